"""U²-Net with Mamba layers inside its residual U-blocks, and the way public U²-Net weights get into it.

Sources: U²-Net, arXiv 2005.09007; Mamba, Gu & Dao 2023, arXiv 2312.00752; the multiscale block with Mamba after every
encoder-side REBNCONV, arXiv 2606.20282.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from model.mamba import Mamba, MambaLayer, NormAt
from model.u2net import RSU_TABLE_SMALL, U2NET

MambaAt = Literal["none", "bottleneck", "encoder"]


class U2MAMBA(U2NET):
    """U²-Net with h = h + mamba(h) inside its RSUs; input and outputs as U2NET.

    mamba_at: where the Mamba layers stand.
        "none": nowhere; equal to U2NET.
        "bottleneck": after the deepest REBNCONV of all 11 RSUs.
        "encoder": there, and after every other encoder-side REBNCONV of the six encoder stages, at full resolution.
    d_state, d_conv, expand, backend: see `model.mamba.Mamba`, as mamba_norm: its norm_at.
    """

    def __init__(
        self,
        in_ch: int = 3,
        out_ch: int = 1,
        mamba_at: MambaAt = "bottleneck",
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        backend: str = "auto",
        mamba_norm: NormAt = "none",
    ):
        if mamba_at not in ("none", "bottleneck", "encoder"):
            raise ValueError(f'mamba_at must be "none", "bottleneck" or "encoder", not {mamba_at!r}')

        def levels(stage: str, height: int) -> tuple[int, ...]:
            if mamba_at == "none":
                return ()
            everywhere = mamba_at == "encoder" and not stage.endswith("d")
            return tuple(range(1, height + 1)) if everywhere else (height,)

        sizes = {"d_state": d_state, "d_conv": d_conv, "expand": expand}
        make = partial(MambaLayer, **sizes, backend=backend, norm_at=mamba_norm)
        super().__init__(in_ch, out_ch, make, levels)


class U2MAMBAP(U2MAMBA):
    """The small U²-Net with Mamba layers; as U2MAMBA."""

    table = RSU_TABLE_SMALL


def variant_of(state_dict: Mapping[str, Tensor]) -> dict:
    """The arguments of U2MAMBA that a state dict of one tells: mamba_at, mamba_norm."""
    return {
        "mamba_at": "encoder" if "stage1.mamba1.norm.weight" in state_dict else "bottleneck",
        "mamba_norm": "gate" if any(key.endswith(".mamba.norm.weight") for key in state_dict) else "none",
    }


@dataclass
class WeightReport:
    """What `load_u2net_weights` did, as lists of keys of the network's state dict."""

    matched: list[str]  # taken from the file
    new: list[str]  # in the network only: left as initialised, out_proj of the Mamba layers set to zero
    unfit: list[str]  # in the file only, or there with another shape

    def __str__(self) -> str:
        line = f"{len(self.matched)} tensors matched, {len(self.new)} new"
        return line + (f", {len(self.unfit)} did not fit: {', '.join(self.unfit[:3])}" if self.unfit else "")


def load_u2net_weights(net: nn.Module, state_dict: Mapping[str, Tensor]) -> WeightReport:
    """Puts public U²-Net weights into `net` so that it computes exactly what U²-Net computes until trained further.

    net: U2NET, U2NETP, U2MAMBA or U2MAMBAP. state_dict: that of u2net.pth or u2netp.pth, or of this project's networks.
    out_proj of every Mamba layer that the file does not hold is set to zero, which makes h + mamba(h) = h.
    Raises ValueError when the plain U²-Net part is not complete, or when the file's Mamba layers have their norm
    elsewhere than the network's; then `net` is left as it was.
    """
    state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}  # saved through DataParallel
    own = net.state_dict()
    matched = [k for k, v in own.items() if k in state_dict and state_dict[k].shape == v.shape]
    new = [k for k in own if k not in state_dict]
    unfit = [k for k in state_dict if k not in own or own[k].shape != state_dict[k].shape]
    missing = [k for k in own if k not in set(matched) and ".mamba" not in k]
    if missing:
        first = state_dict.get("stage1.rebnconv1.conv_s1.weight")
        fits = "u2net.pth fits U2NET and U2MAMBA, u2netp.pth U2NETP and U2MAMBAP"
        if first is not None and first.shape != own["stage1.rebnconv1.conv_s1.weight"].shape:
            fits = "they fit arch = " + ("u2netp and u2mambap" if first.shape[0] == 16 else "u2net and u2mamba")
        raise ValueError(
            f"the weights do not fill {type(net).__name__}: {len(missing)} of {len(own)} tensors are missing or have "
            f"another shape, first {missing[0]}; {fits}"
        )
    normed, wants = (variant_of(keys)["mamba_norm"] for keys in (state_dict, own))
    if any(".mamba" in k for k in matched) and normed != wants:
        raise ValueError(f'their Mamba layers were trained with mamba_norm = "{normed}": set it so')
    with torch.no_grad():
        for key in matched:
            own[key].copy_(state_dict[key])
        for name, module in net.named_modules():
            if isinstance(module, Mamba) and f"{name}.out_proj.weight" not in matched:
                module.out_proj.weight.zero_()
    return WeightReport(matched, new, unfit)
