"""The selective scan of Mamba (Gu & Dao 2023, arXiv 2312.00752, section 3.2, algorithm 2): one function, four backends.

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t        y_t = C_t · h_t + D u_t,  times SiLU(z_t) where a gate z is given

Glossary (paper's letter -> here): batch B -> b; channels D -> d; state size N -> n; length L -> L; input x -> u;
step Δ -> delta; A (d, n) is real and negative; B, C (b, n, L) are "selective": they change from token to token.

State and accumulation are fp32 whatever the inputs (float64 where u is), and no backend makes a (b, d, L, n) tensor.
"""

import functools
import os

import torch
import torch.nn.functional as F
from torch import Tensor

from model import chunked_scan

BACKENDS = ("auto", "reference", "torch", "triton", "mamba_ssm")


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Run the scan above; the arguments are those of mamba_ssm's `selective_scan_fn`.

    u, delta, z: (b, d, L); A: (d, n), negative; B, C: (b, n, L); D, delta_bias: (d). `delta_softplus` applies softplus
    to delta + delta_bias. `backend`: see `choose_backend`. Returns (b, d, L) in u's dtype.
    Raises ValueError for shapes that do not fit, and for a backend that does not work here.
    """
    _check_shapes(u, delta, A, B, C, D, z, delta_bias)
    exporting = torch.compiler.is_exporting() or torch.jit.is_tracing()
    if exporting and backend == "auto":
        backend = "torch"  # an exported file goes to machines that have no kernels of ours
    elif backend not in ("torch", "reference"):
        backend = choose_backend(u.device, backend)[0]
    if backend == "triton":
        return _triton_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    if backend == "mamba_ssm":
        return _library_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)

    # An autocast context inside an exported graph is an operation that ONNX lacks: enter one only where it is needed.
    if torch.is_autocast_enabled(u.device.type):
        with torch.autocast(u.device.type, enabled=False):
            return selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, backend)
    dtype = torch.promote_types(u.dtype, torch.float32)
    x, delta, A, B, C = (v.to(dtype) for v in (u, delta, A, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    chunked = chunked_scan.scan_for_export if exporting else chunked_scan.scan
    y = (_loop if backend == "reference" else chunked)(x, delta, A, B, C)
    if D is not None:
        y = torch.addcmul(y, x, D.to(dtype)[:, None])
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype)


def _loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The definition. unbind, not slices: the gradient of a slice is as long as the whole, and the loop then O(L²)."""
    h = u.new_zeros(*u.shape[:2], A.shape[1])
    ys = []
    for u_t, delta_t, B_t, C_t in zip(u.unbind(2), delta.unbind(2), B.unbind(2), C.unbind(2), strict=True):
        h = torch.exp(delta_t[..., None] * A) * h + (delta_t * u_t)[..., None] * B_t[:, None]  # (b, d, n)
        ys.append((h * C_t[:, None]).sum(-1))
    return torch.stack(ys, -1)


def _triton_scan(*inputs) -> Tensor:
    from u2mamba.fast.selective_scan import selective_scan_triton

    return selective_scan_triton(*inputs)


def _library_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus) -> Tensor:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    delta, B, C, z = (None if v is None else v.to(u.dtype) for v in (delta, B, C, z))  # its kernels want one dtype here
    A, D, delta_bias = (None if v is None else v.float() for v in (A, D, delta_bias))  # and fp32 here
    return selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus)


def choose_backend(device: torch.device | str, wanted: str = "auto") -> tuple[str, str]:
    """The backend that `wanted` means on `device`, and one line that says why, and why not a faster one.

    "auto" takes the first that works of triton, mamba_ssm and torch on a CUDA device, and torch elsewhere. triton and
    mamba_ssm are tried once with a tiny forward and backward pass. Raises ValueError where `wanted` is no backend, or
    one that does not work on `device`.
    """
    device = torch.device(device)
    if wanted not in BACKENDS:
        raise ValueError(f"backend={wanted!r} is not a scan backend: choose one of {', '.join(BACKENDS)}")
    if wanted != "auto":
        if wanted in ("triton", "mamba_ssm") and (trouble := _trouble(wanted, device)):
            raise ValueError(f"backend={wanted!r} cannot be used here: {trouble}; backend='auto' takes one that can")
        return wanted, "asked for"
    if device.type != "cuda":
        return "torch", f"chunked PyTorch; the kernels of triton and mamba_ssm need a CUDA device, and this is {device}"
    troubles = []
    for name in ("triton", "mamba_ssm"):
        trouble = _trouble(name, device)
        if not trouble:
            return name, "; ".join(["the fastest that works here", *troubles])
        troubles.append(f"not {name}: {trouble}")
    return "torch", "; ".join(["chunked PyTorch, slow on a GPU", *troubles])


# torch.compiler.assume_constant_result sets this, and imports all of torch._dynamo for it: 1.3 s of every start
choose_backend._dynamo_marked_constant = True


@functools.cache
def _trouble(name: str, device: torch.device) -> str:
    """One line on why a kernel backend cannot be used here; empty where its values and gradients are the loop's."""
    interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return f"it needs a CUDA device, and this is {device}"
    kernel = _triton_scan if name == "triton" else _library_scan
    reference = functools.partial(selective_scan, backend="reference")
    shapes = [(1, 9, 3), (1, 9, 3), (9, 4), (1, 4, 3), (1, 4, 3), (9,), (1, 9, 3), (9,)]
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            inputs = [torch.linspace(-1, 1, torch.Size(s).numel(), device=device).view(s) for s in shapes]
            inputs = [v.requires_grad_() for v in inputs]
            results = []
            for scan in (kernel, reference):
                y = scan(*inputs[:2], -inputs[2].exp(), *inputs[3:], True)
                results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
        if not all(torch.allclose(p, q, rtol=1e-2, atol=1e-3) for p, q in zip(*results, strict=True)):
            return "its results are wrong on this machine"
    except Exception as error:  # whatever a missing, mismatched or miscompiled library throws
        return " ".join(f"{type(error).__name__}: {error}".split())[:160]
    return ""


def _check_shapes(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D, z, delta_bias) -> None:
    if u.dim() != 3 or A.dim() != 2 or 0 in (*u.shape, *A.shape):
        got = f"{tuple(u.shape)} and {tuple(A.shape)}"
        raise ValueError(f"selective_scan: u must be (b, d, L) and A (d, n), none of them zero, got {got}")
    (b, d, L), n = u.shape, A.shape[1]
    wanted = {"delta": (delta, (b, d, L)), "A": (A, (d, n)), "B": (B, (b, n, L)), "C": (C, (b, n, L))}
    wanted |= {"D": (D, (d,)), "z": (z, (b, d, L)), "delta_bias": (delta_bias, (d,))}
    for name, (value, shape) in wanted.items():
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(f"selective_scan: {name} must be {shape} to fit u {(b, d, L)}, got {tuple(value.shape)}")
