"""How the masks of a dataset are read: one rule for all of them, decided from all of them.

Each file has a kind of its own (`classify`). The kind of the majority is the rule of the set (`decide`). The rule reads
each file by a table of 256 entries (`table`), so that masks that were already resized need not be decoded again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from u2mamba.dataset.image_file import BadFile, DataError

OBJECT = 128  # values above are object, as in PySODMetrics
MAX_CLASS = 20  # label maps have class indices up to here (VOC); gray levels of an object are brighter
MAX_SOFT = 0.05  # max. fraction of gray pixels in a mask of 0 and 255; no mask of DUTS-TR exceeds it
IDENTITY = np.arange(256, dtype=np.uint8)
FIX = "convert to 0 (background) and 255 (object)"


class MaskKind(NamedTuple):
    """What one mask file holds. name: "gray"; "alpha" (a cut-out); "value" (0 and one dark value); "labels"; "empty"
    (all 0, which every rule reads the same way)."""

    name: str
    values: str  # the first few, for messages
    counts: np.ndarray  # (256,) pixels of each value
    clear: bool  # unambiguous: 0 and 255, or an alpha channel with a shape
    flat: bool  # indices, or regions of constant values up to MAX_CLASS
    full_range: int  # of the file's values: 255, or 1023 to 65535 where it has 16 bits
    alpha: int  # of an alpha channel without a shape: 0 (transparent) or 255 (opaque); -1: there is none


class MaskRule(NamedTuple):
    """How a dataset's masks are read. line: printed; as_stored: masks without EXIF tag are drawn on stored images."""

    name: str
    full_range: int = 255
    as_stored: bool = False
    line: str = ""


GRAY = MaskRule("gray")


def is_flat(values: np.ndarray) -> bool:
    """Whether (H, W) uint8 has regions of constant values, as labels do; noise changes from pixel to pixel."""
    edges = np.count_nonzero(values[:, 1:] != values[:, :-1]) + np.count_nonzero(values[1:] != values[:-1])
    return edges < np.count_nonzero(values)


def classify(values: np.ndarray, source: str, full_range: int = 255, alpha: int = -1) -> MaskKind:
    """The kind of a (H, W) uint8. source: "gray", "alpha" or "labels" (indices of a palette or of flat colors)."""
    counts = np.array(Image.fromarray(values).histogram())  # five times as fast as np.bincount
    levels = np.flatnonzero(counts)
    top, single = int(levels[-1]), np.count_nonzero(levels) == 1
    dark, name, flat = counts[1 : MAX_CLASS + 1].sum(), source, source == "labels"
    if source == "gray" and dark > MAX_SOFT * counts[255] and dark + counts[0] + counts[255] == values.size:
        flat = is_flat(values * (values <= MAX_CLASS))  # not the object's own edges
        name = "labels" if flat else "gray"
    if top == 0:
        name = "empty"
    elif name != "alpha" and single and (name == "labels" or (top <= OBJECT and levels[0] == 0)):
        name = "value"
    soft = counts[64:192].sum() > MAX_SOFT * values.size
    clear = name == "alpha" or (name == "gray" and top > OBJECT and not soft)
    text = ", ".join(map(str, levels[:6])) + (", ..." if len(levels) > 6 else "")
    return MaskKind(name, text, counts, clear, flat, full_range, alpha)


def decide(kinds: Iterable[MaskKind], as_stored: bool = False) -> MaskRule:
    """The rule of a dataset: the kind of most of its files. Raises DataError if these are label maps."""
    kinds = list(kinds)
    # next to bright gray levels, a single dark value above MAX_CLASS is a gray level too
    graded = any(kind.name == "gray" and kind.counts[OBJECT + 1 :].any() for kind in kinds)
    names = ["gray" if graded and kind.name == "value" and not kind.flat else kind.name for kind in kinds]
    votes = Counter(name for name in names if name != "empty")
    name = votes.most_common(1)[0][0] if votes else "gray"
    example = next((kind.values for kind in kinds if kind.name == name), "0")
    count = f"{votes[name] + len(kinds) - sum(votes.values()):,} of {len(kinds):,}"
    if name == "labels":
        raise DataError(f"masks: {count} are label maps ({example}), not masks of one object; {FIX}")
    same = len({kind.values for kind in kinds if kind.name == name}) == 1
    text = {
        "gray": "gray levels, 0 to 255",
        "alpha": "alpha channel of RGBA cut-outs",
        "value": f"values {example.replace(', ', ' and ') if same else '0 and one other'}, scaled to 0 and 255",
    }[name]
    full_range = max((kind.full_range for kind in kinds), default=255)
    return MaskRule(name, full_range, as_stored, f"masks: {text}, {count}" if kinds else "")


def table(kind: MaskKind, rule: MaskRule) -> np.ndarray | str:
    """(256,) uint8 that maps a file's values to 0 (background) ... 255 (object), or why the rule cannot read it."""
    if rule.name == "alpha" and kind.alpha >= 0:
        return np.full(256, kind.alpha, np.uint8)
    if kind.name in ("alpha", "empty"):
        return IDENTITY
    if kind.name == "value" and rule.name == "value":
        return np.where(IDENTITY > 0, np.uint8(255), np.uint8(0))
    if kind.name == "labels":
        return f"is a label map ({kind.values}), not a mask; {FIX}"
    if (rule.name == "gray" and not kind.flat) or kind.clear:
        if kind.full_range in (255, rule.full_range):
            return IDENTITY
        return np.rint(IDENTITY * (kind.full_range / rule.full_range)).astype(np.uint8)
    return f"holds {kind.values}, which is ambiguous, unlike the other masks of the dataset; {FIX}"


class RawMask(NamedTuple):
    """A mask file as stored: values (H, W) uint8, upright, and their kind. `by` makes it a mask."""

    path: Path
    values: np.ndarray
    kind: MaskKind

    def by(self, rule: MaskRule | None) -> np.ndarray:
        """(H, W) uint8, 0 background to 255 object, by the rule of its set, or by itself. Raises BadFile."""
        if rule is None:
            rule = MaskRule(self.kind.name, self.kind.full_range)
        lookup = table(self.kind, rule)
        if isinstance(lookup, str):
            raise BadFile(self.path, lookup)
        return self.values if lookup is IDENTITY else lookup[self.values]
