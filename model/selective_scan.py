"""The selective scan of Mamba (Gu & Dao 2023, arXiv 2312.00752, section 3.2, algorithm 2), by one of several backends.

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t        y_t = C_t · h_t + D u_t,  times SiLU(z_t) where a gate z is given

Glossary (paper's letter -> here): batch B -> b; channels D -> d; state size N -> n; length L -> L; input x -> u;
step Δ -> delta; A (d, n) is real and negative; B, C (b, n, L) are "selective": they change from token to token.

State and sums are fp32 for any inputs (float64 for float64), and no backend creates a (b, d, L, n) tensor.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import chunked_scan

PLAIN = ("reference", "torch")  # a loop over the tokens, and the same in chunks
# Faster backends, the fastest first: name -> (scan, with the arguments of `selective_scan` except `backend`; function
# device -> the reason why it cannot run there, "" if it can).
REGISTERED: dict[str, tuple[Callable[..., Tensor], Callable[[torch.device], str]]] = {}


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
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if traced and backend == "auto":
        backend = "torch"  # plain operations: an exported file runs on machines that have no other backend
    elif backend not in PLAIN:
        backend = choose_backend(u.device, backend)[0]
    if backend not in PLAIN:
        return REGISTERED[backend][0](u, delta, A, B, C, D, z, delta_bias, delta_softplus)

    # ONNX has no operation for an autocast context in an exported graph: enter one only where it is needed.
    if torch.is_autocast_enabled(u.device.type):
        with torch.autocast(u.device.type, enabled=False):
            return selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, backend)
    dtype = torch.promote_types(u.dtype, torch.float32)
    x, delta, A, B, C = (v.to(dtype) for v in (u, delta, A, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    chunked = chunked_scan.traceable_scan if traced else chunked_scan.scan
    y = (_loop if backend == "reference" else chunked)(x, delta, A, B, C)
    if D is not None:
        y = torch.addcmul(y, x, D.to(dtype)[:, None])
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype)


def _loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The definition. unbind, not slicing: the gradient of a slice has the full length, which makes the loop O(L²)."""
    h = u.new_zeros(*u.shape[:2], A.shape[1])
    ys = []
    for u_t, delta_t, B_t, C_t in zip(u.unbind(2), delta.unbind(2), B.unbind(2), C.unbind(2), strict=True):
        h = torch.exp(delta_t[..., None] * A) * h + (delta_t * u_t)[..., None] * B_t[:, None]  # (b, d, n)
        ys.append((h * C_t[:, None]).sum(-1))
    return torch.stack(ys, -1)


def choose_backend(device: torch.device | str, wanted: str = "auto") -> tuple[str, str]:
    """The backend for `wanted` on `device`, and the reason, including why faster ones were not chosen.

    "auto" is the first of REGISTERED that works on a CUDA device, else "torch". Raises ValueError for an unknown
    backend, or one that does not work on `device`.
    """
    device = with_index(device)
    if wanted != "auto":
        if wanted not in (*PLAIN, *REGISTERED):
            choices = ", ".join(("auto", *PLAIN, *REGISTERED))
            raise ValueError(f"backend={wanted!r} is not a registered scan backend: choose one of {choices}")
        if trouble := wanted in REGISTERED and REGISTERED[wanted][1](device):
            raise ValueError(f"backend={wanted!r} cannot be used here: {trouble}; backend='auto' selects one that can")
        return wanted, "as requested"
    troubles = []
    for name, (_, unusable) in REGISTERED.items() if device.type == "cuda" else ():
        if not (trouble := unusable(device)):
            return name, "; ".join(["the fastest that works here", *troubles])
        troubles.append(f"not {name}: {trouble}")
    return "torch", "; ".join(["chunked PyTorch", *troubles])


def with_index(device: torch.device | str) -> torch.device:
    """The device, with the index of the current GPU for plain "cuda"."""
    device = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def _check_shapes(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D, z, delta_bias) -> None:
    if u.dim() != 3 or A.dim() != 2 or 0 in (*u.shape, *A.shape):
        got = f"{tuple(u.shape)} and {tuple(A.shape)}"
        raise ValueError(f"selective_scan: u must be (b, d, L) and A (d, n), no dimension zero, got {got}")
    (b, d, L), n = u.shape, A.shape[1]
    wanted = {"delta": (delta, (b, d, L)), "A": (A, (d, n)), "B": (B, (b, n, L)), "C": (C, (b, n, L))}
    wanted |= {"D": (D, (d,)), "z": (z, (b, d, L)), "delta_bias": (delta_bias, (d,))}
    for name, (value, shape) in wanted.items():
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(f"selective_scan: {name} must be {shape} to fit u {(b, d, L)}, got {tuple(value.shape)}")
