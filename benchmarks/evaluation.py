"""How long do the metrics of a test set take: PySODMetrics alone in one process, and u2mamba_eval.py in several.

    python -m benchmarks.evaluation [--images N] [--workers N] [--runs N]

Made maps and masks of 400x300, as PNG. Each time is the wall clock from file names to scores; the script's includes the
start of its interpreters. Prints medians, the ratio, and the largest difference between the scores.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import py_sod_metrics as psm
import torch
import tyro
from PIL import Image
from scipy.ndimage import gaussian_filter

from benchmarks.hardware import lines, median_and_spread

SIZE = (300, 400)  # rows, columns
SCRIPT = Path(__file__).parents[1] / "u2mamba_eval.py"


@dataclass
class Options:
    """What to measure."""

    images: int = 5000
    workers: int = 2
    runs: int = 3


def make_set(folder: Path, images: int, size: tuple[int, int] = SIZE, seed: int = 0) -> tuple[Path, Path]:
    """Maps and masks as a network leaves them: ellipses, their borders soft, moved and noisy in the map."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]] / np.reshape(size, (2, 1, 1))
    pred, gt = folder / "maps", folder / "masks"
    pred.mkdir(parents=True)
    gt.mkdir()
    for number in range(images):
        (cy, cx), (ry, rx), (my, mx) = rng.uniform(0.3, 0.7, 2), rng.uniform(0.05, 0.3, 2), rng.normal(0, 0.02, 2)
        mask = ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1
        moved = ((y - cy - my) / ry) ** 2 + ((x - cx - mx) / rx) ** 2 < 1
        noise = gaussian_filter(rng.normal(0, 1, size), 4) * rng.uniform(0.5, 3)
        found = (gaussian_filter(moved.astype(float), 3) + noise).clip(0, 1)
        for kind, array in ((pred, found), (gt, mask)):
            Image.fromarray(np.rint(array * 255).astype(np.uint8)).save(kind / f"{number:05}.png", compress_level=1)
    return pred, gt


def pysodmetrics_alone(pred: Path, gt: Path) -> dict[str, float]:
    """The scores by PySODMetrics called directly, image after image, without stretching."""
    mae, wf, sm, em = psm.MAE(), psm.WeightedFmeasure(), psm.Smeasure(), psm.Emeasure()
    handlers = {
        "precision": psm.PrecisionHandler(True, False),
        "recall": psm.RecallHandler(True, False),
        "f": psm.FmeasureHandler(True, False, beta=0.3),
        "iou_mean": psm.IOUHandler(False, False, with_binary=True, sample_based=True),
        "iou_set": psm.IOUHandler(False, False, with_binary=True, sample_based=False),
    }
    metrics = (mae, wf, sm, em, psm.FmeasureV2(handlers))
    for path in sorted(gt.iterdir()):
        truth, found = np.asarray(Image.open(path)) > 128, np.asarray(Image.open(pred / path.name)) / 255
        for metric in metrics:
            metric.step(found, truth, normalize=False)
    of = metrics[-1].get_results()
    precision, recall, f_b = (of[k]["dynamic"] for k in ("precision", "recall", "f"))
    f_a = 1.3 * precision * recall / np.maximum(0.3 * precision + recall, 1e-30)
    e = em.get_results()["em"]["curve"]
    values = {
        "mae": mae.get_results()["mae"], "maxf_a": f_a.max(), "maxf_b": f_b.max(), "meanf_a": f_a.mean(),
        "meanf_b": f_b.mean(), "wf": wf.get_results()["wfm"], "sm": sm.get_results()["sm"], "em_max": e.max(),
        "em_mean": e.mean(), "iou_mean": of["iou_mean"]["binary"], "iou_set": of["iou_set"]["binary"],
    }  # fmt: skip
    return {k: float(v) for k, v in values.items()}


def by_script(pred: Path, gt: Path, workers: int, scores: Path) -> dict[str, float]:
    """The scores by u2mamba_eval.py, as a user runs it."""
    command = [sys.executable, SCRIPT, "--pred", pred, "--gt", gt, "--workers", str(workers), "--json", scores]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(scores.read_text())[0]


def main(options: Options) -> None:
    """Measure and print."""
    print(*lines(torch.device("cpu")), f"{options.images:,} images of {SIZE[1]}x{SIZE[0]}", sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        pred, gt = make_set(Path(folder, "set"), options.images)
        ways = {
            "PySODMetrics alone": lambda: pysodmetrics_alone(pred, gt),
            "u2mamba_eval.py, 1 process": lambda: by_script(pred, gt, 1, Path(folder, "scores.json")),
            f"u2mamba_eval.py, {options.workers} processes": lambda: by_script(
                pred, gt, options.workers, Path(folder, "scores.json")
            ),
        }
        seconds, scores = {way: [] for way in ways}, {}
        for _ in range(options.runs):
            for way, call in ways.items():
                start = time.perf_counter()
                scores[way] = call()
                seconds[way].append(time.perf_counter() - start)
    direct, *_ = scores.values()
    base = median_and_spread(next(iter(seconds.values())))[0]
    for way, taken in seconds.items():
        median, spread = median_and_spread(taken)
        apart = max(abs(direct[k] - scores[way][k]) for k in direct)
        print(f"{way}: {median:.1f} ± {spread:.1f} s, {base / median:.2f} times, scores differ by {apart:.1e} at most")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
