import torch
from torch import Tensor, nn

from u2mamba.engine.distributed import DistContext

ALIGNMENT = 64


class MeanOfAll:
    """The mean over the processes of all gradients and of some more tensors, by one all-reduce.

    more: examples of those tensors, of the parameters' device. All gradients live in one tensor, as views of the
    parameters' own strides, which is what the fused optimizers and the all-reduce want.
    """

    def __init__(self, world: DistContext, parameters: list[nn.Parameter], *more: Tensor):
        self.world, self.parameters = world, parameters
        if world.size == 1:
            return
        like = [*parameters, *more]
        room = [-(-t.numel() // ALIGNMENT) * ALIGNMENT for t in like]
        self._flat = torch.zeros(sum(room), dtype=parameters[0].dtype, device=parameters[0].device)
        parts = zip(self._flat.split(room), like, strict=True)
        views = [part.as_strided(t.shape, t.stride(), part.storage_offset()) for part, t in parts]
        self._places = dict(zip(parameters, views, strict=False))
        self._more = views[len(parameters) :]

    def empty_gradient(self, parameter: nn.Parameter) -> Tensor:
        """Where to write a gradient so that it need not be copied."""
        return self._places[parameter] if self.world.size > 1 else torch.empty_like(parameter)

    @torch.no_grad()
    def __call__(self, *more: Tensor) -> None:
        """Replaces every parameter's gradient, and `more`, by the mean."""
        if self.world.size == 1:
            return
        used = [p for p in self.parameters if p.grad is not None]
        elsewhere = [p for p in used if p.grad is not self._places[p]]
        torch._foreach_copy_(
            [*(self._places[p] for p in elsewhere), *self._more], [*(p.grad for p in elsewhere), *more]
        )
        self.world.mean(self._flat)
        for p in used:
            p.grad = self._places[p]
        torch._foreach_copy_(list(more), self._more)
