"""How long does one image take: the published way, and a prepared network (u2mamba/inference/predictor.py), in one run?

    python -m benchmarks.inference                       U2MAMBA, one 320x320 image, on the device at hand
    python -m benchmarks.inference --arch u2net --batches 1 8

The published way: the network as it trained, eval mode, fp32, NCHW, eager, F.interpolate. All ways take a batch of
uint8 images that lies on the device and end with probabilities there; they are timed in turn, run by run, so that a
busy machine slows all of them alike. A GPU by CUDA events, a CPU by the wall clock.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor

from benchmarks.hardware import lines, median_and_spread
from data_loader import normalise
from model import ARCHS
from u2mamba.inference.predictor import Predictor
from u2mamba.runtime.environment import choose_device, choose_precision, choose_scan


@dataclass
class Options:
    arch: str = "u2mamba"
    mamba_at: str = "bottleneck"
    batches: tuple[int, ...] = (1,)
    size: int = 320  # pixels
    runs: int = 30  # calls of each way that are timed
    warm_up: int = 5  # calls before: cuDNN chooses its convolutions, Triton compiles, graphs are captured
    device: str = "auto"


def seconds(call: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """From one call's start until its result is there, on a device that had nothing else to do."""
    if images.is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call(images)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begun = time.perf_counter()
    call(images).cpu()
    return time.perf_counter() - begun


def ways(options: Options, device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    """What is compared: name -> uint8 images (B, H, W, 3) to d0; the published way first."""
    torch.manual_seed(0)
    mamba = {"mamba_at": options.mamba_at, "backend": choose_scan(device, "auto")[0]}
    net = ARCHS[options.arch](**mamba if "mamba" in options.arch else {}).to(device).eval()

    @torch.inference_mode()
    def published(images: Tensor) -> Tensor:
        return net(normalise(images))[0]

    found = {"eager, fp32, NCHW": published, "Predictor, fp32": Predictor(net, device, "fp32")}
    precision, why = choose_precision("bf16", device)
    if precision == "bf16":
        found["Predictor, bf16"] = Predictor(net, device, "bf16")
    else:
        print(f"without bf16: {why}")
    return found


def main(options: Options) -> None:
    device, _ = choose_device(options.device)
    torch.backends.cudnn.benchmark = True
    print("\n".join(lines(device)))
    print(f"selective scan: {choose_scan(device, 'auto')[1]}")
    where = f", Mamba at {options.mamba_at}" if "mamba" in options.arch else ""
    print(f"{options.arch}{where}, {options.size}x{options.size}, {options.runs} runs, ways in turn")
    compared = ways(options, device)
    for batch in options.batches:
        shape = (batch, options.size, options.size, 3)
        images = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(batch)).to(device)
        expected = compared["eager, fp32, NCHW"](images)
        for call in compared.values():
            for _ in range(options.warm_up):
                call(images)
        times = {name: [] for name in compared}
        for _ in range(options.runs):
            for name, call in compared.items():
                times[name].append(seconds(call, images))
        base = None
        for name, call in compared.items():
            median, spread = median_and_spread(times[name])
            base = base or median
            difference = (call(images) - expected).abs().max().item()
            print(
                f"batch {batch:3}: {1e3 * median:8.2f} ms +- {1e3 * spread:.2f}, {batch / median:7.1f} img/s, "
                f"{base / median:5.2f} times, largest difference {difference:.1e}  {name}",
                flush=True,
            )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__, use_underscores=True))
