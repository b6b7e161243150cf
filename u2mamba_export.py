"""A checkpoint -> ONNX: image in, d0 out, in plain operations that every ONNX runtime knows.

    python u2mamba_export.py --checkpoint saved_models/u2net/best.pth --out u2mamba.onnx
    python u2mamba_export.py --variants fp16 int8 --images photos --gt masks

The file takes "image", (N, 3, SIZE, SIZE) float32: RGB over the image's maximum, less the ImageNet mean, over its
deviation, squashed to the square; and gives "d0", (N, 1, SIZE, SIZE) float32 in [0, 1]. It is one file, and at SIZE 320
rembg's "u2net_custom" takes it as it is. It appears under its name only when ONNX Runtime computes with it what PyTorch
computes, to 1e-4 on real images. Needs `pip install -r requirements-export.txt`.

Exit codes: 0 done, 1 done with images or a variant set aside, 2 nothing written, 130 Ctrl-C.
"""

import u2mamba.runtime.start  # noqa: F401  # isort: skip
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from benchmarks.hardware import lines, median_and_spread
from data_loader import MEAN, STD, normalise
from u2mamba.dataset.cache import rescale_image, rescale_mask
from u2mamba.dataset.demo import PHOTOGRAPHS
from u2mamba.dataset.pairs import IMAGE_TYPES, BadFile, pair_folders, read_image, read_pair
from u2mamba.inference.predictor import Predictor, fold_batch_norm, trained_network
from u2mamba.runtime.config import check_input_size, check_settings, input_size
from u2mamba.runtime.environment import choose_precision, choose_scan
from u2mamba.runtime.errors import EXIT_OK, EXIT_SKIPPED, UserError, one_line_errors
from u2mamba.runtime.files import atomic_write, check_folder

TOLERANCE = 1e-4  # largest difference to PyTorch of a probability, fp32
MOST_IMAGES = 100  # of --images, evenly over the folder: for the comparison, and to calibrate int8
PHOTOGRAPHS_TAKEN = ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "ihc.png", "rocket.jpg")
RUNS = 7  # of each way that is timed


@dataclass
class Options:
    checkpoint: str = ""  # weights; default: the small network's that ship in saved_models/
    out: str = "u2mamba.onnx"  # file; variants are called u2mamba_fp16.onnx and u2mamba_int8.onnx
    size: int = 0  # pixels: height and width of the input; 0: as the weights were trained, 320 if unknown
    opset: int = 17  # version of ONNX's operations
    # fp16: half the file; int8: convolutions in 8 bits, calibrated on every second image
    variants: tuple[Literal["fp16", "int8"], ...] = ()
    images: str = ""  # folder to compare and calibrate on; default: scikit-image's photographs
    gt: str = ""  # folder of their masks: then each file's MAE against them as well


LIMITS = {"size": (0, 2048), "opset": (13, 20)}


class D0(nn.Module):
    """The fused map alone."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image)[0]


def export(net: nn.Module, path: Path, size: int, opset: int) -> None:
    """Writes `net`, on the CPU and in eval mode, to `path`: batch norm folded, constants computed, batch size open.

    By the exporter that traces: 15 s for U2MAMBAP. The one built on torch.export takes 450 s for the scans' 3,000
    operations, gives the same graph, and needs two more packages.
    """
    import onnx

    image = torch.zeros(1, 3, size, size)
    names = {"input_names": ["image"], "output_names": ["d0"], "dynamic_axes": {"image": {0: "N"}, "d0": {0: "N"}}}
    traced = path.with_suffix(".traced.onnx")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes that tracing fixes, which are fixed, and of the exporter's age
        torch.onnx.export(D0(fold_batch_norm(net)), (image,), traced, dynamo=False, opset_version=opset, **names)
    session(traced, simplified=path)  # half the operations: constants are folded
    model = onnx.load(path)
    used = {node.domain for node in model.graph.node}
    plain = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(plain)
    preprocessing = f"RGB / max(image), mean {MEAN}, std {STD}, {size}x{size}"
    onnx.helper.set_model_props(model, {"network": type(net).__name__, "preprocessing": preprocessing})
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def session(path: Path, simplified: Path | None = None):
    """ONNX Runtime's session on the CPU; simplified: where to write the graph with its constants computed."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    if simplified:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC  # standard operations
        options.optimized_model_filepath = str(simplified)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def to_fp16(path: Path, target: Path) -> None:
    """Weights and arithmetic in half precision; input, output and the Mamba layers in float32: what a scan gives before
    a norm can be larger than 65,504."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    model = onnx.load(path)
    mamba = [node.name for node in model.graph.node if "/mamba" in node.name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one line for each weight below 1e-7
        model = convert_float_to_float16(model, keep_io_types=True, node_block_list=mamba)
    casts = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Cast"}
    for node in model.graph.node:  # what is cast to half and back between two nodes in float32 is taken as it was
        for place, name in enumerate(node.input):
            if casts.get(name) in casts:
                node.input[place] = casts[casts[name]]
    whole = OnnxModel(model)
    whole.prune_graph()
    whole.topological_sort()
    del whole.model.graph.value_info[:]  # shapes of what was between, as the file that it is made from has none
    onnx.save(whole.model, target)


def to_int8(path: Path, target: Path, images: Tensor) -> None:
    """Convolutions in 8 bits, weights per channel, ranges as seen on `images`; the Mamba layers stay in float32, and so
    does the first convolution, for 256 levels are too few for a photograph (maps 4 to 11 times as far off)."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self):
            self._rest = iter(images.split(1))

        def get_next(self):
            one = next(self._rest, None)
            return None if one is None else {"image": normalise(one).numpy()}

    kept = [node.name for node in onnx.load(path).graph.node if "/mamba" in node.name or "image" in node.input]
    kinds = {"quant_format": QuantFormat.QDQ, "per_channel": True, "op_types_to_quantize": ["Conv"]}
    kinds["nodes_to_exclude"] = kept
    logging.disable(logging.WARNING)  # it advises to fold constants first, which is done
    quantize_static(path, target, Reader(), **kinds)
    logging.disable(logging.NOTSET)


def gather(options: Options, size: int) -> tuple[Tensor, Tensor | None, int]:
    """Images (n, S, S, 3) uint8, their masks (n, S, S) in [0, 1] where --gt is given, and how many were set aside."""
    if options.gt and not options.images:
        raise UserError("--gt: give the images of these masks too, --images FOLDER")
    if options.gt:
        for folder in (options.images, options.gt):
            if not Path(folder).is_dir():
                raise UserError(f"{folder}: there is no such folder")
        files = pair_folders(options.images, options.gt, log=lambda line: print(line, file=sys.stderr))
    elif options.images:
        files = [p for p in sorted(Path(options.images).rglob("*")) if p.suffix.lower() in IMAGE_TYPES]
        if not files:
            raise UserError(f"--images {options.images}: there is no such folder, or no image in it")
    else:
        files = [PHOTOGRAPHS / name for name in PHOTOGRAPHS_TAKEN]
    images, masks, aside = [], [], 0
    for file in files[:: -(-len(files) // MOST_IMAGES)]:
        try:
            image, mask = read_pair(file)[:2] if options.gt else (read_image(file), None)
        except BadFile as error:
            aside += 1
            print(f"set aside: {error}", file=sys.stderr)
            continue
        images.append(rescale_image(image, size))
        if options.gt:
            masks.append(rescale_mask(mask, size) / np.float32(255))
    if not images:
        raise UserError(f"{options.images}: none of its images can be read")
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(masks)) if masks else None, aside


def onnx_maps(running, images: Tensor) -> Tensor:
    """d0 (n, S, S) by a session; one by one, but the first two together, since the batch size is open."""
    chunks = [images[:2], *images[2:].split(1)]
    return torch.cat([torch.from_numpy(running.run(["d0"], {"image": normalise(c).numpy()})[0][:, 0]) for c in chunks])


@torch.inference_mode()
def reference_maps(net: nn.Module, images: Tensor) -> Tensor:
    """d0 (n, S, S) of the network as it was trained: NCHW, batch norm not folded, in fp32 if its weights are."""
    dtype = next(net.parameters()).dtype
    return torch.cat([net(normalise(one).to(dtype))[0][:, 0] for one in images.split(1)])


def print_times(ways: dict[str, Callable[[], object]]) -> None:
    """One image through each way in turn, so that a busy machine slows all of them alike."""
    times = {name: [] for name in ways}
    for _ in range(RUNS + 1):
        for name, call in ways.items():
            begun = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begun)
    for name, found in times.items():
        median, spread = median_and_spread(found[1:])  # the first warms up
        print(f"  {1e3 * median:8.1f} ms +- {1e3 * spread:.1f}  {name}")


def run(options: Options) -> int:
    """The whole of it; returns the exit code."""
    check_settings(options, LIMITS)
    check_input_size(options.size)
    try:
        import onnx  # noqa: F401
        import onnxruntime
    except ImportError as error:
        raise UserError(f"{error}: pip install -r requirements-export.txt") from None
    out, cpu = Path(options.out), torch.device("cpu")
    if out.suffix != ".onnx":
        raise UserError(f"--out {out}: must be called something.onnx")
    net, weights = trained_network(options.checkpoint, choose_scan(cpu, "torch")[0])
    check_folder(out.parent)
    size = input_size(options.size, weights)
    images, masks, aside = gather(options, size)
    print(f"{weights}: {type(net).__name__} at {size}x{size}, compared on {len(images)} images")
    expected = reference_maps(net, images)

    rows, sessions = [], {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder, "fp32.onnx")
        begun = time.perf_counter()
        export(net, work, size, options.opset)
        print(f"exported in {time.perf_counter() - begun:.0f} s", flush=True)
        sessions[out.name] = session(work)
        found = onnx_maps(sessions[out.name], images)
        largest = (found - expected).abs().max().item()
        if not largest <= TOLERANCE:  # not: NaN is refused too
            rounding = (reference_maps(net.double(), images) - expected).abs().max().item()
            unsettled = f"these weights amplify rounding (PyTorch is {rounding:.1e} off float64 itself): train longer"
            raise UserError(
                f"{out}: ONNX Runtime {onnxruntime.__version__} differs from PyTorch {torch.__version__} by "
                f"{largest:.1e}, more than {TOLERANCE:.0e}; nothing is written; "
                + (unsettled if rounding > TOLERANCE else "try another --opset")
            )
        print(f"largest difference to PyTorch: {largest:.1e} (allowed {TOLERANCE:.0e})")
        atomic_write(out, work.read_bytes())
        rows.append((out, found))
        make = {"fp16": to_fp16, "int8": lambda source, target: to_int8(source, target, images[::2])}
        for kind in options.variants:
            made, target = Path(folder, f"{kind}.onnx"), out.with_stem(f"{out.stem}_{kind}")
            make[kind](work, made)
            running = session(made)
            found = onnx_maps(running, images)
            if not found.isfinite().all():
                aside += 1
                print(f"set aside: {target}: its maps are not finite, the weights are too large for {kind}")
                continue
            atomic_write(target, made.read_bytes())
            rows.append((target, found))
            sessions[target.name] = running

    against = f"{'MAE, masks':>12}" if masks is not None else ""
    print(f"{'':24}{'MB':>8}{'MAE, fp32 map':>15}{'largest':>10}{against}")
    for path, maps in rows:
        apart = (maps - expected).abs()
        against = f"{(maps - masks).abs().mean():12.4f}" if masks is not None else ""
        print(f"{path.name:24}{path.stat().st_size / 1e6:8.1f}{apart.mean():15.1e}{apart.max():10.1e}{against}")

    print("one image on this CPU, ways in turn, " + "; ".join(lines(cpu)))
    one, precision = images[:1], choose_precision("bf16", cpu)[0]
    x = normalise(one)
    ways = {f"ONNX Runtime, {n}": lambda s=s: s.run(["d0"], {"image": x.numpy()}) for n, s in sessions.items()}
    ways["PyTorch, eager, fp32, NCHW"] = torch.inference_mode()(lambda: net(x))
    predictor = Predictor(net, cpu, precision)
    ways[f"PyTorch, Predictor, {precision}"] = lambda: predictor(one)
    print_times(ways)
    return EXIT_SKIPPED if aside else EXIT_OK


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(run(tyro.cli(Options, description=__doc__, use_underscores=True)))
