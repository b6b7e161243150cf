"""How fast is the selective scan, and how much memory does it take: every backend that works here, in one run.

    python -m benchmarks.scan [--no-gpu] [--runs N]

On a CPU: forward + backward of "torch" against the reference loop, then "torch" at four lengths, each in a process of
its own, with the peak of its memory above the inputs. On a CUDA device: every backend at the lengths of the network.
All runs have gate, skip, bias and softplus, and gradients for all inputs. Times are medians after a warm-up.
"""

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tyro
from torch import Tensor

from benchmarks.hardware import lines
from model.selective_scan import choose_backend, selective_scan

D_STATE = 16
CPU_BATCH, CPU_CHANNELS, CPU_LENGTHS = 1, 128, (1296, 5184, 20736, 82944)
CPU_RATIO_LENGTH = 5184
GPU_BATCH = 12
GPU_SHAPES = ((512, 81), (512, 324), (64, 1296), (64, 5184), (64, 20736), (64, 82944))  # (channels, tokens)
TORCH_GPU_TOKENS = 5184  # beyond, "torch" is thousands of launches: nobody's choice, and minutes here


@dataclass
class Options:
    """What to measure."""

    runs: int = 7  # timed runs, after the warm-up
    gpu: bool = True  # measure on the CUDA device where there is one; --no-gpu: the CPU
    threads: int = 0  # CPU threads; 0: PyTorch's choice


def make_inputs(batch: int, channels: int, length: int, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor]:
    """u, delta, A, B, C, D, z, delta_bias like a fresh Mamba block's, with gradients; and a gradient of the output."""
    wide, narrow = (batch, channels, length), (batch, D_STATE, length)
    u, delta, B, C, z, dy = (
        torch.randn(s, device=device, dtype=dtype) for s in (wide, wide, narrow, narrow, wide, wide)
    )
    A = -torch.arange(1.0, D_STATE + 1, device=device).repeat(channels, 1)
    D, delta_bias = torch.ones(channels, device=device), torch.full((channels,), -4.6, device=device)  # softplus: 0.01
    return [v.requires_grad_() for v in (u, delta * 0.1, A, B, C, D, z, delta_bias)], dy


def passes(inputs: list[Tensor], dy: Tensor, backend: str) -> dict[str, Callable[[], None]]:
    """The two things to time."""

    def forward() -> None:
        with torch.no_grad():
            selective_scan(*inputs, delta_softplus=True, backend=backend)

    def both() -> None:
        torch.autograd.grad(selective_scan(*inputs, delta_softplus=True, backend=backend), inputs, dy)

    return {"forward": forward, "forward + backward": both}


def cpu_seconds(run: Callable[[], None], runs: int) -> list[float]:
    """Wall-clock seconds of each of `runs` runs, after one more."""
    run()
    found = []
    for _ in range(runs):
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return found


def memory(key: str) -> int | None:
    """Bytes of this process from /proc (VmRSS now, VmHWM at most so far); None where the system has no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), None)


def one_length(length: int, runs: int, threads: int) -> tuple[list[float], int | None]:
    """Seconds, and peak bytes above the inputs, of "torch" at one length; for a process that has done nothing else."""
    torch.set_num_threads(threads)
    inputs, dy = make_inputs(CPU_BATCH, CPU_CHANNELS, 64, torch.float32, "cpu")
    passes(inputs, dy, "torch")["forward + backward"]()  # libraries loaded
    inputs, dy = make_inputs(CPU_BATCH, CPU_CHANNELS, length, torch.float32, "cpu")
    run = passes(inputs, dy, "torch")["forward + backward"]
    before = memory("VmRSS")
    run()
    peak = None if before is None else memory("VmHWM") - before
    return cpu_seconds(run, runs), peak


def on_cpu(runs: int) -> None:
    """Print the ratio to the loop and the table of lengths."""
    shape = f"B={CPU_BATCH}, d={CPU_CHANNELS}, n={D_STATE}, fp32, forward + backward"
    print(f"\n{shape}, L={CPU_RATIO_LENGTH}, median (least - most) of {runs} runs, reference and torch in turn")
    inputs, dy = make_inputs(CPU_BATCH, CPU_CHANNELS, CPU_RATIO_LENGTH, torch.float32, "cpu")
    backends = ("reference", "torch")
    runners = {name: passes(inputs, dy, name)["forward + backward"] for name in backends}
    times = {name: [] for name in backends}
    for _ in range(runs):
        for name in backends:
            times[name] += cpu_seconds(runners[name], 1)
    for name, t in times.items():
        print(f"{name:>10} {1e3 * statistics.median(t):9.1f} ms ({1e3 * min(t):.1f} - {1e3 * max(t):.1f})")
    print(f"     ratio {statistics.median(times['reference']) / statistics.median(times['torch']):9.1f}")

    print(f"\ntorch, {shape}, each length in a process of its own, median (least - most) of {runs} runs")
    print(f"{'L':>8} {'ms':>9} {'spread':>18} {'µs/token':>9} {'MiB above inputs':>17}")
    for length in CPU_LENGTHS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            t, peak = pool.apply(one_length, (length, runs, torch.get_num_threads()))
        ms, spread = 1e3 * statistics.median(t), f"({1e3 * min(t):.1f} - {1e3 * max(t):.1f})"
        mib = "not measured" if peak is None else f"{peak / 2**20:.0f}"
        print(f"{length:>8} {ms:>9.1f} {spread:>18} {1e3 * ms / length:>9.2f} {mib:>17}", flush=True)


def gpu_ms(run: Callable[[], None], runs: int) -> float:
    """Median milliseconds between CUDA events; a run is repeated so that what is timed takes at least 2 ms or so."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed(repeats: int) -> float:
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / repeats

    for _ in range(3):
        run()
    repeats = max(1, min(50, int(2 / timed(2))))
    return statistics.median(timed(repeats) for _ in range(runs))


def replay(run: Callable[[], None]) -> Callable[[], None]:
    """The same run, captured in a CUDA graph; what it computes stays in the graph's memory."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def on_gpu(runs: int) -> None:
    """Print the table of shapes, dtypes and backends."""
    backends = []
    for name in ("mamba_ssm", "torch", "triton"):
        try:
            choose_backend("cuda", name)
            backends.append(name)
        except ValueError as error:
            print(f"without {name}: {error}")
    base = "mamba_ssm" if "mamba_ssm" in backends else "torch"
    print(
        f"\nB={GPU_BATCH}, n={D_STATE}, ms, median of {runs}; graph: a CUDA graph replayed; x: times as fast as {base}"
    )
    columns = ("forward", "forward + backward", "graph: forward", "graph: forward + backward")
    print(f"{'d':>5} {'L':>6} {'dtype':>9} {'backend':>10} " + " ".join(f"{c:>25} {'x':>6}" for c in columns))
    for channels, length in GPU_SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            inputs, dy = make_inputs(GPU_BATCH, channels, length, dtype, "cuda")
            basis: list[float | None] = []
            for name in backends:
                if name == "torch" and length > TORCH_GPU_TOKENS:
                    continue
                row: list[float | None] = []
                for make in (lambda run: run, replay):
                    for run in passes(inputs, dy, name).values():
                        try:
                            row.append(gpu_ms(make(run), runs))
                        except RuntimeError as error:  # out of memory, or a backend that cannot be captured
                            print(f"{name} at L={length}: {' '.join(str(error).split())[:100]}")
                            row.append(None)
                basis = basis or (row if name == base else [])
                ratios = [b / t if b and t else None for b, t in zip(basis or [None] * 4, row, strict=True)]
                cells = (f"{t or 0:>25.3f} {x or 0:>6.2f}" for t, x in zip(row, ratios, strict=True))
                dtype_name = str(dtype).removeprefix("torch.")
                print(f"{channels:>5} {length:>6} {dtype_name:>9} {name:>10} " + " ".join(cells), flush=True)


def main(options: Options) -> None:
    """Print hardware and versions, then measure."""
    if options.threads:
        torch.set_num_threads(options.threads)
    gpu = options.gpu and torch.cuda.is_available()
    print("\n".join(lines(torch.device("cuda" if gpu else "cpu"))))
    torch.manual_seed(0)
    if gpu:
        print(f"auto: {': '.join(choose_backend('cuda'))}")
        on_gpu(options.runs)
    else:
        on_cpu(options.runs)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
