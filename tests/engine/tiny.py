"""A network small enough to follow by hand, tiny runs of the real script, and how their results are compared."""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from tests.forked import run_script

SCRIPT = Path(__file__).parents[2] / "u2mamba_train.py"
TINY = (
    "--arch u2mambap --rescale 48 --crop 40 --batch_size_train 4 --epoch_num 2 --log_frq 1 --save_frq 3 --device cpu "
    "--model_name tiny"
).split()


class Net(nn.Module):
    """Seven outputs from one convolution and batch norm; shapes as U2NET."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 7, 3, padding=1, bias=False)  # before batch norm a bias has rounding for a gradient
        self.bn = nn.BatchNorm2d(7)

    def forward(self, x, logits=False):
        d = self.bn(self.conv(x)).split(1, 1)
        return d if logits else tuple(torch.sigmoid(v) for v in d)


class NetWithoutNorm(Net):
    """No operation over the whole batch, and an unused layer."""

    def forward(self, x, logits=False):
        return self.conv(x).split(1, 1)


def batch(seed=0, n=4):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 8, 8, generator=g), (torch.rand(n, 1, 8, 8, generator=g) > 0.5).float()


def words(data, saved, *more):
    folders = ["--data_dir", data, "--tra_image_dir", "images", "--tra_label_dir", "masks", "--saved_models", saved]
    return [*TINY, *map(str, folders), *more]


def start(data, saved, *more, stderr=subprocess.PIPE):
    """The script itself, to be sent signals."""
    command = [sys.executable, "-u", str(SCRIPT), *words(data, saved, *more)]
    return subprocess.Popen(command, cwd=data, stdout=subprocess.PIPE, stderr=stderr, text=True)


def train(data, saved, *more):
    with tempfile.TemporaryDirectory() as outputs:
        done = run_script(SCRIPT, words(data, saved, *more), data, Path(outputs))
    assert "Traceback" not in done.stderr, done.stderr
    return done


def draw_pairs(folder, names, mode="RGB", labels=False, seed=0):
    """Pairs of 48x72 pixels in folder/images and folder/masks: a bright disc on dark noise; labels: its two halves."""
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[:48, :72]
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for name in names:
        disc = (y - rng.integers(14, 34)) ** 2 + (x - rng.integers(14, 58)) ** 2 < 144
        image = rng.integers(0, 60, (48, 72, len(mode))) + 180 * disc[..., None]
        mask = disc * (1 + (x > x[disc].mean()) if labels else 255)
        Image.fromarray(image.astype(np.uint8), mode).save(folder / "images" / f"{name}.png")
        Image.fromarray(mask.astype(np.uint8)).save(folder / "masks" / f"{name}.png")
    return folder


def last(folder):
    return torch.load(folder / "last.pth", weights_only=True)


def weights(folder):
    return last(folder)["model"]


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
