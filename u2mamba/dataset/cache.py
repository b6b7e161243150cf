"""The pairs at training size, as bytes in memory: 320x320 pixels take 0.41 MB per pair, 4.3 GB for all of DUTS-TR.

They are also stored next to the data, so that the next start reads instead of decoding: a file of NumPy arrays, with
checksums and the data report. A key in its name covers what it depends on: names, sizes and modification times of the
data files, and the code that decodes and rescales.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from u2mamba.dataset import check, decode, image_file, masks, rescale
from u2mamba.dataset.check import DataReport, check_pairs
from u2mamba.dataset.decode import MEAN, Pair
from u2mamba.dataset.masks import MaskRule
from u2mamba.runtime.cores import granted_cores
from u2mamba.runtime.files import replacing
from u2mamba.runtime.source import source_checksum

CODE = check, decode, image_file, masks, rescale  # modules that decide what is in the cache
DISK_MARGIN = 1 << 30  # bytes that must stay free on the disk


def format_bytes(count: int) -> str:
    """ "4.3 GB", "59 MB"."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


@dataclass(eq=False)
class PairCache:
    """Pairs at training size, uint8; masks are 0 background to 255 object."""

    images: torch.Tensor  # (N, size, size, 3)
    masks: torch.Tensor  # (N, size, size)

    @classmethod
    def empty(cls, count: int, size: int) -> PairCache:
        return cls(*(torch.empty((count, size, size, *c), dtype=torch.uint8) for c in ((len(MEAN),), ())))

    @staticmethod
    def bytes_for(count: int, size: int) -> int:
        return count * size * size * (len(MEAN) + 1)


def cache_path(folder: Path, pairs: Sequence[Pair], size: int) -> Path:
    """The file for these pairs: `.cache_<size>_<folders>_<key>.npy`."""
    key = zlib.crc32(repr([source_checksum(Path(module.__file__)) for module in CODE]).encode())
    files = [path for pair in pairs for path in (pair.image, pair.mask)]
    for path in files:
        line = path.name
        with contextlib.suppress(OSError):
            status = path.stat()
            line += f" {status.st_size} {status.st_mtime_ns}"
        key = zlib.crc32(f"{line}\n".encode(errors="surrogateescape"), key)
    # names only, so that a data folder that was moved finds its cache
    folders = "|".join(sorted({path.parent.name for path in files})).encode(errors="surrogateescape")
    return folder / f".cache_{size}_{zlib.crc32(folders):08x}_{key:08x}.npy"


def _store(cache: PairCache, path: Path, report: DataReport, log: Callable[[str], None]) -> None:
    """Saves the cache and deletes older ones of the same folders; if that fails, one line says why."""
    need = PairCache.bytes_for(len(cache.images), cache.images.shape[1])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob(f"{path.name.rsplit('_', 1)[0]}_*"):
            if old.suffix != ".tmp":  # version 0.1.0 wrote .u8
                old.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < need + DISK_MARGIN:
            needed = f"{format_bytes(need)} plus a margin of {format_bytes(DISK_MARGIN)}"
            raise OSError(errno.ENOSPC, f"{format_bytes(free)} free, but it requires {needed}")
        text = np.frombuffer(json.dumps(asdict(report)).encode(), np.uint8)
        arrays = [text, cache.images.numpy(), cache.masks.numpy()]
        with replacing(path) as file:
            for array in ([zlib.crc32(array) for array in arrays], *arrays):
                np.save(file, array)
        log(f"cache: stored as {path}")
    except OSError as error:
        log(f"cache: not stored on disk: {error.strerror or error} ({path.parent})")


def _load(path: Path) -> tuple[PairCache, DataReport]:
    """What `_store` stored. Raises FileNotFoundError, or ValueError and others for a damaged file."""
    with open(path, "rb") as file:
        checksums, *arrays = (np.load(file) for _ in range(4))
    if [zlib.crc32(array) for array in arrays] != checksums.tolist():
        raise ValueError("a checksum does not match")
    text, images, masks = arrays
    report = DataReport(**json.loads(text.tobytes()))
    report.rule = MaskRule(*report.rule)
    return PairCache(torch.from_numpy(images), torch.from_numpy(masks)), report


def cached_pairs(
    pairs: Sequence[Pair], folder: Path, size: int, log: Callable[[str], None]
) -> tuple[PairCache, DataReport]:
    """The usable ones of `pairs` in memory, read from a stored cache in `folder` or decoded and stored there."""
    path, start = cache_path(folder, pairs, size), time.perf_counter()
    with contextlib.suppress(OSError):
        for left in folder.glob(".cache_*.tmp"):  # of a killed process, unless it is recent
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink()
    try:
        cache, report = _load(path)
        log(f"cache: read from {path} in {time.perf_counter() - start:.1f} s")
        return cache, report
    except FileNotFoundError:
        pass
    except Exception as error:  # NumPy's reader raises EOFError, ValueError, MemoryError, ...
        log(f"cache: {path} is damaged ({error}); rebuilding")
    cache = PairCache.empty(len(pairs), size)
    report = check_pairs(pairs, size, cache, log, granted_cores())
    seconds = time.perf_counter() - start
    log(f"cache: filled in {seconds:.1f} s, {len(pairs) / seconds:.0f} pairs/s")
    count = len(report.usable)
    cache = PairCache(cache.images[:count], cache.masks[:count])
    if report.retry:
        log("cache: not stored on disk, because the next start may be able to read more files")
    else:
        _store(cache, path, report, log)
    return cache, report
