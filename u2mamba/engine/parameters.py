"""A network's parameters in the groups that the optimizer treats differently, and its statistics as one tensor."""

import torch
from torch import Tensor, nn


def param_groups_weight_decay(net: nn.Module) -> list[dict]:
    """Parameter groups: weight decay for matrices and convolutions, none for norms, biases and the scan's A and D."""
    without = [p for p in net.parameters() if p.ndim < 2 or getattr(p, "_no_weight_decay", False)]
    ids = {id(p) for p in without}
    return [{"params": [p for p in net.parameters() if id(p) not in ids]}, {"params": without, "weight_decay": 0.0}]


def flatten_statistics(net: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """The running statistics of the modules in training mode as one tensor, to save or restore in one operation.

    Statistics are all floating-point buffers; they become views of that tensor (n); also returns the views by name.
    """
    floats = {name: buffer for name, buffer in net.named_buffers() if buffer.is_floating_point()}
    owners = {name: net.get_submodule(name.rpartition(".")[0]) for name in floats}
    buffers = {name: buffer for name, buffer in floats.items() if owners[name].training}
    flat = torch.cat([next(net.parameters()).new_zeros(0), *(buffer.flatten() for buffer in buffers.values())])
    parts = flat.split([buffer.numel() for buffer in buffers.values()])
    # .data: each with a version counter of its own, as autograd would refuse what reads one and updates another
    views = {name: part.view(b.shape).data for part, (name, b) in zip(parts, buffers.items(), strict=True)}
    for name, view in views.items():
        setattr(owners[name], name.rpartition(".")[2], view)
    return flat, views
