"""A network's parameters in the groups that the optimizer treats differently, and its statistics as one tensor."""

import torch
from torch import Tensor, nn


def param_groups_weight_decay(net: nn.Module) -> list[dict]:
    """Parameter groups: weight decay for matrices and convolutions, none for norms, biases and the scan's A and D."""
    without = [p for p in net.parameters() if p.ndim < 2 or getattr(p, "_no_weight_decay", False)]
    ids = {id(p) for p in without}
    return [{"params": [p for p in net.parameters() if id(p) not in ids]}, {"params": without, "weight_decay": 0.0}]


def flatten_statistics(net: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """The running statistics of the modules in training mode as one tensor, to keep or restore in one operation.

    Statistics are all floating-point buffers; they become views of that tensor (n), which also returns by name.
    """
    owners = [
        (module, key, f"{prefix}.{key}" if prefix else key)
        for prefix, module in net.named_modules()
        for key, buffer in module.named_buffers(recurse=False)
        if module.training and buffer.is_floating_point()
    ]
    if not owners:
        return next(net.parameters()).new_zeros(0), {}
    flat = torch.cat([getattr(module, key).detach().flatten() for module, key, _ in owners])
    views, start = {}, 0
    for module, key, name in owners:
        buffer = getattr(module, key)
        views[name] = flat[start : start + buffer.numel()].view(buffer.shape)
        setattr(module, key, views[name])
        start += buffer.numel()
    return flat, views
