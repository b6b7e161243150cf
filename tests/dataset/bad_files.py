"""Odd and damaged image files made from real photos, each with what reading it must give.

Pillow writes the common ones, tifffile the TIFFs that Pillow cannot, and the rest is put together from bytes. What is
expected is the photo itself, never another reading of the file, except where a lossy coder stands between.
"""

from __future__ import annotations

import functools
import io
import itertools
import os
import socket
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import skimage.data
import tifffile
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from u2mamba.dataset.decode import BadFile, read_image

ORIENTATION = 0x0112  # EXIF
LOSSY = 45  # largest step between a photo and a lossy file of it at quality 95 without subsampling; mean below 3


class Case(NamedTuple):
    """A file's name and content. `pixels` (H, W, 3) uint8: what it shows, to `step`; None: not known.

    `outcome`: "read" (as pixels), "skip", "whole" (skip, or read as pixels) or "either" (skip, or any image).
    """

    name: str
    content: bytes
    pixels: np.ndarray | None = None
    step: int = 0
    outcome: str = "read"


@functools.cache
def photos() -> list[np.ndarray]:
    """Pieces (96, 120, 3) uint8 of photos in scikit-image's wheel."""
    folder, pieces = Path(skimage.data.__file__).parent, []
    for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg"):
        with Image.open(folder / name) as file:
            pieces.append(np.asarray(ImageOps.fit(file.convert("RGB"), (120, 96))))
    return pieces


def encode(image: Image.Image, kind: str, **options) -> bytes:
    """What Pillow writes for `image` as a file of this kind."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def best(image: Image.Image, kind: str, **options) -> bytes:
    """The same, without a loss where that is possible."""
    exact = {"webp": {"lossless": True}, "jpeg": {"quality": 95, "subsampling": 0}}
    return encode(image, kind, **exact.get(kind, {}), **options)


def _gray3(gray: np.ndarray) -> np.ndarray:
    return np.repeat(gray[..., None], 3, axis=2)


# ------------------------------------------------------------------------------------------------- sound but odd


def modes(photo: np.ndarray) -> Iterator[Case]:
    """Every mode that Pillow has and a file can hold."""
    rgb, gray = Image.fromarray(photo), np.ascontiguousarray(photo[..., 1])
    light, palette = Image.fromarray(gray), rgb.quantize(64)
    bits = light.point(lambda v: 255 * (v > 127), "1")
    opaque, few = gray[..., None] > 99, np.asarray(palette.convert("RGB"))
    alpha = Image.fromarray(np.uint8(255) * opaque[..., 0])
    rgba, la = rgb.copy(), Image.merge("LA", (light, alpha))
    rgba.putalpha(alpha)
    cmyk = Image.fromarray(255 - np.dstack([photo, np.full_like(gray, 255)]), "CMYK")
    for mode, image, shown, kinds in (
        ("L", light, _gray3(gray), "png tiff bmp webp gif jpeg"),
        ("1", bits, np.uint8(255) * _gray3(gray > 127), "png tiff bmp gif jpeg"),
        ("RGB", rgb, photo, "png tiff bmp webp jpeg"),
        ("P", palette, few, "png tiff bmp gif"),
        ("RGBA", rgba, np.where(opaque, photo, np.uint8(255)), "png tiff webp"),
        ("LA", la, np.where(opaque, _gray3(gray), np.uint8(255)), "png tiff"),
        ("CMYK", cmyk, photo, "tiff jpeg"),
        ("RGBX", rgb.convert("RGBX"), photo, "tiff"),
        ("PA", palette.convert("PA"), few, "tiff"),
        ("I16", Image.fromarray(gray.astype(np.uint16) * 257), _gray3(gray), "png"),
        ("I", Image.fromarray(gray.astype(np.int32) * 257), _gray3(gray), "tiff"),
        ("F", Image.fromarray(gray / np.float32(255)), _gray3(gray), "tiff"),
    ):
        for kind in kinds.split():
            name = "gif.png" if kind == "gif" else kind  # .gif is not looked for
            yield Case(f"mode_{mode}.{name}", best(image, kind), shown, LOSSY * (kind == "jpeg"))
    yield Case("mode_YCbCr.tiff", encode(rgb.convert("YCbCr"), "tiff"), photo, 4)
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.applyTransform(rgb, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    yield Case("mode_LAB.tiff", encode(lab, "tiff"), photo, 20)  # by steps of 1 in a and b, and of colors out of range
    for order, name in (("<", "little"), (">", "big")):
        yield Case(f"mode_I16_{name}.tiff", tiff(gray.astype(np.uint16) * 257, byteorder=order), _gray3(gray))


def orientations(photo: np.ndarray) -> Iterator[Case]:
    """EXIF orientations 1 to 8 in every kind of file that has them, and values and blocks that mean nothing."""
    stored = Image.fromarray(photo)
    upright = {  # by the EXIF standard: where row 0 and column 0 of the file lie in the scene
        1: photo, 2: photo[:, ::-1], 3: photo[::-1, ::-1], 4: photo[::-1], 5: photo.swapaxes(0, 1),
        6: np.rot90(photo, -1), 7: np.rot90(photo, 2).swapaxes(0, 1), 8: np.rot90(photo),
    }  # fmt: skip
    for kind, value in itertools.product(("png", "tiff", "webp", "jpeg"), (*range(1, 9), 0, 9, 65535)):
        exif = Image.Exif()
        exif[ORIENTATION] = value
        content = best(stored, kind, exif=exif)
        yield Case(f"exif_{value}.{kind}", content, upright.get(value, photo), LOSSY * (kind == "jpeg"))
    for name, exif in (("short", b"Exif\0\0II*\0"), ("junk", b"Exif\0\0" + bytes(range(256)) * 4)):
        yield Case(f"exif_{name}.jpg", best(stored, "jpeg", exif=exif), photo, LOSSY)
        yield Case(f"exif_{name}.png", best(stored, "png", exif=exif), photo)


def ycck(photo: np.ndarray) -> bytes:
    """An Adobe YCCK JPEG: Y, Cb, Cr of the inverted inks C, M, Y, and K next to them."""
    black = (255 - photo.max(axis=2)) // 2
    inks = 255 - photo.astype(int) - black[..., None]
    inks = np.rint(inks * 255 / (255 - black[..., None])).clip(0, 255).astype(np.uint8)  # r = (255 - c)(255 - k) / 255
    light = np.asarray(Image.fromarray(inks).convert("YCbCr"))
    content = encode(Image.fromarray(np.dstack([255 - light, black]), "CMYK"), "jpeg", quality=95)
    at = content.index(b"Adobe")
    return content[: at + 11] + b"\x02" + content[at + 12 :]  # the byte that names the transform


def jpegs(photo: np.ndarray) -> Iterator[Case]:
    """Sound JPEGs of the kinds that cameras, printers and the web make."""
    image = Image.fromarray(photo)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, options in {
        "progressive": {"progressive": True}, "optimized": {"optimize": True}, "restarts": {"restart_marker_rows": 1},
        "icc": {"icc_profile": profile}, "icc_junk": {"icc_profile": b"no profile" * 9},
        "icc_large": {"icc_profile": bytes(1 << 22)}, "comment": {"comment": b"c" * 65_000},
        "xmp": {"xmp": b"x" * 60_000},
    }.items():  # fmt: skip
        yield Case(f"jpeg_{name}.jpg", best(image, "jpeg", **options), photo, LOSSY)
    for name, options in {"420": {"subsampling": 2}, "422": {"subsampling": 1}, "quality_5": {"quality": 5}}.items():
        yield Case(f"jpeg_{name}.jpg", encode(image, "jpeg", **options), photo, 255)
    yield Case("jpeg_ycck.jpg", ycck(photo), photo, LOSSY + 15)
    yield Case("jpeg_tail.jpg", best(image, "jpeg") + b"\xff\xda" * 5000, photo, LOSSY)
    two = encode(image, "mpo", save_all=True, append_images=[Image.fromarray(255 - photo)], quality=95, subsampling=0)
    yield Case("jpeg_two_images.jpg", two, photo, LOSSY)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(size: tuple[int, int], depth: int, color: int, rows: bytes, interlace=0, before=b"", idat=0) -> bytes:
    """A PNG of (width, height) with these filtered rows, `before` ahead of them, `idat` bytes in one chunk (0: all)."""
    pixels, idat = zlib.compress(rows), idat or len(rows) + 99
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, color, 0, 0, interlace))
    parts = (_chunk(b"IDAT", pixels[at : at + idat]) for at in range(0, len(pixels), idat))
    return b"\x89PNG\r\n\x1a\n" + head + before + b"".join(parts) + _chunk(b"IEND", b"")


def _rows(pixels: np.ndarray) -> bytes:
    """(H, W[, C]) -> rows of a PNG, filter 0."""
    flat = np.ascontiguousarray(pixels).view(np.uint8).reshape(len(pixels), -1)
    return np.pad(flat, ((0, 0), (1, 0))).tobytes()


def pngs(photo: np.ndarray) -> Iterator[Case]:
    """Sound PNGs: depths, interlacing, transparency, profiles, text, pixels in small pieces, animation."""
    size, gray, image = photo.shape[1::-1], photo[..., 1], Image.fromarray(photo)
    for depth in (1, 2, 4):
        few = gray >> (8 - depth)
        bits = np.packbits(np.unpackbits(few[..., None], axis=2)[..., 8 - depth :].reshape(len(gray), -1), axis=1)
        shown = np.rint(few * (255 / (2**depth - 1))).astype(np.uint8)
        yield Case(f"png_{depth}_bit.png", png(size, depth, 0, _rows(bits)), _gray3(shown))
    for name, color, pixels in (("rgb16", 2, photo), ("rgba16", 6, np.dstack([photo, np.full_like(gray, 255)]))):
        yield Case(f"png_{name}.png", png(size, 16, color, _rows(pixels.astype(">u2") * np.uint16(257))), photo, 1)
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    adam7 = b"".join(_rows(photo[y::down, x::across]) for y, x, down, across in passes)
    yield Case("png_interlaced.png", png(size, 8, 2, adam7, interlace=1), photo)
    yield Case("png_small_chunks.png", png(size, 8, 2, _rows(photo), idat=50), photo)
    see_through = np.where((photo == photo[0, 0]).all(axis=2, keepdims=True), np.uint8(255), photo)
    key = _chunk(b"tRNS", struct.pack(">HHH", *photo[0, 0].tolist()))
    yield Case("png_color_key.png", png(size, 8, 2, _rows(photo), before=key), see_through)
    palette = image.quantize(32)
    shown = np.where(np.asarray(palette)[..., None] == 3, np.uint8(255), np.asarray(palette.convert("RGB")))
    for name, key in (("key", 3), ("alphas", b"\xff" * 3 + b"\0")):
        yield Case(f"png_palette_{name}.png", encode(palette, "png", transparency=key), shown)
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "c" * 500_000, zip=True)
    yield Case("png_text.png", encode(image, "png", pnginfo=text), photo)
    bomb = b"name\0\0" + zlib.compress(bytes(100_000_000))  # 100 MB of zeros in 100 kB
    for name, chunks in {
        "icc_junk": _chunk(b"iCCP", b"name\0\0" + zlib.compress(b"no profile")), "gamma": _chunk(b"gAMA", bytes(4)),
        "icc_broken": _chunk(b"iCCP", b"name\0\0broken"), "unknown": _chunk(b"abCd", bytes(100_000)),
        "bomb_ztxt": _chunk(b"zTXt", bomb), "bomb_iccp": _chunk(b"iCCP", bomb),
        "bomb_texts": _chunk(b"zTXt", b"name\0\0" + zlib.compress(bytes(1_000_000))) * 200,
    }.items():  # fmt: skip
        yield Case(f"png_{name}.png", png(size, 8, 2, _rows(photo), before=chunks), photo, outcome="whole")
    yield Case("png_bomb_idat.png", png(size, 8, 2, _rows(photo) + bytes(100_000_000)), photo, outcome="whole")


def tiff(pixels: np.ndarray, bigtiff: bool = False, byteorder: str | None = None, **options) -> bytes:
    """What tifffile writes."""
    out = io.BytesIO()
    with tifffile.TiffWriter(out, bigtiff=bigtiff, byteorder=byteorder) as file:
        file.write(pixels, metadata=None, **options)
    return out.getvalue()


def tiffs(photo: np.ndarray) -> Iterator[Case]:
    """Sound TIFFs: compressions, tiles, planes, several pages, number types."""
    image, gray = Image.fromarray(photo), np.ascontiguousarray(photo[..., 1])
    for name in ("raw", "packbits", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "lzma", "zstd"):
        yield Case(f"tiff_{name}.tif", encode(image, "tiff", compression=name), photo, outcome="whole")
    yield Case("tiff_jpeg.tif", encode(image, "tiff", compression="jpeg", quality=95), photo, 255)
    bits = Image.fromarray(gray).point(lambda v: 255 * (v > 127), "1")
    for name in ("tiff_ccitt", "group3", "group4"):
        yield Case(f"tiff_{name}.tif", encode(bits, "tiff", compression=name), np.uint8(255) * _gray3(gray > 127))
    pages = encode(image, "tiff", save_all=True, append_images=[Image.new("RGB", (9, 9))] * 5)
    yield Case("tiff_pages.tif", pages, photo)
    for name, options in {
        "big": {"bigtiff": True}, "big_endian": {"byteorder": ">"}, "tiles": {"tile": (32, 32)},
        "strips": {"rowsperstrip": 1},
    }.items():  # fmt: skip
        yield Case(f"tiff_{name}.tif", tiff(photo, photometric="rgb", **options), photo)
    planes = np.ascontiguousarray(photo.transpose(2, 0, 1))
    yield Case("tiff_planes.tif", tiff(planes, photometric="rgb", planarconfig="separate"), photo)
    yield Case("tiff_rgb16.tif", tiff(photo.astype(np.uint16) * 257, photometric="rgb"), photo, 1)
    yield Case("tiff_white_is_zero.tif", tiff(255 - gray, photometric="miniswhite"), _gray3(gray))
    for dtype in ("int8", "int16", "uint32", "float16", "float64", "complex64"):
        yield Case(f"tiff_{dtype}.tif", tiff((gray >> 1).astype(dtype)), outcome="either")
    five = tiff(np.dstack([photo, gray, gray]), photometric="rgb")
    yield Case("tiff_five_channels.tif", five, outcome="either")


def animations(photo: np.ndarray) -> Iterator[Case]:
    """Several frames, of which the first counts, under right and wrong names."""
    first, second = Image.fromarray(photo), Image.fromarray(255 - photo)
    for kind in ("webp", "png"):
        content = best(first, kind, save_all=True, append_images=[second, first, second], duration=40)
        yield Case(f"animated.{kind}", content, photo)
    palettes = first.quantize(64), second.quantize(64)
    gif = encode(palettes[0], "gif", save_all=True, append_images=[palettes[1]], duration=40)
    for name in ("animated_gif.png", "animated_gif.jpg"):
        yield Case(name, gif, np.asarray(palettes[0].convert("RGB")))
    for kind, other in itertools.product(("png", "webp", "bmp"), ("jpg", "png", "tif")):
        if kind != other:
            yield Case(f"renamed_{kind}.{other}", best(first, kind), photo)


# --------------------------------------------------------------------------------------------------------- damaged


def not_images(photo: np.ndarray) -> Iterator[Case]:
    """Everything that is called .jpg and is none."""
    archive = io.BytesIO()
    np.savez(archive, photo)
    for name, content in {
        "empty": b"", "one_byte": b"\xff", "text": b"not a image\n" * 99, "zeros": bytes(4096),
        "npz": archive.getvalue(),
        "html": b"<!DOCTYPE html><html><body>404</body></html>", "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "script": b"#!/bin/sh\necho ran\n", "jpeg_start": b"\xff\xd8\xff", "png_start": b"\x89PNG\r\n\x1a\n",
        "gif_start": b"GIF89a", "bmp_start": b"BM", "tiff_start": b"II*\0", "webp_start": b"RIFF\0\0\0\0WEBP",
        "heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99),
        **{kind: encode(Image.fromarray(photo), kind) for kind in ("pdf", "eps", "ppm", "tga", "ico")},
    }.items():  # fmt: skip
        yield Case(f"not_{name}.jpg", content, outcome="skip")


def declared(photo: np.ndarray) -> Iterator[Case]:
    """Headers that declare too much, too little or nonsense."""
    rows, image = _rows(photo[:2]), Image.fromarray(photo)
    jpeg, bmp, gif, webp = (encode(image, kind) for kind in ("jpeg", "bmp", "gif", "webp"))
    contents = {
        "65535x65535.gif.png": gif[:6] + b"\xff" * 4 + gif[10:],
        "16383x16383.webp": webp[:26] + b"\xff\x3f\xff\x3f" + webp[30:],
    }
    for width, height in ((30_000, 30_000), (70_000, 2), (2, 70_000), (0, 9), (9, 0), (2**31 - 1, 2**31 - 1)):
        contents[f"{width}x{height}.png"] = png((width, height), 8, 2, rows)
    for depth, color in ((3, 0), (16, 3), (8, 5), (0, 0)):
        contents[f"depth_{depth}_{color}.png"] = png((120, 2), depth, color, rows)
    frame = jpeg.index(b"\xff\xc0") + 5
    for height, width in ((30_000, 30_000), (65_535, 65_535), (0, 120), (96, 0)):
        contents[f"{width}x{height}.jpg"] = jpeg[:frame] + struct.pack(">HH", height, width) + jpeg[frame + 4 :]
    for width, height in ((30_000, 30_000), (0, 0), (-5, 5), (120, -(2**31)), (2**31 - 1, 1)):
        contents[f"{width}x{height}.bmp"] = bmp[:18] + struct.pack("<ii", width, height) + bmp[26:]
    for name, content in contents.items():
        yield Case(f"declared_{name}", content, outcome="skip")
    whole = encode(image, "tiff", compression="raw")
    directory = int.from_bytes(whole[4:8], "little")
    tags = {"width": 256, "height": 257, "offset": 273, "rows": 278, "count": 279, "bits": 258, "samples": 277}
    for (name, tag), value in itertools.product(tags.items(), (0, 30_000, 2**31 - 1)):
        at = whole.index(struct.pack("<H", tag), directory + 2)
        content = whole[: at + 8] + struct.pack("<I", value) + whole[at + 12 :]
        yield Case(f"declared_{name}_{value}.tif", content, outcome="either")
    after = directory + 2 + 12 * int.from_bytes(whole[directory : directory + 2], "little")
    yield Case("tiff_circle.tif", whole[:after] + struct.pack("<I", directory) + whole[after + 4 :], photo)


def broken_pngs(photo: np.ndarray) -> Iterator[Case]:
    """Chunks lost, doubled or with a wrong checksum."""
    whole = encode(Image.fromarray(photo), "png")
    idat, end = whole.index(b"IDAT"), len(whole) - 12
    crc = idat + 4 + int.from_bytes(whole[idat - 4 : idat], "big")
    for name, content in {
        "pixels_crc": whole[:crc] + b"\0\0\0\0" + whole[crc + 4 :], "no_end": whole[:end],
        "one_bit": whole[: idat + 40] + bytes([whole[idat + 40] ^ 1]) + whole[idat + 41 :],
        "head_crc": whole[:29] + b"\0\0\0\0" + whole[33:], "no_pixels": whole[: idat - 4] + whole[end:],
        "length": whole[: idat - 4] + b"\x7f" + whole[idat - 3 :],
        "short_rows": png((120, 96), 8, 2, _rows(photo)[:5000]),
    }.items():  # fmt: skip
        yield Case(f"broken_{name}.png", content, outcome="skip")
    yield Case("broken_no_palette.png", png((120, 96), 8, 3, _rows(photo[..., 1])), outcome="either")


WHOLE = {  # kinds of file to damage
    "jpg": ("jpeg", {}), "progressive.jpg": ("jpeg", {"progressive": True}), "png": ("png", {}), "webp": ("webp", {}),
    "lossless.webp": ("webp", {"lossless": True}), "bmp": ("bmp", {}), "tif": ("tiff", {}),
    "lzw.tif": ("tiff", {"compression": "tiff_lzw"}), "gif.png": ("gif", {}),
}  # fmt: skip


def whole_file(photo: np.ndarray, kind: str) -> Case:
    """A sound file to damage; `kind` of WHOLE. A lossy one shows what Pillow reads from it undamaged."""
    image, (coder, options) = Image.fromarray(photo), WHOLE[kind]
    content = encode(image.quantize(64) if coder == "gif" else image, coder, **options)
    with Image.open(io.BytesIO(content)) as file:
        return Case(f"whole.{kind}", content, np.asarray(file.convert("RGB")))


def cuts(photo: np.ndarray) -> Iterator[Case]:
    """Each kind of file cut at every tenth of its length and just before its end."""
    for whole in (whole_file(photo, kind) for kind in WHOLE):
        length = len(whole.content)
        for at in (*(length * tenth // 10 for tenth in range(1, 10)), length - 2, length - 1):
            outcome = "either" if "progressive" in whole.name else "whole"
            yield Case(f"cut_{at}_{whole.name}", whole.content[:at], whole.pixels, outcome=outcome)


def flips(photo: np.ndarray) -> Iterator[Case]:
    """Each kind of file with 1 to 64 bytes changed; a PNG's checksums find every one."""
    rng = np.random.default_rng(0)
    for kind, count in itertools.product(WHOLE, (1, 1, 2, 4, 16, 64)):
        whole = whole_file(photo, kind)
        content = np.frombuffer(whole.content, np.uint8).copy()
        at = rng.choice(len(content), count, replace=False)
        content[at] ^= rng.integers(1, 256, count, dtype=np.uint8)
        outcome = "whole" if kind == "png" else "either"
        yield Case(f"flip_{count}_{at[0]}_{whole.name}", content.tobytes(), whole.pixels, outcome=outcome)


@functools.cache
def all_cases() -> list[Case]:
    """Every case, of photos that take turns; names are unique."""
    makers = modes, orientations, jpegs, pngs, tiffs, animations, not_images, declared, broken_pngs, cuts, flips
    cases = [case for turn, maker in enumerate(makers) for case in maker(photos()[turn % 4])]
    assert len({case.name for case in cases}) == len(cases)
    return cases


# ---------------------------------------------------------------------------------------------------------- large


def odd_entries(folder: Path) -> list[str]:
    """Puts what is called like an image and is no file into `folder` -> the names."""
    (folder / "folder.jpg").mkdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe.jpg")
        here = os.getcwd()
        os.chdir(folder)  # a socket's path has room for some 100 characters
        try:
            with socket.socket(socket.AF_UNIX) as end:
                end.bind("socket.jpg")
        finally:
            os.chdir(here)
        for name, target in (("loop.jpg", "loop.jpg"), ("nowhere.jpg", "gone"), ("device.jpg", "/dev/zero")):
            (folder / name).symlink_to(target)
    return sorted(path.name for path in folder.iterdir() if not path.is_file())


# ----------------------------------------------------------------------------------------- reading in another process


def peak_memory() -> int:
    """Most bytes that this process ever held; 0 where the system does not tell."""
    if sys.platform == "linux":  # getrusage would count what the parent held when it forked
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return 0


def measured(read: Callable[[Path], np.ndarray], path: Path) -> tuple[np.ndarray | str, float, int]:
    """(array, or why not; processor seconds; bytes by which the peak of memory grew)."""
    memory, started = peak_memory(), time.process_time()
    try:
        got = read(path)
    except BadFile as error:
        assert error.path == path
        assert str(error).isprintable()
        got = error.reason
    return got, time.process_time() - started, peak_memory() - memory


def shape_of(path: Path) -> np.ndarray:
    """Instead of 200 MB through a pipe."""
    return np.array(read_image(path).shape)
