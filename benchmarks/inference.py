"""Latency of the network on a batch of images: the trained network as it is, and prepared by Predictor; a cold start.

    python -m benchmarks.inference                       U2MAMBA, one 320x320 image, on the device at hand
    python -m benchmarks.inference --arch u2net --batches 1 8

Baseline: eval mode, fp32, NCHW, eager. All variants take uint8 images that lie on the device and leave probabilities
there.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from benchmarks.hardware import cli, print_hardware, time_in_turn
from model import ARCHS
from u2mamba.dataset.augment import normalize
from u2mamba.inference.predictor import Predictor
from u2mamba.runtime.environment import choose_device, choose_precision

BASELINE = "eager, fp32, NCHW"


@dataclass
class Config:
    arch: str = "u2mamba"
    batches: tuple[int, ...] = (1,)
    size: int = 320  # pixels
    runs: int = 30
    warm_up: int = 5  # calls: cuDNN chooses its convolutions, Triton compiles, graphs are captured
    cold_runs: int = 3  # of a cut-out of one photo from the shell
    device: str = "auto"


def cold_start(runs: int) -> str:
    """Seconds of a cut-out of one photo from the shell, beside those of importing PyTorch."""
    with tempfile.TemporaryDirectory() as folder:
        Image.radial_gradient("L").resize((640, 480)).convert("RGB").save(Path(folder, "photo.jpg"))
        commands = {
            "import": ["-c", "import torch, PIL.Image"],
            "cut-out": [f"{Path(__file__).parents[1]}/u2mamba_predict.py", "photo.jpg", "--mode=cutout", "--overwrite"],
        }
        run = partial(subprocess.run, cwd=folder, check=True, capture_output=True)
        calls = {name: partial(run, [sys.executable, *words]) for name, words in commands.items()}
        (base, _), (middle, _) = time_in_turn(calls, torch.device("cpu"), runs).values()
    return f"cold start: {middle:.2f} s, {middle / base:.2f} × import torch, PIL.Image ({base:.2f} s)"


def make_variants(cfg: Config, device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    """Name -> a function from uint8 images (B, H, W, 3) to d0 (B, 1, H, W)."""
    torch.manual_seed(0)
    net = ARCHS[cfg.arch]().to(device).eval()

    @torch.inference_mode()
    def eager(images: Tensor) -> Tensor:
        return net(normalize(images))[0]

    precision, line = choose_precision("bf16", device)  # the line says why where it is not bf16
    return {
        BASELINE: eager,
        "Predictor, fp32": Predictor(net, device),
        f"Predictor, {line}": Predictor(net, device, precision),
    }


def main(cfg: Config) -> None:
    device, _ = choose_device(cfg.device)
    torch.backends.cudnn.benchmark = True
    print_hardware(device)
    print(f"{cfg.arch}, {cfg.size}x{cfg.size}, {cfg.runs} runs, variants in turn")
    if cfg.cold_runs:
        print(cold_start(cfg.cold_runs), flush=True)
    variants = make_variants(cfg, device)
    for batch in cfg.batches:
        images = torch.randint(256, (batch, cfg.size, cfg.size, 3), dtype=torch.uint8).to(device)
        calls = {name: partial(call, images) for name, call in variants.items()}
        times = time_in_turn(calls, device, cfg.runs, warm_up=cfg.warm_up)
        base, _ = times[BASELINE]
        for name, (middle, spread) in times.items():
            print(
                f"batch {batch:3}: {1e3 * middle:8.2f} ms ± {1e3 * spread:.2f}, {batch / middle:7.1f} images/s, "
                f"{base / middle:5.2f}×  {name}",
                flush=True,
            )


if __name__ == "__main__":
    cli(main, Config, __doc__)
