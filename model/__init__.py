"""The networks: U2NET, U2NETP and their Mamba versions, and the one function that builds them."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .mamba import Mamba, MambaLayer
from .u2mamba import U2MAMBA, U2MAMBAP
from .u2net import U2NET, U2NETP
from .weights import WeightReport, load_u2net_weights

# arch -> a class, or a function that returns a network; its parameters are the options that it accepts
ARCHS: dict[str, Callable[..., nn.Module]] = {
    "u2net": U2NET,
    "u2netp": U2NETP,
    "u2mamba": U2MAMBA,
    "u2mambap": U2MAMBAP,
}


def build_model(settings: Mapping[str, Any]) -> nn.Module:
    """The network `settings["arch"]`, with the options among `settings` that its signature has; others are ignored.

    Training, prediction, evaluation and export all call it. `net.settings` holds arch and options, as plain values
    that a weights file can carry. Raises ValueError for an arch that is not in ARCHS.
    """
    arch = settings.get("arch")
    if arch not in ARCHS:
        raise ValueError(f"arch = {arch!r}: must be one of {', '.join(ARCHS)}")
    options = {name: settings[name] for name in inspect.signature(ARCHS[arch]).parameters if name in settings}
    net = ARCHS[arch](**options)
    net.settings = {"arch": arch} | options
    return net


__all__ = [
    "ARCHS",
    "U2MAMBA",
    "U2MAMBAP",
    "U2NET",
    "U2NETP",
    "Mamba",
    "MambaLayer",
    "WeightReport",
    "build_model",
    "load_u2net_weights",
]
