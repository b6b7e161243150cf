"""The pairs at training size, as bytes in memory: 320x320 pixels are 0.41 MB a pair, 4.3 GB for all of DUTS-TR.

They are also stored in one file beside the data, so that the next start reads instead of decoding. The rescaling is
RescaleT's: `skimage.transform.resize` is linear and works on one axis at a time, so it is two products with small
sparse matrices, which are read off skimage itself. 1.2 ms instead of 30 ms for a 400x300 image on one core.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from scipy import sparse
from scipy.ndimage import gaussian_filter1d
from skimage.transform import resize

from u2mamba.dataset.pairs import Pair, Report, Unpaired, check_pairs, is_file

MEMORY_SHARE = 0.8  # of the free memory, at most, goes to the cache
DISK_MARGIN = 1 << 30  # bytes that stay free on the disk
BLOCK = 1 << 22  # pixels that are rescaled at once, 50 MB of floats
CHUNK = 1 << 26  # bytes; one check sum each, read and checked in parallel
MAGIC = b"U2CACHE3"  # change it when reading or rescaling changes what the file should hold
HEADER_ROOM = 1 << 12  # the pixels begin at a multiple of this


# --------------------------------------------------------------------------------------------------- rescaling


@functools.lru_cache(maxsize=4096)
def axis_operator(length: int, size: int) -> sparse.csr_array:
    """What `skimage.transform.resize(..., mode="constant")` does along one axis: (size, length) float32, sparse.

    skimage is shown combs of impulses, wider apart than its interpolation reaches, so that each of its answers is the
    weight of one known input. The low-pass filter that it applies before is scipy's, cut off at 4 deviations.
    """
    period = 4  # interpolation takes two neighbours
    combs = np.zeros((length, period))
    combs[np.arange(length), np.arange(length) % period] = 1
    weights = resize(combs, (size, period), mode="constant", anti_aliasing=False)
    rows, phase = np.arange(size)[:, None], np.arange(period)
    centre = (rows + 0.5) * length / size - 0.5
    columns = phase + period * np.rint((centre - phase) / period).astype(np.int64)
    deviation = max(0.0, (length / size - 1) / 2)
    reach = int(4 * deviation + 0.5)
    impulse = np.zeros(2 * reach + 1)
    impulse[reach] = 1
    low_pass = gaussian_filter1d(impulse, deviation, mode="constant") if reach else impulse
    weights, columns = weights[..., None] * low_pass, columns[..., None] + np.arange(-reach, reach + 1)
    used = (weights != 0) & (columns >= 0) & (columns < length)
    rows = np.broadcast_to(rows[..., None], used.shape)
    return sparse.csr_array(  # which adds up what falls into the same place
        (weights[used], (rows[used], columns[used])), shape=(size, length)
    ).astype(np.float32)


@functools.lru_cache(maxsize=4096)
def axis_index(length: int, size: int) -> np.ndarray:
    """Which input each output takes in skimage's resize of order 0 along one axis: (size,) int64."""
    ramp = np.arange(length, dtype=np.int32)[:, None]
    return resize(ramp, (size, 1), order=0, mode="constant", preserve_range=True)[:, 0].astype(np.int64)


def rescale_image(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (size, size, 3) uint8, RescaleT's picture to half a step of rounding."""
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    down, across = axis_operator(height, size), axis_operator(width, size)
    rows = np.zeros((size, width * 3), np.float32)
    step = max(1, BLOCK // width)
    for top in range(0, height, step):  # a 48-megapixel image as float32 would be 0.6 GB a thread
        block = image[top : top + step].reshape(-1, width * 3).astype(np.float32)
        rows += (down if height <= step else down[:, top : top + step]) @ block
    columns = across @ rows.reshape(size, width, 3).swapaxes(0, 1).reshape(width, size * 3)
    # skimage clips to the range of its input; it matters at the border, where mode="constant" mixes in black
    out = np.rint(columns).clip(image.min(), image.max()).astype(np.uint8)
    return np.ascontiguousarray(out.reshape(size, size, 3).swapaxes(0, 1))


def rescale_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """(H, W) uint8 -> (size, size) uint8, exactly RescaleT's (order 0)."""
    if mask.shape == (size, size):
        return mask
    return mask[axis_index(mask.shape[0], size)[:, None], axis_index(mask.shape[1], size)]


# ------------------------------------------------------------------------------------------------------ memory


def available_memory() -> int:
    """Bytes of memory that can be taken without swapping; a container's limit counts."""
    if sys.platform == "win32":
        status = (ctypes.c_ulonglong * 8)()  # MEMORYSTATUSEX: two 32-bit fields, then seven of 64 bits
        ctypes.cast(status, ctypes.POINTER(ctypes.c_uint32))[0] = ctypes.sizeof(status)
        ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
        return int(status[2])  # ullAvailPhys
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2  # macOS: half of what is built in
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    for root, limit, used in (  # control groups, version 2 and version 1; memory held by files can be had back
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            counts = dict(line.split() for line in Path(root, "memory.stat").read_text().splitlines())
            files = int(counts.get("inactive_file", 0))
            free = min(free, int(Path(root, limit).read_text()) - int(Path(root, used).read_text()) + files)
        except (OSError, ValueError):  # not there, or "max"
            continue
    return max(0, free)


def in_words(count: int) -> str:
    """Bytes for people: "4.3 GB", "59 MB"."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


# ------------------------------------------------------------------------------------------------------- cache


def _chunks(*arrays: np.ndarray) -> list[memoryview]:
    flat = [memoryview(array.reshape(-1)) for array in arrays]
    return [part[at : at + CHUNK] for part in flat for at in range(0, len(part), CHUNK)]


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1))


class PairCache:
    """`images` (N, size, size, 3) and `masks` (N, size, size), uint8 tensors; masks are 0 background to 255 object."""

    def __init__(self, images: torch.Tensor, masks: torch.Tensor):
        self.images, self.masks = images, masks

    @classmethod
    def empty(cls, count: int, size: int) -> PairCache:
        """Room for `count` pairs."""
        return cls(
            torch.empty((count, size, size, 3), dtype=torch.uint8), torch.empty((count, size, size), dtype=torch.uint8)
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: slice) -> PairCache:
        return PairCache(self.images[rows], self.masks[rows])

    @staticmethod
    def bytes_for(count: int, size: int) -> int:
        """Memory that `count` pairs take."""
        return count * size * size * 4

    def put(self, index: int, image: np.ndarray, mask: np.ndarray) -> None:
        """Rescale a decoded pair into its place; may be called from several threads."""
        size = self.images.shape[1]
        self.images[index].numpy()[:] = rescale_image(image, size)
        self.masks[index].numpy()[:] = rescale_mask(mask, size)

    def only(self, good: Sequence[int]) -> PairCache:
        """The pairs at the ascending places `good`, moved together in the same memory."""
        for place, index in enumerate(good):
            if place != index:
                self.images[place], self.masks[place] = self.images[index], self.masks[index]
        return self[: len(good)]

    def save(self, path: Path, about: dict) -> None:
        """Write to a temporary name, flush, rename. `about`: what `load` gives back. Raises OSError."""
        chunks = _chunks(self.images.numpy(), self.masks.numpy())
        with _threads() as pool:
            sums = list(pool.map(zlib.crc32, chunks))
        header = json.dumps({"shape": list(self.masks.shape), "sums": sums, "about": about}).encode()
        head = MAGIC + len(header).to_bytes(4, "little") + zlib.crc32(header).to_bytes(4, "little") + header
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(head.ljust(-(-len(head) // HEADER_ROOM) * HEADER_ROOM, b"\0"))
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> tuple[PairCache, dict]:
        """Read a stored cache into memory -> (cache, about). Raises OSError, or ValueError for a damaged file."""
        with open(path, "rb") as file:
            start = file.read(16)
            length, checksum = int.from_bytes(start[8:12], "little"), int.from_bytes(start[12:], "little")
            header = file.read(length)
        if start[:8] != MAGIC or len(header) != length or zlib.crc32(header) != checksum:
            raise ValueError("header damaged")
        told = json.loads(header)
        cache = cls.empty(*told["shape"][:2])
        chunks = _chunks(cache.images.numpy(), cache.masks.numpy())
        offset = -(-(16 + length) // HEADER_ROOM) * HEADER_ROOM
        if path.stat().st_size != offset + sum(map(len, chunks)) or len(told["sums"]) != len(chunks):
            raise ValueError("cut short")
        offsets = np.cumsum([offset, *map(len, chunks)]).tolist()

        def read(number: int) -> bool:
            with open(path, "rb", buffering=0) as file:
                file.seek(offsets[number])
                got = 0
                while got < len(chunks[number]):  # one read gives at most 2 GB, and less where it pleases
                    more = file.readinto(chunks[number][got:])
                    if not more:
                        return False
                    got += more
            return zlib.crc32(chunks[number]) == told["sums"][number]

        with _threads() as pool:
            if not all(pool.map(read, range(len(chunks)))):
                raise ValueError("check sum differs")
        return cache, told["about"]


def cache_path(folder: Path, pairs: Sequence[Pair], size: int) -> Path:
    """The file for these pairs: `.cache_<size>_<folders>_<key>.u8`; the key is of all names, sizes and change times."""
    key = zlib.crc32(MAGIC)
    stats: dict[Path, dict[str, os.stat_result]] = {}
    for parent in {path.parent for pair in pairs for path in pair[1:]}:
        with os.scandir(parent) as entries:  # on Windows the entries bring their figures along
            stats[parent] = {entry.name: entry.stat() for entry in entries if is_file(entry)}
    for pair in pairs:
        for path in pair[1:]:
            stat = stats[path.parent].get(path.name)  # a file that has gone since is found out by the check
            about = f"{stat.st_size} {stat.st_mtime_ns}" if stat else "gone"
            key = zlib.crc32(f"{path.name} {about}\n".encode(errors="surrogateescape"), key)
    # names only, so that a data folder that was moved finds its cache
    homes = "|".join(path.parent.name if path.parent.parent == folder else str(path.parent) for path in pairs[0][1:])
    return folder / f".cache_{size}_{zlib.crc32(homes.encode(errors='surrogateescape')):08x}_{key:08x}{len(pairs):x}.u8"


def store(cache: PairCache, path: Path, about: dict, say: Callable[[str], None]) -> None:
    """Save the cache and remove what it replaces; where that cannot be, one line says why and training goes on."""
    old = path.name.rsplit("_", 1)[0]
    need = PairCache.bytes_for(len(cache), cache.images.shape[1])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for other in path.parent.glob(f"{old}_*.u8"):
            other.unlink()
        free = shutil.disk_usage(path.parent).free
        if free < need + DISK_MARGIN:
            say(
                f"cache: not stored on disk, {in_words(free)} free in {path.parent}, {in_words(need)} needed "
                f"and {in_words(DISK_MARGIN)} to stay free"
            )
            return
        cache.save(path, about)
        say(f"cache: stored as {path}")
    except OSError as error:
        say(f"cache: not stored on disk: {error.strerror or error} ({path.parent})")


def remove_old_parts(folder: Path) -> None:
    """What processes left that were killed while they stored a cache; a fresh one may be that of a living process."""
    with contextlib.suppress(OSError):
        for part in folder.glob(".cache_*.tmp"):
            if time.time() - part.stat().st_mtime > 3600:
                part.unlink()


def cached_pairs(
    pairs: list[Pair], unpaired: Unpaired, folder: Path, size: int, say: Callable[[str], None]
) -> tuple[PairCache, list[int], Report]:
    """Read from disk, or checked and filled: the cache of the usable pairs, their indices in `pairs`, the report."""
    path, started = cache_path(folder, pairs, size), time.perf_counter()
    remove_old_parts(folder)
    try:
        kept, about = PairCache.load(path)
        report = Report(**{**about["report"], "bad": [tuple(entry) for entry in about["report"]["bad"]]})
        report.unpaired_images, report.unpaired_masks, report.duplicates, report.others = map(list, unpaired)
        aside = sorted(set(range(len(pairs))) - set(about["good"]))
        mended, _ = check_pairs([pairs[index] for index in aside])  # a permission changes without the file's time
        if not mended:
            say(f"cache: read from {path} in {time.perf_counter() - started:.1f} s")
            return kept, about["good"], report
        say(f"cache: {len(mended):,} pairs that were set aside can be read now; made again")
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        say(f"cache: {path} is damaged ({error}); made again")
    kept = PairCache.empty(len(pairs), size)
    good, report = check_pairs(pairs, unpaired, keep=kept.put, say=say)
    seconds = time.perf_counter() - started
    say(f"cache: filled in {seconds:.1f} s, {len(pairs) / seconds:.0f} pairs a second")
    kept = kept.only(good)
    store(kept, path, {"good": good, "report": asdict(report)}, say)
    return kept, good, report
