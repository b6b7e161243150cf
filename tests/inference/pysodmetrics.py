"""A synthetic test set of saliency maps and masks, and its scores by PySODMetrics, called directly."""

from pathlib import Path

import numpy as np
import py_sod_metrics as psm
from PIL import Image
from scipy.ndimage import gaussian_filter


def make_set(folder: Path, images: int, size: tuple[int, int] = (300, 400), seed: int = 0) -> tuple[Path, Path]:
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
        saliency = (gaussian_filter(moved.astype(float), 3) + noise).clip(0, 1)
        for kind, array in ((pred, saliency), (gt, mask)):
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
        mask, saliency = np.asarray(Image.open(path)) > 128, np.asarray(Image.open(pred / path.name)) / 255
        for metric in metrics:
            metric.step(saliency, mask, normalize=False)
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
