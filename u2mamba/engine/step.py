"""One training step: forward, loss, backward, clipping, optimizer, averaged weights, without waiting for the device.

A step whose loss or gradient is NaN or Inf leaves weights, optimizer and running statistics unchanged; it is counted,
and `TrainStep.read` reports it.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from model.u2net import as_list, saliency_map
from model.weights import uncompiled
from u2mamba.engine.distributed import DistContext
from u2mamba.engine.gradients import GradientAverager
from u2mamba.engine.parameters import flatten_statistics
from u2mamba.engine.validation import iou_per_image
from u2mamba.runtime.environment import Environment, HeapRetention, memory_in_use, out_of_memory
from u2mamba.runtime.errors import UserError

HISTORY = 64  # most recent steps that `RunningMeans.nonfinite` covers


@dataclass
class RunningMeans:
    """Means since the last `TrainStep.reset`, without skipped steps."""

    loss: float  # the trained scalar: the sum over d0, d1, ...
    losses: list[float]  # as the loss returned them: one value, one per output, or its "tar"
    iou: float  # mean over images
    steps: int
    nonfinite_steps: int  # skipped since the run began
    consecutive_nonfinite: int
    nonfinite: dict[int, str] = field(default_factory=dict)  # age of a step, 0 the newest -> what was NaN or Inf
    memory: float = 0.0  # GiB in use

    @property
    def tar(self) -> float:
        """U-2-Net's name for the loss of d0."""
        return self.losses[0] if self.losses else math.nan


class TrainStep:
    """Trains `net` on one batch per call; each module keeps its train or eval mode.

    loss: (logits d0, d1, ..., masks) -> a number, one value per output (their sum is trained), or, as in U-2-Net,
    (tar, loss): the second is trained, the first is printed. dist: the processes that train together, each with a batch
    of the same size; running statistics are averaged. grad_clip: maximum norm; ema_decay: per step; 0 turns either off.
    grad_accum_steps: micro-batches per batch; batch norm sees one at a time.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[tuple[Tensor, ...], Tensor], Any],
        env: Environment,
        dist: DistContext = DistContext(),  # noqa: B008 - immutable
        *,
        grad_clip: float = 0.0,
        ema_decay: float = 0.0,
        grad_accum_steps: int = 1,
    ):
        self.net, self.optimizer, self.loss, self.env, self.dist = net, optimizer, loss, env, dist
        self.grad_clip, self.ema_decay, self.grad_accum_steps = grad_clip, ema_decay, grad_accum_steps
        self.device = env.device
        self.heap = HeapRetention(env.device)
        self.ema: dict[str, Tensor] = {}
        self.ema_steps = 0
        self.nonfinite = torch.zeros(2, device=env.device)  # steps; steps in a row
        self.sums, self.history = torch.zeros(0), torch.zeros(0, 0)  # the first step creates them, as the loss requires
        self._modules, self._parameters = list(net.modules()), dict(uncompiled(net).named_parameters())
        self._setup = None

    def __call__(self, images: Tensor, masks: Tensor) -> None:
        """images: (B, C, H, W) normalized, masks: (B, 1, H, W) in [0, 1], both on the step's device.

        Raises UserError if memory runs out, with a batch size to try, and for an unsupported result of the loss.
        """
        groups = [len(group["params"]) for group in self.optimizer.param_groups]
        flags = [p.requires_grad for p in self._parameters.values()], [m.training for m in self._modules]
        if (setup := (flags, groups, self.loss)) != self._setup:
            self._setup = setup
            self._set_up()
        try:
            self._run(images, masks)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            parts, half = 2 * self.grad_accum_steps, max(len(images) // 2, 1)
            advice = f"grad_accum_steps = {parts} or " * (parts <= len(images)) + f"batch_size_train = {half}"
            problem = f"a batch of {len(images)} does not fit into the memory of {self.device}"
            raise UserError(f"{problem}: try {advice}") from None
        self.ema_steps += bool(self.ema)

    def _set_up(self) -> None:
        """Collects the trained parameters: at the first step, and after `requires_grad`, a mode or the loss changed."""
        self.net.zero_grad()  # also of parameters that are now frozen
        trained = {name: p for name, p in self._parameters.items() if p.requires_grad}
        self.statistics, views = flatten_statistics(uncompiled(self.net))
        self.averager = GradientAverager(self.dist, list(trained.values()))
        self.averaged = trained | views  # averages start from zero, as Adam's moments do
        if self.ema_decay:
            start = 1 - self.ema_decay**self.ema_steps
            self.ema = {
                name: torch.empty_like(t).copy_(self.ema[name]) if name in self.ema else t.detach() * start
                for name, t in self.averaged.items()
            }

    def _run(self, images: Tensor, masks: Tensor) -> None:
        with self.heap:
            self._step(images, masks)

    def _step(self, images: Tensor, masks: Tensor) -> None:
        statistics = self.statistics.clone()
        # to None, not to zero: autograd then moves its tensors, where accumulating would cost one kernel each
        self.net.zero_grad()
        self.optimizer.zero_grad()  # also for parameters outside the network
        batches = zip(images.chunk(self.grad_accum_steps), masks.chunk(self.grad_accum_steps), strict=True)
        parts = [self._backward(x, y, len(y) / len(masks)) for x, y in batches]
        values = torch.stack(parts).sum(0)  # IoU, loss, losses
        gradient = self.averager(self.statistics, values)  # from here on every process computes the same
        norm = torch.linalg.vector_norm(gradient)
        if self.grad_clip:
            # NaN becomes 1: it would persist in the padding between the gradients
            gradient.mul_((self.grad_clip / (norm + 1e-6)).clamp(max=1.0).nan_to_num(1.0))
        nonfinite = ~torch.isfinite(torch.cat((values[1:], norm.float().view(1))))
        finite = ~nonfinite.any()
        if self.optimizer.defaults.get("fused"):
            self.optimizer.found_inf = (~finite).float()  # makes fused optimizers skip the update
            self.optimizer.step()
        elif finite:
            self.optimizer.step()
        self.statistics.copy_(torch.where(finite, self.statistics, statistics))
        self._count(finite, nonfinite, values, len(masks))
        if self.ema:
            with torch.no_grad():
                torch._foreach_lerp_([*self.ema.values()], [*self.averaged.values()], 1 - self.ema_decay)

    def _backward(self, images: Tensor, masks: Tensor, share: float) -> Tensor:
        """Adds the gradients of a micro-batch -> the sum of its images' IoU, and its share of the losses: (2 + n)."""
        with self.env.autocast():
            logits = self.net(images, logits=True)
        loss, values = self.compute_loss(logits, masks)
        (loss * share).backward()
        maps = saliency_map(as_list(logits)[0].detach().float())
        iou = iou_per_image(maps, masks).sum() if maps.shape == masks.shape else torch.full_like(loss, math.nan)
        return torch.cat((iou.view(1).float(), torch.cat((loss.view(1), values)).detach().float() * share))

    def compute_loss(self, logits: tuple[Tensor, ...], masks: Tensor) -> tuple[Tensor, Tensor]:
        """The loss to train, a scalar, and the values to print (n)."""
        result = self.loss(logits, masks)
        pair = isinstance(result, (tuple, list)) and len(result) == 2
        loss, values = (result[1], result[0]) if pair else (result, result)
        if pair and isinstance(values, (int, float)) and isinstance(loss, Tensor):
            values = torch.full_like(loss, values)
        if all(isinstance(v, Tensor) and v.ndim <= 1 and v.numel() for v in (loss, values)) and loss.requires_grad:
            return loss.sum(), values.detach().to(loss.dtype).view(-1)
        name = getattr(getattr(self.loss, "func", self.loss), "__name__", type(self.loss).__name__)
        kind = f"a tensor {tuple(result.shape)}" if isinstance(result, Tensor) else f"a {type(result).__name__}"
        kind += "" if getattr(loss, "requires_grad", True) else " without a gradient"
        wanted = "it must return a number, a tensor with one value per output, or (tar, loss)"
        raise UserError(f"the loss {name} returned {kind}: {wanted}")

    @torch.no_grad()
    def _count(self, finite: Tensor, nonfinite: Tensor, values: Tensor, images: int) -> None:
        counts = torch.cat((torch.ones_like(values[:1]), torch.full_like(values[:1], images), values))
        if self.sums.shape != counts.shape:  # the first step, or another loss
            self.sums = torch.zeros_like(counts)
        if self.history.shape[1] != len(nonfinite):
            self.history = nonfinite.new_zeros(HISTORY, len(nonfinite))
        self.sums += torch.where(finite, counts, 0.0)
        self.nonfinite += torch.where(finite, 0.0, 1.0)
        self.nonfinite[1] *= torch.where(finite, 0.0, 1.0)
        self.history.copy_(torch.cat((nonfinite[None], self.history[:-1])))

    def read(self) -> RunningMeans:
        """The means so far. The only call that waits for the device."""
        steps, images, iou, *losses = self.sums.tolist() or [0.0] * 4
        loss, *losses = [v / steps if steps else math.nan for v in losses]
        iou = iou / images if images else math.nan
        skipped = [int(v) for v in self.nonfinite.tolist()]
        nonfinite = {}
        for age, row in enumerate(self.history.tolist()):
            if any(row):  # loss, losses, gradient norm
                outputs = [f"d{i}" for i, bad in enumerate(row[1:-1]) if bad and len(row) > 3]
                nonfinite[age] = ", ".join(outputs) or ("the loss" if row[0] else "the gradient")
        return RunningMeans(loss, losses, iou, int(steps), *skipped, nonfinite, memory_in_use(self.device))

    def reset(self) -> None:
        self.sums.zero_()

    def set_learning_rate(self, value: float) -> None:
        """For all parameter groups; an optional key `lr_scale` of a group multiplies it."""
        for group in self.optimizer.param_groups:
            group["lr"] = value * group.get("lr_scale", 1.0)

    def ema_model(self) -> nn.Module:
        """The network to validate and save: a copy with the averaged weights if there are any, else `net`."""
        if not self.ema_steps:
            return self.net
        net = copy.deepcopy(self.net)
        tensors, correction = uncompiled(net).state_dict(), 1 - self.ema_decay**self.ema_steps
        with torch.no_grad():
            for name, average in self.ema.items():
                tensors[name].copy_(average / correction)
        return net

    def state_dict(self) -> dict[str, Any]:
        """The state that `last.pth` stores, without the weights."""
        return {
            "optimizer": self.optimizer.state_dict()["state"],
            "ema": {name: average.cpu() for name, average in self.ema.items()},
            "ema_steps": self.ema_steps,
            "ema_decay": self.ema_decay,
            "sums": self.sums.cpu(),
            "nonfinite": self.nonfinite.cpu(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # not restored: learning rates come from the schedule, the rest from the settings
        groups = self.optimizer.state_dict()["param_groups"]
        shapes = dict(enumerate(p.shape for group in self.optimizer.param_groups for p in group["params"]))
        saved, names = state["optimizer"], _names_of_moments(self.optimizer)
        if all(
            moments.keys() == names and all(not v.ndim or v.shape == shapes.get(i) for v in moments.values())
            for i, moments in saved.items()
        ):
            self.optimizer.load_state_dict({"state": saved, "param_groups": groups})
            for p, moments in self.optimizer.state.items():  # in p's layout: fused optimizers ignore strides
                moments.update({k: torch.empty_like(p).copy_(v) for k, v in moments.items() if v.shape == p.shape})
        else:
            print("warning: the optimizer or its parameter groups changed: its moments start from zero")
        self.sums = state["sums"].to(self.device)
        self.nonfinite.copy_(state["nonfinite"])
        if self.ema_decay and state["ema_steps"]:
            self.ema_steps = state["ema_steps"]
            factor = (1 - self.ema_decay**self.ema_steps) / (1 - state["ema_decay"] ** self.ema_steps)
            self.ema = {name: average.to(self.device) * factor for name, average in state["ema"].items()}
            self._setup = None  # the next step matches them to the network's tensors


def _names_of_moments(optimizer: torch.optim.Optimizer) -> Collection[str]:
    """Names of the optimizer's state per parameter, found by a step of a copy."""
    copied, group = copy.copy(optimizer), next(group for group in optimizer.param_groups if group["params"])
    p = torch.zeros_like(group["params"][0], requires_grad=True)
    p.grad = torch.zeros_like(p)
    copied.state, copied.param_groups = defaultdict(dict), [group | {"params": [p]}]
    copied.step()
    return copied.state[p].keys()
