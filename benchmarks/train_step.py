"""Throughput and memory of the full training step: forward, seven-output loss, backward, Adam.

    python -m benchmarks.train_step                      baseline, compiled and fast, in one run
    torchrun --nproc_per_node=4 -m benchmarks.train_step --variants fast       images/s of four GPUs together

Baseline: fp32, NCHW, eager, the scan of mamba_ssm where it is installed. Compiled: plain PyTorch in bf16, channels_last
with torch.compile and a CUDA graph. Fast: bf16, channels_last, kernels and a CUDA graph.
"""

import contextlib
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from benchmarks.hardware import cli, print_hardware, time_in_turn
from model import build_model
from model.mamba import Mamba
from model.selective_scan import choose_backend
from u2mamba.engine.distributed import DistContext, init_distributed
from u2mamba.engine.parameters import param_groups_weight_decay
from u2mamba.engine.step import TrainStep
from u2mamba.runtime.environment import Environment
from u2mamba_train import PRESETS, fast, total_loss


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


def make_step(variant: str, cfg: Config, batch: int, dist: DistContext) -> tuple[TrainStep, Environment]:
    """The step of a variant, and its environment; prints how it runs."""
    baseline = variant == "baseline"
    settings = replace(
        PRESETS["reference"], device=cfg.device, batch_size_train=batch, precision="fp32" if baseline else "bf16"
    )
    env = Environment.choose(settings, dist)
    net = build_model({"arch": cfg.arch, "mamba_at": cfg.mamba_at})
    net.to(env.device, memory_format=env.memory_format).train()
    if fast:  # on a layer without operations it only registers the scans
        print(*fast.install(net if variant == "fast" else nn.Linear(1, 1, device=env.device)), sep="\n")
    with contextlib.suppress(ValueError):  # mamba_ssm is not installed, or there is no GPU
        for layer in (m for m in net.modules() if baseline and isinstance(m, Mamba)):
            layer.backend = choose_backend(env.device, "mamba_ssm")[0]
    if variant == "compiled":
        net.compile()
    optimizer = torch.optim.Adam(param_groups_weight_decay(net), lr=1e-4, fused=True)
    make = TrainStep if baseline or not fast else fast.TrainStep
    return make(net, optimizer, partial(total_loss, cfg=settings), env, dist), env


def main(cfg: Config, dist: DistContext) -> None:
    print(f"{cfg.arch}, Mamba at {cfg.mamba_at}, {cfg.size}x{cfg.size}, {cfg.runs} runs of {cfg.steps} steps")
    for batch in cfg.batches:
        base, shape = 0.0, (batch, 1, cfg.size, cfg.size)
        for variant in cfg.variants:
            torch.cuda.empty_cache()
            step, env = make_step(variant, cfg, batch, dist)
            if env.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(env.device)
            images = torch.randn(shape, device=env.device).repeat(1, 3, 1, 1).to(memory_format=env.memory_format)
            masks = (torch.rand(shape, device=env.device) > 0.7).float()
            calls = {variant: partial(step, images, masks)}
            middle, spread = time_in_turn(calls, env.device, cfg.runs, cfg.steps, warm_up=6)[variant]
            del step, calls  # frees the memory for the next variant
            base = base or middle
            gib = torch.cuda.max_memory_allocated(env.device) / 2**30 if env.device.type == "cuda" else 0.0
            print_hardware(env.device)
            print(
                f"{dist.size} × batch {batch:3}, {variant:8}: {dist.size * batch / middle:7.1f} images/s, "
                f"{1e3 * middle:7.2f} ms ± {1e3 * spread:.2f}, {base / middle:.2f}×, {gib:.1f} GiB",
                flush=True,
            )


if __name__ == "__main__":
    with init_distributed() as context:
        cli(main, Config, __doc__, context)
