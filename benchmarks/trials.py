"""Loss terms and layers that `benchmarks.ablation` tries; what helps moves into the trainer, the rest stays here.

A trial takes the place of one of the trainer's functions for the length of a run. The terms are added, with weight 1,
to the loss of each output d0, ..., d6.
"""

from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

import u2mamba_train
from model import ARCHS
from u2mamba_train import total_loss

Outputs = tuple[Tensor, ...]


def ssim_term(logits: Outputs, masks: Tensor) -> Tensor:
    """1 - SSIM of d0, ..., d6, (B, 1, H, W) each, in windows of 11x11 -> (7,). BASNet (CVPR 2019) adds it, there with
    Gaussian windows."""
    p, y = torch.sigmoid(torch.stack([d.float() for d in logits])).flatten(0, 1), masks.repeat(len(logits), 1, 1, 1)
    mean = partial(F.avg_pool2d, kernel_size=11, stride=1)
    a, b = mean(p), mean(y)
    aa, bb, ab = mean(p * p) - a * a, mean(y * y) - b * b, mean(p * y) - a * b
    ssim = (2 * a * b + 1e-4) * (2 * ab + 9e-4) / ((a * a + b * b + 1e-4) * (aa + bb + 9e-4))
    return 1 - ssim.view(len(logits), -1).mean(1)


def kl_term(logits: Outputs, masks: Tensor) -> Tensor:
    """KL divergence from d0, held fixed, to each of d0, ..., d6, mean over the pixels -> (7,).

    A reading of the "cross-level consistency" of arXiv 2606.20282, whose code is not public.
    """
    d0 = logits[0].detach().float()
    p = torch.sigmoid(d0)
    own = F.binary_cross_entropy_with_logits(d0, p)  # the entropy of d0
    return torch.stack([F.binary_cross_entropy_with_logits(d.float(), p) - own for d in logits])


def _with(term):
    return patch.object(u2mamba_train, "total_loss", lambda d, y, *constants: total_loss(d, y, *constants) + term(d, y))


def _half_sides():
    def weighted(logits: Outputs, masks: Tensor, *constants) -> Tensor:
        each = total_loss(logits, masks, *constants)
        return torch.cat((each[:1], each[1:] * 0.5))

    return patch.object(u2mamba_train, "total_loss", weighted)


def _dropping(share: float, layer, _, out: Tensor) -> Tensor:
    return F.dropout2d(out, share, layer.training)


def _network_with_dropout(make, share: float, **words):
    net = make(**words)
    for name in ("stage6", *(f"stage{i}d" for i in range(1, 6))):
        getattr(net, name).register_forward_hook(partial(_dropping, share))
    return net


def _dropout(share: float):
    made = {name: partial(_network_with_dropout, make, share) for name, make in ARCHS.items()}
    return patch.object(u2mamba_train, "ARCHS", made)


TRIALS = {  # variant: makes the context in which it is trained
    "SSIM as well": partial(_with, ssim_term),
    "KL from d0 to all": partial(_with, kl_term),
    "side outputs weigh half": _half_sides,
    "dropout of channels": partial(_dropout, 0.1),  # of what the decoder's blocks and stage 6 give
}
