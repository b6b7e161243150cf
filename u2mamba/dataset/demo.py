"""Generates a small synthetic salient-object dataset in the layout of DUTS-TR, without a download.

Objects are cut out of photos (or are shapes filled with a piece of one), lit, rotated and pasted onto pieces of other
photos; images are 208-304 px a side. The dataset shows within minutes that training works. It is not a benchmark: the
validation pairs show the same objects and photos as the training pairs, in other places, sizes and lighting.

The photos are those inside scikit-image's wheel (0.25 and 0.26 contain the same ones; nothing is fetched). By the
docstrings of `skimage.data`: public domain or no known copyright restrictions: astronaut (NASA), hubble_deep_field
(NASA), rocket (SpaceX), coins (Brooklyn Museum), text, ihc (CMMI); CC0: brick, grass, gravel, retina (M. Häggström),
camera (L. Varshney), chelsea (S. van der Walt), coffee (R. Michetti), horse (A. Preuss). Others of the wheel, whose
license is not stated there, are not used. The outlines of the objects (demo_objects.json) were traced for this set.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter, ImageOps
from skimage.color import rgb2lab

from u2mamba.runtime.errors import UserError

VERSION = 1  # increase it with any change of the images, so that older datasets are refused
COUNT = 480  # 24 of them are for validation
FOLDER = Path("DUTS-TR", "DUTS-TR")
PHOTOGRAPHS = Path(skimage.data.__file__).parent

# photo; side where the photo cuts the object off, or "free"; maximum area as a fraction of the image; vertices (x, y)
# in pixels of the photo, two are the box of an ellipse. Objects that are cut off come first and are always alone.
OBJECTS = json.loads(Path(__file__).with_name("demo_objects.json").read_text(encoding="utf-8"))
CUT_OFF = sum(item["side"] != "free" for item in OBJECTS)
GRAY = {"brick.png", "grass.png", "gravel.png", "camera.png", "coins.png", "text.png"}  # these photos are tinted
HUES = [(4, 32), (55, 90), (130, 165), (4, 32)]  # of 256: clay to sand, leaves, slate to sky, clay again
# (photo, box (left, upper, right, lower) or None for all of it): pieces that show no object of their own
TEXTURES = [("brick.png", None), ("grass.png", None), ("gravel.png", None), ("coffee.png", (484, 0, 600, 400))]
BACKGROUNDS = [*TEXTURES, ("text.png", None), ("ihc.png", None), ("hubble_deep_field.jpg", None)]
BACKGROUNDS += [("rocket.jpg", (330, 0, 600, 120)), ("camera.png", (345, 60, 512, 395))]  # evening sky, lawn
BACKGROUNDS += [("astronaut.png", (305, 0, 370, 200)), ("chelsea.png", (404, 0, 451, 300))]  # walls out of focus
FILLINGS = [*TEXTURES, ("chelsea.png", (90, 5, 310, 95)), ("astronaut.png", (0, 0, 60, 500))]  # fur, flag
BLURRED = ["coffee.png", "astronaut.png", "chelsea.png", "rocket.jpg", "retina.jpg"]  # used whole, beyond recognition
SHAPES = ["blob", "star", "polygon", "ring", "ellipse", "horse"]  # each as frequent as one of OBJECTS


def smooth(mask: Image.Image, factor: int) -> Image.Image:
    """A mask drawn `factor` times as large -> corners rounded by blur and threshold, a soft edge of 1-2 px."""
    mask = mask.filter(ImageFilter.GaussianBlur(4))
    return mask.point(lambda v: max(0, min(255, (v - 128) * 4 + 128))).reduce(factor)


def cut_out(photo: Image.Image, outline: list) -> tuple[Image.Image, Image.Image]:
    """An object's pixels and its soft mask, both cropped to the outline."""
    if photo.width > 1000:  # the retina's 1411 px exceed every image here
        photo, outline = photo.reduce(3), [(x / 3, y / 3) for x, y in outline]
    mask = Image.new("L", (photo.width * 4, photo.height * 4))
    vertices = [((x + 0.5) * 4, (y + 0.5) * 4) for x, y in outline]
    draw = ImageDraw.Draw(mask)
    if len(outline) == 2:
        draw.ellipse(vertices, fill=255)
    else:
        draw.polygon(vertices, fill=255)
        draw.line([*vertices, vertices[0]], fill=0, width=8)  # 1 px less: the old background bleeds into the edge
    mask = smooth(mask, 4)
    return photo.crop(mask.getbbox()), mask.crop(mask.getbbox())


def tint(image: Image.Image, rng: np.random.Generator, strength: float, hues: list[tuple[int, int]]) -> Image.Image:
    """A gray photo in shades of one hue; strength 0 leaves it gray."""
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
    mask = Image.new("L", tuple(int(v) + 9 for v in outline.max(0)))
    ImageDraw.Draw(mask).polygon(outline.ravel().tolist(), fill=255)
    if kind == "ring":
        hole = (outline - outline.mean(0)) * rng.uniform(0.4, 0.6) + outline.mean(0)
        ImageDraw.Draw(mask).polygon(hole.ravel().tolist(), fill=0)
    return smooth(mask, 2)


def gradient(width: int, height: int, angle: float) -> np.ndarray:
    """(height, width, 1), from about -1 to 1 across the image in the direction `angle`."""
    x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
    return (x * np.cos(angle) + y * np.sin(angle))[..., None]


class Composer:
    """Holds the photos and draws pairs; `pair(seed, i)` depends on its two numbers alone."""

    def __init__(self) -> None:
        names = {name for name, _ in BACKGROUNDS + FILLINGS} | {o["photo"] for o in OBJECTS} | {"horse.png", *BLURRED}
        self.photo: dict[str, Image.Image] = {}
        for name in sorted(names):
            try:
                with Image.open(PHOTOGRAPHS / name) as image:
                    self.photo[name] = image.convert("L" if name in GRAY else "RGB")
            except (OSError, SyntaxError) as error:
                fix = "pip install --force-reinstall scikit-image"
                raise UserError(f"{PHOTOGRAPHS / name}, a part of scikit-image, cannot be read: {fix}") from error
        self.cut = [cut_out(self.photo[item["photo"]], item["outline"]) for item in OBJECTS]
        horse = ImageOps.invert(self.photo["horse.png"].convert("L"))
        self.horse = horse.crop(horse.getbbox())

    def piece(self, name: str, box: tuple | None, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
        """A random crop of a photo or of a box in it, perhaps flipped, resized to `size` (width, height)."""
        image = self.photo[name].crop(box) if box else self.photo[name]
        scale = min(image.width / size[0], image.height / size[1])
        scale *= rng.uniform(0.55, 1) if scale > 0.6 else 1  # no larger magnification than the photo's size requires
        w, h = size[0] * scale, size[1] * scale
        x, y = rng.random() * max(0, image.width - w), rng.random() * max(0, image.height - h)
        crop = (x, y, min(x + w, image.width), min(y + h, image.height))
        image = image.resize(size, Image.Resampling.BICUBIC, box=crop)
        return ImageOps.mirror(image) if rng.random() < 0.5 else image

    def draw_background(self, size: tuple[int, int], rng: np.random.Generator) -> tuple[str, Image.Image]:
        """A photo's name and a piece of it."""
        far = rng.random() < 0.2
        name, box = (str(rng.choice(BLURRED)), None) if far else BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
        image = self.piece(name, box, size, rng)
        if name in GRAY:
            image = tint(image, rng, rng.uniform(0.1, 0.6), HUES)
        if far or rng.random() < 0.4:
            image = image.filter(ImageFilter.GaussianBlur(rng.uniform(14, 22) if far else rng.uniform(0.8, 3)))
        image = ImageEnhance.Contrast(image).enhance(rng.uniform(0.5, 1))
        return name, ImageEnhance.Brightness(image).enhance(rng.uniform(0.6, 1.25))

    def draw_object(self, kind: int, rng: np.random.Generator) -> tuple[str, Image.Image, Image.Image, str, float]:
        """A photo's name, the object's pixels, its soft mask, the side where it is cut off and its maximum area."""
        if kind < len(OBJECTS):
            name, side, max_area, _ = OBJECTS[kind].values()
            pixels, mask = self.cut[kind]
            if name in GRAY:  # coins from silver to gold; the cameraman from gray to sepia
                pixels = tint(pixels, rng, rng.uniform(0, 0.6 if name == "coins.png" else 0.15), HUES[:1])
        else:
            shape = SHAPES[kind - len(OBJECTS)]
            mask = self.horse if shape == "horse" else shape_mask(shape, rng)
            (name, box), side, max_area = FILLINGS[rng.integers(len(FILLINGS))], "free", 0.4
            pixels = self.piece(name, box, mask.size, rng)
            pixels = tint(pixels, rng, rng.uniform(0.45, 0.75), HUES) if name in GRAY else pixels
            # Darker toward its edge and away from the light, as a solid object is.
            inside = np.asarray(mask.filter(ImageFilter.GaussianBlur(mask.width / 14)), np.float32)[..., None] / 255
            light = (0.35 + 0.8 * inside) * (1 + 0.22 * gradient(*mask.size, rng.uniform(0, 2 * np.pi)))
            pixels = Image.fromarray(np.clip(np.asarray(pixels) * light, 0, 255).astype(np.uint8))
        return name, ImageEnhance.Brightness(pixels).enhance(rng.uniform(0.85, 1.25)), mask, side, max_area

    def compose(self, kinds: list[int], rng: np.random.Generator) -> tuple[Image.Image, Image.Image] | None:
        """One attempt at a pair with objects of these kinds; None if one does not stand out or does not fit."""
        size = width, height = tuple(int(v) * 8 for v in rng.integers(26, 39, 2))
        background, image = self.draw_background(size, rng)
        background_lab = rgb2lab(np.asarray(image.reduce(8))).mean((0, 1))
        union, number = Image.new("L", size), len(kinds)
        for k, kind in enumerate(kinds):
            name, pixels, mask, side, max_area = self.draw_object(kind, rng)
            weight = np.asarray(mask.reduce(3), np.float32)[..., None] / 255
            lab = (rgb2lab(np.asarray(pixels.reduce(3))) * weight).sum((0, 1)) / weight.sum()
            # A CIE76 difference of 2 is just visible side by side; below 30 the eye has to search for the object.
            if name == background or np.linalg.norm(lab - background_lab) < 30:
                return None
            area = rng.uniform(0.07 if side == "free" else 0.18, max_area if number == 1 else min(max_area, 0.16))
            scale = np.sqrt(area * width * height / (weight.mean() * mask.width * mask.height))
            scale = min(scale, 0.9 / number * width / mask.width, 0.9 * height / mask.height, 3)
            item = pixels.copy()
            item.putalpha(mask)
            item = item.resize((round(mask.width * scale), round(mask.height * scale)), Image.Resampling.BICUBIC)
            if rng.random() < 0.5:
                item, side = ImageOps.mirror(item), side.replace("left", "right")
            angle = rng.uniform(-35, 35) if side == "free" else rng.uniform(-3, 3)
            hidden = abs(np.sin(np.radians(angle))) + 0.03  # so that the side that was cut off lies outside the image
            hidden_x, hidden_y = round(item.height * hidden), round(item.width * hidden)
            item = item.rotate(angle, Image.Resampling.BICUBIC, expand=True)
            start, room_x, room_y = k * width // number, width // number - item.width, height - item.height
            x = start + int(rng.integers(min(0, room_x), max(0, room_x) + 1))
            y = int(rng.integers(min(0, room_y), max(0, room_y) + 1))
            x = -hidden_x if "left" in side else room_x + hidden_x if "right" in side else x
            y = -hidden_y if "top" in side else room_y + hidden_y if "bottom" in side else y
            alpha, shadow = Image.new("L", size), Image.new("L", size)
            alpha.paste(item.getchannel("A"), (x, y))
            if rng.random() < 0.7:
                shadow.paste(item.getchannel("A"), (x + int(rng.integers(-7, 8)), y + int(rng.integers(-7, 8))))
                shadow = shadow.filter(ImageFilter.GaussianBlur(rng.uniform(4, 10)))
                image.paste((0, 0, 0), mask=ImageEnhance.Brightness(shadow).enhance(rng.uniform(0.3, 0.65)))
            image.paste(item, (x, y), mask=item)
            union = ImageChops.lighter(union, alpha)
        mask = union.point(lambda v: 255 if v >= 128 else 0)
        if not 0.04 <= np.asarray(mask).mean() / 255 <= 0.7:
            return None
        # One light and one sensor for the whole image: contrast, exposure, temperature, a gradient, noise.
        array = (np.asarray(image, np.float32) - 128) * rng.uniform(0.9, 1.15) + 128
        array *= rng.uniform(0.85, 1.15) * (1 + rng.uniform(-0.08, 0.08) * np.array([1, 0, -1]))
        array *= 1 + rng.uniform(0, 0.15) * gradient(width, height, rng.uniform(0, 2 * np.pi))
        array += rng.normal(0, rng.uniform(0.5, 4), array.shape)
        return Image.fromarray(np.clip(array, 0, 255).astype(np.uint8)), mask

    def pair(self, seed: int, i: int) -> tuple[Image.Image, Image.Image]:
        """Image (RGB) and mask (L, 0 or 255) number `i`."""
        rng = np.random.default_rng([seed, i])
        two = rng.random() < 0.15
        kinds = rng.integers(CUT_OFF if two else 0, len(OBJECTS) + len(SHAPES), 1 + two).tolist()
        while (pair := self.compose(kinds, rng)) is None:  # about every third attempt succeeds
            pass
        return pair


def make_demo(out_dir: str | Path, n: int = COUNT, seed: int = 0) -> Path:
    """Writes `n` pairs to `out_dir`/DUTS-TR/DUTS-TR/{im_aug/demo_0000.jpg, gt_aug/demo_0000.png} and returns `out_dir`.

    The same `n` and `seed` give the same files, up to a gray level between versions of Pillow. A dataset that is there
    is kept. A rename publishes all files at once, so several processes may call this. Raises UserError if the dataset
    cannot be generated or written, or its folder holds other files.
    """
    out_dir = Path(out_dir)
    final = out_dir / FOLDER
    stamp, text = final / "demo.json", json.dumps({"version": VERSION, "count": n, "seed": seed})

    def is_there() -> bool:
        return stamp.is_file() and stamp.read_text(encoding="utf-8") == text

    if final.exists():
        if is_there():
            return out_dir
        raise UserError(f"{final} holds other files than this demo dataset: move it away, or set data_dir")
    composer = Composer()
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out_dir, prefix=".make_demo-") as work:
            new = Path(work, "new")
            for name in ("im_aug", "gt_aug"):
                (new / name).mkdir(parents=True)
            for i in range(n):
                image, mask = composer.pair(seed, i)
                image.save(new / "im_aug" / f"demo_{i:04d}.jpg", quality=92)
                mask.save(new / "gt_aug" / f"demo_{i:04d}.png")
            (new / stamp.name).write_text(text, encoding="utf-8")
            new.rename(final)
    except OSError as error:
        if not is_there():  # another process may have been faster
            message = f"cannot write the demo dataset ({error}): {out_dir} must be writable, 20 MB free"
            raise UserError(message) from error
    return out_dir
