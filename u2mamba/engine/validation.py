"""Scores during training: the printed IoU, and IoU, MAE and max F-measure of the validation pairs. Preview images.

`SODMetric` equals PySODMetrics (inference/evaluation.py), which a test checks, and stays on the GPU.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_stat_scores

from model.u2net import as_list, saliency_map
from u2mamba.dataset.augment import MEAN, STD
from u2mamba.dataset.batches import Batch, Data, validation_batches
from u2mamba.engine.distributed import DistContext
from u2mamba.runtime.environment import HeapRetention, cudnn_benchmark_disabled
from u2mamba.runtime.errors import StopSignal

BETA2 = 0.3  # beta² of the F-measure (Achanta et al. 2009), as in all SOD papers
LEVELS = 256  # thresholds
VAL_BATCH = 12  # images


def iou_per_image(prediction: Tensor, mask: Tensor) -> Tensor:
    """Jaccard index of each image, (B, ...) probabilities and masks -> (B,); both are thresholded at 0.5.

    An empty mask predicted as empty counts 1. Does not wait for the device.
    """
    p, t = (prediction.flatten(1) > 0.5).byte(), (mask.flatten(1) > 0.5).byte()
    # per sample torchmetrics fails for a batch of one, where "global" is the same
    average = "samplewise" if len(p) > 1 else "global"
    counts = binary_stat_scores(p, t, multidim_average=average, validate_args=False).view(-1, 5)
    tp, fp, _, fn, _ = counts.unbind(1)
    union = tp + fp + fn
    return torch.where(union > 0, tp / union.clamp(min=1), 1.0)


class SODMetric(Metric):
    """Mean IoU, MAE and max F-measure over images; torchmetrics adds up the states of all processes.

    maxF: precision and recall at 256 thresholds, each averaged over the images, then the highest F with beta² = 0.3
    (the definition of U²-Net's paper and code). Saliency maps are quantized to 256 levels as in PySODMetrics, and not
    normalized. compute() -> {"IoU", "MAE", "maxF"}; an additional entry is printed and logged too.
    """

    def __init__(self) -> None:
        super().__init__()
        for name, shape in (("images", ()), ("iou", ()), ("mae", ()), ("precision", LEVELS), ("recall", LEVELS)):
            self.add_state(name, torch.zeros(shape), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, mask: Tensor) -> None:
        """prediction: (B, 1, H, W) probabilities; mask: (B, 1, H, W) in [0, 1]."""
        b = prediction.shape[0]
        prediction, mask = prediction.float().reshape(b, -1), mask.float().reshape(b, -1)
        truth = mask > 0.5
        self.iou += iou_per_image(prediction, mask).sum()
        self.mae += (prediction - truth.float()).abs().mean(1).sum()
        level = (prediction * (LEVELS - 1)).long().clamp_(0, LEVELS - 1)
        histogram = torch.zeros(b, 2 * LEVELS, device=prediction.device)
        histogram.scatter_add_(1, level + LEVELS * truth.long(), torch.ones_like(prediction))
        # pixels at or above each threshold, the highest threshold first
        negative, positive = histogram.view(b, 2, LEVELS).flip(-1).cumsum(-1).unbind(1)
        self.precision += (positive / (positive + negative).clamp(min=1)).sum(0)
        self.recall += (positive / truth.sum(1, keepdim=True).clamp(min=1)).sum(0)
        self.images += b

    def compute(self) -> dict[str, float]:
        precision, recall = self.precision / self.images, self.recall / self.images
        f = (1 + BETA2) * precision * recall / (BETA2 * precision + recall).clamp(min=1e-12)
        scores = {"IoU": self.iou / self.images, "MAE": self.mae / self.images, "maxF": f.max()}
        return {name: float(value) for name, value in scores.items()}


@contextlib.contextmanager
def eval_mode(net: nn.Module) -> Iterator[nn.Module]:
    """Inside the block `net` is in eval mode; afterwards each module returns to its own mode (a frozen one to eval)."""
    modes = {module: module.training for module in net.modules()}
    try:
        yield net.eval()
    finally:
        for module, training in modes.items():
            module.training = training


@cudnn_benchmark_disabled()
@torch.no_grad()
def validate(
    net: nn.Module,
    batches: Iterable[Batch],
    stop: StopSignal,
    dist: DistContext = DistContext(),  # noqa: B008 - immutable
) -> dict[str, float]:
    """The scores of d0 over the `batches` of all processes; {} if there are none.

    Raises Stopped in every process if one received a signal.
    """
    device = next(net.parameters()).device
    metric, memory = SODMetric().to(device), HeapRetention(device)
    with eval_mode(net):
        for batch in batches:
            if stop:
                break
            with memory:
                d0 = saliency_map(as_list(net(batch.x, logits=True))[0])
            metric.update(d0, batch.y)
    dist.raise_if_stopped(stop)
    return metric.compute() if dist.all_reduce_max(metric.update_count) else {}


def preview_batch(data: Data, channels_last: bool) -> Batch:
    """Up to six validation pairs, or training pairs if there are none."""
    source = data.val if len(data.val) else data.train
    return next(validation_batches(source, range(min(6, len(source))), channels_last=channels_last))


@cudnn_benchmark_disabled()
@torch.no_grad()
def preview(net: nn.Module, images: Tensor, masks: Tensor) -> Tensor:
    """A grid with one row per pair, image | mask | d0: uint8 (3, H, W). images, masks: a normalized batch."""
    from torchvision.utils import make_grid

    with eval_mode(net):
        d0 = saliency_map(as_list(net(images, logits=True))[0]).float().cpu()
    colors = 3 if len(MEAN) > 2 else 1
    mean, std = (torch.tensor(v[:colors]).view(1, -1, 1, 1) for v in (MEAN, STD))
    photos = (images[:, :colors].float().cpu() * std + mean).clamp(0, 1)
    columns = [photos.expand(-1, 3, -1, -1), masks.float().cpu().expand(-1, 3, -1, -1), d0.expand(-1, 3, -1, -1)]
    tiles = torch.stack(columns, 1).flatten(0, 1)
    return (make_grid(tiles, nrow=3, padding=4, pad_value=1.0) * 255).round().to(torch.uint8)
