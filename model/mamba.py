"""Mamba (Gu & Dao 2023, arXiv 2312.00752, section 3.4) and the layer that runs it over the pixels of a feature map.

Glossary (paper's letter -> here): batch B; model width D -> d_model; expansion E -> expand; inner width ED -> d_inner;
state size N -> d_state; length L -> L tokens; rank of Δ, R -> dt_rank; step Δ -> dt_proj, its bias added in the scan;
A -> -exp(A_log); skip D -> D. Names, shapes and initialization are those of mamba_ssm's `Mamba`: state dicts fit both.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from .layers import PlainOps
from .selective_scan import selective_scan

NormAt = Literal["none", "gate"]
DT_MIN, DT_MAX = 1e-3, 1e-1  # range of the initial Δ (arXiv 2312.00752, section 3.6)


class Mamba(nn.Module):
    """A selective state space block: (B, L, d_model) -> (B, L, d_model), each token mixed with those before it.

    backend: of the scan, see `model.selective_scan.choose_backend`. norm_at: "none", as in Mamba, where the result
    grows with the product of Δ, B, C, u and the gate and can explode; or "gate", an RMSNorm of the gated result before
    out_proj, as in Mamba-2 (arXiv 2405.21060, section 7.1).
    """

    ops = PlainOps

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        backend: str = "auto",
        norm_at: NormAt = "none",
    ) -> None:
        super().__init__()
        if norm_at not in ("none", "gate"):
            raise ValueError(f'Mamba: norm_at must be "none" or "gate", not {norm_at!r}')
        self.d_model, self.d_state, self.backend, self.norm_at = d_model, d_state, backend, norm_at
        self.d_inner, self.dt_rank = int(expand * d_model), math.ceil(d_model / 16)
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        self.conv1d = nn.Conv1d(self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(self.d_inner, 1))  # S4D-real: A = -1..-N
        self.D = nn.Parameter(torch.ones(self.d_inner))
        if norm_at == "gate":
            self.norm = nn.RMSNorm(self.d_inner, eps=1e-5)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        dt = torch.empty(self.d_inner).uniform_(math.log(DT_MIN), math.log(DT_MAX)).exp()
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.A_log._no_weight_decay = self.D._no_weight_decay = True

    def forward(self, x: Tensor, channels_first: bool = False) -> Tensor:
        """(B, L, d_model) -> the same, with `channels_first` in the memory layout (B, d_model, L) of an image.

        Raises ValueError for a different width.
        """
        if x.dim() != 3 or x.shape[2] != self.d_model:
            raise ValueError(f"Mamba: x must be (B, L, {self.d_model}), got {tuple(x.shape)}")

        u, z = self.ops.project(self.in_proj, x.transpose(1, 2), parts=2)  # (B, d_inner, L)
        u = self.ops.conv_silu(self.conv1d, u)
        x_dbc = self.ops.project(self.x_proj, u)  # (B, dt_rank + 2 d_state, L)
        dt, B, C = x_dbc.split([self.dt_rank, self.d_state, self.d_state], dim=1)
        dt = self.ops.project(self.dt_proj, dt)  # (B, d_inner, L)
        A = -torch.exp(self.A_log.to(torch.promote_types(x.dtype, torch.float32)))
        y = selective_scan(u, dt, A, B, C, self.D, z, self.dt_proj.bias, delta_softplus=True, backend=self.backend)
        if self.norm_at == "gate":
            y = self.ops.rms_norm(self.norm, y)
        return self.ops.project(self.out_proj, y, tokens_first=not channels_first).transpose(1, 2)


class MambaLayer(nn.Module):
    """Mamba over a feature map: (B, C, H, W) -> H·W tokens of C channels -> LayerNorm -> Mamba -> (B, C, H, W).

    With `channel_token` the C channels are the tokens and their H·W pixels the features: `dim` is then H·W, which fixes
    the image size. Computes in fp32 inside any autocast; with the fast operations, as mamba_ssm, tokens are bf16, state
    and sums fp32. The result has the input's dtype and memory format, so that `h + mamba(h)` is one pass over memory.
    options: backend and norm_at of `Mamba`.
    """

    ops = PlainOps

    def __init__(
        self, dim: int, d_state: int = 16, d_conv: int = 4, expand: int = 2, channel_token: bool = False, **options: str
    ) -> None:
        super().__init__()
        self.dim, self.channel_token = dim, channel_token
        self.norm = nn.LayerNorm(dim)
        self.mamba = Mamba(dim, d_state, d_conv, expand, **options)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same. Raises ValueError where C (with `channel_token` H·W) is not `dim`."""
        if x.dim() != 4:
            raise ValueError(f"MambaLayer: x must be (B, C, H, W), got {tuple(x.shape)}")
        # ONNX has no operation for an autocast context in an exported graph: enter one only where it is needed.
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self.forward(x)
        tokens = x.flatten(2)  # (B, C, H·W)
        if not self.channel_token:
            tokens = tokens.transpose(1, 2)  # (B, H·W, C), without a copy where x is channels_last
        if tokens.shape[2] != self.dim:
            what = "H·W, with channel_token=True," if self.channel_token else "C"
            raise ValueError(f"MambaLayer: {what} must be dim={self.dim}, got {tokens.shape[2]} of x {tuple(x.shape)}")
        tokens = self.ops.layer_norm(self.norm, tokens)
        channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        channels_first = not channels_last and not self.channel_token
        y = self.mamba(tokens, channels_first)
        y = (y if self.channel_token else y.transpose(1, 2)).unflatten(2, x.shape[2:])
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return y.to(x.dtype, memory_format=layout).contiguous(memory_format=layout)
