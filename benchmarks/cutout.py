"""Foreground colors of cut-outs: how much of the old background stays in soft edges, and what they cost.

    python -m benchmarks.cutout                     tables of docs/inference.md
    python -m benchmarks.cutout --count 100 --checkpoint saved_models/fast_4gpu/best.pth
    python -m benchmarks.cutout --pairs im_aug gt_aug --count 139       a guided filter, which was left out

Composites with known foreground: objects of the demo set, their edge colors continued outward, on its backgrounds.
Color error: mean difference, of 255, to the object's colors where 0 < alpha < 255. Composite error: the cut-out on a
new background against the true colors and alpha on it, over the same pixels; it holds the errors of the map too.
--pairs: maps of the validation split at the images' own size, as they are and after a guided filter.
"""

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import py_sod_metrics as psm
import torch
from PIL import Image
from scipy.ndimage import binary_erosion, distance_transform_edt, uniform_filter

import u2mamba_predict
from benchmarks.hardware import cli, in_turn
from u2mamba.dataset.decode import read_pair
from u2mamba.dataset.demo import OBJECTS, SHAPES, Composer
from u2mamba.dataset.pairs import pair_folders, train_val_split
from u2mamba.dataset.rescale import rescale_image, resize_map
from u2mamba.inference import Predictor, load_model
from u2mamba.inference.foreground import foreground_colors
from u2mamba.inference.render import predict_file

GUIDED = ((2, 1e-4), (4, 1e-4), (4, 1e-2))  # radius in pixels, eps
TOLERANCE = 2  # pixels: of boundary F
BACKGROUNDS = {"black": (0, 0, 0), "white": (255, 255, 255), "magenta": (255, 0, 255)}


@dataclass
class Config:
    count: int = 24  # composites, or pairs
    checkpoint: str = "small"
    width: int = 640  # pixels; height: three quarters
    runs: int = 5  # of a cut-out of 12 megapixels
    pairs: tuple[str, str] = ("", "")  # folders of images and masks


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
    """(2, 4) before and after: color error, composite errors; sums over the soft pixels of `map_`."""
    soft = (map_ > 0) & (map_ < 255)
    rows = []
    for cutout in (image, foreground_colors(image, map_)):
        differences = [cutout - colors]
        differences += [blend(cutout, map_, b) - blend(colors, alpha, b) for b in BACKGROUNDS.values()]
        rows.append([np.abs(d[soft]).mean(1).sum() for d in differences])
    return np.array(rows)


def cost(predict: Predictor, runs: int) -> str:
    """Seconds of a cut-out of a 12-megapixel photo, from file to file, with foreground colors and without."""
    with tempfile.TemporaryDirectory() as folder:
        photo = Path(folder, "photo.jpg")
        Image.fromarray(composite(Composer(), 0, 640)[0]).resize((4000, 3000)).save(photo, quality=92)
        settings = [u2mamba_predict.Config(mode=("cutout",), foreground=on) for on in (False, True)]
        calls = {cfg.foreground: functools.partial(predict_file, photo, predict, 320, cfg) for cfg in settings}
        without, with_ = (min(seconds) for seconds in in_turn(calls, torch.device("cpu"), runs).values())
    return f"12 megapixels: {without:.2f} s without, {with_:.2f} s with foreground colors (+{with_ / without - 1:.0%})"


def guided_filter(image: np.ndarray, map_: np.ndarray, radius: int, eps: float) -> np.ndarray:
    """(H, W) in [0, 1]: the map as a local linear function of the colors (He et al. 2010, equations 19 to 21)."""

    def mean(x: np.ndarray) -> np.ndarray:
        return uniform_filter(x, (2 * radius + 1,) * 2 + (1,) * (x.ndim - 2))

    colors, p = image / 255, map_[..., None]
    mean_colors, mean_p = mean(colors), mean(p)
    covariance = mean(colors[..., :, None] * colors[..., None, :]) + eps * np.eye(3)
    covariance -= mean_colors[..., :, None] * mean_colors[..., None, :]
    a = np.linalg.solve(covariance, (mean(colors * p) - mean_colors * mean_p)[..., None])[..., 0]
    b = mean_p[..., 0] - (a * mean_colors).sum(-1)
    return ((mean(a) * colors).sum(-1) + mean(b)).clip(0, 1)


def boundary_f(found: np.ndarray, mask: np.ndarray) -> float:
    """F-measure of the boundary pixels of two (H, W) bool masks that match within TOLERANCE (Perazzi et al. 2016)."""
    edges = [part & ~binary_erosion(part, border_value=1) for part in (found, mask)]
    if not all(edge.any() for edge in edges):
        return float(not any(edge.any() for edge in edges))
    distances = [distance_transform_edt(~edge) for edge in edges]
    precision, recall = ((distances[1 - k][edges[k]] <= TOLERANCE).mean() for k in (0, 1))
    return 2 * precision * recall / max(precision + recall, 1e-9)


def filter_scores(cfg: Config, predict: Predictor) -> np.ndarray:
    """(1 + filters, 2): mean weighted F and boundary F of the network's maps and of the filtered ones."""
    validation = train_val_split(pair_folders(*cfg.pairs))[1]
    chosen = validation[:: max(1, len(validation) // cfg.count)][: cfg.count]
    print(f"{len(chosen):,} of {len(validation):,} validation pairs")
    scores = []
    for pair in chosen:
        image, mask = read_pair(pair)
        saliency = predict.saliency(image).astype(np.float64)
        weighted = psm.WeightedFmeasure()
        maps = [saliency, *(guided_filter(image, saliency, *setting) for setting in GUIDED)]
        for map_ in maps:
            weighted.step(map_, mask > 128, normalize=False)
        scores.append([weighted.weighted_fms, [boundary_f(map_ > 0.5, mask > 128) for map_ in maps]])
    return np.mean(scores, axis=0).T


def main(cfg: Config) -> None:
    predict = Predictor(load_model(cfg.checkpoint))
    if all(cfg.pairs):
        names = "the network's map", *(f"guided filter, radius {radius}, eps {eps}" for radius, eps in GUIDED)
        for name, (weighted, boundary) in zip(names, filter_scores(cfg, predict), strict=True):
            print(f"{name:35} weighted F {weighted:.4f}  boundary F {boundary:.4f}")
        return
    composer = Composer()
    sums = {"the network's map": np.zeros((2, 4)), "true alpha": np.zeros((2, 4))}
    pixels = dict.fromkeys(sums, 0)
    for i in range(cfg.count):
        image, colors, alpha = composite(composer, i, cfg.width)
        saliency = predict(torch.from_numpy(rescale_image(image, 320))[None])[0, 0].numpy()
        network = np.rint(resize_map(saliency, alpha.shape) * 255).astype(np.uint8)
        for name, map_ in zip(sums, (network, alpha), strict=True):
            sums[name] += errors(image, colors, alpha, map_)
            pixels[name] += int(((map_ > 0) & (map_ < 255)).sum())
    print(f"{cfg.count} composites of {cfg.width} pixels; before -> after, of 255")
    for name, total in sums.items():
        before, after = total / pixels[name]
        for k, what in enumerate(("colors", *(f"composite on {b}" for b in BACKGROUNDS))):
            print(f"{name:18} {what:22} {before[k]:6.2f} -> {after[k]:6.2f}  {after[k] / before[k]:4.0%}")
    print(cost(predict, cfg.runs))


if __name__ == "__main__":
    cli(main, Config, __doc__)
