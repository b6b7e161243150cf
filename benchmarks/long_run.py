"""Does a long run grow? The real trainer with its checkpoints, validation, log and pictures, on a tiny network.

    python -m benchmarks.long_run                                10,000 iterations on the CPU: minutes
    python -m benchmarks.long_run --device cuda --network few

Prints what the process holds at each tenth of the run; exits with 1 where the end is above the second tenth by more
than MOST_GROWTH.
"""

import dataclasses
import os
import sys
import tempfile
import threading
from typing import ClassVar, Literal

import torch
import tyro
from torch import Tensor, nn

import u2mamba_train
from benchmarks.hardware import lines
from model import U2NET
from model.u2net import RSU_TABLE_SMALL
from u2mamba.runtime.environment import choose_device, memory_in_use

# RSS: what the allocator keeps for later and log.csv in the page cache move it by some MiB either way
MOST_GROWTH = {"RSS, MiB": 24.0, "GPU, MiB": 8.0, "files": 2.0, "threads": 2.0}


@dataclasses.dataclass
class Options:
    iterations: int = 10_000
    device: str = "cpu"
    network: Literal["one", "few"] = "one"  # one: a convolution; few: all layers of U²-Net, of few channels


class One(nn.Module):
    """Seven outputs from one convolution and batch norm; shapes as U2NET."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7)

    def forward(self, x: Tensor, logits: bool = False) -> tuple[Tensor, ...]:
        d = self.norm(self.conv(x))
        return (d if logits else d.sigmoid()).split(1, 1)


class Few(U2NET):
    """All layers of U²-Net with 2 channels inside its blocks and 4 between them."""

    table: ClassVar = {
        name: (height, dilated, {3: 3, 64: 4, 128: 8}[in_ch], 2, 4)
        for name, (height, dilated, in_ch, *_) in RSU_TABLE_SMALL.items()
    }


def look(device: torch.device) -> dict[str, float]:
    """What the process holds now."""
    return {
        "RSS, MiB": 1024 * memory_in_use(torch.device("cpu")),
        "GPU, MiB": 1024 * memory_in_use(device) if device.type == "cuda" else 0.0,
        "files": float(len(os.listdir("/proc/self/fd"))) if os.path.isdir("/proc/self/fd") else 0.0,
        "threads": float(threading.active_count()),
    }


def measure(iterations: int, device: str, network: str, **constants) -> list[dict[str, float]]:
    """Trains on the demo set, or what the `constants` say; what the process held at each tenth of the run."""
    looks, where = [], choose_device(device)[0]
    planned = u2mamba_train.batches

    def watched(*arguments, **more):
        for batch in planned(*arguments, **more):
            yield batch
            watched.iteration += 1
            if watched.iteration % (iterations // 10) == 0:
                looks.append(look(where))

    watched.iteration = 0
    u2mamba_train.batches = watched
    u2mamba_train.ARCHS["u2netp"] = {"one": One, "few": Few}[network]
    demo = u2mamba_train.PRESETS["demo"]
    with tempfile.TemporaryDirectory() as saved:
        cfg = dataclasses.replace(
            demo, saved_models=saved, arch="u2netp", rescale=40, crop=32, batch_size_train=2, precision="fp32",
            channels_last=False, epoch_num=-(-iterations // 228), save_frq=iterations // 50, keep_checkpoints=3,
            log_frq=iterations // 100, save_minutes=0.25, device=device,
        )  # fmt: skip
        u2mamba_train.run(dataclasses.replace(cfg, **constants), u2mamba_train.DistContext())
    return looks[:10]


def main(options: Options) -> int:
    looks = measure(options.iterations, options.device, options.network)
    print("\n".join(lines(choose_device(options.device)[0])))
    print("iterations  " + "  ".join(f"{name:>8}" for name in MOST_GROWTH))
    for tenth, held in enumerate(looks, 1):
        print(f"{tenth * (options.iterations // 10):10,}  " + "  ".join(f"{held[name]:8.1f}" for name in MOST_GROWTH))
    growth = {name: looks[-1][name] - looks[1][name] for name in MOST_GROWTH}
    print("growth since the second tenth: " + ", ".join(f"{name} {value:+.1f}" for name, value in growth.items()))
    return int(any(growth[name] > most for name, most in MOST_GROWTH.items()))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__, use_underscores=True)))
