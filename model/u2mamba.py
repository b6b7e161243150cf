"""U²-Net with Mamba layers inside its residual U-blocks.

Sources: U²-Net, arXiv 2005.09007; Mamba, Gu & Dao 2023, arXiv 2312.00752; the multiscale block with Mamba after every
encoder-side REBNCONV, arXiv 2606.20282.
"""

from functools import partial
from typing import Literal

from .mamba import MambaLayer, NormAt
from .u2net import RSU_CONFIG_SMALL, U2NET

MambaAt = Literal["none", "bottleneck", "encoder"]


class U2MAMBA(U2NET):
    """U²-Net with h = h + mamba(h) inside its RSUs; input and outputs as U2NET.

    mamba_at: "none", equal to U2NET; "bottleneck", after the deepest REBNCONV of all 11 RSUs; "encoder", there and
    after every other encoder-side REBNCONV of the six encoder stages, at full resolution. mamba_norm: `Mamba`'s
    norm_at.
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

        def levels(stage: str, height: int) -> range:
            """The REBNCONVs of a stage that a Mamba layer follows."""
            everywhere = mamba_at == "encoder" and not stage.endswith("d")
            return range(1 if everywhere else height, height + 1) if mamba_at != "none" else range(0)

        sizes = {"d_state": d_state, "d_conv": d_conv, "expand": expand}
        super().__init__(in_ch, out_ch, partial(MambaLayer, **sizes, backend=backend, norm_at=mamba_norm), levels)


class U2MAMBAP(U2MAMBA):
    """The small U²-Net with Mamba layers; as U2MAMBA."""

    config = RSU_CONFIG_SMALL
