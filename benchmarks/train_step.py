"""How fast is the full training step (forward, seven-output loss, backward, Adam), and what does its time go to?

    python -m benchmarks.train_step                      the table: the published way and ours, in one run
    python -m benchmarks.train_step --profile            GPU time of our step by kind of kernel as well

The published way: fp32, NCHW, eager, F.interpolate, the selective scan of mamba_ssm where it is installed. On the CPU
the sizes are small and the comparison is fp32 NCHW eager against what `choose_precision` picks.
"""

import contextlib
import functools
from dataclasses import dataclass

import torch
import tyro

from benchmarks.hardware import lines, median_and_spread, time_calls
from model import ARCHS
from model.selective_scan import choose_backend
from u2mamba.engine.distributed import DistContext
from u2mamba.engine.parameters import decayed_and_not
from u2mamba.engine.step import TrainStep
from u2mamba.runtime.environment import choose_device, choose_kernels, choose_layout, choose_precision
from u2mamba_train import FAST, total_loss

KINDS = {  # kind of kernel: words in its name; the first that fits counts
    "Mamba's norm and convolution": ("_layer_norm", "_conv_silu"),
    "matrix product": ("gemm_f32", "gemm_tf32", "gemv", "nvjet", "splitK", "gemmk1"),
    "convolution": ("conv", "cudnn", "xmma", "implicit", "wgrad", "dgrad", "fprop", "cutlass", "nchwToNhwc"),
    "selective scan": ("_scan", "_ends", "_join", "_grads", "_add_splits", "selective"),
    "batch norm + ReLU": ("batch_norm", "bn_", "_stats", "_apply", "_grad_stats", "_grad_apply"),
    "upsample, pool, cat": ("upsample", "max_pool", "pool", "CatArray"),
    "loss": ("_losses", "_finish"),
    "optimizer": ("adam", "multi_tensor", "foreach"),
    "elementwise, copy, reduce": ("elementwise", "reduce", "copy", "Memcpy", "Memset", "memset", "memcpy"),
}  # fmt: skip


@dataclass
class Options:
    arch: str = "u2mamba"
    mamba_at: str = "bottleneck"
    batches: tuple[int, ...] = (12, 32)
    size: int = 288  # pixels
    runs: int = 5
    steps: int = 20  # a run
    device: str = "auto"
    published: bool = True  # measure the published way too
    profile: bool = False
    search: int = 10  # algorithms that cuDNN's search tries for each convolution (PyTorch's default); 0: all
    recipe: bool = False  # ours with what the preset fast adds: AdamW, soft IoU loss, clipping, averaged weights


def make_step(
    options: Options,
    device: torch.device,
    published: bool,
    reference_graph: bool = False,
    world: DistContext = DistContext(),  # noqa: B008 - immutable
):
    """A TrainStep, the line that describes it, its memory format. reference_graph: capture the published way too."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest" if published else "high")
    precision = "fp32" if published else choose_precision("bf16", device)[0]
    kernels = not published and choose_kernels(True, device, precision, True)[0]
    backend, _ = choose_backend(device)
    if published and device.type == "cuda":
        with contextlib.suppress(ValueError):
            backend, _ = choose_backend(device, "mamba_ssm")
    mamba = {"mamba_at": options.mamba_at, "backend": backend} if options.arch.startswith("u2mamba") else {}
    channels_last, layout = choose_layout(not published, device, precision)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    net = ARCHS[options.arch](**mamba).to(device, memory_format=memory_format)
    world.prepare(net, synchronise_batch_norm=False)
    recipe = options.recipe and not published
    algorithm, decay = (torch.optim.AdamW, FAST.weight_decay) if recipe else (torch.optim.Adam, 0.0)
    optimizer = algorithm(decayed_and_not(net), lr=1e-4, weight_decay=decay, fused=True)
    graph = (reference_graph or not published) and device.type == "cuda"
    iou, edge = (FAST.iou_loss, FAST.edge_loss) if recipe else (0.0, 0.0)
    more = {"clip": FAST.clip, "ema_decay": FAST.ema_decay} if recipe else {}
    loss = functools.partial(total_loss, iou=iou, edge=edge, fused=kernels)
    step = TrainStep(net, optimizer, loss, device, precision, graph=graph, kernels=kernels, world=world, **more)
    words = [precision, layout, "one CUDA graph" if graph else "eager"]
    words += ["fused kernels"] * kernels + [f"scan {backend}"] + ["recipe of fast"] * recipe
    return step, ", ".join(words), memory_format


def measure(options: Options, device: torch.device, batch: int, published: bool) -> tuple[str, float, float, float]:
    """(description, seconds a step, spread, GiB): the peak of what tensors take, with cuDNN's search at the start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step, words, memory_format = make_step(options, device, published)
    images = torch.randn(batch, 3, options.size, options.size, device=device).to(memory_format=memory_format)
    masks = (torch.rand(batch, 1, options.size, options.size, device=device) > 0.7).float()
    if published:
        step.memory = contextlib.nullcontext()  # left to the system
    seconds = time_calls(lambda: step(images, masks), device, options.runs, options.steps, warm_up=6)
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else float("nan")
    if options.profile and not published:
        profile(lambda: step(images, masks))
    return words, *median_and_spread(seconds), memory


def profile(call) -> None:
    """Prints the GPU time of one call by kind of kernel, and the longest kernels."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
        call()
        torch.cuda.synchronize()
    totals: dict[str, float] = {}
    counts: dict[str, int] = {}
    names: dict[str, tuple[float, int]] = {}
    for event in prof.events():
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        ms = event.device_time / 1e3
        kind = next((k for k, parts in KINDS.items() if any(p.lower() in event.name.lower() for p in parts)), "other")
        totals[kind] = totals.get(kind, 0) + ms
        counts[kind] = counts.get(kind, 0) + 1
        old = names.get(event.name, (0.0, 0))
        names[event.name] = (old[0] + ms, old[1] + 1)
    print(f"GPU time of one step: {sum(totals.values()):.2f} ms in {sum(counts.values())} kernels")
    for kind in sorted(totals, key=totals.get, reverse=True):
        print(f"  {kind:28} {totals[kind]:7.2f} ms {counts[kind]:6}")
    for name, (ms, n) in sorted(names.items(), key=lambda item: -item[1][0])[:45]:
        print(f"    {ms:7.3f} ms {n:5}  {name[:110]}")


def main(options: Options) -> None:
    device, _ = choose_device(options.device)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = True, options.search
    print("\n".join(lines(device)))
    size = f"{options.size}x{options.size}"
    print(f"{options.arch}, Mamba at {options.mamba_at}, {size}, {options.runs} runs of {options.steps} steps")
    for batch in options.batches:
        base = None
        for published in (True, False) if options.published else (False,):
            words, seconds, spread, memory = measure(options, device, batch, published)
            base = base or (seconds if published else None)
            ratio = f", {base / seconds:.1f} times the published way" if base and not published else ""
            print(
                f"batch {batch:3}: {batch / seconds:7.1f} img/s, {1e3 * seconds:7.2f} ms +- {1e3 * spread:.2f}, "
                + (f"{memory:.1f} GiB  " if device.type == "cuda" else "")
                + f"{'published way: ' if published else 'ours: '}{words}{ratio}",
                flush=True,
            )
            if device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__, use_underscores=True))
