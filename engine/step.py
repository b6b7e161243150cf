"""One training step: forward, loss, backward, clipping, optimizer, averaged weights, without a synchronisation.

A step with a loss or gradient that is not finite changes nothing: not the weights, not the optimizer, not the batch norm
statistics; it is counted, and `TrainStep.read` tells.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.metrics import iou_per_image

OUTPUTS = 7  # d0..d6


@dataclass
class Means:
    """Running means since the last `TrainStep.reset`, over the steps that were finite."""

    loss: float  # sum over d0..d6
    losses: list[float]  # of d0, ..., d6; the first is the published code's "tar"
    iou: float  # mean over images
    steps: int
    bad_steps: int  # steps left out since the run began
    bad_in_a_row: int


class TrainStep:
    """Calling it trains `net` by one batch.

    loss: (logits d0..d6, masks) -> (7,) losses. precision: "fp32", or "bf16" for autocast with fp32 weights.
    clip: largest gradient norm, 0 for none. ema_decay: decay of the averaged weights per step, 0 for none.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[tuple[Tensor, ...], Tensor], Tensor],
        device: torch.device,
        precision: str = "fp32",
        clip: float = 0.0,
        ema_decay: float = 0.0,
    ):
        self.net, self.optimizer, self.loss, self.device = net, optimizer, loss, device
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
        self.clip = clip or math.inf
        self.parameters = [p for p in net.parameters() if p.requires_grad]
        self.statistics = _flatten_statistics(net)
        self.ema_decay, self.ema = ema_decay, None
        if ema_decay:
            self.ema = [torch.zeros_like(t) for t in (*self.parameters, self.statistics)]
        # sums over the steps since `reset`: steps, images, IoU, losses of d0..d6; then bad steps, bad steps in a row
        self.sums = torch.zeros(3 + OUTPUTS, device=device)
        self.bad = torch.zeros(2, device=device)
        self.ema_steps = 0

    def __call__(self, images: Tensor, masks: Tensor) -> None:
        """images: (B, 3, H, W) normalised, masks: (B, 1, H, W) in [0, 1], both on the step's device."""
        statistics = self.statistics.clone()
        self.net.train()
        with self.autocast:
            logits = self.net(images, logits=True)
        losses = self.loss(logits, masks)
        self.optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip, error_if_nonfinite=False)
        ok = torch.isfinite(norm) & torch.isfinite(losses.detach().sum())
        self.optimizer.found_inf = (~ok).float()  # read by the fused optimizers: they then change nothing
        self.optimizer.step()
        self.statistics.copy_(torch.where(ok, self.statistics, statistics))
        self._count(ok, logits[0].detach(), masks, losses.detach())
        if self.ema:
            torch._foreach_lerp_(self.ema, [*self.parameters, self.statistics], 1 - self.ema_decay)
            self.ema_steps += 1

    @torch.no_grad()
    def _count(self, ok: Tensor, d0: Tensor, masks: Tensor, losses: Tensor) -> None:
        iou = iou_per_image(torch.sigmoid(d0.float()), masks).sum()
        images = torch.full_like(iou, len(masks))
        seen = torch.cat((torch.stack((torch.ones_like(iou), images, iou)), losses.float()))
        self.sums += torch.where(ok, seen, 0.0)
        self.bad += torch.where(ok, 0.0, 1.0)
        self.bad[1] *= torch.where(ok, 0.0, 1.0)

    def read(self) -> Means:
        """The means so far; waits for the device (the only place that does)."""
        steps, images, iou, *losses = self.sums.tolist()
        bad, bad_in_a_row = self.bad.tolist()
        losses = [v / steps if steps else math.nan for v in losses]
        return Means(sum(losses), losses, iou / images if images else math.nan, int(steps), int(bad), int(bad_in_a_row))

    def reset(self) -> None:
        self.sums.zero_()

    @property
    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = value

    def averaged(self) -> nn.Module:
        """The network to validate and to keep: with the averaged weights where there are any, else the one trained."""
        if not self.ema_steps:
            return self.net
        net = copy.deepcopy(self.net)
        correction = 1 - self.ema_decay**self.ema_steps  # the average started from zero, as Adam's moments do
        with torch.no_grad():
            for p, average in zip(net.parameters(), self.ema[:-1], strict=True):
                p.copy_(average / correction)
            _flatten_statistics(net).copy_(self.ema[-1] / correction)
        return net

    def state_dict(self) -> dict:
        """What `last.pth` keeps of the step besides the weights."""
        optimizer = self.optimizer.state_dict()
        ema = [t.cpu() for t in self.ema] if self.ema else None
        return {"optimizer": optimizer, "ema": ema, "ema_steps": self.ema_steps, "sums": self.sums.cpu(), "bad": self.bad.cpu()}

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.sums.copy_(state["sums"])
        self.bad.copy_(state["bad"])
        self.ema_steps = state["ema_steps"]
        for mine, theirs in zip(self.ema or [], state["ema"] or [], strict=True):
            mine.copy_(theirs)


def _flatten_statistics(net: nn.Module) -> Tensor:
    """All running means and variances of `net` as one tensor of which the buffers become views, to be kept or put back
    in one operation."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    flat = torch.cat([b.detach() for m in norms for b in (m.running_mean, m.running_var)])
    start = 0
    for m in norms:
        for name in ("running_mean", "running_var"):
            size = getattr(m, name).numel()
            setattr(m, name, flat[start : start + size])
            start += size
    return flat
