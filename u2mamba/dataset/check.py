"""The data check before training: each pair is decoded once, the mask rule is decided, and anomalies are reported.

Files that cannot be used are skipped and named; none of them stops the run.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from u2mamba.dataset.decode import BadFile, Pair, open_pair
from u2mamba.dataset.masks import GRAY, IDENTITY, OBJECT, MaskKind, MaskRule, decide, table
from u2mamba.dataset.pairs import truncate_list
from u2mamba.dataset.rescale import rescale_image, rescale_mask
from u2mamba.runtime.workers import ordered_map

if TYPE_CHECKING:
    from u2mamba.dataset.cache import PairCache


@dataclass
class DataReport:
    """What the check found. `unusable` pairs are skipped; the rest of the report is about usable ones."""

    usable: list[int] = field(default_factory=list)  # indices
    checksums: list[int] = field(default_factory=list)  # of the two files of each usable pair
    unusable: list[str] = field(default_factory=list)  # file names and reasons
    retry: bool = False  # the next start may be able to read some of them
    rule: MaskRule = GRAY  # how the masks are read
    values: list[int] = field(default_factory=lambda: [255, 0])  # value range of the mask files
    found: dict[str, list[str]] = field(default_factory=dict)  # key of FINDINGS -> file names

    def lines(self) -> list[str]:
        """What is printed: one line per finding."""
        pairs, empty, out = len(self.usable), len(self.found.get("empty", [])), []
        if pairs:
            low, high = self.values
            out.append(f"data: {pairs:,} pairs, mask values {low}-{high}, {empty:,} empty masks")
        if self.rule.line:
            out.append(self.rule.line)
        view = "stored, as other pairs show" if self.rule.as_stored else "displayed"
        drawn = f"where shapes are inconclusive, masks count as drawn on the image as {view}"
        for key, names in {"skipped": self.unusable, **self.found}.items():
            if names and len(names) >= MIN_FRACTION.get(key, 0) * pairs:
                out.append(f"{FINDINGS[key].format(f'{len(names):,}', drawn=drawn)}: {truncate_list(names)}")
        return out


MIN_FRACTION = {"inverted": 0.1, "gray": 0.5}  # of the pairs, from which a finding is reported
FINDINGS = {
    "skipped": "warning: skipped {} pairs that are unreadable or do not match",
    "resized": "data: {} masks differ from their image in size, but not in aspect ratio",
    "other": "masks: {} of another, but unambiguous kind are used too",
    "empty": "data: {} masks are empty",
    "white": "warning: {} masks are all object, without background",
    "inverted": "warning: {} masks are object along most of the border: object and background seem swapped",
    "vanished": "warning: {} masks are empty at training size: their objects are too small",
    "trimap": "warning: {} masks are trimaps (0, 128, 255): 128 is trained as probability 0.5",
    "untagged": "warning: {} images have an EXIF orientation, but their masks do not; {drawn}",
    "gray": "warning: {} masks are gray-level images: are the image and mask folders swapped?",
}


class _Visit(NamedTuple):
    """What one pair contributes to the report."""

    checksum: int
    kind: MaskKind
    border: np.ndarray  # (256,) pixels of each value of the mask along its border
    top: int  # largest value at training size
    resized: bool
    untagged: str


def check_pairs(
    pairs: Sequence[Pair],
    size: int = 320,
    store: PairCache | None = None,
    log: Callable[[str], None] = lambda line: None,
    threads: int = 8,
) -> DataReport:
    """Decodes every pair once, decides how the masks are read, and reports anomalies at size x size pixels.

    store: the cache, filled here so that no file is decoded twice, from several threads (decoding and rescaling
    release the GIL); its first rows hold the usable pairs. Progress goes to `log`. Raises DataError where the masks are
    label maps.
    """

    def visit(index: int, as_stored: bool = False) -> _Visit | BadFile:
        pair = pairs[index]
        try:
            with open_pair(pair, as_stored) as (image, mask, resized, untagged):
                small = rescale_mask(mask.values, size)
                if store:
                    store.images[index].numpy()[:] = rescale_image(image, size)
                    store.masks[index].numpy()[:] = small
                edges = np.concatenate([mask.values[[0, -1]].ravel(), mask.values[:, [0, -1]].ravel()])
            checksum = zlib.crc32(pair.mask.read_bytes(), zlib.crc32(pair.image.read_bytes()))
            return _Visit(checksum, mask.kind, np.bincount(edges, minlength=256), int(small.max()), resized, untagged)
        except BadFile as error:
            return error
        except (OSError, MemoryError) as error:
            return BadFile(pair.image, getattr(error, "strerror", None) or "does not fit into memory", retry=True)

    visits: dict[int, _Visit] = {}
    report, bad = DataReport(), {}
    start = last_log = time.monotonic()
    threads = min(32, threads)
    for index, visited in ordered_map(visit, range(len(pairs)), threads, ahead=2 * threads):
        (bad if isinstance(visited, BadFile) else visits)[index] = visited
        if (now := time.monotonic()) - last_log > 10:
            last_log = now
            log(f"data: {index + 1:,} of {len(pairs):,} pairs read, {(index + 1) / (now - start):.0f} pairs/s")

    drawn = {visited.untagged for visited in visits.values()}
    report.rule = decide([visited.kind for visited in visits.values()], "stored" in drawn and "seen" not in drawn)
    for index, visited in visits.items():
        kind, row = visited.kind, len(report.usable)
        lookup = table(kind, report.rule)
        if isinstance(lookup, str):
            bad[index] = BadFile(pairs[index].mask, lookup)
            continue
        if store:
            if visited.untagged == "unknown" and report.rule.as_stored:
                visit(index, as_stored=True)
            if row != index or lookup is not IDENTITY:
                store.images[row] = store.images[index]
                store.masks[row].numpy()[:] = lookup[store.masks[index].numpy()]
        report.usable.append(index)
        report.checksums.append(visited.checksum)
        levels = np.flatnonzero(kind.counts)
        report.values = [min(report.values[0], int(levels[0])), max(report.values[1], int(levels[-1]))]
        object_, border = (int(h[lookup > OBJECT].sum()) / int(h.sum()) for h in (kind.counts, visited.border))
        soft = kind.counts[(lookup > 63) & (lookup < 192)].sum() / kind.counts.sum()
        facts = {
            "resized": visited.resized,
            "other": kind.name not in (report.rule.name, "empty") and kind.clear,
            "empty": not object_,
            "white": object_ == 1,
            "inverted": object_ < 1 and border > 0.5,
            "vanished": object_ and lookup[visited.top] <= OBJECT,
            "trimap": soft and {*lookup[levels].tolist()} in ({0, 127, 255}, {0, 128, 255}),
            "untagged": bool(visited.untagged),
            "gray": soft > 0.2,
        }
        for key, is_so in facts.items():
            if is_so:
                report.found.setdefault(key, []).append(pairs[index].mask.name)
    report.unusable = [f"{bad[index].path.name} ({bad[index].reason})" for index in sorted(bad)]
    report.retry = any(error.retry for error in bad.values())
    return report
