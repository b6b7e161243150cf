"""Foreground colors of cut-outs: how much of the old background stays in soft edges.

    python -m benchmarks.cutout                     tables of docs/inference.md
    python -m benchmarks.cutout --count 100 --checkpoint saved_models/fast_4gpu/best.pth

Composites with known foreground: objects of the demo set, their edge colors continued outward, on its backgrounds.
Color error: mean difference, of 255, to the object's colors where 0 < alpha < 255. Composite error: the cut-out on a
new background against the true colors and alpha on it, over the same pixels; it holds the errors of the map too.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import distance_transform_edt

from benchmarks.hardware import cli, print_hardware
from u2mamba.dataset.demo import OBJECTS, SHAPES, Composer
from u2mamba.inference import Predictor, load_model
from u2mamba.inference.foreground import foreground_colors

BACKGROUNDS = {"black": (0, 0, 0), "white": (255, 255, 255), "magenta": (255, 0, 255)}


@dataclass
class Config:
    count: int = 24  # composites
    checkpoint: str = "small"
    width: int = 640  # pixels; height: three quarters


def composite(composer: Composer, i: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image (H, W, 3) uint8, the object's color at every pixel (H, W, 3) and its alpha (H, W), both 0 to 255."""
    rng, size = np.random.default_rng([7, i]), (width, width * 3 // 4)
    _, pixels, mask, _, _ = composer.draw_object(int(rng.integers(len(OBJECTS) + len(SHAPES))), rng)
    _, background = composer.draw_background(size, rng)
    scale = min(size[0] / mask.width, size[1] / mask.height) * rng.uniform(0.5, 0.85)
    part = (round(mask.width * scale), round(mask.height * scale))
    place = tuple(int(rng.integers(0, a - b + 1)) for a, b in zip(size, part, strict=True))
    alpha, colors = Image.new("L", size), Image.new("RGB", size)
    alpha.paste(mask.resize(part, Image.Resampling.BICUBIC), place)
    colors.paste(pixels.resize(part, Image.Resampling.BICUBIC), place)
    alpha, colors = np.asarray(alpha), np.asarray(colors, np.float32)
    nearest = distance_transform_edt(alpha < 253, return_distances=False, return_indices=True)
    colors = colors[tuple(nearest)]
    return np.rint(blend(colors, alpha, np.asarray(background))).astype(np.uint8), colors, alpha


def blend(colors: np.ndarray, alpha: np.ndarray, background: np.ndarray | tuple) -> np.ndarray:
    a = alpha[..., None] / np.float32(255)
    return a * colors + (1 - a) * np.asarray(background, np.float32)


def errors(image: np.ndarray, colors: np.ndarray, alpha: np.ndarray, map_: np.ndarray) -> np.ndarray:
    """(2, 4, n) before and after: color error, composite errors at each of the n soft pixels of `map_`."""
    soft = (map_ > 0) & (map_ < 255)
    rows = []
    for cutout in (image, foreground_colors(image, map_)):
        differences = [cutout - colors]
        differences += [blend(cutout, map_, b) - blend(colors, alpha, b) for b in BACKGROUNDS.values()]
        rows.append([np.abs(d[soft]).mean(1) for d in differences])
    return np.array(rows)


def main(cfg: Config) -> None:
    print_hardware(torch.device("cpu"))
    predict, composer = Predictor(load_model(cfg.checkpoint)), Composer()
    results: dict[str, list[np.ndarray]] = {"the network's map": [], "true alpha": []}
    for i in range(cfg.count):
        image, colors, alpha = composite(composer, i, cfg.width)
        network = np.rint(predict.saliency(image) * 255).astype(np.uint8)
        for name, map_ in zip(results, (network, alpha), strict=True):
            results[name].append(errors(image, colors, alpha, map_))
    print(f"{cfg.count} composites of {cfg.width} pixels; before -> after, of 255")
    for name, parts in results.items():
        before, after = np.concatenate(parts, axis=2).mean(2)
        for k, what in enumerate(("colors", *(f"composite on {b}" for b in BACKGROUNDS))):
            print(f"{name:18} {what:22} {before[k]:6.2f} -> {after[k]:6.2f}  {after[k] / before[k]:4.0%}")


if __name__ == "__main__":
    cli(main, Config, __doc__)
