"""The metrics of the SOD papers over a set of saliency maps: PySODMetrics, in several processes, the numbers of one.

    with worker_pool(8) as pool:  # u2mamba.runtime.workers
        scores = SetScores("ECSSD")
        for item, result in evaluate(items_of(Path("masks"), Path("maps"))[0], pool):
            scores.add(item.stem, result)
    print(scores.summary())

Every image is scored by a worker; what it contributes is added up in the order of the names, so the sums do not depend
on the number of processes. Nothing here imports torch, which each worker would load for nothing.

Conventions, those of PySODMetrics called with `normalize=False`: a mask is cut at > 128, the map stays as it is
(PySODMetrics' default stretches each map to its own minimum and maximum). Thresholds: the float map times 255, decimals
dropped, is at or above 255, 254, ..., 0; so precision, recall, F and E have 256 values each, the highest threshold
first. IoU cuts at > 0.5. MAE, weighted F and S-measure take the float map itself.

An empty mask counts: MAE mean(map), S-measure 1 - mean(map), weighted F, precision, recall and F 0 at each threshold,
E-measure the share of pixels below the threshold (times n / (n - 1) for n pixels), IoU 1 where nothing is above 0.5,
else 0.
"""

import functools
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from py_sod_metrics import (
    MAE,
    Emeasure,
    FmeasureHandler,
    FmeasureV2,
    IOUHandler,
    PrecisionHandler,
    RecallHandler,
    Smeasure,
    WeightedFmeasure,
)

from u2mamba.dataset.pairs import (
    IMAGE_TYPES,
    MAP_TYPES,
    BadFile,
    Pair,
    Unpaired,
    pair_names,
    read_map,
    read_mask,
    read_pair,
)
from u2mamba.runtime.errors import UserError
from u2mamba.runtime.workers import in_order

BETA2 = 0.3  # weight of precision in the F-measure, Achanta et al. 2009
EPS = np.spacing(1)  # PySODMetrics'
METRICS = (
    "mae", "maxf_a", "maxf_b", "meanf_a", "meanf_b", "wf", "sm", "em_max", "em_mean", "iou_mean", "iou_set",
)  # fmt: skip
AHEAD = 2  # images read in advance for each core


class Item(NamedTuple):
    """One image to score: files, or arrays where a network made the map."""

    stem: str
    image: Path | None  # the photograph
    mask: Path | np.ndarray  # (H, W) uint8
    map: Path | np.ndarray | None  # (h, w) float32; None before the network made it


class ImageScores(NamedTuple):
    """What one image contributes."""

    mae: float
    wf: float
    sm: float
    intersection: int  # pixels of map > 0.5 and mask
    union: int
    curves: np.ndarray  # (4, 256): precision, recall, F and E at thresholds 255, ..., 0
    empty: bool  # the mask holds no object
    constant: bool  # the map has one value
    resized: bool  # the map was of another size than the mask

    @property
    def iou(self) -> float:
        """Jaccard index; nothing found where nothing is counts 1."""
        return self.intersection / self.union if self.union else 1.0


# ------------------------------------------------------------------------------------------------- one image


def _pixels_above(pred: np.ndarray, gt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels at or above thresholds 255, ..., 0, (256,) each: inside the mask and outside it.

    What PySODMetrics counts twice by `np.histogram`, which sorts the pixels: a sixth of all its time.
    """
    levels = (pred * 255).astype(np.uint8)
    inside, outside = (np.cumsum(np.bincount(levels[where], minlength=256)[::-1]) for where in (gt, ~gt))
    return inside, outside


class _FmeasureV2(FmeasureV2):
    def dynamically_binarizing(self, pred: np.ndarray, gt: np.ndarray, FG: int, BG: int) -> dict:
        tp, fp = _pixels_above(pred, gt)
        return {"tp": tp, "fp": fp, "tn": BG - fp, "fn": FG - tp}


class _Emeasure(Emeasure):
    def cal_em_with_cumsumhistogram(self, pred: np.ndarray, gt: np.ndarray) -> np.ndarray:
        tp, fp = _pixels_above(pred, gt)
        found, left = tp + fp, self.gt_size - tp - fp
        if self.gt_fg_numel == 0:
            enhanced = left
        elif self.gt_fg_numel == self.gt_size:
            enhanced = found
        else:
            parts = self.generate_parts_numel_combinations(tp, fp, found, left)
            enhanced = sum((2 * a * b / (a**2 + b**2 + EPS) + 1) ** 2 / 4 * n for n, (a, b) in zip(*parts, strict=True))
        return enhanced / (self.gt_size - 1 + EPS)


class _Smeasure(Smeasure):
    """An object centred on the last row or column leaves quadrants without a pixel; they weigh 0, but would be NaN."""

    def ssim(self, pred: np.ndarray, gt: np.ndarray) -> float:
        return super().ssim(pred, gt) if pred.size else 0.0


def score_map(prediction: np.ndarray, truth: np.ndarray, resized: bool = False) -> ImageScores:
    """(H, W) float64 probabilities against (H, W) bool."""
    of_thresholds = [
        PrecisionHandler(True, False),
        RecallHandler(True, False),
        FmeasureHandler(True, False, beta=BETA2),
    ]
    of_half = IOUHandler(False, False, with_binary=True, sample_based=False)
    mae, wf, sm, em = MAE(), WeightedFmeasure(), _Smeasure(), _Emeasure()
    for metric in (mae, wf, sm, em, _FmeasureV2(dict(enumerate((*of_thresholds, of_half))))):
        metric.step(prediction, truth, normalize=False)
    counts = of_half.binary_results
    return ImageScores(
        mae=float(mae.get_results()["mae"]),
        wf=float(wf.get_results()["wfm"]),
        sm=float(sm.get_results()["sm"]),
        intersection=int(counts["tp"]),
        union=int(counts["tp"] + counts["fp"] + counts["fn"]),
        curves=np.stack([h.dynamic_results[0] for h in of_thresholds] + [em.get_results()["em"]["curve"]]),
        empty=not truth.any(),
        constant=bool(prediction.min() == prediction.max()),
        resized=resized,
    )


def map_at(prediction: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A map brought to (H, W): bilinear, `F.interpolate(..., align_corners=False)`, in the precision that it has.

    PySODEvalToolkit and BiRefNet resize maps of another size by the same function, theirs rounded to bytes.
    """
    if prediction.shape == shape:
        return prediction
    return cv2.resize(prediction, shape[::-1], interpolation=cv2.INTER_LINEAR).clip(0, 1)


def stretch_map(prediction: np.ndarray) -> np.ndarray:
    """Min-max stretching, which PySODMetrics and U²-Net's code do by default; a constant map stays as it is."""
    low, high = prediction.min(), prediction.max()
    return (prediction - low) / (high - low) if high > low else prediction


def mask_and_map(item: Item) -> tuple[np.ndarray, np.ndarray]:
    """Of an item, read where they are files. Where the photograph is known, a mask drawn on it as it is stored, and not
    as it is seen (EXIF), is turned. Raises BadFile."""
    mask = read_mask(item.mask) if isinstance(item.mask, Path) else item.mask
    prediction = read_map(item.map) if isinstance(item.map, Path) else item.map
    if item.image and isinstance(item.mask, Path) and prediction.shape == mask.shape[::-1] != mask.shape:
        mask = read_pair(Pair(item.stem, item.image, item.mask)).mask
    return mask, prediction


def score_item(item: Item, stretch: bool = False) -> ImageScores | BadFile:
    """Reads what is a file, brings the map to the mask's size, scores it. A file that cannot be used is returned."""
    try:
        mask, prediction = mask_and_map(item)
        if not np.isfinite(prediction).all():
            raise BadFile(item.image, "the network's map of it holds values that are not numbers")
        resized = prediction.shape != mask.shape and isinstance(item.map, Path)
        prediction = map_at(prediction, mask.shape).astype(np.float64)
        return score_map(stretch_map(prediction) if stretch else prediction, mask > 128, resized)
    except BadFile as error:
        return error
    except MemoryError:
        return BadFile(item.image or item.map, "its metrics do not fit into memory")


# ------------------------------------------------------------------------------------------------- many images


def evaluate(
    items: Iterable[Item], pool: Executor | None = None, stretch: bool = False
) -> Iterator[tuple[Item, ImageScores | BadFile]]:
    """Each item with its scores, or with why it has none, in the order of `items`."""
    task = functools.partial(score_item, stretch=stretch)
    if pool is None:
        return ((item, task(item)) for item in items)
    return in_order(pool, task, items, AHEAD * (os.cpu_count() or 1))


class SetScores:
    """The scores of one data set, added up image by image."""

    def __init__(self, name: str):
        self.name = name
        self.images: list[tuple[str, ImageScores]] = []  # without their curves
        self.bad: list[BadFile] = []
        self._curves = np.zeros((4, 256))

    def add(self, stem: str, scores: ImageScores | BadFile) -> None:
        """Takes the next image in; the order decides the last digits of the sums."""
        if isinstance(scores, BadFile):
            self.bad.append(scores)
            return
        self._curves += scores.curves
        self.images.append((stem, scores._replace(curves=None)))

    def curves(self) -> dict[str, np.ndarray]:
        """Means over the images at thresholds 255, ..., 0, (256,) each: precision, recall, f_a, f_b, e."""
        precision, recall, f_b, e = self._curves / len(self.images)
        divisor = BETA2 * precision + recall
        f_a = np.divide((1 + BETA2) * precision * recall, divisor, out=np.zeros(256), where=divisor > 0)
        return {"precision": precision, "recall": recall, "f_a": f_a, "f_b": f_b, "e": e}

    def summary(self) -> dict[str, Any]:
        """{"name", "n", one value for each of METRICS}.

        a: precision and recall are averaged over the images, then F; b: F of each image, then the average; max and
        mean are over the 256 thresholds. Raises UserError when no image was scored.
        """
        if not self.images:
            raise UserError(f"{self.name}: no image could be evaluated{f'; {self.bad[0]}' if self.bad else ''}")
        of, scores = self.curves(), [s for _, s in self.images]
        union = sum(s.union for s in scores)
        values = (
            np.mean([s.mae for s in scores]), of["f_a"].max(), of["f_b"].max(), of["f_a"].mean(), of["f_b"].mean(),
            np.mean([s.wf for s in scores]), np.mean([s.sm for s in scores]), of["e"].max(), of["e"].mean(),
            np.mean([s.iou for s in scores]), sum(s.intersection for s in scores) / union if union else 1.0,
        )  # fmt: skip
        return {"name": self.name, "n": len(scores)} | dict(zip(METRICS, map(float, values), strict=True))


def items_of(gt: Path, pred: Path | None = None, image: Path | None = None) -> tuple[list[Item], Unpaired]:
    """Masks in `gt` with the saved maps, or the photographs, of the same stem; and the names left over.

    pred: a folder of maps; then `image` is only for showing. Without it the photographs in `image` are paired with the
    masks, and an item's map is for a network to make. Raises UserError for a missing folder, or without any pair.
    """
    folder = pred or image
    if folder.resolve() == gt.resolve():
        raise UserError(f"{gt} is given for the masks and for the {'maps' if pred else 'images'}: give two folders")
    names, masks = _file_names(folder), _file_names(gt)
    pairs, unpaired = pair_names(names, masks, MAP_TYPES if pred else IMAGE_TYPES)
    if not pairs:
        raise UserError(
            f"{folder} has {len(unpaired.images)} {'maps' if pred else 'images'}, {gt} {len(unpaired.masks)} masks, "
            "and no two have the same name (without the extension)"
        )
    photographs = {}
    if image:
        photographs = {stem: image / name for stem, name, _ in pair_names(_file_names(image), masks)[0]}
    return [
        Item(stem, photographs.get(stem), gt / mask, pred / name if pred else None) for stem, name, mask in pairs
    ], unpaired


def _file_names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.is_file()]
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; give a folder of images, maps or masks") from None
