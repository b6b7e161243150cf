"""What a run of many iterations holds of memory, files and threads: the real trainer around a network of one layer."""

import dataclasses
import os
import tempfile
import threading

import torch
from torch import Tensor, nn

import u2mamba_train
from u2mamba.runtime.environment import memory_in_use


class One(nn.Module):
    """Seven outputs from one convolution and batch norm; shapes as U2NET."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7)

    def forward(self, x: Tensor, logits: bool = False) -> tuple[Tensor, ...]:
        d = self.norm(self.conv(x))
        return (d if logits else d.sigmoid()).split(1, 1)


def look() -> dict[str, float]:
    """What the process holds now."""
    return {
        "RSS, MiB": 1024 * memory_in_use(torch.device("cpu")),
        "files": float(len(os.listdir("/proc/self/fd"))) if os.path.isdir("/proc/self/fd") else 0.0,
        "threads": float(threading.active_count()),
    }


def measure(iterations: int, **settings) -> list[dict[str, float]]:
    """Trains; what the process held at each tenth of the run."""
    looks, planned = [], u2mamba_train.batches

    def watched(*arguments, **more):
        for batch in planned(*arguments, **more):
            yield batch
            watched.iteration += 1
            if watched.iteration % (iterations // 10) == 0:
                looks.append(look())

    watched.iteration = 0
    u2mamba_train.batches = watched
    u2mamba_train.ARCHS["u2netp"] = One
    demo = u2mamba_train.PRESETS["demo"]
    with tempfile.TemporaryDirectory() as saved:
        cfg = dataclasses.replace(
            demo, saved_models=saved, arch="u2netp", rescale=40, crop=32, batch_size_train=2, precision="fp32",
            channels_last=False, save_frq=iterations // 50, keep_checkpoints=3, log_frq=iterations // 100,
            save_minutes=0.25, device="cpu",
        )  # fmt: skip
        u2mamba_train.run(dataclasses.replace(cfg, **settings), u2mamba_train.DistContext())
    return looks[:10]
