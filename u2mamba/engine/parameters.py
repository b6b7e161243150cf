"""A network's parameters in the groups that the optimizer treats differently, and its statistics as one tensor."""

import torch
from torch import Tensor, nn


def param_groups_weight_decay(net: nn.Module) -> list[dict]:
    """Parameter groups: weight decay for matrices and convolutions, none for norms, biases and the scan's A and D."""
    plain = [p for p in net.parameters() if p.ndim < 2 or getattr(p, "_no_weight_decay", False)]
    kept = {id(p) for p in plain}
    return [{"params": [p for p in net.parameters() if id(p) not in kept]}, {"params": plain, "weight_decay": 0.0}]


def flatten_statistics(net: nn.Module) -> Tensor:
    """All running means and variances of `net` as one tensor of which the buffers become views, to be kept or put back
    in one operation."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    flat = torch.cat([b.detach() for m in norms for b in (m.running_mean, m.running_var)])
    start = 0
    for m in norms:
        for name in ("running_mean", "running_var"):
            size = getattr(m, name).numel()
            setattr(m, name, flat[start : start + size])
            start += size
    return flat
