"""Time and memory of the selective scan, forward and backward.

    python -m benchmarks.scan                on a GPU: the kernels and mamba_ssm, from a CUDA graph
    python -m benchmarks.scan --device cpu   memory of "torch" (Linux), and its time against the reference loop

All inputs have gradients; gate, skip, bias and softplus are on. Times are medians after a warm-up.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from benchmarks.hardware import cli, print_hardware, time_in_turn
from model.selective_scan import REGISTERED, selective_scan
from u2mamba.fast.install import register_scans
from u2mamba.runtime.environment import choose_device, memory_in_use, peak_memory

D_STATE = 16
CPU_SHAPE = (1, 128)  # batch, channels
GPU_BATCH, GPU_SHAPES = 12, ((512, 81), (512, 324), (64, 1296), (64, 5184), (64, 20736), (64, 82944))  # (d, L)


@dataclass
class Config:
    runs: int = 7  # timed runs on a CPU, after the warm-up
    memory_length: int = 82944  # tokens, on a CPU: whose memory is measured
    ratio_length: int = 5184  # tokens, on a CPU: where "torch" is compared with the reference loop
    device: str = "auto"


def forward_and_backward(
    batch: int, channels: int, length: int, backend: str, device: str, dtype: torch.dtype = torch.float32
) -> Callable[[], object]:
    """A call that runs both passes on inputs like a fresh Mamba block's: (B, d, L) and, for B and C, (B, n, L)."""
    wide, narrow = (batch, channels, length), (batch, D_STATE, length)
    shapes = (wide, wide, narrow, narrow, wide, wide)
    u, delta, B, C, z, dy = (torch.randn(s, device=device, dtype=dtype) for s in shapes)
    A = -torch.arange(1.0, D_STATE + 1, device=device).repeat(channels, 1)
    D, delta_bias = torch.ones(channels, device=device), torch.full((channels,), -4.6, device=device)  # softplus: 0.01
    inputs: list[Tensor] = [v.requires_grad_() for v in (u, delta * 0.1, A, B, C, D, z, delta_bias)]
    return lambda: torch.autograd.grad(selective_scan(*inputs, delta_softplus=True, backend=backend), inputs, dy)


def on_cpu(cfg: Config, device: torch.device) -> None:
    print(f"B={CPU_SHAPE[0]}, d={CPU_SHAPE[1]}, n={D_STATE}, fp32, forward + backward, {cfg.runs} runs")
    forward_and_backward(*CPU_SHAPE, 64, "torch", "cpu")()  # loads the libraries
    call = forward_and_backward(*CPU_SHAPE, cfg.memory_length, "torch", "cpu")
    before = 1024 * memory_in_use(device)
    call()
    print(f"L={cfg.memory_length}, torch: {peak_memory() / 2**20 - before:.0f} MiB above the inputs")
    calls = {name: forward_and_backward(*CPU_SHAPE, cfg.ratio_length, name, "cpu") for name in ("reference", "torch")}
    times = time_in_turn(calls, device, cfg.runs)
    for name, (middle, spread) in times.items():
        print(f"L={cfg.ratio_length}, {name}: {1e3 * middle:.1f} ms ± {1e3 * spread:.1f}")
    print(f"ratio: {times['reference'][0] / times['torch'][0]:.1f}")


def on_gpu() -> None:
    from triton.testing import do_bench_cudagraph  # Linux only

    register_scans()
    print(f"B={GPU_BATCH}, n={D_STATE}, forward + backward, median")
    print(f"{'d':>5} {'L':>6} {'dtype':>9} {'backend':>10} {'ms':>10}")
    for (channels, length), dtype, name in product(GPU_SHAPES, (torch.bfloat16, torch.float32), REGISTERED):
        call = forward_and_backward(GPU_BATCH, channels, length, name, "cuda", dtype)
        try:
            cell = f"{do_bench_cudagraph(call, return_mode='median'):.3f}"
        except (RuntimeError, ValueError) as error:  # out of memory, or a backend that does not work here
            cell = type(error).__name__
        print(f"{channels:>5} {length:>6} {str(dtype)[6:]:>9} {name:>10} {cell:>10}", flush=True)


def main(cfg: Config) -> None:
    device, _ = choose_device(cfg.device)
    print_hardware(device)
    torch.manual_seed(0)
    if device.type == "cuda":
        on_gpu()
    else:
        on_cpu(cfg, device)


if __name__ == "__main__":
    cli(main, Config, __doc__)
