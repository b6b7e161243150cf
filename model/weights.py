"""A weights file -> a network: this project's files, which carry their settings, U-2-Net's public ones, and others.

Every function raises ValueError (or its subclass CorruptFileError) with one line that names the file.
"""

import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .mamba import Mamba

METADATA_KEY = "u2mamba"  # of the state dict's _metadata, which load_state_dict ignores and torch.save keeps
WRAPPERS = ("model", "state_dict", "model_state_dict", "net", "ema")  # keys of a checkpoint under which weights lie
FIRST = "stage1.rebnconvin.conv_s1.weight"  # every network of the U²-Net family has this key
FITS = "u2net.pth fits arch u2net and u2mamba, u2netp.pth fits u2netp and u2mambap"
OPTIONAL = "num_batches_tracked"  # of batch norm: PyTorch before 0.4.1 has none, and nothing here uses it
DEFAULT_SIZE = 320  # pixels: the training size of the public weights
MIN_ROW = 32  # numbers per output channel, below which int8 saves little


class CorruptFileError(ValueError):
    """A file that is truncated, differs from its checksums, or cannot be read."""


def read_file(path: str | Path) -> Any:
    """The content of a file of torch.save's or of safetensors, on the CPU, without running code that it may hold.

    torch.save stores a CRC-32 of each record, which torch.load does not check; zipfile does.
    """
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        if zipfile.is_zipfile(path):  # the public weights of 2020 have an older format, without checksums
            with zipfile.ZipFile(path) as records:
                if record := records.testzip():
                    raise CorruptFileError(f"{path}: is damaged, {record} does not match its checksum")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch asks users to file an issue about pickles that are refused here
            return torch.load(path, map_location="cpu", weights_only=True)
    except CorruptFileError:
        raise
    except ImportError:
        raise ValueError(f"{path}: requires the package safetensors: pip install safetensors") from None
    except FileNotFoundError:
        weights = [file for file in Path(path).parent.glob("*.pth") if not file.name.startswith("last_")]
        others = ", ".join(file.name for file in sorted(weights, key=lambda file: file.stat().st_mtime)[-3:])
        raise ValueError(
            f"{path}: there is no such checkpoint{f'; that folder contains {others}' * bool(others)}"
        ) from None
    except IsADirectoryError:
        raise ValueError(f"{path}: is a folder, not a checkpoint") from None
    except OSError as error:
        # a truncated file makes the readers seek to a negative offset: Invalid argument
        raise CorruptFileError(f"{path}: is truncated, or cannot be read ({error.strerror or error})") from None
    except Exception as error:  # zipfile, pickle and torch raise almost anything for a damaged file
        # operand 149 starts the pickles of today's Python, which torch.save does not write
        if isinstance(error, pickle.UnpicklingError) and (m := re.search(r"GLOBAL ([\w.]+)|operand 149", str(error))):
            what = m[1] or "a plain pickle"
            raise ValueError(f"{path}: refused, it contains code ({what}), not only weights") from None
        raise CorruptFileError(f"{path}: is not a checkpoint, or is truncated or damaged") from None


def read_state_dict(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(weights, settings) of a weights file or of a run's last.pth (the weights in training, not their average).

    settings: as stored by `cpu_state_dict`: those of `model.build_model`, and "size", the training size in pixels;
    empty for foreign files. Wrapper keys and prefixes ("module.", "_orig_mod.", "net.") are removed, and what Lightning
    and others store beside the network.
    """
    state = read_file(path)
    for key in WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    inner = [state, *(state.values() if isinstance(state, Mapping) else ())]  # of other wrappers, the first
    state = next((s for s in inner if isinstance(s, Mapping) and s and all(map(torch.is_tensor, s.values()))), None)
    if state is None:
        raise ValueError(f"{path}: does not contain a state dict")
    metadata = getattr(state, "_metadata", None)
    settings = metadata.get(METADATA_KEY) if isinstance(metadata, Mapping) else None
    settings = dict(settings) if isinstance(settings, Mapping) else {}
    state = {str(k): v for k, v in state.items()}
    _dequantize(state, path)
    if not settings and (prefix := next((k.removesuffix(FIRST) for k in state if k.endswith(FIRST)), "")):
        state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    while len(parts := {key.partition(".")[0] for key in state}) == 1 and all("." in key for key in state):
        if settings and not parts <= {"module", "_orig_mod"}:  # a network of the user's own with a single child
            break
        state = {key.partition(".")[2]: v for key, v in state.items()}
    return state, settings


def cpu_state_dict(net: nn.Module, size: int | None = None) -> OrderedDict[str, Tensor]:
    """The weights in the format of all files: contiguous copies on the CPU, with the settings to rebuild `net`.

    size: pixels of the training images. It and `net.settings` travel in `_metadata`, so the keys are those of `net`
    alone, and U-2-Net's code loads the file with strict=True.
    """
    net = uncompiled(net)
    state = net.state_dict()
    result = OrderedDict((k, v.detach().to("cpu", copy=True).contiguous()) for k, v in state.items())
    # without the backend, which depends on the machine
    settings = {k: v for k, v in getattr(net, "settings", {}).items() if k != "backend"}
    settings |= {"size": size} if size else {}
    result._metadata = OrderedDict(getattr(state, "_metadata", {})) | ({METADATA_KEY: settings} if settings else {})
    return result


def quantize(state: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """A quarter of the size: `<key>.int8` and, one for each output channel (first dimension), `<key>.scale` in fp16.

    Biases, norms and other small tensors stay unchanged.
    """
    result = OrderedDict()
    for key, weight in state.items():
        if not key.endswith("weight") or weight.dim() < 2 or weight.numel() < MIN_ROW * len(weight):
            result[key] = weight
            continue
        rows = weight.float().flatten(1)
        scale = (rows.abs().amax(1) / 127).half().clamp(min=2**-24)  # of an empty channel
        levels = rows / scale.float()[:, None]
        result[f"{key}.int8"] = levels.round().clamp(-127, 127).to(torch.int8).view(weight.shape)
        result[f"{key}.scale"] = scale
    result._metadata = state._metadata
    return result


def _dequantize(state: dict[str, Tensor], path: str | Path) -> None:
    """Replaces the tensors of `quantize` by weights in fp32."""
    for key in [key for key in state if key.endswith(".int8")]:
        name = key.removesuffix(".int8")
        levels, scale = state.pop(key), state.pop(f"{name}.scale", torch.zeros(0))
        fits = name not in state and (levels.dtype, scale.dtype) == (torch.int8, torch.float16) and levels.dim() > 1
        if not fits or scale.shape != levels.shape[:1] or not (scale.isfinite() & (scale > 0)).all():
            raise CorruptFileError(f"{path}: is damaged, {key} does not have one finite scale per output channel")
        state[name] = (levels.flatten(1) * scale.float()[:, None]).view(levels.shape)


def uncompiled(net: nn.Module) -> nn.Module:
    """The module inside a torch.compile or DataParallel wrapper, whose keys have a prefix."""
    return net.module if isinstance(net, nn.DataParallel) else getattr(net, "_orig_mod", net)


def infer_settings(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Settings for `model.build_model`, inferred from names and shapes, for files without settings."""
    try:
        in_ch = state[FIRST].shape[1]
        mid_ch = state["stage1.rebnconv1.conv_s1.weight"].shape[0]
        out_ch = state["outconv.weight"].shape[0]
    except KeyError:
        raise ValueError("contains the weights of a network other than U²-Net") from None
    mamba = any(".mamba" in key for key in state)
    arch = ("u2mamba" if mamba else "u2net") + ("p" if mid_ch == 16 else "")
    settings = {"arch": arch, "in_ch": in_ch, "out_ch": out_ch}
    if mamba:
        settings["mamba_at"] = "encoder" if "stage1.mamba1.norm.weight" in state else "bottleneck"
        settings["mamba_norm"] = _mamba_norm(state)
    return settings


def _arch(net: nn.Module) -> str:
    return getattr(net, "settings", {}).get("arch", type(net).__name__)


def _mamba_norm(keys: Mapping[str, Tensor]) -> str:
    return "gate" if any(key.endswith(".mamba.norm.weight") for key in keys) else "none"


def load_model(path: str | Path, **options: Any) -> nn.Module:
    """The network of a weights file in eval mode; `options` replace settings of the file (backend="torch").

    `net.settings` holds its settings, and "size", the training size in pixels, where the file specifies it.
    """
    return from_state_dict(*read_state_dict(path), path, **options)


def from_state_dict(state: Mapping[str, Tensor], settings: dict[str, Any], path: str | Path, **options: Any):
    """As `load_model`; path: for messages."""
    from . import build_model  # ARCHS is read when the network is built

    try:
        net = build_model((settings if "arch" in settings else infer_settings(state) | settings) | options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    load_state_dict(net, state, path)
    net.settings |= {"size": settings["size"]} if "size" in settings else {}
    return net.eval()


def load_state_dict(net: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Loads every tensor of `state` into `net`. Raises ValueError naming the first misfit."""
    net = uncompiled(net)
    report = _compare(net, state)
    if wrong := [k for k in report.new if not k.endswith(OPTIONAL)] + report.unfit:
        raise ValueError(
            f"{path}: does not fit arch {_arch(net)!r}: {len(wrong)} of {len(net.state_dict())} tensors differ, first "
            f"{wrong[0]}; it belongs to another or a changed network"
        )
    net.load_state_dict(state, strict=False)


# ------------------------------------------------------------------------------------------------------ warm start


@dataclass
class WeightReport:
    """Which keys of a state dict a warm start used."""

    matched: list[str]  # copied from the file
    new: list[str]  # in the network only: left as initialized, out_proj of Mamba layers set to zero
    unfit: list[str]  # in the file only, or of another shape there

    def __str__(self) -> str:
        line = f"{len(self.matched)} tensors matched, {len(self.new)} new"
        return line + (f", {len(self.unfit)} did not fit: {', '.join(self.unfit[:3])}" if self.unfit else "")


def load_u2net_weights(net: nn.Module, state_dict: Mapping[str, Tensor]) -> WeightReport:
    """Loads public U²-Net weights so that `net` computes exactly what U²-Net computes until it is trained further.

    net: U2NET, U2NETP, U2MAMBA or U2MAMBAP. state_dict: that of u2net.pth or u2netp.pth, or of this project's networks.
    out_proj of each Mamba layer that the file lacks is set to zero, which makes h + mamba(h) = h.
    Raises ValueError when the plain U²-Net part is not complete, or when the file's Mamba layers have their norm
    elsewhere than the network's; then `net` is left unchanged.
    """
    state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}  # saved by DataParallel
    report = _compare(net, state_dict)
    own, matched = net.state_dict(), set(report.matched)
    if missing := [k for k in own if k not in matched and ".mamba" not in k and not k.endswith(OPTIONAL)]:
        raise ValueError(
            f"the weights are incomplete for {type(net).__name__}: {len(missing)} of {len(own)} tensors are missing or "
            f"have another shape, first {missing[0]}; {FITS}"
        )
    _copy(net, state_dict, report)
    return report


def load_pretrained(net: nn.Module, path: str | Path, size: int | None = None) -> str:
    """Warm start: copies each tensor of a weights file that fits by name and shape -> a line with the counts.

    size: pixels of the new run's images; a second line warns if the file's training size is very different.
    Raises ValueError if more than half of the file's tensors do not fit; then `net` is left unchanged.
    """
    net, (state, settings) = uncompiled(net), read_state_dict(path)
    report = _compare(net, state)
    if 2 * len(report.unfit) > len(state):
        made = ", ".join(f"{k} = {settings[k]}" for k in ("arch", "mamba_at", "mamba_norm") if k in settings)
        hint = f"the file has {made}" if made else FITS
        raise ValueError(
            f"{path}: {len(report.unfit)} of its {len(state)} tensors do not fit arch {_arch(net)!r}, first "
            f'{report.unfit[0]}; {hint}; --pretrained "" trains from scratch'
        )
    try:
        _copy(net, state, report)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    line, trained = f"pretrained: {report} ({path})", settings.get("size", DEFAULT_SIZE)
    if size and not 2 / 3 < size / trained < 3 / 2:
        line += f"\nwarning: the weights were trained at {trained} pixels; accuracy may drop at {size}"
    return line


def _compare(net: nn.Module, state: Mapping[str, Tensor]) -> WeightReport:
    own = net.state_dict()
    fits = {k: None for k, v in own.items() if k in state and state[k].shape == v.shape}
    return WeightReport([*fits], [k for k in own if k not in state], [k for k in state if k not in fits])


@torch.no_grad()
def _copy(net: nn.Module, state: Mapping[str, Tensor], report: WeightReport) -> None:
    own, matched = net.state_dict(), set(report.matched)
    if any(".mamba" in k for k in matched) and (norm := _mamba_norm(state)) != _mamba_norm(own):
        raise ValueError(f'their Mamba layers were trained with mamba_norm = "{norm}": use the same setting')
    net.load_state_dict({key: state[key] for key in report.matched}, strict=False)
    for name, module in net.named_modules():
        if isinstance(module, Mamba) and f"{name}.out_proj.weight" not in matched:
            module.out_proj.weight.zero_()
