"""Compose a small salient-object set in the DUTS layout, without a download.

Objects are cut out of photographs (or are shapes filled with a piece of one), lit, turned and set on pieces of other
photographs; pictures are 208-304 px a side. The set shows in minutes that training works; it measures nothing: the
held-out pairs show the same objects and photographs as the training pairs, in other places, sizes and light.

The photographs are those that lie inside scikit-image's wheel (0.25 and 0.26 ship the same; nothing is fetched). By the
docstrings of `skimage.data`: public domain or no known copyright restrictions: astronaut (NASA), hubble_deep_field
(NASA), rocket (SpaceX), coins (Brooklyn Museum), text, ihc (CMMI); CC0: brick, grass, gravel, retina (M. Häggström),
camera (L. Varshney), chelsea (S. van der Walt), coffee (R. Michetti), horse (A. Preuss). Pictures of the wheel whose
licence is not stated there are not used. The outlines of the objects were traced for this file.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import skimage.data
from filelock import FileLock, Timeout
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter, ImageOps
from skimage.color import rgb2lab

from u2mamba.runtime.errors import UserError

VERSION = 1  # a new number makes existing sets be composed again: raise it when the pictures would change
COUNT = 480  # 24 of them are held out by crc32(stem) % 20 == 0
FOLDER = Path("DUTS-TR", "DUTS-TR")
PHOTOGRAPHS = Path(skimage.data.__file__).parent


class DemoError(UserError):
    """The set cannot be made; the message is one line that says why and what mends it."""


# Each object: photograph, side where the photograph ends and the object would go on, largest share of a picture,
# then the vertices of its outline, "x,y" in pixels of the photograph; two vertices are the box of an ellipse.
# Those tied to a side come first; they are always alone in a picture.
TRACED = """
astronaut.png bottom 0.55 489,455 28,455 23,434 19,409 19,392 24,375 26,342 34,315 38,306 44,282 60,253 76,235 92,224
105,212 119,193 123,178 138,160 154,151 182,147 181,133 174,128 169,117 157,103 154,91 153,69 156,58 174,43 186,36
198,25 206,20 228,16 247,18 276,31 286,40 296,59 300,83 299,96 296,108 289,118 276,133 267,138 264,149 257,163 256,171
275,187 288,202 299,218 305,234 320,244 340,262 356,303 358,323 362,330 361,343 367,349 383,345 416,344 436,351 452,359
477,383 490,409 494,427 496,452
camera.png bottom-left 0.55 270,300 220,300 207,294 199,300 0,300 0,259 9,246 18,227 26,221 38,198 48,185 61,161 76,143
105,129 117,125 130,124 139,115 150,107 160,105 165,96 173,86 185,74 192,69 218,68 243,80 254,91 266,106 269,113
269,128 259,131 257,137 266,140 280,147 286,143 299,141 321,140 324,142 323,154 318,156 319,168 326,169 330,179 331,194
325,202 323,211 314,225 303,237 299,248 304,273 298,279 292,275 291,293 286,289
chelsea.png top 0.5 42,0 36,25 32,50 30,80 31,108 42,160 55,183 75,203 98,222 120,244 150,257 185,267 225,273 250,275
280,270 300,256 312,240 318,222 334,202 345,183 360,145 362,118 357,100 357,77 366,65 373,40 398,0
coffee.png free 0.5 303,382 273,382 239,378 207,369 165,349 139,330 110,304 95,287 86,268 79,245 76,229 76,193 87,153
99,134 113,116 128,101 150,84 167,76 180,73 192,57 204,45 218,35 242,24 271,18 298,18 321,22 337,27 353,34 369,45
384,59 395,73 407,67 420,71 423,81 416,108 436,128 459,156 473,196 479,220 479,237 472,269 453,307 429,340 398,362
338,381
astronaut.png free 0.25 408,0 401,12 396,32 396,50 394,54 390,42 387,41 382,55 381,75 382,100 379,107 378,140 378,180
365,196 356,211 354,222 376,224 367,260 368,271 377,265 386,257 405,269 411,252 415,252 416,272 426,272 426,239 437,236
439,250 434,261 444,265 454,274 455,266 459,264 455,250 454,235 455,226 454,210 453,120 454,60 447,41 442,41 437,52
437,32 431,12 426,0
astronaut.png free 0.22 134,349 206,421
coins.png free 0.22 306,17 364,71
coins.png free 0.22 316,157 378,217
retina.jpg free 0.3 60,65 1340,1345
"""
OBJECTS: list[tuple[str, str, float, list[tuple[float, ...]]]] = []
for _photo, _side, _share, *_vertices in (o.split() for o in re.split(r"\n(?=[a-z])", TRACED.strip())):
    OBJECTS.append((_photo, _side, float(_share), [tuple(map(float, v.split(","))) for v in _vertices]))
TIED = sum(side != "free" for _, side, *_ in OBJECTS)
TINTED = {"brick.png", "grass.png", "gravel.png", "camera.png", "coins.png", "text.png"}  # grey: they get a colour
HUES = [(4, 32), (55, 90), (130, 165), (4, 32)]  # of 256: clay to sand, leaves, slate to sky, and earth once more
# (photograph, box left-upper-right-lower or None for all of it): pieces that show no object of their own
TEXTURES = [("brick.png", None), ("grass.png", None), ("gravel.png", None), ("coffee.png", (484, 0, 600, 400))]  # wood
BACKGROUNDS = [*TEXTURES, ("text.png", None), ("ihc.png", None), ("hubble_deep_field.jpg", None)]
BACKGROUNDS += [("rocket.jpg", (330, 0, 600, 120)), ("camera.png", (345, 60, 512, 395))]  # evening sky, town and lawn
BACKGROUNDS += [("astronaut.png", (305, 0, 370, 200)), ("chelsea.png", (404, 0, 451, 300))]  # walls out of focus
FILLINGS = [*TEXTURES, ("chelsea.png", (90, 5, 310, 95)), ("astronaut.png", (0, 0, 60, 500))]  # fur, flag
BLURRED = ["coffee.png", "astronaut.png", "chelsea.png", "rocket.jpg", "retina.jpg"]  # whole, once nothing can be told
SHAPES = ["blob", "star", "polygon", "ring", "ellipse", "horse"]  # each as frequent as one of OBJECTS


def smooth(mask: Image.Image, times: int) -> Image.Image:
    """A mask drawn `times` as large: corners rounded by blur and threshold, then reduced to a soft edge of 1-2 px."""
    mask = mask.filter(ImageFilter.GaussianBlur(4))
    return mask.point(lambda v: max(0, min(255, (v - 128) * 4 + 128))).reduce(times)


def cut_out(photo: Image.Image, outline: list[tuple[float, ...]]) -> tuple[Image.Image, Image.Image]:
    """An object's pixels and its soft mask, both cropped to the outline."""
    if photo.width > 1000:  # the retina's 1411 px are more than any picture here can show
        photo, outline = photo.reduce(3), [(x / 3, y / 3) for x, y in outline]
    mask = Image.new("L", (photo.width * 4, photo.height * 4))
    vertices = [((x + 0.5) * 4, (y + 0.5) * 4) for x, y in outline]
    draw = ImageDraw.Draw(mask)
    if len(outline) == 2:
        draw.ellipse(vertices, fill=255)
    else:
        draw.polygon(vertices, fill=255)
        draw.line([*vertices, vertices[0]], fill=0, width=8)  # 1 px off all round: the old background bleeds into it
    mask = smooth(mask, 4)
    return photo.crop(mask.getbbox()), mask.crop(mask.getbbox())


def tint(image: Image.Image, rng: np.random.Generator, strength: float, hues: list[tuple[int, int]]) -> Image.Image:
    """A grey photograph in shades of one hue; strength 0 leaves it grey."""
    hue = int(rng.integers(*hues[rng.integers(len(hues))]))
    mid = Image.new("HSV", (1, 1), (hue, int(255 * strength), 165)).convert("RGB").getpixel((0, 0))
    return ImageOps.colorize(image, black=(16, 14, 14), white=(250, 246, 238), mid=mid)


def shape_mask(kind: str, rng: np.random.Generator) -> Image.Image:
    """The soft mask of a random blob, star, polygon, ring or ellipse, about 200 px wide."""
    t = np.linspace(0, 2 * np.pi, 360, endpoint=False)
    corners = int(rng.integers(3, 8))
    phase = (t * corners / (2 * np.pi)) % 1 - 0.5
    radius = np.ones_like(t)
    if kind == "blob":
        radius += sum(rng.uniform(0, 0.5 / k) * np.cos(k * t + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 4, 5))
    elif kind == "star":
        radius = 1 - rng.uniform(0.8, 1.2) * (0.5 - np.abs(phase))
    elif kind == "polygon":
        radius = 1 / np.cos(phase * 2 * np.pi / corners)
    outline = np.stack([radius * np.cos(t), rng.uniform(0.6, 1) * radius * np.sin(t)], 1)
    outline = (outline - outline.min(0)) * (400 / np.ptp(outline, 0).max()) + 8
    width, height = (int(v) + 9 for v in outline.max(0))
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).polygon(outline.ravel().tolist(), fill=255)
    if kind == "ring":
        hole = (outline - outline.mean(0)) * rng.uniform(0.4, 0.6) + outline.mean(0)
        ImageDraw.Draw(mask).polygon(hole.ravel().tolist(), fill=0)
    return smooth(mask, 2)


def gradient(width: int, height: int, angle: float) -> np.ndarray:
    """(height, width, 1), from about -1 to 1 across the picture in the direction `angle`."""
    x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
    return (x * np.cos(angle) + y * np.sin(angle))[..., None]


class Composer:
    """Holds the photographs and draws pairs; `pair(seed, i)` depends on nothing but its two numbers."""

    def __init__(self) -> None:
        names = {name for name, *_ in [*OBJECTS, *BACKGROUNDS, *FILLINGS]} | {"horse.png", *BLURRED}
        self.photo: dict[str, Image.Image] = {}
        for name in sorted(names):
            try:
                with Image.open(PHOTOGRAPHS / name) as image:
                    self.photo[name] = image.convert("L" if name in TINTED else "RGB")
            except (OSError, SyntaxError) as error:
                mend = "pip install --force-reinstall scikit-image"
                raise DemoError(f"{PHOTOGRAPHS / name}, which its wheel holds, cannot be read: {mend}") from error
        self.cut = [cut_out(self.photo[name], outline) for name, *_, outline in OBJECTS]
        horse = ImageOps.invert(self.photo["horse.png"].convert("L"))
        self.horse = horse.crop(horse.getbbox())

    def piece(self, name: str, box: tuple | None, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
        """A random crop of a photograph or of a box in it, perhaps mirrored, scaled to `size` (width, height)."""
        image = self.photo[name].crop(box) if box else self.photo[name]
        scale = min(image.width / size[0], image.height / size[1])
        scale *= rng.uniform(0.55, 1) if scale > 0.6 else 1  # never enlarged more than the photograph makes needful
        w, h = size[0] * scale, size[1] * scale
        x, y = rng.random() * max(0, image.width - w), rng.random() * max(0, image.height - h)
        crop = (x, y, min(x + w, image.width), min(y + h, image.height))
        image = image.resize(size, Image.Resampling.BICUBIC, box=crop)
        return ImageOps.mirror(image) if rng.random() < 0.5 else image

    def draw_background(self, size: tuple[int, int], rng: np.random.Generator) -> tuple[str, Image.Image]:
        """A photograph's name and a piece of it to set objects on."""
        far = rng.random() < 0.2
        name, box = (str(rng.choice(BLURRED)), None) if far else BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
        image = self.piece(name, box, size, rng)
        if name in TINTED:
            image = tint(image, rng, rng.uniform(0.1, 0.6), HUES)
        if far or rng.random() < 0.4:
            image = image.filter(ImageFilter.GaussianBlur(rng.uniform(14, 22) if far else rng.uniform(0.8, 3)))
        image = ImageEnhance.Contrast(image).enhance(rng.uniform(0.5, 1))
        return name, ImageEnhance.Brightness(image).enhance(rng.uniform(0.6, 1.25))

    def draw_object(self, kind: int, rng: np.random.Generator) -> tuple[str, Image.Image, Image.Image, str, float]:
        """A photograph's name, the object's pixels, its soft mask, the side it is tied to and its largest share."""
        if kind < len(OBJECTS):
            (name, side, share, _), (pixels, mask) = OBJECTS[kind], self.cut[kind]
            if name in TINTED:  # coins of silver to gold; the cameraman grey to sepia
                pixels = tint(pixels, rng, rng.uniform(0, 0.6 if name == "coins.png" else 0.15), HUES[:1])
        else:
            shape = SHAPES[kind - len(OBJECTS)]
            mask = self.horse if shape == "horse" else shape_mask(shape, rng)
            (name, box), side, share = FILLINGS[rng.integers(len(FILLINGS))], "free", 0.4
            pixels = self.piece(name, box, mask.size, rng)
            pixels = tint(pixels, rng, rng.uniform(0.45, 0.75), HUES) if name in TINTED else pixels
            # Darker towards its edge and away from the light, as a solid thing would be.
            inside = np.asarray(mask.filter(ImageFilter.GaussianBlur(mask.width / 14)), np.float32)[..., None] / 255
            light = (0.35 + 0.8 * inside) * (1 + 0.22 * gradient(*mask.size, rng.uniform(0, 2 * np.pi)))
            pixels = Image.fromarray(np.clip(np.asarray(pixels) * light, 0, 255).astype(np.uint8))
        return name, ImageEnhance.Brightness(pixels).enhance(rng.uniform(0.85, 1.25)), mask, side, share

    def compose(self, kinds: list[int], rng: np.random.Generator) -> tuple[Image.Image, Image.Image] | None:
        """One try at a pair with objects of these kinds; None where one does not stand out or does not fit."""
        size = width, height = tuple(int(v) * 8 for v in rng.integers(26, 39, 2))
        ground, image = self.draw_background(size, rng)
        ground_lab = rgb2lab(np.asarray(image.reduce(8))).mean((0, 1))
        union = Image.new("L", size)
        number = len(kinds)
        for k, kind in enumerate(kinds):
            name, pixels, mask, side, most = self.draw_object(kind, rng)
            weight = np.asarray(mask.reduce(3), np.float32)[..., None] / 255
            lab = (rgb2lab(np.asarray(pixels.reduce(3))) * weight).sum((0, 1)) / weight.sum()
            # A CIE76 difference of 2 is just seen side by side; below 30 the eye has to search for the object.
            if name == ground or np.linalg.norm(lab - ground_lab) < 30:
                return None
            share = rng.uniform(0.07 if side == "free" else 0.18, most if number == 1 else min(most, 0.16))
            scale = np.sqrt(share * width * height / (weight.mean() * mask.width * mask.height))
            scale = min(scale, 0.9 / number * width / mask.width, 0.9 * height / mask.height, 3)
            cut = pixels.copy()
            cut.putalpha(mask)
            cut = cut.resize((round(mask.width * scale), round(mask.height * scale)), Image.Resampling.BICUBIC)
            if rng.random() < 0.5:
                cut, side = ImageOps.mirror(cut), side.replace("left", "right")
            angle = rng.uniform(-35, 35) if side == "free" else rng.uniform(-3, 3)
            hide = abs(np.sin(np.radians(angle))) + 0.03  # so that a side that was cut off lies outside the picture
            hide_x, hide_y = round(cut.height * hide), round(cut.width * hide)
            cut = cut.rotate(angle, Image.Resampling.BICUBIC, expand=True)
            start, room_x, room_y = k * width // number, width // number - cut.width, height - cut.height
            x = start + int(rng.integers(min(0, room_x), max(0, room_x) + 1))
            y = int(rng.integers(min(0, room_y), max(0, room_y) + 1))
            x = -hide_x if "left" in side else room_x + hide_x if "right" in side else x
            y = -hide_y if "top" in side else room_y + hide_y if "bottom" in side else y
            alpha, shadow = Image.new("L", size), Image.new("L", size)
            alpha.paste(cut.getchannel("A"), (x, y))
            if rng.random() < 0.7:
                shadow.paste(cut.getchannel("A"), (x + int(rng.integers(-7, 8)), y + int(rng.integers(-7, 8))))
                shadow = shadow.filter(ImageFilter.GaussianBlur(rng.uniform(4, 10)))
                image.paste((0, 0, 0), mask=ImageEnhance.Brightness(shadow).enhance(rng.uniform(0.3, 0.65)))
            image.paste(cut, (x, y), mask=cut)
            union = ImageChops.lighter(union, alpha)
        truth = union.point(lambda v: 255 if v >= 128 else 0)
        if not 0.04 <= np.asarray(truth).mean() / 255 <= 0.7:
            return None
        # One light and one sensor for all of it: contrast, exposure, temperature, a gradient, noise.
        array = (np.asarray(image, np.float32) - 128) * rng.uniform(0.9, 1.15) + 128
        array *= rng.uniform(0.85, 1.15) * (1 + rng.uniform(-0.08, 0.08) * np.array([1, 0, -1]))
        array *= 1 + rng.uniform(0, 0.15) * gradient(width, height, rng.uniform(0, 2 * np.pi))
        array += rng.normal(0, rng.uniform(0.5, 4), array.shape)
        return Image.fromarray(np.clip(array, 0, 255).astype(np.uint8)), truth

    def pair(self, seed: int, i: int) -> tuple[Image.Image, Image.Image]:
        """Picture (RGB) and mask (L, 0 or 255) number `i`."""
        rng = np.random.default_rng([seed, i])
        two = rng.random() < 0.15
        kinds = rng.integers(TIED if two else 0, len(OBJECTS) + len(SHAPES), 1 + two).tolist()
        while (made := self.compose(kinds, rng)) is None:  # about every third try holds
            pass
        return made


def is_complete(folder: Path, stamp: dict) -> bool:
    """Whether `folder` holds the set that `stamp` names, with all its files."""
    try:
        found = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
        names = [{p.stem for p in (folder / sub).iterdir() if p.stat().st_size} for sub in ("im_aug", "gt_aug")]
    except (OSError, ValueError):
        return False
    return found == stamp and names[0] & names[1] >= {f"demo_{i:04d}" for i in range(stamp["count"])}


def of_others(folder: Path) -> list[str]:
    """Files in `folder` that are no demo set's: all where there is no demo.json; never hidden ones, as the cache is."""
    ours = re.compile(r"demo\.json|im_aug/demo_\d{4,}\.jpg|gt_aug/demo_\d{4,}\.png")
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]
    names = sorted(name for name in found if not re.search(r"(^|/)\.", name))
    return [name for name in names if not ours.fullmatch(name)] if "demo.json" in names else names


def make_demo(out_dir: str | Path, n: int = COUNT, seed: int = 0) -> Path:
    """Write `n` pairs to `out_dir`/DUTS-TR/DUTS-TR/{im_aug/demo_0000.jpg, gt_aug/demo_0000.png} and return `out_dir`.

    The same `n` and `seed` give the same files, up to a grey level between versions of Pillow. A set that is already
    complete is left alone, whatever lies beside its files; another demo set in the same place is replaced, unless other
    files are in it. Files appear all at once, by a rename; several processes may call this at once.
    Raises DemoError, whose one line says what to change, where the set cannot be made or written.
    """
    out_dir = Path(out_dir)
    if n < 1 or seed < 0:
        raise DemoError(f"count must be at least 1 and seed at least 0, got {n} and {seed}")
    final, stamp = out_dir / FOLDER, {"version": VERSION, "count": n, "seed": seed}
    if is_complete(final, stamp):
        return out_dir
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(out_dir / ".make_demo.lock", timeout=600):
            if not is_complete(final, stamp):  # by the process that held the lock before
                _make(final, stamp)
    except Timeout:
        raise DemoError(f"another process has been making {final} for ten minutes, or holds .make_demo.lock") from None
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        raise DemoError(f"cannot write the demo set ({error}): {out_dir} must be writable, with 20 MB free") from error
    return out_dir


def _make(final: Path, stamp: dict) -> None:
    if final.exists() and (others := of_others(final)):
        raise DemoError(
            f"{final} holds {len(others)} files that make_demo did not write ({others[0]}): move them away, or set "
            "another data_dir"
        )
    out_dir = final.parents[1]
    for left in out_dir.glob(".make_demo-*"):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    composer = Composer()
    work = Path(tempfile.mkdtemp(dir=out_dir, prefix=".make_demo-"))
    old, new = work / "old", work / "new"
    try:
        for sub in ("im_aug", "gt_aug"):
            (new / sub).mkdir(parents=True)
        for i in range(stamp["count"]):
            picture, mask = composer.pair(stamp["seed"], i)
            picture.save(new / "im_aug" / f"demo_{i:04d}.jpg", quality=92)
            mask.save(new / "gt_aug" / f"demo_{i:04d}.png")
        (new / "demo.json").write_text(json.dumps(stamp), encoding="utf-8")
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.exists():
            final.rename(old)
        new.rename(final)
    finally:
        shutil.rmtree(work, ignore_errors=True)
