"""One training step: forward, loss, backward, clipping, optimizer, averaged weights, without a synchronisation.

A step with a loss or gradient that is not finite changes nothing: not the weights, not the optimizer, not the
batch norm statistics; it is counted, and `TrainStep.read` tells. (The averages move towards the weights as they are.)

On a CUDA GPU the whole step is captured in a graph and replayed: U²-Net launches some 5,000 kernels a step, and the CPU
cannot launch them as fast as the GPU runs them. The same code runs eagerly everywhere else.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.layers import fused
from u2mamba.engine.distributed import DistContext
from u2mamba.engine.gradients import MeanOfAll
from u2mamba.engine.parameters import flatten_statistics
from u2mamba.engine.validation import iou_per_image
from u2mamba.fast import compile_only, join
from u2mamba.runtime.environment import HeapRetention, memory_in_use, out_of_memory
from u2mamba.runtime.errors import UserError

OUTPUTS = 7  # d0..d6
HISTORY = 64  # steps of which it is remembered what was not finite
EAGER_STEPS = 3  # before the capture: kernels are compiled, convolution algorithms chosen, optimizer state made


@dataclass
class RunningMeans:
    """Running means since the last `TrainStep.reset`, over the steps that were finite."""

    loss: float  # sum over d0..d6
    losses: list[float]  # of d0, ..., d6; the first is the published code's "tar"
    iou: float  # mean over images
    steps: int
    nonfinite_steps: int  # steps left out since the run began
    consecutive_nonfinite: int
    nonfinite: dict[int, str]  # of the HISTORY last steps, 0 the newest: the outputs whose loss was not finite
    memory: float  # GiB in use

    @property
    def tar(self):
        return self.losses[0]


class TrainStep:
    """Calling it trains `net` by one batch.

    optimizer: one of PyTorch's with fused=True. loss: (logits d0..d6, masks) -> (7,) losses.
    precision: "fp32"; or "bf16", activations and convolutions in bf16; in fp32 the weights, and of Mamba everything,
    with the fused kernels its state and sums.
    clip: largest gradient norm, 0 for none. ema_decay: decay of the averaged weights per step, 0 for none.
    accumulate: parts of a batch that go through the network one after the other, their gradients added up: the memory
    of one part, and the step of the whole batch, but for batch norm, which normalises each part by itself.
    graph: capture the step on CUDA. kernels: use the fused Triton kernels (bf16, channels_last, CUDA).
    world: the processes that train together, each with its own batch of the same size; weights, averages and means
    stay the same in all, batch norm statistics are the mean of theirs.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[tuple[Tensor, ...], Tensor], Tensor],
        env,
        dist: DistContext = DistContext(),  # noqa: B008 - immutable
        *,
        grad_clip: float = 0.0,
        ema_decay: float = 0.0,
        grad_accum_steps: int = 1,
        graph: bool = False,
        kernels: bool = False,
    ):
        world, clip, accumulate, device, precision = dist, grad_clip, grad_accum_steps, env.device, env.precision
        self.net, self.optimizer, self.loss, self.device = net, optimizer, loss, device
        self.clip, self.kernels, self.accumulate = clip, kernels, accumulate
        self.autocast = torch.autocast(
            device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=not graph
        )
        self.parameters = [p for p in net.parameters() if p.requires_grad]
        self.copied = [m for m in net.modules() if kernels and _runs_in_bf16(m)]
        self.statistics = flatten_statistics(net)
        self.ema_decay = ema_decay
        self.ema = [torch.zeros_like(t) for t in (*self.parameters, self.statistics)] if ema_decay else None
        # sums over the steps since `reset`: steps, images, IoU, losses of d0..d6; then bad steps, bad steps in a row
        self.sums = torch.zeros(3 + OUTPUTS, device=device)
        self.bad = torch.zeros(2, device=device)
        self.recent = torch.zeros(HISTORY, device=device)  # newest first: a bit for each output, one for the gradient
        self.bits = 2.0 ** torch.arange(OUTPUTS + 1, device=device)
        self.mean_of_all = MeanOfAll(world, self.parameters, self.statistics, torch.zeros(OUTPUTS + 1, device=device))
        self.ema_steps = self.eager_steps = 0
        self.memory = HeapRetention(device)
        self.graph = self.images = self.masks = self.shape = None
        self.wants_graph = graph and device.type == "cuda"
        # one for all: the allocator keeps memory apart for each stream that ever ran a step
        self.side = torch.cuda.Stream(device) if self.wants_graph else None
        if device.type == "cuda" and hasattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch"):
            torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)  # the streams are joined by hand
        for group in optimizer.param_groups if self.wants_graph else ():
            group["capturable"] = True
            group["lr"] = torch.tensor(float(group["lr"]), device=device)  # so that it can change without a new capture

    def __call__(self, images: Tensor, masks: Tensor) -> None:
        """images: (B, 3, H, W) normalised, masks: (B, 1, H, W) in [0, 1], both on the step's device.

        Raises UserError naming a batch size to try when the memory does not suffice.
        """
        try:
            if self.shape is None or images.shape[2:] != self.shape[2:]:
                self._compile_kernels(images, masks)
            if not self.wants_graph:
                with self.memory:
                    self._step(images, masks)
            elif self.graph and images.shape == self.images.shape:
                self.images.copy_(images)
                self.masks.copy_(masks)
                self.graph.replay()
            elif self.eager_steps >= EAGER_STEPS and images.shape == self.shape:  # twice in a row: no last batch
                self._capture(images, masks)
            else:  # the first steps, the first of another size, and the last, smaller batch of an epoch
                self._on_side_stream(images, masks)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            less, parts = max(len(images) // 2, 1), 2 * self.accumulate
            advice = f"accumulate = {parts}, which takes it in {parts} parts, or " if parts <= len(images) else ""
            raise UserError(
                f"a batch of {len(images)} does not fit into the memory of {self.device}: try {advice}"
                f"batch_size_train = {less}"
            ) from None
        self.shape = images.shape
        self.ema_steps += bool(self.ema)

    def _compile_kernels(self, images: Tensor, masks: Tensor) -> None:
        """Compiles the Triton kernels of a step side by side, by a step of a copy of the network thrown away after."""
        if self.device.type != "cuda":
            return
        self._copy_weights()
        net, images, masks = copy.deepcopy(self.net), *next(self._parts(images, masks))
        with compile_only(), self.autocast, fused(self.kernels):
            self._backward(self.loss(net(images, logits=True), masks))
        if self.kernels:
            join(self.device)

    def _on_side_stream(self, images: Tensor, masks: Tensor) -> None:
        """As PyTorch asks of what runs before a capture: gradients must not belong to the default stream."""
        stream = self.side
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self._step(images, masks)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self.eager_steps += 1

    def _capture(self, images: Tensor, masks: Tensor) -> None:
        self.graph = None  # of another size
        self.images, self.masks = images.clone(), masks.clone()  # clone keeps the memory format
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()  # the graph's memory is its own: what the eager steps took would stay beside it
        graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's own thread may ask for the state of an earlier all-reduce meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._step(self.images, self.masks)
        self.graph = graph
        self.graph.replay()  # the capture itself computed nothing

    def _parts(self, images: Tensor, masks: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(images.chunk(self.accumulate), masks.chunk(self.accumulate), strict=True)

    def _step(self, images: Tensor, masks: Tensor) -> None:
        statistics = self.statistics.clone()
        self._copy_weights()
        self.optimizer.zero_grad(set_to_none=True)
        figures = sum(self._gradients(x, y, len(y) / len(masks)) for x, y in self._parts(images, masks))
        self.mean_of_all(self.statistics, figures)  # from here on every process computes the same
        if self.clip:
            norm = nn.utils.clip_grad_norm_(self.parameters, self.clip)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        odd = ~torch.isfinite(torch.cat((figures[1:], norm.float().view(1))))
        ok = ~odd.any()
        self.optimizer.found_inf = (~ok).float()  # read by the fused optimizers: they then change nothing
        self.optimizer.step()
        self.statistics.copy_(torch.where(ok, self.statistics, statistics))
        self.recent.copy_(torch.cat(((odd * self.bits).sum().view(1), self.recent[:-1])))
        self._count(ok, figures, len(masks))
        if self.ema:
            torch._foreach_lerp_(self.ema, [*self.parameters, self.statistics], 1 - self.ema_decay)

    def _gradients(self, images: Tensor, masks: Tensor, share: float) -> Tensor:
        """Adds the gradients of a part of the batch to those of the parts before; returns the sum of its images' IoU
        and its share of the mean losses: (1 + OUTPUTS,)."""
        with self.autocast, fused(self.kernels):
            logits = self.net(images, logits=True)
        losses = self.loss(logits, masks) * share
        self._backward(losses)
        if self.kernels:
            join(self.device)
        self._fetch_gradients()
        iou = iou_per_image(torch.sigmoid(logits[0].detach().float()), masks).sum()
        return torch.cat((iou[None], losses.detach().float()))

    @staticmethod
    def _backward(losses: Tensor) -> None:
        """In this thread: Triton's mode of compiling, and the algorithms that cuDNN has chosen, belong to a thread."""
        with torch.autograd.set_multithreading_enabled(False):
            losses.sum().backward()

    @torch.no_grad()
    def _copy_weights(self) -> None:
        """bf16 copies of the weights, all in a few kernels where autocast takes one for each."""
        if not self.copied:
            return
        for m in self.copied:
            if not hasattr(m, "copy"):
                m.copy = m.weight.detach().to(torch.bfloat16).requires_grad_()  # a plain tensor: not in the state dict
            m.copy.grad = None
        torch._foreach_copy_([m.copy for m in self.copied], [m.weight for m in self.copied])

    @torch.no_grad()
    def _fetch_gradients(self) -> None:
        used = [m for m in self.copied if m.copy.grad is not None]
        first = [m for m in used if m.weight.grad is None]  # all of them, but where parts of the batch came before
        for m in first:
            m.weight.grad = self.mean_of_all.empty_gradient(m.weight)
        if used:
            put = torch._foreach_copy_ if first else torch._foreach_add_
            put([m.weight.grad for m in used], [m.copy.grad for m in used])
        for m in used:
            m.copy.grad = None

    @torch.no_grad()
    def _count(self, ok: Tensor, figures: Tensor, images: int) -> None:
        seen = torch.cat((torch.ones_like(figures[:1]), torch.full_like(figures[:1], images), figures))
        self.sums += torch.where(ok, seen, 0.0)
        self.bad += torch.where(ok, 0.0, 1.0)
        self.bad[1] *= torch.where(ok, 0.0, 1.0)

    def read(self) -> RunningMeans:
        """The means so far; waits for the device (the only place that does)."""
        steps, images, iou, *losses = self.sums.tolist()
        bad, bad_in_a_row = self.bad.tolist()
        losses = [v / steps if steps else math.nan for v in losses]
        iou = iou / images if images else math.nan
        odd = {ago: _outputs(int(bits)) for ago, bits in enumerate(self.recent.tolist()) if bits}
        return RunningMeans(
            sum(losses), losses, iou, int(steps), int(bad), int(bad_in_a_row), odd, memory_in_use(self.device)
        )

    def reset(self) -> None:
        self.sums.zero_()

    def set_learning_rate(self, value: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(value)
            else:
                group["lr"] = value

    def ema_model(self) -> nn.Module:
        """The network to validate and to keep: with the averaged weights where there are any, else the one trained."""
        if not self.ema_steps:
            return self.net
        net = copy.deepcopy(self.net)
        correction = 1 - self.ema_decay**self.ema_steps  # the average started from zero, as Adam's moments do
        with torch.no_grad():
            for kept, average in zip((*net.parameters(), flatten_statistics(net)), self.ema, strict=True):
                kept.copy_(average / correction)
        return net

    def state_dict(self) -> dict:
        """What `last.pth` keeps of the step besides the weights."""
        return {
            "optimizer": self.optimizer.state_dict()["state"],
            "ema": [t.cpu() for t in self.ema] if self.ema else None,
            "ema_steps": self.ema_steps,
            "ema_decay": self.ema_decay,
            "sums": self.sums.cpu(),
            "bad": self.bad.cpu(),
        }

    def load_state_dict(self, state: dict) -> None:
        groups = self.optimizer.state_dict()["param_groups"]  # rates are the schedule's, and the rest are constants
        self.optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        for p, kept in self.optimizer.state.items():  # the fused optimizers walk through memory, whatever the strides
            kept.update({k: torch.empty_like(p).copy_(v) for k, v in kept.items() if v.shape == p.shape})
        self.sums.copy_(state["sums"])
        self.bad.copy_(state["bad"])
        if self.ema and (steps := state["ema_steps"]):  # else the average starts here
            self.ema_steps, decay = steps, state.get("ema_decay", self.ema_decay)
            for mine, theirs in zip(self.ema, state["ema"], strict=True):  # brought to what `averaged` divides by
                mine.copy_(theirs).mul_((1 - self.ema_decay**steps) / (1 - decay**steps))


def _runs_in_bf16(layer: nn.Module) -> bool:
    """Whether the fused kernels take the layer's weight in bf16: 3x3 convolutions, and Mamba's projections."""
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3))


def _outputs(bits: int) -> str:
    names = [f"d{i}" for i in range(OUTPUTS) if bits >> i & 1]
    return ", ".join(names) or "the gradient"
