"""One training step: forward, loss, backward, clipping, optimizer, averaged weights, without waiting for the device.

A step with a loss or gradient that is not finite changes nothing: not the weights, not the optimizer, not the running
statistics; it is counted, and `TrainStep.read` names it. (Averages move towards the unchanged weights.)
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from model.u2net import saliency_map
from model.weights import uncompiled
from u2mamba.engine.distributed import DistContext
from u2mamba.engine.gradients import GradientAverager
from u2mamba.engine.parameters import flatten_statistics
from u2mamba.engine.validation import iou_per_image
from u2mamba.runtime.environment import Environment, HeapRetention, memory_in_use, out_of_memory
from u2mamba.runtime.errors import UserError

HISTORY = 64  # steps of which it is known what was not finite


@dataclass
class RunningMeans:
    """Means since the last `TrainStep.reset`, over the steps that were finite."""

    loss: float  # what was trained: the sum over d0, d1, ...
    losses: list[float]  # what the loss returned: one value, one per output, or its "tar"
    iou: float  # mean over images
    steps: int
    nonfinite_steps: int  # skipped since the run began
    consecutive_nonfinite: int
    nonfinite: dict[int, str] = field(default_factory=dict)  # of the last steps, 0 the newest: what was not finite
    memory: float = 0.0  # GiB in use

    @property
    def tar(self) -> float:
        """U-2-Net's name for the loss of d0."""
        return self.losses[0] if self.losses else math.nan


class TrainStep:
    """Calling it trains `net`, in the modes that its modules are in, by one batch.

    loss: function (logits d0, d1, ..., masks) -> a number, one value per output (their sum is trained), or, as in
    U-2-Net, (tar, loss), of which the second is trained and the first printed.
    dist: the processes that train together, each with its own batch of the same size. Weights, averages and means stay
    the same in all; running statistics are the mean of theirs.
    grad_clip: largest gradient norm, 0: off. ema_decay: per step, of the averaged weights, 0: off. grad_accum_steps:
    micro-batches, whose gradients add up: the memory of one, and the step of the whole batch, but for batch norm.
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
        self.sums = self.history = None  # made by the first step: the loss decides how many values there are
        self._modules, self._parameters, self._setup = (
            list(net.modules()),
            dict(uncompiled(net).named_parameters()),
            None,
        )

    def __call__(self, images: Tensor, masks: Tensor) -> None:
        """images: (B, C, H, W) normalized, masks: (B, 1, H, W) in [0, 1], both on the step's device.

        Raises UserError that names a batch size to try when the memory does not suffice, or what the loss returned.
        """
        groups = [len(group["params"]) for group in self.optimizer.param_groups]
        flags = [p.requires_grad for p in self._parameters.values()], [m.training for m in self._modules]
        if self._setup != (flags, groups, self.loss):
            self._setup = (flags, groups, self.loss)
            self._set_up()
        try:
            self._run(images, masks)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            parts = 2 * self.grad_accum_steps
            advice = f"grad_accum_steps = {parts} or " if parts <= len(images) else ""
            raise UserError(
                f"a batch of {len(images)} does not fit into the memory of {self.device}: try {advice}"
                f"batch_size_train = {max(len(images) // 2, 1)}"
            ) from None
        self.ema_steps += bool(self.ema)

    def _set_up(self) -> None:
        """What is trained: at the first step, and where `requires_grad` or a module's mode has changed."""
        for parameter in self._parameters.values():
            parameter.grad = None
        trained = {name: p for name, p in self._parameters.items() if p.requires_grad}
        self.statistics, views = flatten_statistics(uncompiled(self.net))
        self.averager = GradientAverager(self.dist, list(trained.values()))
        self.averaged = trained | views  # their averages start from zero, as Adam's moments do
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
        self.optimizer.zero_grad()  # also of parameters that are not the network's
        self.averager.zero()
        parts = [self._backward(x, y, len(y) / len(masks)) for x, y in self._micro_batches(images, masks)]
        values = torch.stack(parts).sum(0)  # IoU, loss, losses
        gradient = self.averager(self.statistics, values)  # from here on every process computes the same
        norm = torch.linalg.vector_norm(gradient)
        if self.grad_clip:
            gradient.mul_((self.grad_clip / (norm + 1e-6)).clamp(max=1.0))
        nonfinite = ~torch.isfinite(torch.cat((values[1:], norm.float().view(1))))
        finite = ~nonfinite.any()
        if self.optimizer.defaults.get("fused"):
            self.optimizer.found_inf = (~finite).float()  # with which the fused optimizers change nothing
            self.optimizer.step()
        elif finite:
            self.optimizer.step()
        self.statistics.copy_(torch.where(finite, self.statistics, statistics))
        self._count(finite, nonfinite, values, len(masks))
        if self.ema:
            with torch.no_grad():
                torch._foreach_lerp_([*self.ema.values()], [*self.averaged.values()], 1 - self.ema_decay)

    def _micro_batches(self, images: Tensor, masks: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(images.chunk(self.grad_accum_steps), masks.chunk(self.grad_accum_steps), strict=True)

    def _backward(self, images: Tensor, masks: Tensor, share: float) -> Tensor:
        """Adds the gradients of a micro-batch -> the sum of its images' IoU, and its share of the losses: (2 + n)."""
        with self.env.autocast():
            logits = self.net(images, logits=True)
        loss, values = self.compute_loss(logits, masks)
        (loss * share).backward()
        d0 = (logits[0] if isinstance(logits, (tuple, list)) else logits).detach().float()
        maps = saliency_map(d0)
        iou = iou_per_image(maps, masks).sum() if maps.shape == masks.shape else torch.full_like(loss, math.nan)
        return torch.cat((iou.view(1).float(), torch.cat((loss.view(1), values)).detach().float() * share))

    def compute_loss(self, logits: tuple[Tensor, ...], masks: Tensor) -> tuple[Tensor, Tensor]:
        """The loss to train, a scalar, and the values to print (n)."""
        result = self.loss(logits, masks)
        pair = isinstance(result, (tuple, list)) and len(result) == 2
        loss, values = (result[1], result[0]) if pair else (result, result)
        if isinstance(values, (int, float)) and isinstance(loss, Tensor):
            values = torch.full_like(loss, values)
        if all(isinstance(v, Tensor) and v.ndim <= 1 and v.numel() for v in (loss, values)) and loss.requires_grad:
            return loss.sum(), values.detach().to(loss.dtype).view(-1)
        name = getattr(getattr(self.loss, "func", self.loss), "__name__", type(self.loss).__name__)
        kind = f"a tensor {tuple(result.shape)}" if isinstance(result, Tensor) else f"a {type(result).__name__}"
        kind += "" if getattr(loss, "requires_grad", True) else " without a gradient"
        raise UserError(
            f"the loss {name} returned {kind}: it must return a number, one value per output or (tar, loss)"
        )

    @torch.no_grad()
    def _count(self, finite: Tensor, nonfinite: Tensor, values: Tensor, images: int) -> None:
        if self.sums is None or len(self.sums) != 2 + len(values):
            self.sums = values.new_zeros(2 + len(values))  # steps, images, then as `values`
        if self.history is None or self.history.shape[1] != len(nonfinite):
            self.history = nonfinite.new_zeros(HISTORY, len(nonfinite))
        counts = torch.cat((torch.ones_like(values[:1]), torch.full_like(values[:1], images), values))
        self.sums += torch.where(finite, counts, 0.0)
        self.nonfinite += torch.where(finite, 0.0, 1.0)
        self.nonfinite[1] *= torch.where(finite, 0.0, 1.0)
        self.history.copy_(torch.cat((nonfinite[None], self.history[:-1])))

    def read(self) -> RunningMeans:
        """The means so far; waits for the device (the only place that does)."""
        steps, images, iou, loss, *losses = [0.0] * 4 if self.sums is None else self.sums.tolist()
        means = [v / steps if steps else math.nan for v in (loss, *losses)]
        skipped = [int(v) for v in self.nonfinite.tolist()]
        rows = [] if self.history is None else self.history.tolist()
        nonfinite = {steps_back: _describe(row) for steps_back, row in enumerate(rows) if any(row)}
        iou = iou / images if images else math.nan
        return RunningMeans(means[0], means[1:], iou, int(steps), *skipped, nonfinite, memory_in_use(self.device))

    def reset(self) -> None:
        if self.sums is not None:
            self.sums.zero_()

    def set_learning_rate(self, value: float) -> None:
        """Of all groups; `lr_scale`, a key that a group may have, multiplies its own."""
        for group in self.optimizer.param_groups:
            group["lr"] = value * group.get("lr_scale", 1.0)

    def ema_model(self) -> nn.Module:
        """The network to validate and to save: a copy with the averaged weights where there are any, else `net`."""
        if not self.ema_steps:
            return self.net
        net = copy.deepcopy(self.net)
        tensors, correction = uncompiled(net).state_dict(), 1 - self.ema_decay**self.ema_steps
        with torch.no_grad():
            for name, average in self.ema.items():
                tensors[name].copy_(average / correction)
        return net

    def state_dict(self) -> dict[str, Any]:
        """What `last.pth` holds of the step besides the weights."""
        return {
            "optimizer": self.optimizer.state_dict()["state"],
            "ema": {name: average.cpu() for name, average in self.ema.items()},
            "ema_steps": self.ema_steps,
            "ema_decay": self.ema_decay,
            "sums": None if self.sums is None else self.sums.cpu(),
            "nonfinite": self.nonfinite.cpu(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        groups = self.optimizer.state_dict()["param_groups"]  # rates are the schedule's, and the rest are settings
        self.optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        for p, moments in self.optimizer.state.items():  # fused optimizers walk through memory, whatever the strides
            moments.update({k: torch.empty_like(p).copy_(v) for k, v in moments.items() if v.shape == p.shape})
        if any(v.ndim and v.shape != p.shape for p, m in self.optimizer.state.items() for v in m.values()):
            print("warning: the optimizer's groups have changed: its moments start from zero")
            self.optimizer.state.clear()
        self.sums = None if state["sums"] is None else state["sums"].to(self.device)
        self.nonfinite.copy_(state["nonfinite"])
        if self.ema_decay and state["ema_steps"]:  # else the average starts here
            self.ema_steps = state["ema_steps"]
            factor = (1 - self.ema_decay**self.ema_steps) / (1 - state["ema_decay"] ** self.ema_steps)
            self.ema = {name: average.to(self.device) * factor for name, average in state["ema"].items()}
            self._setup = None  # the next step matches them with the network's tensors


def _describe(nonfinite: list[bool]) -> str:
    """What of (loss, losses..., gradient norm) was not finite."""
    loss, *losses, _ = nonfinite
    names = [f"d{i}" for i, bad in enumerate(losses) if bad] if len(losses) > 1 else []
    return ", ".join(names) or ("the loss" if loss else "the gradient")
