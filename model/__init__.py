"""The networks: U2NET, U2NETP and their Mamba versions."""

from model.mamba import Mamba, MambaLayer
from model.u2mamba import U2MAMBA, U2MAMBAP, WeightReport, load_u2net_weights
from model.u2net import U2NET, U2NETP

ARCHS = {"u2net": U2NET, "u2netp": U2NETP, "u2mamba": U2MAMBA, "u2mambap": U2MAMBAP}

__all__ = [
    "ARCHS",
    "U2MAMBA",
    "U2MAMBAP",
    "U2NET",
    "U2NETP",
    "Mamba",
    "MambaLayer",
    "WeightReport",
    "load_u2net_weights",
]
