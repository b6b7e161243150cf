"""Time and memory of the selective scan, forward and backward, for every backend that works on this machine.

    python -m benchmarks.scan                on a GPU: every backend, launched and from a CUDA graph
    python -m benchmarks.scan --device cpu   "torch" against the reference loop, then "torch" at four lengths

All inputs have gradients; gate, skip, bias and softplus are on. Times are medians after a warm-up.
"""

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor

from benchmarks.hardware import in_cuda_graph, in_turn, lines, median_and_spread, time_calls
from model.selective_scan import choose_backend, selective_scan
from u2mamba.fast.install import register_scans
from u2mamba.runtime.environment import choose_device, memory_in_use, peak_memory

D_STATE = 16
CPU_SHAPE = (1, 128)  # batch, channels
GPU_BATCH, GPU_SHAPES = 12, ((512, 81), (512, 324), (64, 1296), (64, 5184), (64, 20736), (64, 82944))  # (d, L)
TORCH_MAX_TOKENS = 5184  # on a GPU; beyond it "torch" is thousands of launches


@dataclass
class Config:
    runs: int = 7  # timed runs, after the warm-up
    lengths: tuple[int, ...] = (1296, 5184, 20736, 82944)  # tokens, on a CPU
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


def one_length(length: int, runs: int, threads: int) -> tuple[list[float], float]:
    """Seconds, and peak GiB above the inputs, of "torch" at one length; for a process that has done nothing else."""
    torch.set_num_threads(threads)
    cpu = torch.device("cpu")
    forward_and_backward(*CPU_SHAPE, 64, "torch", "cpu")()  # loads the libraries
    call = forward_and_backward(*CPU_SHAPE, length, "torch", "cpu")
    before = memory_in_use(cpu)
    call()
    return time_calls(call, cpu, runs), peak_memory(cpu) - before


def on_cpu(cfg: Config) -> None:
    cpu = torch.device("cpu")
    print(f"B={CPU_SHAPE[0]}, d={CPU_SHAPE[1]}, n={D_STATE}, fp32, forward + backward, {cfg.runs} runs")
    # first: the peak that the system reports of a process is at least what its parent held
    print(f"{'L':>8} {'ms':>9} {'±':>7} {'µs/token':>9} {'MiB above inputs':>17}")
    for length in cfg.lengths:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds, peak = pool.apply(one_length, (length, cfg.runs, torch.get_num_threads()))
        middle, spread = median_and_spread(seconds)
        figures = f"{1e3 * middle:>9.1f} {1e3 * spread:>7.1f} {1e6 * middle / length:>9.2f} {1024 * peak:>17.0f}"
        print(f"{length:>8} {figures}", flush=True)
    calls = {name: forward_and_backward(*CPU_SHAPE, cfg.ratio_length, name, "cpu") for name in ("reference", "torch")}
    times = {name: median_and_spread(s) for name, s in in_turn(calls, cpu, cfg.runs).items()}
    for name, (middle, spread) in times.items():
        print(f"L={cfg.ratio_length}, {name}: {1e3 * middle:.1f} ms ± {1e3 * spread:.1f}")
    print(f"ratio: {times['reference'][0] / times['torch'][0]:.1f}")


def on_gpu(cfg: Config, device: torch.device) -> None:
    register_scans()
    backends = []
    for name in ("mamba_ssm", "torch", "triton"):
        try:
            backends.append(choose_backend("cuda", name)[0])
        except ValueError as error:
            print(f"without {name}: {error}")
    print(f"B={GPU_BATCH}, n={D_STATE}, forward + backward, median of {cfg.runs} runs")
    print(f"{'d':>5} {'L':>6} {'dtype':>9} {'backend':>10} {'launched, ms':>13} {'graph, ms':>10}")
    for channels, length in GPU_SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            for name in backends:
                if name == "torch" and length > TORCH_MAX_TOKENS:
                    continue
                call = forward_and_backward(GPU_BATCH, channels, length, name, "cuda", dtype)
                cells = ""
                for make, width in ((lambda c: c, 13), (in_cuda_graph, 10)):
                    try:
                        ms = 1e3 * median_and_spread(time_calls(make(call), device, cfg.runs, calls=20, warm_up=3))[0]
                        cells += f" {ms:>{width}.3f}"
                    except RuntimeError as error:  # out of memory, or a backend that cannot be captured
                        cells += f" {type(error).__name__:>{width}}"
                print(f"{channels:>5} {length:>6} {str(dtype)[6:]:>9} {name:>10}{cells}", flush=True)


def main(cfg: Config) -> None:
    device, _ = choose_device(cfg.device)
    print("\n".join(lines(device)))
    torch.manual_seed(0)
    if device.type == "cuda":
        on_gpu(cfg, device)
    else:
        on_cpu(cfg)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, use_underscores=True))
