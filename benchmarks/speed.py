"""The figures of speed by one command: the training step, the data's share of it, the scan, one image, the start.

    python -m benchmarks.speed --repeat 2                  the table, twice
    python -m benchmarks.speed --data_dir train_data       the start with DUTS-TR instead of the demo's pairs

On a CPU the step's batch is 2, and the rows that need a GPU are left out. Each row stands for a target: images/s and
memory of a step beside the published way in the same run (benchmarks/train_step.py), what augmenting a batch as `fast`
does adds to it, scans (benchmarks/scan.py), latency (benchmarks/inference.py), and the seconds from the start of the
process to the first printed step with no kernel compiled (but whatever of PyTorch the disk has in memory).
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import tyro

from benchmarks import data, inference, scan, train_step
from benchmarks.hardware import lines
from model.selective_scan import choose_backend
from u2mamba.dataset.demo import make_demo
from u2mamba.runtime.environment import choose_device
from u2mamba_train import FAST

ROOT = Path(__file__).parents[1]
STEPS = (("bottleneck", 12), ("bottleneck", 32), ("encoder", 12))  # where the Mamba layers are, batch
SCANS = ((512, 81, torch.float32), (64, 1296, torch.float32), (64, 82944, torch.bfloat16))  # channels, tokens, dtype
PICTURES = 2000  # of random bytes, from which batches are made


@dataclass
class Options:
    arch: str = "u2mamba"
    size: int = 288  # pixels
    runs: int = 3
    steps: int = 10  # a run
    repeat: int = 1  # times the whole table
    data_dir: str = ""  # of the start; default: the demo's pairs
    device: str = "auto"


def step_rows(options: Options, device: torch.device) -> Iterator[str]:
    """The published way and ours, and on a GPU the data's share of ours at the first batch size."""
    for place, batch in STEPS if device.type == "cuda" else (("bottleneck", 2),):
        of_step = train_step.Options(
            arch=options.arch, mamba_at=place, size=options.size, runs=options.runs, steps=options.steps
        )
        base, found = None, []
        for published in (True, False):
            words, seconds, spread, memory = train_step.measure(of_step, device, batch, published)
            base = base or seconds
            scan_word = words.rsplit("scan ", 1)[-1]
            found.append(
                f"{batch / seconds:.1f} img/s ({1e3 * seconds:.2f} ms +- {1e3 * spread:.2f}, "
                + (f"{memory:.1f} GiB, " if device.type == "cuda" else "")
                + f"scan {scan_word})"
            )
            if device.type == "cuda":
                torch.cuda.empty_cache()
        yield f"step, {place}, batch {batch}: published way {found[0]}; ours {found[1]}"
        yield f"    {base / seconds:.1f} times the published way"
        if device.type == "cuda" and place == "bottleneck":
            ms = augment_ms(batch, device)
            yield f"    augmenting its pictures as fast does: {ms:.3f} ms, {ms / 10 / seconds:.1f} % of the step"


def augment_ms(batch: int, device: torch.device) -> float:
    """Milliseconds on the GPU for a batch from a cache there, changed as the preset fast does."""
    shape = (PICTURES, FAST.rescale, FAST.rescale)
    images = torch.randint(256, (*shape, 3), dtype=torch.uint8, device=device)
    masks = torch.randint(2, shape, dtype=torch.uint8, device=device) * 255
    return scan.gpu_ms(scan.replay(data.augmenting(images, masks, batch, changed=True)), runs=5)


def scan_rows(options: Options) -> Iterator[str]:
    """Forward + backward by graph replays: ours and, where it is installed, mamba_ssm's."""
    for channels, length, dtype in SCANS:
        inputs, dy = scan.make_inputs(scan.GPU_BATCH, channels, length, dtype, "cuda")
        found = []
        for backend in ("triton", "mamba_ssm"):
            try:
                choose_backend("cuda", backend)
            except ValueError:
                continue
            ms = scan.gpu_ms(scan.replay(scan.passes(inputs, dy, backend)["forward + backward"]), options.runs)
            found.append(f"{backend} {ms:.3f} ms")
        kind = str(dtype).removeprefix("torch.")
        yield f"scan, B={scan.GPU_BATCH}, d={channels}, L={length}, {kind}: {', '.join(found)}"


def image_rows(options: Options, device: torch.device) -> Iterator[str]:
    """Latency of one 320x320 image, each way a multiple of the published one."""
    images = torch.randint(256, (1, 320, 320, 3), dtype=torch.uint8).to(device)
    found = {}
    for name, call in inference.ways(inference.Options(arch=options.arch), device).items():
        for _ in range(4):
            call(images)
        found[name] = median(inference.seconds(call, images) for _ in range(3 * options.runs))
    base = next(iter(found.values()))
    yield "one 320x320 image: " + "; ".join(f"{k} {1e3 * v:.2f} ms, {base / v:.1f} times" for k, v in found.items())


def start_row(options: Options) -> str:
    """Runs the trainer until its first line of a step."""
    folder = options.data_dir or str(make_demo(ROOT / "train_data" / "demo"))
    with tempfile.TemporaryDirectory() as made:
        words = f"u2mamba_train.py fast --batch_size_train 12 --log_frq 1 --data_dir {folder} --saved_models {made}"
        words += f" --arch {options.arch} --resume never"
        started, took = time.monotonic(), float("nan")
        with subprocess.Popen(
            [sys.executable, *words.split()], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {"TRITON_CACHE_DIR": f"{made}/triton", "PYTHONUNBUFFERED": "1"},
        ) as run:  # fmt: skip
            for line in run.stdout:
                if line.startswith("[epoch"):
                    took = time.monotonic() - started
                    break
            run.kill()
    return f"start of fast, batch 12, nothing compiled: {took:.1f} s to the first step"


def main(options: Options) -> None:
    device, _ = choose_device(options.device)
    torch.backends.cudnn.benchmark = True
    print("\n".join(lines(device)))
    for number in range(options.repeat):
        print(f"\n{number + 1} of {options.repeat}: {options.arch}, {options.size}x{options.size}", flush=True)
        for row in step_rows(options, device):
            print(row, flush=True)
        for row in scan_rows(options) if device.type == "cuda" else ():
            print(row, flush=True)
        for row in image_rows(options, device):
            print(row, flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            print(start_row(options), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__, use_underscores=True))
