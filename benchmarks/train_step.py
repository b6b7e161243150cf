"""Throughput and memory of the full training step: forward, seven-output loss, backward, Adam.

    python -m benchmarks.train_step                      baseline, compiled and fast, in one run
    torchrun --nproc_per_node=4 -m benchmarks.train_step --variants fast       images/s of four GPUs together

Baseline: fp32, NCHW, eager, the scan of mamba_ssm where it is installed. Compiled: plain PyTorch in bf16, channels_last
with torch.compile and a CUDA graph. Fast: bf16, channels_last, kernels and a CUDA graph.
"""

import contextlib
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor

from benchmarks.hardware import lines, median_and_spread, time_calls
from model import ARCHS, Mamba
from model.selective_scan import choose_backend
from u2mamba import fast
from u2mamba.engine.distributed import DistContext, init_distributed
from u2mamba.engine.parameters import param_groups_weight_decay
from u2mamba.engine.step import TrainStep
from u2mamba.runtime.environment import Environment, choose_device, choose_precision
from u2mamba_train import Config as TrainConfig
from u2mamba_train import total_loss


@dataclass
class Config:
    arch: str = "u2mamba"
    mamba_at: str = "bottleneck"
    batches: tuple[int, ...] = (12, 32)  # per process
    variants: tuple[str, ...] = ("baseline", "compiled", "fast")
    size: int = 288  # pixels
    runs: int = 5
    steps: int = 20  # per run
    device: str = "auto"


def make_step(
    variant: str, cfg: Config, device: torch.device, dist: DistContext
) -> tuple[TrainStep, torch.memory_format]:
    """The step of a variant, and the memory format of its images."""
    torch.manual_seed(0)
    baseline = variant == "baseline"
    torch.set_float32_matmul_precision("highest" if baseline else "high")
    precision = "fp32" if baseline else choose_precision("bf16", device)[0]
    channels_last = not baseline and (device.type == "cuda" or precision == "bf16")
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    net = ARCHS[cfg.arch](**{"mamba_at": cfg.mamba_at} if cfg.arch.startswith("u2mamba") else {})
    net.to(device, memory_format=memory_format).train()
    dist.broadcast_weights(net)
    if variant == "fast" or (baseline and device.type == "cuda"):
        fast.install(net)  # of the baseline, only the scan: its layers are not channels_last
    if baseline and device.type == "cuda":
        with contextlib.suppress(ValueError):
            choose_backend(device, "mamba_ssm")
            for layer in (m for m in net.modules() if isinstance(m, Mamba)):
                layer.backend = "mamba_ssm"
    if variant == "compiled":
        net.compile()
    optimizer = torch.optim.Adam(param_groups_weight_decay(net), lr=1e-4, fused=True)

    def loss(logits: tuple[Tensor, ...], masks: Tensor) -> Tensor:
        return total_loss(logits, masks, TrainConfig())

    make = TrainStep if baseline else fast.TrainStep
    return make(net, optimizer, loss, Environment(device, precision, channels_last), dist), memory_format


def main(cfg: Config, dist: DistContext) -> None:
    device, _ = choose_device(cfg.device, dist.local_rank)
    torch.backends.cudnn.benchmark = True
    print("\n".join(lines(device)))
    print(f"{cfg.arch}, Mamba at {cfg.mamba_at}, {cfg.size}x{cfg.size}, {cfg.runs} runs of {cfg.steps} steps")
    for batch in cfg.batches:
        base, shape = 0.0, (batch, 1, cfg.size, cfg.size)
        for variant in cfg.variants:
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            step, memory_format = make_step(variant, cfg, device, dist)
            images = torch.randn(shape, device=device).repeat(1, 3, 1, 1).to(memory_format=memory_format)
            masks = (torch.rand(shape, device=device) > 0.7).float()
            seconds = time_calls(lambda s=step, x=images, y=masks: s(x, y), device, cfg.runs, cfg.steps, warm_up=6)
            middle, spread = median_and_spread(seconds)
            base = base or middle
            memory = f", {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB" if device.type == "cuda" else ""
            print(
                f"{dist.size} × batch {batch:3}, {variant:8}: {dist.size * batch / middle:7.1f} images/s, "
                f"{1e3 * middle:7.2f} ms ± {1e3 * spread:.2f}, {base / middle:.2f}×{memory}",
                flush=True,
            )


if __name__ == "__main__":
    with init_distributed() as context:
        main(tyro.cli(Config, description=__doc__, use_underscores=True), context)
