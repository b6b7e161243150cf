"""The pairs at training size, as bytes in memory: 320x320 pixels take 0.41 MB per pair, 4.3 GB for all of DUTS-TR.

They are also stored next to the data, so that the next start reads instead of decoding: a file of plain bytes (all
images, then all masks) and a small JSON file with its checksum and the data report. A key in their names covers
what they depend on: names, sizes and modification times of the data files, and the code that decodes and rescales.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from u2mamba.dataset import check, decode, image_file, masks, rescale
from u2mamba.dataset.check import DataReport, check_pairs
from u2mamba.dataset.decode import MEAN, BadFile, Pair, open_pair
from u2mamba.dataset.masks import MaskRule
from u2mamba.runtime.cores import granted_cores
from u2mamba.runtime.files import replacing
from u2mamba.runtime.source import source_checksum

CODE = check, decode, image_file, masks, rescale  # modules that decide what is in the cache
DISK_MARGIN = 1 << 30  # bytes that must stay free on the disk


def format_bytes(count: int) -> str:
    """ "4.3 GB", "59 MB"."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


class PairCache:
    """`images` (N, size, size, 3) and `masks` (N, size, size), uint8 tensors; masks are 0 background to 255 object."""

    def __init__(self, images: torch.Tensor, masks: torch.Tensor):
        self.images, self.masks = images, masks

    @classmethod
    def empty(cls, count: int, size: int) -> PairCache:
        return cls(*(torch.empty((count, size, size, *c), dtype=torch.uint8) for c in ((len(MEAN),), ())))

    @staticmethod
    def bytes_for(count: int, size: int) -> int:
        return count * size * size * (len(MEAN) + 1)

    def keep_rows(self, rows: Sequence[int]) -> PairCache:
        """The pairs of the ascending `rows`, compacted in place."""
        for place, row in enumerate(rows):
            if place != row:
                self.images[place], self.masks[place] = self.images[row], self.masks[row]
        return PairCache(self.images[: len(rows)], self.masks[: len(rows)])

    def save(self, path: Path, report: DataReport) -> None:
        """Writes `path` and, once that is complete, the JSON file that makes it valid. Raises OSError."""
        metadata = {"shape": self.masks.shape, "report": asdict(report)}
        metadata["checksum"] = _checksum(metadata, self.images.numpy(), self.masks.numpy())
        with replacing(path) as file:
            file.writelines((self.images.numpy(), self.masks.numpy()))
        with replacing(path.with_suffix(".json")) as file:
            file.write(json.dumps(metadata).encode())

    @classmethod
    def load(cls, path: Path) -> tuple[PairCache, DataReport]:
        """Raises FileNotFoundError, or ValueError and others for damaged files."""
        metadata = json.loads(path.with_suffix(".json").read_bytes())
        checksum, pixels = metadata.pop("checksum"), np.fromfile(path, np.uint8)
        if _checksum(metadata, pixels) != checksum:
            raise ValueError("its checksum does not match")
        count, size, _ = metadata["shape"]
        images, masks = torch.from_numpy(pixels).split([count * size * size * len(MEAN), count * size * size])
        report = DataReport(**metadata["report"])
        report.unusable, report.values = [tuple(entry) for entry in report.unusable], tuple(report.values)
        report.rule = MaskRule(*report.rule)
        return cls(images.view(count, size, size, len(MEAN)), masks.view(count, size, size)), report


def _checksum(metadata: dict, *pixels: np.ndarray) -> int:
    checksum = zlib.crc32(json.dumps(metadata).encode())
    for part in pixels:
        checksum = zlib.crc32(part, checksum)
    return checksum


def cache_path(folder: Path, pairs: Sequence[Pair], size: int) -> Path:
    """The file for these pairs: `.cache_<size>_<folders>_<key>.u8`."""
    key = zlib.crc32(repr([source_checksum(Path(module.__file__)) for module in CODE]).encode())
    files = [path for pair in pairs for path in (pair.image, pair.mask)]
    folders = sorted({path.parent for path in files})
    for path in files:
        line = f"{path.name} removed\n"
        with contextlib.suppress(OSError):
            line = f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}\n"
        key = zlib.crc32(line.encode(errors="surrogateescape"), key)
    # the names of the folders only, so that a data folder that was moved finds its cache
    where = "|".join(f.name if f.parent == folder else str(f) for f in folders).encode(errors="surrogateescape")
    return folder / f".cache_{size}_{zlib.crc32(where):08x}_{key:08x}{len(pairs):x}.u8"


def _store(cache: PairCache, path: Path, report: DataReport, log: Callable[[str], None]) -> None:
    """Saves the cache in place of an older one of the same folders; if that fails, one line says why."""
    need = PairCache.bytes_for(len(cache.images), cache.images.shape[1])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob(f"{path.name.rsplit('_', 1)[0]}_*"):
            if old.suffix in (".json", ".u8"):
                old.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < need + DISK_MARGIN:
            needed = f"{format_bytes(need)} plus a margin of {format_bytes(DISK_MARGIN)}"
            log(f"cache: not stored on disk: {path.parent} has {format_bytes(free)} free, but it requires {needed}")
            return
        cache.save(path, report)
        log(f"cache: stored as {path}")
    except OSError as error:
        log(f"cache: not stored on disk: {error.strerror or error} ({path.parent})")


def _remove_leftovers(folder: Path) -> None:
    """Removes temporary files of processes that were killed; a recent one may belong to a running process."""
    with contextlib.suppress(OSError):
        for part in folder.glob(".cache_*.tmp"):
            if time.time() - part.stat().st_mtime > 3600:
                part.unlink()


def _is_readable(pair: Pair) -> bool:
    """For pairs that were skipped: fixing permissions does not change a file's time."""
    with contextlib.suppress(BadFile), open_pair(pair):
        return True
    return False


def cached_pairs(
    pairs: Sequence[Pair], folder: Path, size: int, log: Callable[[str], None]
) -> tuple[PairCache, DataReport]:
    """The usable ones of `pairs` in memory, read from a stored cache in `folder` or decoded and stored there."""
    path, start = cache_path(folder, pairs, size), time.perf_counter()
    _remove_leftovers(folder)
    try:
        cache, report = PairCache.load(path)
        readable = sum(_is_readable(pairs[k]) for k in {*range(len(pairs))}.difference(report.usable, report.misread))
        if not readable:
            log(f"cache: read from {path} in {time.perf_counter() - start:.1f} s")
            return cache, report
        log(f"cache: {readable:,} pairs that were skipped are readable now; rebuilding")
        del cache
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log(f"cache: {path} is damaged ({error}); rebuilding")
    cache = PairCache.empty(len(pairs), size)
    report = check_pairs(pairs, size, cache, log, granted_cores())
    seconds = time.perf_counter() - start
    log(f"cache: filled in {seconds:.1f} s, {len(pairs) / seconds:.0f} pairs/s")
    cache = cache.keep_rows(report.usable)
    _store(cache, path, report, log)
    return cache, report
