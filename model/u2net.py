"""U²-Net and its small version, exactly as published, with optional Mamba layers inside.

Source: Qin et al., "U²-Net: Going deeper with nested U-structure for salient object detection", Pattern Recognition
2020, arXiv 2005.09007, figures 3 (RSU) and 5 (network), and the state dicts of the authors' u2net.pth and u2netp.pth.

Glossary: RSU(L, in, mid, out) is a residual U-block of height L; d1..d6 are the side outputs, d0 their fusion.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .layers import PlainOps

# name: (height L, dilated, in, mid, out); RSU-4F, the dilated one, keeps its size and needs no pooling
RSU_CONFIG = {
    "stage1": (7, False, 3, 32, 64),
    "stage2": (6, False, 64, 32, 128),
    "stage3": (5, False, 128, 64, 256),
    "stage4": (4, False, 256, 128, 512),
    "stage5": (4, True, 512, 256, 512),
    "stage6": (4, True, 512, 256, 512),
    "stage5d": (4, True, 1024, 256, 512),
    "stage4d": (4, False, 1024, 128, 256),
    "stage3d": (5, False, 512, 64, 128),
    "stage2d": (6, False, 256, 32, 64),
    "stage1d": (7, False, 128, 16, 64),
}
# the small network: mid 16 and out 64 everywhere
RSU_CONFIG_SMALL = {
    name: (height, dilated, 3 if name == "stage1" else 128 if name.endswith("d") else 64, 16, 64)
    for name, (height, dilated, *_) in RSU_CONFIG.items()
}
MIN_SIZE = 32  # pixels: five poolings of the network must leave at least one


class REBNCONV(nn.Module):
    """3x3 convolution + batch norm + ReLU (+ residual): (B, in, H, W) -> (B, out, H, W)."""

    ops = PlainOps

    def __init__(self, in_ch: int, out_ch: int, dilation: int = 1):
        super().__init__()
        self.conv_s1 = nn.Conv2d(in_ch, out_ch, 3, padding=dilation, dilation=dilation)
        self.bn_s1 = nn.BatchNorm2d(out_ch)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.ops.batch_norm_relu(self.conv_s1, self.bn_s1, x, residual)


class RSU(nn.Module):
    """Residual U-block of height L: (B, in, H, W) -> (B, out, H, W).

    mamba: function dim -> a layer (B, dim, H, W) -> the same. mamba_levels: the REBNCONVs (1..L) that are followed by
    h + layer(h); the layer of level i is `mamba<i>`.
    """

    ops = PlainOps

    def __init__(
        self,
        height: int,
        dilated: bool,
        in_ch: int,
        mid_ch: int,
        out_ch: int,
        mamba: Callable[[int], nn.Module] | None = None,
        mamba_levels: Iterable[int] = (),
    ):
        super().__init__()
        self.height, self.dilated = height, dilated
        self.rebnconvin = REBNCONV(in_ch, out_ch)
        dilations = {level: 2 ** (level - 1) if dilated else 1 for level in range(1, height)}
        for level, dilation in dilations.items():
            setattr(self, f"rebnconv{level}", REBNCONV(out_ch if level == 1 else mid_ch, mid_ch, dilation))
        setattr(self, f"rebnconv{height}", REBNCONV(mid_ch, mid_ch, 2 ** (height - 1) if dilated else 2))
        for level, dilation in reversed(dilations.items()):
            setattr(self, f"rebnconv{level}d", REBNCONV(2 * mid_ch, out_ch if level == 1 else mid_ch, dilation))
        for level in mamba_levels:
            setattr(self, f"mamba{level}", mamba(mid_ch))

    def forward(self, x: Tensor) -> Tensor:
        hx_in = self.rebnconvin(x)
        skips = []
        h = hx_in
        for level in range(1, self.height + 1):
            h = getattr(self, f"rebnconv{level}")(h)
            if (mamba := getattr(self, f"mamba{level}", None)) is not None:
                h = h + mamba(h)
            pooled = not self.dilated and level < self.height - 1
            h, skip = self.ops.max_pool(h) if pooled else (h, h)
            skips.append(skip)
        h = skips.pop()
        for level in range(self.height - 1, 1, -1):
            h = getattr(self, f"rebnconv{level}d")(self.ops.upsample_cat(h, skips.pop()))
        return self.rebnconv1d(self.ops.upsample_cat(h, skips.pop()), residual=hx_in)


def saliency_map(logits: Tensor) -> Tensor:
    """Logits (B, K, H, W) -> probability of an object (B, 1, H, W): sigmoid, or for K > 1 classes, of which the first
    is the background, 1 - its softmax."""
    return torch.sigmoid(logits) if logits.shape[1] == 1 else 1 - logits.softmax(1)[:, :1]


def as_list(outputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor]) -> list[Tensor]:
    """[d0, d1, ...]: a network may return one tensor, several, or a dict of them."""
    if isinstance(outputs, Tensor):
        return [outputs]
    return list(outputs.values() if isinstance(outputs, Mapping) else outputs)


class U2NET(nn.Module):
    """U²-Net: (B, in_ch, H, W) float, H and W at least 32 -> (d0, ..., d6), each (B, 1, H, W).

    `net(x)` returns probabilities, `net(x, logits=True)` the logits (B, out_ch, H, W) for the loss. mamba: as in `RSU`;
    levels: function (stage, height) -> the RSU's mamba_levels. Raises ValueError for other shapes.
    """

    ops = PlainOps
    config = RSU_CONFIG

    def __init__(self, in_ch: int = 3, out_ch: int = 1, mamba: Callable[[int], nn.Module] | None = None, levels=None):
        super().__init__()
        widths = {}
        for name, (height, dilated, rsu_in, mid, out) in self.config.items():
            mamba_levels = levels(name, height) if levels else ()
            rsu_in = in_ch if name == "stage1" else rsu_in
            setattr(self, name, RSU(height, dilated, rsu_in, mid, out, mamba, mamba_levels))
            widths[name] = out
        for i, name in enumerate(("stage1d", "stage2d", "stage3d", "stage4d", "stage5d", "stage6"), start=1):
            setattr(self, f"side{i}", nn.Conv2d(widths[name], out_ch, 3, padding=1))
        self.outconv = nn.Conv2d(6 * out_ch, out_ch, 1)

    def forward(self, x: Tensor, logits: bool = False) -> tuple[Tensor, ...]:
        if x.ndim != 4 or min(x.shape[2:]) < MIN_SIZE:
            raise ValueError(f"images must be (B, C, H, W) with H, W >= {MIN_SIZE}; got {tuple(x.shape)}")
        skips = []
        h = x
        for i in range(1, 6):
            h, skip = self.ops.max_pool(getattr(self, f"stage{i}")(h))
            skips.append(skip)
        h = self.stage6(h)
        sides = [self.ops.side_output(self.side6, h)]
        for i in range(5, 0, -1):
            h = getattr(self, f"stage{i}d")(self.ops.upsample_cat(h, skips.pop()))
            sides.insert(0, self.ops.side_output(getattr(self, f"side{i}"), h))
        size = sides[0].shape[2:]
        sides = [sides[0], *(self.ops.upsample_to(s, size) for s in sides[1:])]
        outputs = (self.outconv(torch.cat(sides, 1)), *sides)
        return outputs if logits else tuple(saliency_map(d) for d in outputs)


class U2NETP(U2NET):
    """The small U²-Net (1.1 million parameters); shapes as U2NET."""

    config = RSU_CONFIG_SMALL
