"""Validation on the held-out pairs, and the pictures of it."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from u2mamba.dataset.augment import MEAN, STD
from u2mamba.dataset.batches import Batch
from u2mamba.engine.distributed import DistContext
from u2mamba.engine.metrics import ValidationMetrics
from u2mamba.runtime.environment import HeapRetention, cudnn_benchmark_disabled, out_of_memory
from u2mamba.runtime.errors import StopSignal, UserError


@cudnn_benchmark_disabled()
@torch.no_grad()
def validate(
    net: nn.Module,
    batches: Iterable[Batch],
    stop: StopSignal,
    world: DistContext = DistContext(),  # noqa: B008 - immutable
) -> dict[str, float] | None:
    """{"IoU", "MAE", "maxF"} of d0 over the `batches` of all processes; None where there are none, or when `stop`
    became true in between. Raises UserError naming a batch size to try when the memory does not suffice."""
    net.eval()
    device = next(net.parameters()).device
    metrics, memory = ValidationMetrics(device), HeapRetention(device)
    for batch in batches:
        if stop:
            break
        try:
            with memory:
                d0 = net(batch.x)[0]
            metrics.update(d0, batch.y)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            size, less = len(batch.x), max(len(batch.x) // 2, 1)
            raise UserError(
                f"validation: a batch of {size} does not fit into memory: try batch_size_val = {less}"
            ) from None
    if world.all_reduce_max(stop.exit_code):
        return None
    metrics.gather(world)
    return metrics.result() if metrics.images else None


@cudnn_benchmark_disabled()
@torch.no_grad()
def preview(net: nn.Module, images: Tensor, masks: Tensor) -> Tensor:
    """A sheet with a row for each pair, image | mask | d0: uint8 (3, H, W). images, masks: as the loop gives them."""
    from torchvision.utils import make_grid  # here, since it takes more than a second of every start

    net.eval()
    d0 = net(images)[0].float().cpu()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    photographs = (images.float().cpu() * std + mean).clamp(0, 1)
    columns = [photographs, masks.float().cpu().expand(-1, 3, -1, -1), d0.expand(-1, 3, -1, -1)]
    tiles = torch.stack(columns, 1).flatten(0, 1)
    return (make_grid(tiles, nrow=3, padding=4, pad_value=1.0) * 255).round().to(torch.uint8)
