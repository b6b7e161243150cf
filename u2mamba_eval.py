"""Scores a checkpoint, or saved maps, by the metrics of the salient object detection papers.

    python u2mamba_eval.py --checkpoint saved_models/u2net/best.pth --image DUTS-TE/images --gt DUTS-TE/masks
    python u2mamba_eval.py --pred maps/DUTS-TE maps/ECSSD --gt DUTS-TE/masks ECSSD/masks --json scores.json --out report

Computed by PySODMetrics at the masks' own size, on the map as it is: a checkpoint's probabilities in fp32, a picture's
bytes / 255. Two definitions of the F-measure (beta² = 0.3) are in use, and their figures do not compare:

    A  precision and recall are averaged over the images, then F: U²-Net and BASNet (their evaluation tool)
    B  F of each image, then the average: PySODMetrics' F curve, BiRefNet

each at 256 thresholds, of which the best (max F) and the mean (mean F). Both of B, and U²-Net's code where it saves
maps, stretch each map to its own minimum and maximum first: --stretch.

Exit codes: 0 done; 1 done, but files were set aside; 2 the input cannot be used; 130, 143 stopped.
"""

import u2mamba.runtime.start  # noqa: F401  # isort: skip
import csv
import io
import json
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from tqdm import tqdm

from u2mamba.dataset.pairs import BadFile, Unpaired, read_image, some_of
from u2mamba.inference.evaluation import METRICS, Item, SetScores, evaluate, items_of, map_at, mask_and_map
from u2mamba.runtime.config import check_input_size, check_settings, input_size
from u2mamba.runtime.errors import EXIT_OK, EXIT_SKIPPED, EXIT_TERMINATED, UserError, one_line_errors
from u2mamba.runtime.files import atomic_write, check_folder
from u2mamba.runtime.workers import worker_pool

WORST = 20  # images on the sheet
LABELS = dict(
    zip(
        METRICS,
        ("MAE", "max F, A", "max F, B", "mean F, A", "mean F, B", "weighted F", "S-measure", "max E", "mean E",
         "IoU, mean over images", "IoU, whole set"),
        strict=True,
    )
)  # fmt: skip
KINDS_OF_FOLDER = {
    "gt",
    "gts",
    "gt_aug",
    "mask",
    "masks",
    "ground_truth",
    "groundtruth",
    "annotations",
}  # not a set's name


@dataclass
class Config:
    gt: tuple[str, ...]  # folders of masks, one for each data set
    checkpoint: str = ""  # of any of our networks; with --image
    image: tuple[str, ...] = ()  # folders of photographs, ordered as --gt; with --pred for the sheet, and to turn masks
    pred: tuple[str, ...] = ()  # folders of saved maps (pictures, or .npy of floats), in the order of --gt
    name: tuple[str, ...] = ()  # of the data sets; else the folders of masks give them
    json: str = ""  # file for the scores, an object for each data set
    csv: str = ""  # file for the scores, a row for each data set
    out: str = ""  # folder for curves, the scores of each image, and the sheet of the worst ones
    stretch: bool = False  # stretch each map to its own minimum and maximum first
    workers: int = 0  # processes for the metrics; 0: one for each core
    # with --checkpoint
    size: int = 0  # pixels: images are squashed to this square; 0: as the weights were trained, 320 if unknown
    batch: int = 8  # images at a time through the network
    precision: Literal["fp32", "bf16"] = "fp32"
    tta: bool = False  # the mean with the mirrored image's map: twice the time
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    gpu: int = 0  # which one, where there are several
    speed: bool = False  # measure the network's images a second and peak memory


LIMITS = {"size": (0, 4096), "batch": (1, 4096), "workers": (0, 1024), "gpu": (0, 1024)}


def names_of(cfg: Config) -> list[str]:
    """The names of the data sets: --name, or those of the folders of masks (of what they lie in, for .../masks)."""
    folders = [Path(gt).resolve() for gt in cfg.gt]
    names = cfg.name or [f.parent.name if f.name.lower() in KINDS_OF_FOLDER else f.name for f in folders]
    for name in names:
        if not name or Path(name).name != name:
            raise UserError(f"--name {name!r}: must be a name for files, without a path")
    if len(set(names)) < len(names):
        raise UserError(f"two data sets would be called alike ({', '.join(names)}): give --name, one for each")
    return list(names)


def check(cfg: Config) -> None:
    """Raises UserError for what does not go together."""
    check_settings(cfg, LIMITS)
    check_input_size(cfg.size)
    if bool(cfg.checkpoint) == bool(cfg.pred):
        raise UserError("give either --checkpoint with --image (maps are made), or --pred (maps are read)")
    if not cfg.gt or (cfg.checkpoint and not cfg.image):
        raise UserError(f"{'--image' if cfg.gt else '--gt'} names no folder")
    for option in ("pred", "image", "name"):
        given = getattr(cfg, option)
        if given and len(given) != len(cfg.gt):
            raise UserError(f"--{option} has {len(given)} entries, --gt {len(cfg.gt)}: they are matched in order")
    if cfg.speed and not cfg.checkpoint:
        raise UserError("--speed measures a network: it wants --checkpoint")
    if cfg.tta and not cfg.checkpoint:
        raise UserError("--tta mirrors what a network is shown: it wants --checkpoint")


def score_sets(cfg: Config) -> list[tuple[SetScores, Unpaired, list[Item], dict[str, float]]]:
    """The scores of each data set, the names left over, its worst items (the worst first), and the network's speed."""
    sets = []
    for place, (name, gt) in enumerate(zip(names_of(cfg), cfg.gt, strict=True)):
        folders = (Path(of[place]) if of else None for of in (cfg.pred, cfg.image))
        sets.append((SetScores(name), *items_of(Path(gt), *folders)))
    predict, speed = None, {}
    if cfg.checkpoint:
        from u2mamba.inference import (
            maps,  # here, for worker processes import what stands at the top, and torch takes seconds
        )

        predict, line = maps.open_network(Path(cfg.checkpoint), cfg.device, cfg.gpu, cfg.precision, cfg.tta)
        size = input_size(cfg.size, Path(cfg.checkpoint))
        print(f"{line}; {size}x{size}", flush=True)
        if cfg.speed:
            speed = dict(
                zip(("img_s", "memory_GiB"), maps.measure_speed(predict, sets[0][1], size, cfg.batch), strict=True)
            )
    results = []
    images = sum(len(items) for _, items, _ in sets)
    with worker_pool(min(cfg.workers or os.cpu_count() or 1, images)) as pool:
        for scores, items, unpaired in sets:
            source: Iterable[Item] = items
            if predict:
                source = maps.maps_of(items, predict, size, cfg.batch, scores.bad)
            worst = []
            for item, result in tqdm(
                evaluate(source, pool, cfg.stretch), scores.name, len(items), unit="img", disable=None, leave=False
            ):
                scores.add(item.stem, result)
                if cfg.out and not isinstance(result, BadFile):
                    worst = sorted([*worst, (result.iou, -result.mae, item.stem, item)], key=lambda w: w[:3])[:WORST]
            results.append((scores, unpaired, [w[-1] for w in worst], speed))
    return results


def findings(scores: SetScores, unpaired: Unpaired, kind: str) -> list[str]:
    """A line for each finding about the files of a data set; kind: "map" or "image"."""
    flagged = {
        flag: [stem for stem, s in scores.images if getattr(s, flag)] for flag in ("resized", "constant", "empty")
    }
    lines = []
    for names, what in (
        (unpaired.images, f"{kind}s without a mask, set aside"),
        (unpaired.masks, f"masks without {'an image' if kind == 'image' else 'a map'}, set aside"),
        (unpaired.duplicates, "files with the name of another, set aside"),
        ([str(error) for error in scores.bad], "that cannot be used, set aside"),
        (flagged["resized"], "maps of another size than their mask, resized to it"),
        (flagged["constant"], "maps of one value everywhere, used"),
        (flagged["empty"], "masks without an object, used"),
    ):
        if names:
            lines.append(f"{scores.name}: {len(names):,} {what}: {some_of(names)}")
    return lines


def table(summaries: Sequence[dict[str, Any]]) -> str:
    """A column for each data set, a row for each metric."""
    rows = [["", *(s["name"] for s in summaries)], ["images", *(f"{s['n']:,}" for s in summaries)]]
    rows += [[label, *(f"{s[key]:.4f}" for s in summaries)] for key, label in LABELS.items()]
    for key, label in (("img_s", "network, images/s"), ("memory_GiB", "network, peak GiB")):
        if key in summaries[0]:
            rows.append([label, *(f"{s[key]:.4g}" for s in summaries)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def sheet_rows(scores: SetScores, worst: Sequence[Item]) -> list[tuple[str, list[np.ndarray]]]:
    """For `plots.contact_sheet`: the name and scores above image (where there are any), mask and map."""
    of, rows = dict(scores.images), []
    for item in worst:
        mask, prediction = mask_and_map(item)
        found = map_at(prediction, mask.shape)
        pictures = [mask, np.rint(found * 255).astype(np.uint8)]
        if any(w.image for w in worst):
            pictures.insert(0, _photograph(item.image))
        s = of[item.stem]
        rows.append((f"{item.stem[:48]}  IoU {s.iou:.3f}  MAE {s.mae:.3f}  wF {s.wf:.3f}", pictures))
    return rows


def _photograph(path: Path | None) -> np.ndarray:
    try:
        return read_image(path) if path else np.zeros((1, 1), np.uint8)
    except BadFile:  # it is only for showing here
        return np.zeros((1, 1), np.uint8)


def as_csv(rows: Sequence[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode(errors="surrogateescape")


def run(cfg: Config) -> int:
    """The whole evaluation; returns the exit code."""
    check(cfg)
    files = [Path(f) for f in (cfg.json, cfg.csv) if f]
    for folder in dict.fromkeys([f.parent for f in files] + [Path(cfg.out)] * bool(cfg.out)):
        check_folder(folder)
    for file in files:
        if file.is_dir():
            raise UserError(f"{file} is a folder: give the name of a file")

    results = score_sets(cfg)
    summaries = [scores.summary() | speed for scores, _, _, speed in results]
    lines = [line for s, unpaired, _, _ in results for line in findings(s, unpaired, "map" if cfg.pred else "image")]
    print("\n".join([*lines, table(summaries)]), flush=True)

    if cfg.json:
        atomic_write(Path(cfg.json), (json.dumps(summaries, indent=1) + "\n").encode())
    if cfg.csv:
        atomic_write(Path(cfg.csv), as_csv(summaries))
    if cfg.out:
        from u2mamba.inference import plots  # matplotlib: half a second

        out = Path(cfg.out)
        curves = {scores.name: scores.curves() for scores, *_ in results}
        atomic_write(out / "precision_recall.png", plots.precision_recall(curves))
        atomic_write(out / "f_threshold.png", plots.f_against_threshold(curves))
        for scores, _, worst, _ in results:
            keys = ("mae", "wf", "sm", "iou", "empty", "constant", "resized")
            of_images = [{"image": stem} | {k: getattr(s, k) for k in keys} for stem, s in scores.images]
            atomic_write(out / f"{scores.name}_images.csv", as_csv(of_images))
            atomic_write(out / f"{scores.name}_worst.png", plots.contact_sheet(sheet_rows(scores, worst)))
    set_aside = any(scores.bad or any(unpaired) for scores, unpaired, *_ in results)
    return EXIT_SKIPPED if set_aside else EXIT_OK


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))  # so that the worker processes end too
    with one_line_errors():
        sys.exit(run(tyro.cli(Config, description=__doc__, use_underscores=True)))
