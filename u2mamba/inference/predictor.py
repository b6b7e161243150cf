"""A trained network as fast as the machine runs it, for whoever wants maps: evaluation, prediction, export.

net, path = trained_network("saved_models/u2net/best.pth")
predict = Predictor(net, device, precision)
d0 = predict(images)  # (B, S, S, 3) uint8 -> (B, 1, S, S) float32 probabilities
"""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from model import weights
from model.u2net import REBNCONV
from u2mamba.dataset.augment import normalise
from u2mamba.runtime.environment import HeapRetention, out_of_memory
from u2mamba.runtime.errors import UserError

SHIPPED = Path(__file__).parents[2] / "saved_models"  # small weights come with the code as u2mambap*.pth
GRAPHS = 4  # batch shapes kept as CUDA graphs; more of them run eagerly


def weights_path(checkpoint: str = "") -> Path:
    """The file that `checkpoint` names; "" is the newest that ships. Raises UserError where none does."""
    shipped = sorted(SHIPPED.glob("u2mambap*.pth"))
    if not checkpoint and not shipped:
        raise UserError(
            "no weights: give --checkpoint PATH, of your own run, of `python u2mamba_train.py demo` "
            "(saved_models/demo/best.pth, minutes), or U-2-Net's public u2netp.pth (github.com/xuebinqin/U-2-Net)"
        )
    return Path(checkpoint) if checkpoint else shipped[-1]


def trained_network(checkpoint: str = "", backend: str = "auto") -> tuple[nn.Module, Path]:
    """The network of a checkpoint (`weights_path`), in eval mode, and the file that it came from.

    Raises UserError where there is none, or for one that is not of this project's networks.
    """
    path = weights_path(checkpoint)
    try:
        return weights.load_model(path, backend=backend), path
    except ValueError as error:
        raise UserError(str(error)) from None


def fold_batch_norm(net: nn.Module) -> nn.Module:
    """A copy of `net` in eval mode, each batch norm multiplied into the convolution before it: the same function."""
    net = copy.deepcopy(net).eval().requires_grad_(False)
    for block in net.modules():
        if isinstance(block, REBNCONV):
            block.conv_s1 = fuse_conv_bn_eval(block.conv_s1, block.bn_s1)
            block.bn_s1 = nn.Identity()
    return net


class Predictor:
    """Maps of batches of images, by a copy of `net` that is prepared once: batch norm folded, channels_last.

    precision: "fp32"; or "bf16", convolutions in bf16, Mamba and the fusion of the side outputs in fp32.
    graph: on CUDA, replay one graph for each batch shape. tta: the mean with the mirrored images' maps. On a CPU the
    process keeps the memory that a batch took for the next one (`HeapRetention`): a sixth less time.
    """

    def __init__(
        self, net: nn.Module, device: torch.device, precision: str = "fp32", graph: bool = True, tta: bool = False
    ):
        self.device, self.tta, self.graphs, self.memory = device, tta, {}, HeapRetention(device)
        self.wants_graph = graph and device.type == "cuda"
        self.net = fold_batch_norm(net).to(device, memory_format=torch.channels_last)
        self.dtype = torch.float32
        if precision == "bf16":
            self.dtype = torch.bfloat16
            for layer in self.net.modules():
                if isinstance(layer, nn.Conv2d) and layer is not self.net.outconv:
                    layer.to(self.dtype)
            self.net.outconv.register_forward_pre_hook(lambda _, x: (x[0].float(),))

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """(B, H, W, 3) uint8, on any device -> d0, (B, 1, H, W) float32 probabilities on the predictor's device.

        The result is the caller's own. Raises UserError naming a batch size to try when the memory does not suffice.
        """
        d0 = self._maps(images)
        return (d0 + self._maps(images.flip(2)).flip(3)) / 2 if self.tta else d0

    def _maps(self, images: Tensor) -> Tensor:
        try:
            if not self.wants_graph:
                with self.memory:
                    return self._forward(images.to(self.device))
            if images.shape not in self.graphs:
                if len(self.graphs) >= GRAPHS:
                    return self._forward(images.to(self.device))
                self.graphs[images.shape] = self._capture(images.to(self.device))
            graph, taken, given = self.graphs[images.shape]
            taken.copy_(images, non_blocking=True)
            graph.replay()
            return given.clone()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            n, h, w, _ = images.shape
            less = f"a batch of {n // 2}" if n > 1 else "a smaller size"
            raise UserError(f"{n} images of {w}x{h} do not fit into the memory of {self.device}: try {less}") from None

    def _forward(self, images: Tensor) -> Tensor:
        return self.net(normalise(images, channels_last=True).to(self.dtype))[0]

    def _capture(self, images: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        taken = images.clone()
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # kernels are compiled, convolution algorithms chosen
                self._forward(taken)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            given = self._forward(taken)
        return graph, taken, given
