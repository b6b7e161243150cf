"""Images and masks that the tests of this folder make, and the calls that they share."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from u2mamba.dataset.batches import Data, open_data
from u2mamba.dataset.pairs import pair_folders, train_val_split

ROUNDING = 0.5 / 255  # of an image in [0, 1] that was stored as bytes


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth image with some grain, (height, width, 3) uint8, that reaches 255."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(y / 9 + k) + np.cos(x / (7 + k) + seed) for k in range(3)], axis=2)
    out = np.clip(127 + 50 * waves + rng.normal(0, 8, (height, width, 3)), 0, 255).astype(np.uint8)
    out[height // 2, width // 2] = 255
    return out


def disc(height: int, width: int) -> np.ndarray:
    """A mask with an off-center disc, uint8 0 and 255."""
    y, x = np.mgrid[0:height, 0:width]
    return np.where((y / height - 0.4) ** 2 + (x / width - 0.6) ** 2 < 0.05, 255, 0).astype(np.uint8)


def sample(image: np.ndarray, label: np.ndarray) -> dict:
    """What `SalObjDataset` passes to a transform."""
    return {"imidx": np.array([3]), "image": image, "label": label[..., None]}


def make_folders(root: Path, count: int = 6, size: tuple[int, int] = (60, 80)) -> tuple[Path, Path]:
    """`count` pairs p000.png, ... -> the folders of images and masks."""
    images, masks = root / "im_aug", root / "gt_aug"
    images.mkdir(parents=True)
    masks.mkdir()
    for k in range(count):
        Image.fromarray(photo(*size, seed=k)).save(images / f"p{k:03d}.png")
        Image.fromarray(disc(*size)).save(masks / f"p{k:03d}.png")
    return images, masks


class Opened(NamedTuple):
    data: Data
    log: str
    skipped: int  # files without a partner


def open_folders(images: Path, masks: Path, size: int = 32, **options) -> Opened:
    """`open_data` of the pairs of two folders at 32 pixels, and what it printed."""
    lines: list[str] = []
    pairs = pair_folders(images, masks, log=lines.append)
    data = open_data(*train_val_split(pairs), size, log=lines.append, **options)
    return Opened(data, "\n".join(lines), pairs.skipped)


def make_set(folder: Path, images: int, size: tuple[int, int] = (300, 400), seed: int = 0) -> tuple[Path, Path]:
    """Maps and masks as a network leaves them: ellipses, their borders soft, moved and noisy in the map."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]] / np.reshape(size, (2, 1, 1))
    pred, gt = folder / "maps", folder / "masks"
    pred.mkdir(parents=True)
    gt.mkdir()
    for number in range(images):
        (cy, cx), (ry, rx), (my, mx) = rng.uniform(0.3, 0.7, 2), rng.uniform(0.05, 0.3, 2), rng.normal(0, 0.02, 2)
        mask = ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1
        moved = ((y - cy - my) / ry) ** 2 + ((x - cx - mx) / rx) ** 2 < 1
        noise = gaussian_filter(rng.normal(0, 1, size), 4) * rng.uniform(0.5, 3)
        saliency = (gaussian_filter(moved.astype(float), 3) + noise).clip(0, 1)
        for kind, array in ((pred, saliency), (gt, mask)):
            Image.fromarray(np.rint(array * 255).astype(np.uint8)).save(kind / f"{number:05}.png", compress_level=1)
    return pred, gt
