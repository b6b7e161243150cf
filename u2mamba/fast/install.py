"""Replaces the operations of model/layers.py in a network by kernels, and registers the fast selective scans.

A kernel is used in bf16 training on channels_last tensors, after a trial on the device: one forward and backward pass
that must agree with the plain operation. A kernel that fails the trial, or whose plain operation was edited, is not
used, and `install` reports it.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from model import selective_scan
from model.layers import PlainOps
from model.mamba import Mamba
from u2mamba.fast import launch
from u2mamba.fast.batch_norm_relu import BatchNormReLU
from u2mamba.fast.conv2d import Conv2d, Projection
from u2mamba.fast.mamba_ops import ConvSiLU, RMSNorm
from u2mamba.fast.max_pool import MaxPool
from u2mamba.fast.selective_scan import selective_scan_triton
from u2mamba.fast.side_output import SideOutput
from u2mamba.fast.upsample import UpsampleCat, upsample_to

NAMES = {  # operation -> its name in the line that `install` returns
    "batch_norm_relu": "batch norm + ReLU", "max_pool": "pooling", "upsample_cat": "upsampling",
    "upsample_to": "upsampling of side outputs", "side_output": "side outputs", "project": "Mamba's projections",
    "conv_silu": "Mamba's convolution", "rms_norm": "Mamba's norm",
}  # fmt: skip
TOLERANCE = 0.05  # relative error in the trial: each number is rounded to 8 bits once or twice


def _or_plain(operation: Callable) -> Callable:
    """The operation in bf16 training where its kernel supports the inputs, else the plain one of the same name."""
    plain = getattr(PlainOps, operation.__name__)

    @functools.wraps(operation)
    def choose(self, *args, **options):
        x = next(v for v in args if isinstance(v, Tensor))
        kind = x.device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
        bf16 = autocast or x.dtype == torch.bfloat16
        if bf16 and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            with contextlib.suppress(launch.Unsupported):
                return operation(self, *args, **options)
        return plain(*args, **options)

    return choose


class FusedOps(PlainOps):
    """The operations of one network as kernels; `bf16_weights`: the training step's bf16 copies of weights."""

    def __init__(self):
        self.bf16_weights: dict[Tensor, Tensor] = {}
        self.uses: Counter[Tensor] = Counter()  # how often one forward pass uses each copy

    def __deepcopy__(self, memo: dict) -> "FusedOps":  # a copy of the network has parameters of its own
        return self

    def _weight(self, layer: nn.Module) -> tuple[Tensor, Callable[[], bool]]:
        """The weight in bf16, and whether its gradient may wait: a copy's, unless the pass adds up several."""
        copy = self.bf16_weights.get(layer.weight)
        if copy is None:
            return layer.weight.to(torch.bfloat16), lambda: False
        self.uses[copy] += 1
        return copy, lambda: self.uses[copy] == 1

    @_or_plain
    def batch_norm_relu(self, conv, norm, x, residual=None):
        statistics = norm.training and getattr(norm, "track_running_stats", False) and norm.momentum is not None
        fits = type(norm) is nn.BatchNorm2d and norm.affine and statistics
        fits &= type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
        fits &= not conv._forward_pre_hooks  # of weight_norm, say
        last = fits and conv.weight.is_contiguous(memory_format=torch.channels_last)
        launch.require(x, layers=fits, channels_last_weights=last)
        # without the bias, which batch norm cancels: its gradient is zero, and a reduction over all pixels to find that
        weight, may_wait = self._weight(conv)
        y = Conv2d.apply(x.to(torch.bfloat16), weight, conv, may_wait).contiguous(memory_format=torch.channels_last)
        statistics = (norm.running_mean, norm.running_var, norm.momentum, norm.eps)
        return BatchNormReLU.apply(y, norm.weight, norm.bias, *statistics, conv.bias, residual)

    @_or_plain
    def side_output(self, conv, x):
        fits = type(conv) is nn.Conv2d and conv.bias is not None
        fits = fits and (conv.stride, conv.padding, conv.dilation) == ((1, 1), (1, 1), (1, 1))
        launch.require(x, bf16=x.dtype == torch.bfloat16, layer=fits)
        return SideOutput.apply(x, self._weight(conv)[0], conv.bias)

    @_or_plain
    def max_pool(self, x):
        return MaxPool.apply(x)

    @_or_plain
    def upsample_to(self, x, size):
        return upsample_to(x, tuple(size))

    @_or_plain
    def upsample_cat(self, x, skip):
        return UpsampleCat.apply(x, skip)

    @_or_plain
    def layer_norm(self, norm, x):
        return PlainOps.layer_norm(norm, x).to(x.dtype)  # tokens stay in bf16; the scan's state and sums are fp32

    @_or_plain
    def project(self, layer, v, parts=1, tokens_first=False):
        weight, may_wait = self._weight(layer)
        return Projection.apply(weight, v, parts, tokens_first, may_wait)

    @_or_plain
    def conv_silu(self, conv, x):
        return ConvSiLU.apply(x, conv.weight, conv.bias)

    @_or_plain
    def rms_norm(self, norm, x):
        return RMSNorm.apply(x, norm.weight, norm.eps)


def install(net: nn.Module) -> list[str]:
    """Installs the kernels that work on the device of `net` in its layers; registers the scans "triton", "mamba_ssm".

    Call it when `net` is on its device and in its memory format, before `TrainStep` is created. Returns lines to print:
    which operations use kernels, which do not, and why.
    """
    device = selective_scan.with_index(next(net.parameters()).device)
    register_scans()
    lines = [_install_kernels(net, device)]
    for wanted in {m.backend for m in net.modules() if isinstance(m, Mamba)}:
        backend, reason = selective_scan.choose_backend(device, wanted)
        lines.append(f"selective scan: {backend} ({reason})")
    return lines


def register_scans() -> None:
    for name, scan in (("triton", selective_scan_triton), ("mamba_ssm", _mamba_ssm_scan)):
        selective_scan.REGISTERED[name] = (scan, functools.partial(_unusable, name))


def _install_kernels(net: nn.Module, device: torch.device) -> str:
    owners = [m for m in net.modules() if (ops := getattr(m, "ops", None)) is PlainOps or isinstance(ops, FusedOps)]
    weights = [m.weight for m in net.modules() if isinstance(m, nn.Conv2d)]
    last = any(w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous() for w in weights)
    problem = launch.why_not(device) or ("" if last else "they require bf16 and channels_last")
    problem = problem or ("" if owners else "no layer of the network has ops = PlainOps")
    if problem := problem or ("" if any(m.training for m in net.modules()) else "they are for training"):
        return f"kernels: none, plain PyTorch layers ({problem})"
    ops, failed = FusedOps(), _trial(device)
    for name in failed:
        setattr(ops, name, getattr(PlainOps, name))
    for module in owners:
        module.ops = ops
    line = "kernels: " + (", ".join(words for name, words in NAMES.items() if name not in failed) or "none")
    plain = "; ".join(f"{NAMES[name]} ({reason})" for name, reason in failed.items())
    return line + (f"; plain PyTorch: {plain}" if plain else "")


def _trouble(fast: Callable[[], list[Tensor]], plain: Callable[[], list[Tensor]], difference: str) -> str:
    """The error that `fast` raises, or `difference` where its results are not those of `plain`; "" where they are."""
    try:
        with torch.inference_mode(False), torch.enable_grad():
            pairs = [(a.float(), b.float()) for a, b in zip(fast(), plain(), strict=True)]
        return "" if all((a - b).norm() <= TOLERANCE * b.norm() for a, b in pairs) else difference
    except Exception as error:  # compilers, drivers, libraries and versions of Triton can raise anything
        return " ".join(f"{type(error).__name__}: {error}".split())[:160]


@functools.cache
def _trial(device: torch.device) -> dict[str, str]:
    """Operation -> why its kernel cannot be used, for those that fail one forward and backward pass in bf16."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        conv, norm, side = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(16, 1, 3, padding=1)
        linear, short, rms = nn.Linear(16, 16), nn.Conv1d(16, 16, 4, groups=16, padding=3), nn.RMSNorm(16, eps=1e-5)
        large, small, tokens = torch.randn(2, 16, 24, 25), torch.randn(2, 16, 12, 13), torch.randn(2, 16, 20)
    layers = nn.ModuleList((conv, norm, side, linear, short, rms)).to(device, memory_format=torch.channels_last)
    parameters = [p for p in layers.parameters() if p is not conv.bias]  # which batch norm cancels
    large, small = (x.to(device, memory_format=torch.channels_last) for x in (large, small))
    tokens = tokens.to(device)
    cases = {  # inputs and the call; batch norm in three launches and in one
        "batch_norm_relu": (
            (large, small),
            lambda ops, x, y: (ops.batch_norm_relu(conv, norm, x, x), ops.batch_norm_relu(conv, norm, y)),
        ),
        "max_pool": ((large,), lambda ops, x: ops.max_pool(x)),
        "upsample_cat": ((small, large), lambda ops, x, y: (ops.upsample_cat(x, y),)),
        "upsample_to": ((small,), lambda ops, x: (ops.upsample_to(x[:, :1], (24, 25)),)),
        "side_output": ((large,), lambda ops, x: (ops.side_output(side, x),)),
        "project": ((tokens,), lambda ops, v: ops.project(linear, v, parts=2)),
        "conv_silu": ((tokens,), lambda ops, v: (ops.conv_silu(short, v),)),
        "rms_norm": ((tokens,), lambda ops, v: (ops.rms_norm(rms, v),)),
    }  # fmt: skip

    def run(ops: PlainOps, dtype: torch.dtype, inputs, call) -> list[Tensor]:
        norm.reset_running_stats()
        inputs = [x.to(torch.bfloat16).to(dtype).requires_grad_() for x in inputs]
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            outputs = call(ops, *inputs)
        slopes = [torch.linspace(-1, 2, y.numel(), device=device).view(y.shape) for y in outputs]
        total = sum((y * slope).sum() for y, slope in zip(outputs, slopes, strict=True))
        grads = torch.autograd.grad(total, inputs + parameters, allow_unused=True, materialize_grads=True)
        return [*outputs, *grads, norm.running_mean.clone(), norm.running_var.clone()]

    with contextlib.suppress(Exception), torch.enable_grad(), launch.compile_only():  # side by side
        for case in cases.values():
            run(FusedOps(), torch.bfloat16, *case)
    troubles = {
        name: _trouble(
            functools.partial(run, FusedOps(), torch.bfloat16, *case),
            functools.partial(run, PlainOps, torch.float32, *case),
            "differs from model/layers.py",
        )
        for name, case in cases.items()
    }
    return {name: trouble for name, trouble in troubles.items() if trouble}


_unusable_scans: dict[tuple[str, torch.device], str] = {}


def _unusable(name: str, device: torch.device) -> str:
    """Why a scan cannot be used on `device`, "" where it can: tried once, and never inside `compile_only`."""
    if (name, device) not in _unusable_scans and not launch.compiling():
        _unusable_scans[name, device] = _scan_trial(name, device)
    return _unusable_scans.get((name, device), "")


def _scan_trial(name: str, device: torch.device) -> str:
    if problem := launch.why_not(device) if name == "triton" else "" if device.type == "cuda" else "it requires CUDA":
        return problem
    shapes = [(1, 9, 3), (1, 9, 3), (9, 4), (1, 4, 3), (1, 4, 3), (9,), (1, 9, 3), (9,)]

    def run(scan: Callable) -> list[Tensor]:
        inputs = [torch.linspace(-1, 1, torch.Size(s).numel(), device=device).view(s) for s in shapes]
        inputs = [v.requires_grad_() for v in inputs]
        with torch.autocast(device.type, enabled=False):
            y = scan(*inputs[:2], -inputs[2].exp(), *inputs[3:], True)
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    reference = functools.partial(selective_scan.selective_scan, backend="reference")
    scans = [functools.partial(run, scan) for scan in (selective_scan.REGISTERED[name][0], reference)]
    return _trouble(*scans, "its results are wrong on this machine")


def _mamba_ssm_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus) -> Tensor:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    delta, B, C, z = (None if v is None else v.to(u.dtype) for v in (delta, B, C, z))  # its kernels need one dtype here
    A, D, delta_bias = (None if v is None else v.float() for v in (A, D, delta_bias))  # and fp32 here
    return selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
