"""Evaluates a checkpoint, or saved saliency maps, by the metrics of salient object detection papers.

    python u2mamba_eval.py --checkpoint saved_models/u2net/best.pth --image DUTS-TE/images --gt DUTS-TE/masks
    python u2mamba_eval.py --pred maps/DUTS-TE maps/ECSSD --gt DUTS-TE/masks ECSSD/masks --json scores.json --out report

PySODMetrics computes them at the size of the ground-truth masks, on unchanged maps: a checkpoint's probabilities in
fp32, or an image file's bytes / 255. Two definitions of the F-measure (beta² = 0.3) are in use and not comparable:

    A  F of the precision and recall averaged over the images: U²-Net and BASNet (their evaluation tool)
    B  F of each image, then averaged: PySODMetrics' F curve, BiRefNet

Each has 256 thresholds, of which the maximum (max F) and the mean (mean F) are reported. Both of B, and U²-Net's code
when it saves maps, first normalize each map by its minimum and maximum: --normalize.

A second table shows where a network fails: the scores by object size. MAE is the sum of a missed part, where
the map is below the mask, and an extra part, where it is above.

Exit codes: 0 done; 1 done, but files were skipped; 2 the input cannot be used; 130, 143 stopped by Ctrl-C, SIGTERM.
"""

import os.path  # isort: skip
import sys  # isort: skip

sys.path.insert(0, os.path.dirname(__file__))  # PYTHONSAFEPATH leaves it out
import u2mamba.runtime.start  # noqa: F401  # isort: skip
import contextlib
import csv
import functools
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from tqdm import tqdm

from u2mamba.dataset.decode import BadFile, read_image
from u2mamba.dataset.masks import MaskRule
from u2mamba.dataset.pairs import truncate_list
from u2mamba.dataset.rescale import resize_map
from u2mamba.inference.evaluation import (
    METRICS,
    SIZES,
    DatasetMetrics,
    ImageScores,
    Item,
    list_items,
    mask_rule,
    read_item,
    score_item,
)
from u2mamba.runtime.config import Range, check_settings, read_settings
from u2mamba.runtime.cores import granted_cores
from u2mamba.runtime.errors import EXIT_OK, EXIT_SKIPPED, UserError, one_line_errors
from u2mamba.runtime.files import atomic_write, check_folder
from u2mamba.runtime.workers import ordered_map

SHEET_IMAGES = 20  # with the lowest IoU
MASK_FOLDERS = {"gt", "gts", "gt_aug", "mask", "masks", "ground_truth", "groundtruth", "annotations"}


@dataclass
class Config:
    __doc__ = __doc__  # for --help
    gt: tuple[str, ...] = ()  # folders of ground-truth masks, one per dataset
    checkpoint: str = ""  # weights file, or small or large (included); with --image
    image: tuple[str, ...] = ()  # folders of images, in the order of --gt; with --pred: for the sheet and EXIF rotation
    pred: tuple[str, ...] = ()  # folders of saved maps (images, or .npy of floats), in the order of --gt
    name: tuple[str, ...] = ()  # names of the datasets; default: from the mask folders
    json: str = ""  # file for the scores: an object per dataset
    out: str = ""  # folder for curves, scores per image, and a contact sheet of the worst maps
    normalize: bool = False  # min-max normalize each map first
    # with --checkpoint
    size: Annotated[int, Range(0, 4096)] = 0  # pixels: input size of the network; 0: its training size
    batch: Annotated[int, Range(1, 4096)] = 8  # images per forward pass
    precision: Literal["fp32", "bf16"] = "fp32"
    tta: bool = False  # flip test-time augmentation: takes twice as long
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"


def dataset_names(cfg: Config) -> list[str]:
    """--name, or the names of the folders of masks (of their parents, for .../masks)."""
    folders = [Path(gt).resolve() for gt in cfg.gt]
    names = cfg.name or [f.parent.name if f.name.lower() in MASK_FOLDERS else f.name for f in folders]
    for name in names:
        if not name or Path(name).name != name:
            raise UserError(f"--name {name!r}: must be usable as a file name, without a path")
    if len(set(names)) < len(names):
        raise UserError(f"two datasets have the same name ({', '.join(names)}): give one --name for each")
    return list(names)


def check(cfg: Config) -> Config:
    """The settings with `~` expanded. Raises UserError for options that conflict, and paths that cannot be written."""
    cfg = check_settings(cfg)
    if bool(cfg.checkpoint) == bool(cfg.pred):
        raise UserError("give either --checkpoint with --image (maps are predicted), or --pred (maps are read)")
    if not cfg.gt or (cfg.checkpoint and not cfg.image):
        raise UserError(f"{'--image' if cfg.gt else '--gt'} is missing: give a folder")
    for option in ("pred", "image", "name"):
        if (given := getattr(cfg, option)) and len(given) != len(cfg.gt):
            raise UserError(f"--{option} has {len(given)} entries, --gt {len(cfg.gt)}: they are matched in order")
    if cfg.tta and not cfg.checkpoint:
        raise UserError("--tta requires a network: give --checkpoint")
    if cfg.json and Path(cfg.json).is_dir():
        raise UserError(f"{cfg.json} is a folder: give the name of a file")
    for folder in [Path(cfg.json).parent] * bool(cfg.json) + [Path(cfg.out)] * bool(cfg.out):
        check_folder(folder)
    return cfg


def report_files(metrics: DatasetMetrics) -> list[str]:
    """One line per kind of problem with the paired files of a dataset."""
    remarks = (
        ([str(error) for error in metrics.bad], "skipped files that cannot be used"),
        ([stem for stem, s in metrics.images if s.resized], "maps that were resized to the size of their mask"),
        ([stem for stem, s in metrics.images if s.constant], "constant maps (used)"),
        ([stem for stem, s in metrics.images if s.size == "empty"], "masks without an object (used)"),
    )
    lines = [f"{metrics.name}: {len(names):,} {what}: {truncate_list(names)}" for names, what in remarks if names]
    if metrics.images and all(scores.faint for _, scores in metrics.images):
        lines.append(f"{metrics.name}: no map value exceeds 1 of 255; were they saved as 0 and 1 instead of 0 to 255?")
    return lines


def table(summaries: Sequence[dict[str, Any]]) -> str:
    """A column per dataset, a row per metric."""
    rows = [["", *(s["name"] for s in summaries)], ["images", *(f"{s['n']:,}" for s in summaries)]]
    rows += [[label, *(f"{s[key]:.4f}" for s in summaries)] for key, label in METRICS.items()]
    return align(rows)


def size_table(metrics: DatasetMetrics) -> str:
    """The scores of a dataset by object size: a row per size that occurs, a column per metric."""
    rows = [[f"{metrics.name}, by object", "images", "MAE", "missed", "extra", "IoU"]]
    for size, (n, *means) in ((size, scores.values()) for size, scores in metrics.by_size().items()):
        rows += [[f"{size}: {SIZES[size]}", f"{n:,}", *(f"{mean:.4f}" for mean in means)]] if n else []
    return align(rows)


def align(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def sheet_rows(worst: Sequence[tuple[Item, ImageScores]], rule: MaskRule) -> list[tuple[str, list[np.ndarray]]]:
    """For `plots.contact_sheet`: name and scores above the image (if any is known), mask and map."""
    rows = []
    for item, s in worst:
        mask, saliency = read_item(item, rule)
        images = [mask, np.rint(resize_map(saliency, mask.shape) * 255).astype(np.uint8)]
        with contextlib.suppress(BadFile, TypeError):  # an image is optional here
            images.insert(0, read_image(item.image))
        rows.append((f"{item.stem[:48]}  IoU {s.iou:.3f}  MAE {s.mae:.3f}  wF {s.wf:.3f}", images))
    return rows


def images_csv(metrics: DatasetMetrics) -> bytes:
    """The scores of each image: a row per image."""
    keys = ("mae", "missed", "extra", "area", "size", "wf", "sm", "iou", "constant", "resized")
    text = io.StringIO()
    rows = [("image", *keys), *((stem, *(getattr(s, key) for key in keys)) for stem, s in metrics.images)]
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode(errors="surrogateescape")


def main(cfg: Config) -> int:
    """Runs the command; returns the exit code."""
    cfg = check(cfg)
    datasets = []
    for index, (name, gt) in enumerate(zip(dataset_names(cfg), cfg.gt, strict=True)):
        folders = (Path(paths[index]) if paths else None for paths in (cfg.pred, cfg.image))
        log = functools.partial(print, f"{name}:")
        datasets.append((DatasetMetrics(name), *list_items(Path(gt), *folders, log)))
    if cfg.checkpoint:
        from u2mamba.inference import pipeline, predictor  # imports torch: seconds
        from u2mamba_predict import prepare

        net = predictor.load_model(cfg.checkpoint)
        size = predictor.input_size(net, cfg.size)
        predict = prepare(net, size, cfg)
    threads = min(granted_cores(), sum(len(items) for _, items, _ in datasets))
    lines, worst = [], {}
    for metrics, items, _ in datasets:
        rule = mask_rule(items, threads)
        source = pipeline.predict_items(predict, items, size, cfg.batch, rule) if cfg.checkpoint else items
        score = functools.partial(score_item, normalize=cfg.normalize, rule=rule)
        results = ordered_map(score, source, threads, ahead=2 * threads)
        ranking = []  # the worst first
        with contextlib.closing(results):
            for item, scores in tqdm(results, metrics.name, len(items), unit="img", disable=None, leave=False):
                metrics.add(item.stem, scores)
                if cfg.out and not isinstance(scores, BadFile):
                    ranking.append((item, scores))
                    ranking.sort(key=lambda entry: (entry[1].iou, -entry[1].mae, entry[0].stem))
                    del ranking[SHEET_IMAGES:]
        worst[metrics.name] = ranking, rule
        lines += [f"{metrics.name}: {rule.line}"] if rule.line else []
        lines += report_files(metrics)
    summaries = [metrics.summary() for metrics, *_ in datasets]
    print("\n".join([*lines, table(summaries), *("\n" + size_table(metrics) for metrics, *_ in datasets)]), flush=True)

    if cfg.json:
        rows = [s | {"by_size": metrics.by_size()} for s, (metrics, *_) in zip(summaries, datasets, strict=True)]
        atomic_write(Path(cfg.json), (json.dumps(rows, indent=1) + "\n").encode())
    if cfg.out:
        from u2mamba.inference import plots  # imports matplotlib: half a second

        curves = {metrics.name: metrics.curves() for metrics, *_ in datasets}
        atomic_write(Path(cfg.out, "curves.png"), plots.curves(curves))
        sizes = {metrics.name: metrics.by_size() for metrics, *_ in datasets}
        atomic_write(Path(cfg.out, "error_by_size.png"), plots.error_by_size(sizes))
        for metrics, *_ in datasets:
            atomic_write(Path(cfg.out, f"{metrics.name}_images.csv"), images_csv(metrics))
            sheet = plots.contact_sheet(sheet_rows(*worst[metrics.name]))
            atomic_write(Path(cfg.out, f"{metrics.name}_worst.png"), sheet)
    skipped = any(metrics.bad or skipped for metrics, _, skipped in datasets)
    return EXIT_SKIPPED if skipped else EXIT_OK


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main(read_settings(Config())))
