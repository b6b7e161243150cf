"""What the convolutions of a training step cost by themselves, and what they would cost at the GPU's ceilings.

    python -m benchmarks.convolutions                        U2NET at 288x288, batch 12 and 32
    python -m benchmarks.convolutions --limits 10 0          cuDNN's search among 10 (PyTorch's default), all

Every 3x3 convolution of the network by itself in bf16, channels_last: forward, gradient of the input, gradient of the
weight, replayed from CUDA graphs. The floor of each is the larger of its operations and of its bytes (each tensor read
or written once) at the ceilings given. The sum is what the step's time is held against.
"""

import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch
import tyro
from torch import nn

from benchmarks.hardware import lines, time_calls
from model import ARCHS
from u2mamba.runtime.environment import choose_device

PASSES = ("forward", "input gradient", "weight gradient")
CALLS = 20  # of a convolution in one graph


class Shape(NamedTuple):
    """What makes one convolution differ from another in time."""

    ins: int
    outs: int
    height: int
    width: int
    dilation: int

    def __str__(self) -> str:
        dilated = f", dilation {self.dilation}" if self.dilation > 1 else ""
        return f"{self.ins:4} -> {self.outs:3}, {self.height}x{self.width}{dilated}"


@dataclass
class Options:
    arch: str = "u2net"
    batches: tuple[int, ...] = (12, 32)
    size: int = 288  # pixels
    limits: tuple[int, ...] = (10,)  # algorithms that cuDNN's search tries for each; 0: all
    runs: int = 3
    tflops: float = 790.0  # ceiling of bf16 matrix products, measured on an H100
    tbytes: float = 3.0  # ceiling of memory, TB/s, measured on an H100
    device: str = "auto"
    longest: int = 12  # shapes to print


def shapes_of(arch: str, size: int) -> Counter[Shape]:
    """How often each shape of a 3x3 convolution occurs in a network, by a pass without numbers."""
    with torch.device("meta"):
        net, found = ARCHS[arch](), Counter()

        def count(conv: nn.Conv2d, inputs: tuple, out: torch.Tensor) -> None:
            if conv.kernel_size == (3, 3):
                found[Shape(conv.in_channels, conv.out_channels, *out.shape[2:], conv.dilation[0])] += 1

        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(count)
        net(torch.empty(1, 3, size, size))
    return found


def floor(shape: Shape, batch: int, options: Options) -> float:
    """Seconds of one of the three passes at the ceilings."""
    pixels = batch * shape.height * shape.width
    operations = 2 * 9 * pixels * shape.ins * shape.outs
    moved = 2 * (pixels * (shape.ins + shape.outs) + 9 * shape.ins * shape.outs)
    return max(operations / (options.tflops * 1e12), moved / (options.tbytes * 1e12))


def measure(shape: Shape, batch: int, device: torch.device, runs: int) -> list[float]:
    """Seconds of the three passes of one convolution."""
    like = {"device": device, "dtype": torch.bfloat16}
    last = {"memory_format": torch.channels_last}
    x = torch.randn(batch, shape.ins, shape.height, shape.width, **like).to(**last)
    dy = torch.randn(batch, shape.outs, shape.height, shape.width, **like).to(**last)
    weight = torch.randn(shape.outs, shape.ins, 3, 3, **like).to(**last)
    around = [shape.dilation] * 2
    geometry = ([1, 1], around, around, False, [0, 0], 1)

    def gradient(which: list[bool]):
        return torch.ops.aten.convolution_backward(dy, x, weight, None, *geometry, which)

    calls = (
        lambda: nn.functional.conv2d(x, weight, None, 1, around, around),
        lambda: gradient([True, False, False]),
        lambda: gradient([False, True, False]),
    )
    seconds = []
    for call in calls if shape.ins > 3 else (calls[0], calls[2]):  # the pictures have no gradient
        call()
        if device.type != "cuda":
            seconds.append(min(time_calls(call, device, runs)))
            continue
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(CALLS):
                call()
        seconds.append(min(time_calls(graph.replay, device, runs)) / CALLS)
    return seconds if shape.ins > 3 else [seconds[0], 0.0, seconds[1]]


def table(options: Options, device: torch.device, batch: int, limit: int) -> None:
    """Prints the longest shapes and the sums; in a thread of its own, since PyTorch keeps cuDNN's choices for each."""
    torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = True, limit
    started = time.perf_counter()
    counts = shapes_of(options.arch, options.size)
    rows = [(shape, n, measure(shape, batch, device, options.runs)) for shape, n in counts.items()]
    rows.sort(key=lambda row: -row[1] * sum(row[2]))
    took = time.perf_counter() - started
    print(f"batch {batch}, {limit or 'all'} algorithms tried, {took:.1f} s with searching; ms in the step", flush=True)
    print(f"{'':34}{'times':>6}{'forward':>10}{'input':>10}{'weight':>10}{'floor, each':>12}")
    for shape, n, seconds in rows[: options.longest]:
        figures = "".join(f"{1e3 * n * s:10.3f}" for s in seconds)
        print(f"{shape!s:34}{n:6}{figures}{1e3 * n * floor(shape, batch, options):12.3f}")
    sums = [1e3 * sum(n * seconds[i] for _, n, seconds in rows) for i in range(len(PASSES))]
    least = 1e3 * sum(n * floor(shape, batch, options) * sum(s > 0 for s in seconds) for shape, n, seconds in rows)
    print(
        f"{'all':34}{counts.total():6}{''.join(f'{s:10.3f}' for s in sums)}   together {sum(sums):.2f} ms, floor "
        f"{least:.2f} ms: {batch / sum(sums) * 1e3:.0f} and {batch / least * 1e3:.0f} img/s\n",
        flush=True,
    )


def main(options: Options) -> None:
    device, _ = choose_device(options.device)
    print("\n".join(lines(device)))
    print(f"{options.arch}, {options.size}x{options.size}, ceilings {options.tflops} TFLOP/s, {options.tbytes} TB/s\n")
    for batch in options.batches:
        for limit in options.limits:
            worker = threading.Thread(target=table, args=(options, device, batch, limit))
            worker.start()
            worker.join()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__, use_underscores=True))
