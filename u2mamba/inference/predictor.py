"""A trained network, prepared to predict saliency maps as fast as the device allows.

net = load_model("saved_models/u2net/best.pth")
predict = Predictor(net, torch.device("cpu"))
saliency = predict.saliency("photo.jpg")  # (H, W) float32 probabilities
saliency = predict(images)  # (B, S, S, 3) uint8 RGB -> (B, 1, S, S) float32 probabilities; net.settings has S
"""

import contextlib
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from model import weights
from model.u2net import REBNCONV, as_list, saliency_map
from u2mamba.dataset.augment import MEAN, normalize
from u2mamba.dataset.decode import read_image
from u2mamba.dataset.rescale import rescale_image, resize_map
from u2mamba.runtime.environment import HeapRetention, out_of_memory
from u2mamba.runtime.errors import UserError

PRETRAINED_DIR = Path(__file__).parents[2] / "saved_models"
PRETRAINED = {"small": "u2mambap.pth", "large": "u2mamba.pth"}  # names that --checkpoint accepts instead of a path
MAX_GRAPHS = 4  # maximum number of batch shapes with a CUDA graph; others run eagerly


def weights_path(checkpoint: str | Path = "small") -> Path:
    """The weights file that `checkpoint` names: "small" and "large" are included, anything else is a path.

    Raises UserError if an included file is missing.
    """
    path = PRETRAINED_DIR / PRETRAINED[checkpoint] if checkpoint in PRETRAINED else Path(checkpoint)
    if checkpoint in PRETRAINED and not path.is_file():
        raise UserError(
            f'"{checkpoint}": {path} not found; give the path of a weights file (your own, or U-2-Net\'s public '
            "u2net.pth or u2netp.pth)"
        )
    return path


def load_model(checkpoint: str | Path = "small", **options: Any) -> nn.Module:
    """The network of a weights file (`weights_path`) on the CPU, in eval mode; options: as `model.weights.load_model`.

    `net.settings` holds what it was built with, and "size", its training size in pixels, where the file specifies it.
    Raises UserError with one line where the file cannot be used.
    """
    path = weights_path(checkpoint)
    try:
        net = weights.load_model(path, **options)
    except ValueError as error:
        raise UserError(str(error)) from None
    if (channels := net.settings.get("in_ch", len(MEAN))) != len(MEAN):
        raise UserError(
            f"{checkpoint}: expects {channels} channels, but MEAN in u2mamba/dataset/decode.py has {len(MEAN)}"
        )
    if (outputs := net.settings.get("out_ch", 1)) > 1:
        print(f"{checkpoint}: has {outputs} outputs; a map is 1 minus the probability of the first, the background")
    if checkpoint in PRETRAINED:
        net.settings.setdefault("size", weights.DEFAULT_SIZE)
    return net


def input_size(net: nn.Module, size: int = 0) -> int:
    """Pixels of the square that images are resized to: `size`, or for 0 the training size. Raises UserError."""
    if 0 < size < 32:
        raise UserError(f"size = {size}: must be from 32 to 4096, or 0 for the training size")
    if not size and "size" not in net.settings:
        print(f"the weights file does not record its training size: using {weights.DEFAULT_SIZE} pixels (see --size)")
    return size or net.settings.get("size", weights.DEFAULT_SIZE)


def fold_batch_norm(net: nn.Module, copy: bool = True) -> nn.Module:
    """A copy of `net`, or `net` itself, in eval mode, each batch norm folded into the convolution before it, unless the
    block, which may be edited, then computes something else."""
    net = (deepcopy(net) if copy else net).eval().requires_grad_(False)
    for block in net.modules():
        conv, norm = getattr(block, "conv_s1", None), getattr(block, "bn_s1", None)
        fits = isinstance(block, REBNCONV) and (type(conv), type(norm)) == (nn.Conv2d, nn.BatchNorm2d)
        if fits and norm.track_running_stats and norm.num_features == conv.out_channels:
            image = torch.linspace(-1, 1, 16 * conv.in_channels).view(1, -1, 4, 4).to(conv.weight)
            expected = block(image)
            block.conv_s1, block.bn_s1 = fuse_conv_bn_eval(conv, norm), nn.Identity()
            if not torch.allclose(block(image), expected, 1e-2, 1e-2 * float(expected.abs().max())):  # TF32: 1e-3
                block.conv_s1, block.bn_s1 = conv, norm
    return net


def _cast_inputs(layer: nn.Module, inputs: tuple) -> tuple:
    """To the type of the layer's own weights."""
    dtype = next(layer.parameters(recurse=False)).dtype
    return tuple(v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for v in inputs)


class Predictor:
    """Saliency maps of batches of images, by a copy of `net` (copy=False: by `net`): batch norm folded, channels_last.

    precision: "fp32"; or "bf16": convolutions in bf16, Mamba and the fusion of the side outputs in fp32.
    tta: flip test-time augmentation, averaged with the map of the horizontally flipped image. On CUDA, a graph for each
    batch shape is replayed. On a CPU, memory is reused between batches (`HeapRetention`): a sixth of the time.
    """

    def __init__(
        self,
        net: nn.Module,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - immutable
        precision: str = "fp32",
        tta: bool = False,
        copy: bool = True,
    ):
        self.device, self.tta, self.memory, self._graphs = device, tta, HeapRetention(device), {}
        self.net = fold_batch_norm(net, copy).to(device, memory_format=torch.channels_last)
        self.dtype = torch.float32
        if precision == "bf16":
            self.dtype, fusion = torch.bfloat16, getattr(self.net, "outconv", None)
            for layer in self.net.modules():
                if isinstance(layer, nn.Conv2d) and layer is not fusion:
                    layer.to(self.dtype)
                if any(True for _ in layer.parameters(recurse=False)):
                    layer.register_forward_pre_hook(_cast_inputs)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 RGB, on any device -> saliency maps, (B, 1, H, W) float32 on the predictor's device.

        A later call does not overwrite the result. Raises UserError naming a batch size to try when memory runs out.
        """
        # Triton launches on the thread's current GPU, which need not be this one
        with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
            saliency = self._predict(images)
            return (saliency + self._predict(images.flip(2)).flip(3)) / 2 if self.tta else saliency

    def saliency(self, image: np.ndarray | str | Path) -> np.ndarray:
        """A file, or (H, W, 3) uint8 RGB -> its saliency map, (H, W) float32 in [0, 1].

        The network sees it at `net.settings["size"]`. Raises BadFile for a file that cannot be read.
        """
        image = image if isinstance(image, np.ndarray) else read_image(image)
        size = self.net.settings.get("size", weights.DEFAULT_SIZE)
        resized = torch.from_numpy(rescale_image(image, size))
        return resize_map(self(resized[None])[0, 0].cpu().numpy(), image.shape[:2])

    def _predict(self, images: Tensor) -> Tensor:
        try:
            if self.device.type != "cuda":
                with self.memory:
                    return self._forward(images.to(self.device))
            if images.shape not in self._graphs:
                if len(self._graphs) >= MAX_GRAPHS:
                    return self._forward(images.to(self.device))
                self._graphs[images.shape] = self._capture(images.to(self.device))
            graph, static_input, static_output = self._graphs[images.shape]
            static_input.copy_(images, non_blocking=True)
            graph.replay()
            return static_output.clone()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            n, h, w, _ = images.shape
            less = f"a batch of {n // 2}" if n > 1 else "a smaller size"
            raise UserError(f"{n} images of {w}x{h} do not fit into the memory of {self.device}: try {less}") from None

    def _forward(self, images: Tensor) -> Tensor:
        logits = self.net(normalize(images, channels_last=True).to(self.dtype), logits=True)
        return saliency_map(as_list(logits)[0].float())

    def _capture(self, images: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        static_input = images.clone()
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles kernels and selects convolution algorithms
                self._forward(static_input)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            static_output = self._forward(static_input)
        return graph, static_input, static_output
