"""The figures that the run prints and validates by, on any device and without synchronising.

The metrics of the papers on test sets come from PySODMetrics. `ValidationMetrics` equals it (a test holds
them together) and exists because validation after every epoch has to stay on the GPU.
"""

import torch
from torch import Tensor

from u2mamba.engine.distributed import DistContext

BETA2 = 0.3  # weight of precision in the F-measure, Achanta et al. 2009, used by every SOD paper
LEVELS = 256  # thresholds


def iou_per_image(prediction: Tensor, target: Tensor) -> Tensor:
    """Jaccard index of each image, (B, ...) probabilities and masks -> (B,); both are cut at 0.5.

    An empty mask predicted empty counts 1, where torchmetrics' BinaryJaccardIndex answers 0; otherwise equal to it
    image by image. (torchmetrics' samplewise scores, which would do this in one call, fail for a batch of one.)
    """
    p, t = prediction.flatten(1) > 0.5, target.flatten(1) > 0.5
    union = (p | t).sum(1)
    return torch.where(union > 0, (p & t).sum(1) / union.clamp(min=1), 1.0)


class ValidationMetrics:
    """Mean IoU, MAE and max F-measure over a set of images.

    maxF: precision and recall at 256 thresholds, each averaged over the images, then the best F with beta² = 0.3 (the
    definition of U²-Net's paper and code). Predictions are cut to 256 levels as PySODMetrics does; not stretched.
    """

    def __init__(self, device: torch.device):
        self.images = 0
        self._sums = torch.zeros(2, device=device)  # IoU, MAE
        self._curves = torch.zeros(2, LEVELS, device=device)  # precision, recall

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """prediction: (B, 1, H, W) probabilities; target: (B, 1, H, W) in [0, 1]."""
        b = prediction.shape[0]
        prediction = prediction.float().reshape(b, -1)
        target = target.float().reshape(b, -1)
        truth = target > 0.5
        self._sums += torch.stack(
            (iou_per_image(prediction, target).sum(), (prediction - truth.float()).abs().mean(1).sum())
        )
        level = (prediction * (LEVELS - 1)).long().clamp_(0, LEVELS - 1)
        hist = torch.zeros(b, 2 * LEVELS, device=prediction.device)
        hist.scatter_add_(1, level + LEVELS * truth.long(), torch.ones_like(prediction))
        # pixels at or above each threshold, the highest first
        negative, positive = hist.view(b, 2, LEVELS).flip(-1).cumsum(-1).unbind(1)
        precision = positive / (positive + negative).clamp(min=1)
        recall = positive / truth.sum(1, keepdim=True).clamp(min=1)
        self._curves += torch.stack((precision.sum(0), recall.sum(0)))
        self.images += b

    def gather(self, world: DistContext) -> None:
        """Adds up what the processes have seen, each its own images."""
        self.images = int(world.sum(torch.tensor(self.images)))
        world.sum(self._sums)
        world.sum(self._curves)

    def result(self) -> dict[str, float]:
        """{"IoU", "MAE", "maxF"}; raises ZeroDivisionError when no image was seen."""
        iou, mae = (self._sums / self.images).tolist()
        precision, recall = self._curves / self.images
        f = (1 + BETA2) * precision * recall / (BETA2 * precision + recall).clamp(min=1e-12)
        return {"IoU": iou, "MAE": mae, "maxF": f.max().item()}
