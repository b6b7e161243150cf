"""Entry points for torch.hub: the networks of this repository, in plain PyTorch and in eval mode.

net = torch.hub.load("path/to/this/repository", "u2mambap", source="local")
d0 = net(images)[0]  # (B, 3, H, W) float32, normalized as docs/export.md says -> (B, 1, H, W) saliency maps in [0, 1]
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

from torch import nn

dependencies = ["torch"]
ROOT = Path(__file__).parent
NAME = "u2mamba_networks"  # not "model": the caller may have imported a module of that name
if NAME not in sys.modules:
    spec = importlib.util.spec_from_file_location(NAME, ROOT / "model" / "__init__.py")
    sys.modules[NAME] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[NAME])
networks = sys.modules[NAME]


def u2mambap(pretrained: bool = True, **options: Any) -> nn.Module:
    """The small network; options: of `model.U2MAMBAP`. pretrained: with the included weights."""
    return _build("u2mambap", pretrained, options)


def u2mamba(pretrained: bool = True, **options: Any) -> nn.Module:
    """The large network, as `u2mambap`. Raises ValueError if saved_models/u2mamba.pth is missing."""
    return _build("u2mamba", pretrained, options)


def u2net_file(path: str, **options: Any) -> nn.Module:
    """The network of a weights file: U-2-Net's public u2net.pth or u2netp.pth, or one that this project has written.

    Raises ValueError with one line if the file cannot be used.
    """
    return networks.weights.load_model(path, **options)


def _build(arch: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    if pretrained:
        return u2net_file(str(ROOT / "saved_models" / f"{arch}.pth"), **options)
    return networks.build_model({"arch": arch} | options).eval()
