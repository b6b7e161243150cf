"""The metrics of salient object detection papers for a set of saliency maps: PySODMetrics.

Nothing here imports torch, which the evaluation of saved maps does not need.

Conventions are PySODMetrics' with `normalize=False`; docs/evaluation.md lists them and the edge cases.

Three things differ, so that every score is in [0, 1]. E divides by n - 1 for n pixels and can exceed 1: it is clipped.
Quadrants without pixels count 0 in the S-measure, where PySODMetrics returns NaN. Masks of 0 and 1, or of 0 and another
dark value, are scaled to 0 and 255, as u2mamba/dataset/masks.py decides for the whole dataset.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import py_sod_metrics as psm

from u2mamba.dataset.decode import (
    BadFile,
    Pair,
    open_pair,
    read_map,
    read_mask,
    read_orientation,
    read_pair,
    read_raw_mask,
)
from u2mamba.dataset.masks import MaskKind, MaskRule, decide
from u2mamba.dataset.pairs import MAP_TYPES, pair_folders
from u2mamba.dataset.rescale import resize_map
from u2mamba.runtime.errors import UserError
from u2mamba.runtime.workers import ordered_map

BETA2 = 0.3  # beta² of the F-measure (Achanta et al. 2009)
METRICS = {
    "mae": "MAE", "maxf_a": "max F, A", "maxf_b": "max F, B", "meanf_a": "mean F, A", "meanf_b": "mean F, B",
    "wf": "weighted F", "sm": "S-measure", "em_max": "max E", "em_mean": "mean E",
    "iou_mean": "IoU, mean over images", "iou_set": "IoU, whole set",
}  # fmt: skip
SIZES = {  # of an image's object
    "small": "under 10 % of the image", "medium": "10 to 30 %", "large": "over 30 %", "empty": "no object",
    "full": "all of the image",
}  # fmt: skip


class Item(NamedTuple):
    """An image to score."""

    stem: str
    image: Path | None  # the photo, if known
    mask: Path | np.ndarray  # (H, W) uint8
    map: Path | np.ndarray | BadFile | None  # (h, w) float in [0, 1]; None until a network has predicted it


class ImageScores(NamedTuple):
    """The scores of one image."""

    mae: float
    missed: float  # the part of the MAE where the map is too low: mean of max(mask - map, 0)
    extra: float  # the part where it is too high
    area: float  # fraction of the pixels that belong to the object
    wf: float
    sm: float
    intersection: int  # pixels of map > 0.5 and mask
    union: int
    curves: np.ndarray  # (4, 256): precision, recall, F and E at thresholds 255, ..., 0
    constant: bool  # the map has a single value
    resized: bool  # the map had another size than the mask
    faint: bool  # no value of the map exceeds 1 of 255

    @property
    def iou(self) -> float:
        """Jaccard index; an empty prediction for an empty mask counts 1."""
        return self.intersection / self.union if self.union else 1.0

    @property
    def size(self) -> str:
        """The object's size, of SIZES."""
        if self.area in (0, 1):
            return "full" if self.area else "empty"
        return "small" if self.area < 0.1 else "large" if self.area > 0.3 else "medium"


class _Smeasure(psm.Smeasure):
    """An object centered on the last row or column leaves quadrants without pixels. Their weight is 0, but PySODMetrics
    multiplies it by NaN."""

    def ssim(self, pred: np.ndarray, gt: np.ndarray) -> float:
        return super().ssim(pred, gt) if pred.size else 0.0


def score_map(saliency: np.ndarray, mask: np.ndarray, resized: bool = False) -> ImageScores:
    """(H, W) float64 probabilities against (H, W) bool."""
    curves = [psm.PrecisionHandler(True, False), psm.RecallHandler(True, False)]
    curves.append(psm.FmeasureHandler(True, False, beta=BETA2))
    mae, wf, sm, em = psm.MAE(), psm.WeightedFmeasure(), _Smeasure(), psm.Emeasure()
    for metric in (mae, wf, sm, em, psm.FmeasureV2(dict(enumerate(curves)))):
        metric.step(saliency, mask, normalize=False)
    found = saliency > 0.5
    return ImageScores(
        mae=float(mae.get_results()["mae"]),
        missed=float(np.maximum(mask - saliency, 0).mean()),
        extra=float(np.maximum(saliency - mask, 0).mean()),
        area=float(mask.mean()),
        wf=float(wf.get_results()["wfm"]),
        sm=float(sm.get_results()["sm"]),
        intersection=int((found & mask).sum()),
        union=int((found | mask).sum()),
        curves=np.stack([c.dynamic_results[0] for c in curves] + [em.get_results()["em"]["curve"].clip(0, 1)]),
        constant=bool(saliency.min() == saliency.max()),
        resized=resized,
        faint=bool(saliency.max() <= 1 / 255),
    )


def mask_rule(items: Sequence[Item], threads: int = 1) -> MaskRule:
    """How the masks of a dataset are read, decided from all of them. Raises DataError for label maps.

    Unreadable files do not count; they are reported when they are scored.
    """

    def survey(item: Item) -> tuple[MaskKind | None, str]:
        try:
            if item.image and read_orientation(item.image) != 1:
                with open_pair(Pair(item.stem, item.image, item.mask)) as pair:
                    return pair.mask.kind, pair.untagged
            return read_raw_mask(item.mask).kind, ""
        except (BadFile, MemoryError):
            return None, ""

    kinds, drawn = zip(*(found for _, found in ordered_map(survey, items, threads)), strict=True)
    return decide([kind for kind in kinds if kind], "stored" in drawn and "seen" not in drawn)


def read_item(item: Item, rule: MaskRule | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(mask, map) of an item, read where they are files. Raises BadFile.

    Where the photo is known, a mask that was drawn on it as stored, not as displayed (EXIF), is rotated.
    """
    if isinstance(item.map, BadFile):
        raise item.map
    mask = read_mask(item.mask, rule) if isinstance(item.mask, Path) else item.mask
    saliency = read_map(item.map) if isinstance(item.map, Path) else item.map
    as_stored = (rule and rule.as_stored) or saliency.shape == mask.shape[::-1] != mask.shape
    if as_stored and item.image and isinstance(item.mask, Path):
        mask = read_pair(Pair(item.stem, item.image, item.mask), rule)[1]
    return mask, saliency


def score_item(item: Item, normalize: bool = False, rule: MaskRule | None = None) -> ImageScores | BadFile:
    """Scores an item's map at its mask's size; returns a BadFile if a file cannot be used.

    normalize: by minimum and maximum, PySODMetrics' and U²-Net's default; a constant map stays unchanged.
    """
    try:
        mask, saliency = read_item(item, rule)
        resized = saliency.shape != mask.shape and isinstance(item.map, Path)
        saliency = resize_map(saliency, mask.shape).astype(np.float64)
        low, high = saliency.min(), saliency.max()
        if normalize and low < high:
            saliency = (saliency - low) / (high - low)
        return score_map(saliency, mask > 128, resized)
    except BadFile as error:
        return error
    except MemoryError:
        return BadFile(item.image or item.map, "computing its metrics ran out of memory")


class DatasetMetrics:
    """The metrics of one dataset, accumulated image by image."""

    def __init__(self, name: str):
        self.name = name
        self.images: list[tuple[str, ImageScores]] = []
        self.bad: list[BadFile] = []

    def add(self, stem: str, scores: ImageScores | BadFile) -> None:
        if isinstance(scores, BadFile):
            self.bad.append(scores)
        else:
            self.images.append((stem, scores))

    def curves(self) -> dict[str, np.ndarray]:
        """Means over the images at thresholds 255, ..., 0, (256,) each: precision, recall, f_a, f_b, e."""
        precision, recall, f_b, e = np.mean([scores.curves for _, scores in self.images], axis=0)
        divisor = BETA2 * precision + recall
        f_a = np.divide((1 + BETA2) * precision * recall, divisor, out=np.zeros(256), where=divisor > 0)
        return {"precision": precision, "recall": recall, "f_a": f_a, "f_b": f_b, "e": e}

    def summary(self) -> dict[str, Any]:
        """{"name", "n", one value for each of METRICS}. Raises UserError when no image was scored.

        a: F of the mean precision and recall; b: mean of the images' F; max and mean are over the 256 thresholds.
        """
        if not self.images:
            raise UserError(f"{self.name}: no image could be evaluated{f'; {self.bad[0]}' if self.bad else ''}")
        curves, scores = self.curves(), [s for _, s in self.images]
        union = sum(s.union for s in scores)
        f_a, f_b, e = curves["f_a"], curves["f_b"], curves["e"]
        values = (
            np.mean([s.mae for s in scores]), f_a.max(), f_b.max(), f_a.mean(), f_b.mean(),
            np.mean([s.wf for s in scores]), np.mean([s.sm for s in scores]), e.max(), e.mean(),
            np.mean([s.iou for s in scores]), sum(s.intersection for s in scores) / union if union else 1.0,
        )  # fmt: skip
        return {"name": self.name, "n": len(scores)} | dict(zip(METRICS, map(float, values), strict=True))

    def by_size(self) -> dict[str, dict[str, Any]]:
        """For each of SIZES {"n", "mae", "missed", "extra", "iou"}: means over its images, None where it has none."""
        keys = ("mae", "missed", "extra", "iou")
        groups = {size: [s for _, s in self.images if s.size == size] for size in SIZES}
        return {
            size: {"n": len(group)}
            | {key: float(np.mean([getattr(s, key) for s in group])) if group else None for key in keys}
            for size, group in groups.items()
        }


def list_items(
    gt: Path, pred: Path | None = None, image: Path | None = None, log: Callable[[str], None] = print
) -> tuple[list[Item], int]:
    """The masks in `gt` paired by file stem with saved maps or photos, and the number of files without a partner.

    pred: a folder of maps; photos in `image` are then optional. Without `pred` the photos are paired with the masks,
    and a network has to predict the maps. Raises UserError for a missing folder, or if there are no pairs.
    """
    photos = pair_folders(image, gt, (lambda _: None) if pred else log, ("--image", "--gt")) if image else ()
    if not pred:
        return [Item(*pair[:3], None) for pair in photos], photos.skipped
    photo = {pair.stem: pair.image for pair in photos}
    maps = pair_folders(pred, gt, log, ("--pred", "--gt"), MAP_TYPES)
    return [Item(pair.stem, photo.get(pair.stem), pair.mask, pair.image) for pair in maps], maps.skipped
