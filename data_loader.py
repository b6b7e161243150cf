"""The dataset and the transforms that U-2-Net published, with scikit-image on every access, as the reference.

A training run does not call them. It uses their fast equivalents in u2mamba/dataset/rescale.py and augment.py, which a
test compares with them: to change the training data, edit those. Source: Qin et al., U-2-Net's data_loader.py
(github.com/xuebinqin/U-2-Net); its bugs are fixed and marked. The functions for batches can be imported from here too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
from skimage import color, transform
from torch.utils.data import Dataset

from u2mamba.dataset.augment import MEAN, STD, Augmentation, augment, epoch_plan, normalize
from u2mamba.dataset.batches import Batch, Data, DataSource, batches, open_data, validation_batches
from u2mamba.dataset.decode import BadFile, read_image, read_mask
from u2mamba.dataset.image_file import DataError
from u2mamba.dataset.pairs import find_pairs, pair_folders, train_val_split

__all__ = [
    "MEAN", "STD", "Augmentation", "BadFile", "Batch", "Data", "DataError", "DataSource", "RandomCrop", "Rescale",
    "RescaleT", "SalObjDataset", "ToTensor", "ToTensorLab", "augment", "batches", "epoch_plan", "find_pairs",
    "normalize", "open_data", "pair_folders", "train_val_split", "validation_batches",
]  # fmt: skip

Sample = dict  # {"imidx": (1,) int, "image": (H, W, 3), "label": (H, W, 1)}, arrays; tensors after ToTensor[Lab]


def _random_vflip(sample: Sample) -> Sample:
    if torch.rand(()) >= 0.5:  # torch's generator: DataLoader seeds it differently in every worker
        return {**sample, "image": sample["image"][::-1], "label": sample["label"][::-1]}
    return sample


def _resize(sample: Sample, size: tuple[int, int]) -> Sample:
    image = transform.resize(sample["image"], size, mode="constant")
    label = transform.resize(sample["label"], size, mode="constant", order=0, preserve_range=True)
    return {**sample, "image": image, "label": label}


class RescaleT:
    """Resizes image and label to `output_size` (a side, or height and width) without keeping the aspect ratio; the
    image becomes float in [0, 1]."""

    def __init__(self, output_size: int | tuple[int, int]):
        # Fixed: the published one accepts a tuple and then fails on it.
        self.output_size = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)

    def __call__(self, sample: Sample) -> Sample:
        return _resize(sample, self.output_size)


class Rescale:
    """Vertical flip with p = 0.5, then resizes the shorter side to `output_size`, or to (height, width)."""

    def __init__(self, output_size: int | tuple[int, int]):
        self.output_size = output_size

    def __call__(self, sample: Sample) -> Sample:
        height, width = sample["image"].shape[:2]
        size = self.output_size
        if isinstance(size, int):
            size = (int(size * height / width), size) if height > width else (size, int(size * width / height))
        return _resize(_random_vflip(sample), tuple(size))


class RandomCrop:
    """Vertical flip with p = 0.5, then a random crop of `output_size`. Raises ValueError if the image is smaller."""

    def __init__(self, output_size: int | tuple[int, int]):
        self.output_size = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)

    def __call__(self, sample: Sample) -> Sample:
        sample = _random_vflip(sample)
        (height, width), (rows, columns) = sample["image"].shape[:2], self.output_size
        if rows > height or columns > width:
            raise ValueError(f"RandomCrop({self.output_size}): the image is only {height}x{width}")
        # Fixed: randint(0, h - rows) never returns the last offset, and fails if the sizes match.
        top, left = (int(torch.randint(room + 1, ())) for room in (height - rows, width - columns))
        crop = np.s_[top : top + rows, left : left + columns]
        return {**sample, "image": sample["image"][crop], "label": sample["label"][crop]}


def _divide(values: np.ndarray, by: float) -> np.ndarray:
    # Fixed: an all-black image or a constant channel was divided by zero, and the loss became NaN.
    return values / by if by > 1e-6 else values


def _standardize(channels: np.ndarray) -> np.ndarray:
    """Each channel to [0, 1] by its own range, then to mean 0 and standard deviation 1."""
    out = np.empty(channels.shape)
    for c in range(channels.shape[2]):
        plane = channels[:, :, c] - channels[:, :, c].min()
        plane = _divide(plane, plane.max())
        out[:, :, c] = _divide(plane - plane.mean(), plane.std())
    return out


class ToTensorLab:
    """Arrays -> tensors {"imidx", "image" (3 or 6, H, W), "label" (1, H, W) in [0, 1]}, float64 as published.

    flag 0: RGB divided by the image's maximum, then ImageNet mean and standard deviation; 1: Lab; 2: RGB and Lab, both
    standardized per channel.
    """

    def __init__(self, flag: int = 0):
        self.flag = flag

    def __call__(self, sample: Sample) -> Sample:
        image, label = sample["image"], sample["label"]
        # Fixed: divided by the crop's own maximum, a crop that holds only noise or a soft edge of the object became
        # full foreground. read_mask has scaled files of 0 and 1 to 255; labels that end at 1 stay.
        label = label / (255 if label.max() > 1 else 1)
        if image.shape[2] == 1:
            image = np.repeat(image, 3, axis=2)
        if self.flag == 1:
            image = _standardize(color.rgb2lab(image))
        elif self.flag == 2:
            image = _standardize(np.concatenate([image, color.rgb2lab(image)], axis=2))
        else:
            image = (_divide(image, image.max()) - MEAN) / STD
        image, label = (torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1))) for array in (image, label))
        return {"imidx": torch.from_numpy(sample["imidx"]), "image": image, "label": label}


class ToTensor(ToTensorLab):
    """ToTensorLab with flag 0."""

    def __init__(self):
        super().__init__(0)


class SalObjDataset(Dataset):
    """Samples of image files and mask files, in the order given; without mask names: labels of zeros."""

    def __init__(
        self,
        img_name_list: Sequence[str | os.PathLike],
        lbl_name_list: Sequence[str | os.PathLike],
        transform: Callable[[Sample], Sample] | None = None,
    ):
        self.image_name_list, self.label_name_list, self.transform = img_name_list, lbl_name_list, transform

    def __len__(self) -> int:
        return len(self.image_name_list)

    def __getitem__(self, idx: int) -> Sample:
        image = read_image(self.image_name_list[idx])
        label = read_mask(self.label_name_list[idx]) if self.label_name_list else np.zeros(image.shape[:2], np.uint8)
        sample = {"imidx": np.array([idx]), "image": image, "label": label[:, :, None]}
        return self.transform(sample) if self.transform else sample
