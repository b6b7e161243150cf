"""A checkpoint -> ONNX, in standard operations that every ONNX runtime supports: image in, saliency map out.

    python u2mamba_export.py --checkpoint saved_models/u2net/best.pth --out u2mamba.onnx
    python u2mamba_export.py --variants fp16 int8 --images photos --gt masks
    python u2mamba_export.py --checkpoint large --out u2mamba.pth      plain fp32 weights

Input "image": (N, 3, SIZE, SIZE) float32, RGB resized without keeping the aspect ratio, divided by the image's maximum,
normalized by ImageNet's mean and standard deviation. Output "d0": (N, 1, SIZE, SIZE) float32 in [0, 1]. The model is a
single file; with SIZE 320 rembg's "u2net_custom" uses it unchanged. It is written only if ONNX Runtime's results equal
PyTorch's to 1e-4 on real images. Requires `pip install -r requirements-export.txt`, except for a weights file (.pth).

Exit codes: 0 done, 1 done but images or a variant were skipped, 2 nothing written, 130 stopped by Ctrl-C.
"""

import os.path  # isort: skip
import sys  # isort: skip

sys.path.insert(0, os.path.dirname(__file__))  # PYTHONSAFEPATH leaves it out
import u2mamba.runtime.start  # noqa: F401  # isort: skip
import importlib
import io
import logging
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor, nn

from model.u2net import as_list, saliency_map
from model.weights import cpu_state_dict, quantize
from u2mamba.dataset.augment import MEAN, STD, normalize
from u2mamba.dataset.decode import BadFile, read_image, read_pair
from u2mamba.dataset.demo import PHOTOGRAPHS
from u2mamba.dataset.pairs import pair_folders
from u2mamba.dataset.rescale import rescale_image, rescale_mask
from u2mamba.inference.inputs import find_images
from u2mamba.inference.predictor import fold_batch_norm, input_size, load_model, weights_path
from u2mamba.runtime.config import Range, check_settings, read_settings
from u2mamba.runtime.errors import EXIT_OK, EXIT_SKIPPED, UserError, one_line_errors
from u2mamba.runtime.files import atomic_write, check_folder

TOLERANCE = 1e-4  # maximum difference to PyTorch's probabilities in fp32
MAX_IMAGES = 100  # of --images, evenly spaced: for the comparison, and to calibrate int8
PHOTOS = ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "ihc.png", "rocket.jpg")


@dataclass
class Config:
    __doc__ = __doc__  # for --help
    checkpoint: str = "small"  # weights file, or small or large (included)
    out: str = "u2mamba.onnx"  # .onnx, or .pth for weights; variants: u2mamba_fp16.onnx, u2mamba_int8.onnx
    size: Annotated[int, Range(0, 2048)] = 0  # pixels: height and width of the input; 0: the training size
    opset: Annotated[int, Range(13, 20)] = 17  # ONNX opset version
    # fp16: half the file size; int8: convolutions in 8 bits, calibrated on every second image (.pth: only int8)
    variants: tuple[Literal["fp16", "int8"], ...] = ()
    images: str = ""  # folder of images for comparison and calibration; default: scikit-image's photos
    gt: str = ""  # folder of their ground-truth masks: also reports each file's MAE against them


class SaliencyModel(nn.Module):
    """(N, 3, H, W) -> the saliency map alone, (N, 1, H, W)."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> Tensor:
        return saliency_map(as_list(self.net(image, logits=True))[0])


def export(net: nn.Module, path: Path, size: int, opset: int) -> None:
    """Writes `net`, on the CPU and in eval mode, to `path`: batch norm folded, constants folded, any batch size.

    Uses the tracing exporter, 15 s for U2MAMBAP. The torch.export-based one takes 450 s for the scans' 3,000
    operations, produces the same graph, and requires two more packages.
    """
    import onnx

    image = torch.zeros(1, len(MEAN), size, size)
    names = {"input_names": ["image"], "output_names": ["d0"], "dynamic_axes": {"image": {0: "N"}, "d0": {0: "N"}}}
    traced = path.with_suffix(".traced.onnx")
    model = SaliencyModel(fold_batch_norm(net))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing fixes sizes, as intended, and is deprecated
        torch.onnx.export(model, (image,), traced, dynamo=False, opset_version=opset, **names)
    open_session(traced, simplified=path)  # half the operations: constants are folded
    model = onnx.load(path)
    used = {node.domain for node in model.graph.node}
    plain = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(plain)
    preprocessing = f"RGB / max(image), mean {MEAN}, std {STD}, {size}x{size}"
    onnx.helper.set_model_props(model, {"network": type(net).__name__, "preprocessing": preprocessing})
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def open_session(path: Path, simplified: Path | None = None):
    """An ONNX Runtime session on the CPU; simplified: where to write the graph with folded constants."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    if simplified:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC  # standard operations
        options.optimized_model_filepath = str(simplified)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def to_fp16(path: Path, target: Path) -> None:
    """Weights and arithmetic in half precision; input, output and Mamba layers stay in fp32, since the output of a scan
    before a norm can exceed 65,504."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    model = onnx.load(path)
    mamba = [node.name for node in model.graph.node if "/mamba" in node.name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one for each weight below 1e-7
        model = convert_float_to_float16(model, keep_io_types=True, node_block_list=mamba)
    casts = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Cast"}
    for node in model.graph.node:  # removes casts to half and back between two nodes in fp32
        for index, name in enumerate(node.input):
            if casts.get(name) in casts:
                node.input[index] = casts[casts[name]]
    graph = OnnxModel(model)
    graph.prune_graph()
    graph.topological_sort()
    del graph.model.graph.value_info[:]  # intermediate shapes, which the fp32 file lacks too
    onnx.save(graph.model, target)


def to_int8(path: Path, target: Path, images: Tensor) -> None:
    """Convolutions in 8 bits, weights per channel, activation ranges calibrated on `images`. The Mamba layers stay in
    fp32, and so does the first convolution: with 256 input levels, the error of the maps is 4 to 11 times as large."""
    import onnx
    from onnxruntime.quantization import QuantFormat, quantize_static

    batches = ({"image": normalize(image).numpy()} for image in images.split(1))
    reader = SimpleNamespace(get_next=lambda: next(batches, None))
    excluded = [node.name for node in onnx.load(path).graph.node if "/mamba" in node.name or "image" in node.input]
    options = {"quant_format": QuantFormat.QDQ, "per_channel": True, "op_types_to_quantize": ["Conv"]}
    logging.disable(logging.WARNING)  # it recommends folding constants first, which is done
    quantize_static(path, target, reader, nodes_to_exclude=excluded, **options)
    logging.disable(logging.NOTSET)


def load_images(cfg: Config, size: int) -> tuple[Tensor, Tensor | None, int]:
    """Images (n, S, S, 3) uint8, with --gt their masks (n, S, S) in [0, 1], and how many files were skipped."""
    if cfg.gt and not cfg.images:
        raise UserError("--gt: also give the images of these masks, --images FOLDER")
    if cfg.gt:
        files = pair_folders(cfg.images, cfg.gt, options=("--images", "--gt"))
    elif cfg.images:
        files = [source.image for source in find_images([cfg.images])[0]]
    else:
        files = [PHOTOGRAPHS / name for name in PHOTOS]
    images, masks, skipped = [], [], 0
    for file in files[:: -(-len(files) // MAX_IMAGES)]:
        try:
            image, mask = read_pair(file)[:2] if cfg.gt else (read_image(file), None)
        except BadFile as error:
            skipped += 1
            print(f"skipped: {error}", file=sys.stderr)
            continue
        images.append(rescale_image(image, size))
        if cfg.gt:
            masks.append(rescale_mask(mask, size) / np.float32(255))
    if not images:
        raise UserError(f"{cfg.images}: none of its images can be read")
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(masks)) if masks else None, skipped


def onnx_maps(session, images: Tensor) -> Tensor:
    """Saliency maps (n, S, S) of a session; the first two in one batch, to test the dynamic batch size."""
    batches = [images[:2], *images[2:].split(1)]
    return torch.cat([torch.from_numpy(session.run(["d0"], {"image": normalize(b).numpy()})[0][:, 0]) for b in batches])


@torch.inference_mode()
def reference_maps(net: nn.Module, images: Tensor) -> Tensor:
    """Saliency maps (n, S, S) of the unmodified network."""
    return torch.cat([SaliencyModel(net)(normalize(image))[:, 0] for image in images.split(1)])


def write_weights(net: nn.Module, out: Path, variants: tuple[str, ...]) -> dict[Path, nn.Module]:
    """Writes plain fp32 weights and, as a variant, int8 weights -> file: the network loaded from it."""
    weights = {out: cpu_state_dict(net, net.settings.get("size"))}
    if "int8" in variants:
        weights[out.with_stem(f"{out.stem}_int8")] = quantize(weights[out])
    for path, state in weights.items():
        torch.save(state, content := io.BytesIO())
        atomic_write(path, content.getvalue())
    return {path: load_model(path, backend="torch") for path in weights}


def write_onnx(net: nn.Module, cfg: Config, size: int, images: Tensor, expected: Tensor) -> dict[Path, Tensor]:
    """Writes the ONNX file and its variants -> their maps. A variant with NaN or Inf in its maps is skipped."""
    import onnxruntime

    out, results = Path(cfg.out), {}
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as folder:
        exported, start = Path(folder, "fp32.onnx"), time.perf_counter()
        export(net, exported, size, cfg.opset)
        print(f"exported in {time.perf_counter() - start:.0f} s", flush=True)
        maps = onnx_maps(open_session(exported), images)
        difference = (maps - expected).abs().max().item()
        if not difference <= TOLERANCE:  # not ">", so that NaN is refused too
            raise UserError(
                f"{out}: ONNX Runtime {onnxruntime.__version__} differs from PyTorch {torch.__version__} by "
                f"{difference:.1e}, more than {TOLERANCE:.0e}; nothing was written; try another --opset, or weights "
                "that were trained longer (barely trained ones can amplify rounding errors)"
            )
        print(f"maximum difference to PyTorch: {difference:.1e} (allowed {TOLERANCE:.0e})")
        atomic_write(out, exported.read_bytes())
        results[out] = maps
        convert = {"fp16": to_fp16, "int8": lambda source, target: to_int8(source, target, images[::2])}
        for kind in cfg.variants:
            variant, target = Path(folder, f"{kind}.onnx"), out.with_stem(f"{out.stem}_{kind}")
            convert[kind](exported, variant)
            maps = onnx_maps(open_session(variant), images)
            if maps.isfinite().all():
                atomic_write(target, variant.read_bytes())
                results[target] = maps
            else:
                print(f"skipped: {target}: its maps contain NaN/Inf: the weights exceed the range of {kind}")
    return results


def main(cfg: Config) -> int:
    """Runs the command; returns the exit code."""
    cfg = check_settings(cfg)
    out = Path(cfg.out)
    if out.suffix not in (".onnx", ".pth"):
        raise UserError(f"--out {out}: must end in .onnx, or in .pth for a weights file")
    if out.suffix == ".pth" and "fp16" in cfg.variants:
        raise UserError(f"--variants fp16: the only variant of a weights file such as {out} is int8")
    try:
        for name in ("onnx", "onnxruntime") if out.suffix == ".onnx" else ():
            importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{error}: pip install -r requirements-export.txt") from None
    net = load_model(cfg.checkpoint, backend="torch")
    size = input_size(net, cfg.size)
    check_folder(out.parent)
    images, masks, skipped = load_images(cfg, size)
    print(f"{weights_path(cfg.checkpoint)}: {type(net).__name__} at {size}x{size}, compared on {len(images)} images")
    expected = reference_maps(net, images)
    if out.suffix == ".onnx":
        results = write_onnx(net, cfg, size, images, expected)
    else:
        results = {p: reference_maps(n, images) for p, n in write_weights(net, out, cfg.variants).items()}
    skipped += len(results) < 1 + len(set(cfg.variants))

    print(f"{'':24}{'MB':>8}{'MAE to fp32':>15}{'max':>10}" + f"{'MAE to masks':>15}" * (masks is not None))
    for path, maps in results.items():
        error = (maps - expected).abs()
        to_masks = f"{(maps - masks).abs().mean():15.4f}" if masks is not None else ""
        print(f"{path.name:24}{path.stat().st_size / 1e6:8.1f}{error.mean():15.1e}{error.max():10.1e}{to_masks}")
    return EXIT_SKIPPED if skipped else EXIT_OK


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main(read_settings(Config())))
