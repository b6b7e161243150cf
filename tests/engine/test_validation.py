"""The scores of the run equal hand-computed ones and the libraries'."""

import numpy as np
import pytest
import torch
from py_sod_metrics import MAE, Fmeasure
from torchmetrics.classification import BinaryJaccardIndex

from tests.engine.tiny import Net
from u2mamba.dataset.batches import Batch
from u2mamba.engine.validation import SODMetric, iou_per_image, validate
from u2mamba.runtime.errors import Stopped, StopSignal


def test_iou_of_an_empty_mask():
    nothing, something = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
    assert iou_per_image(nothing, nothing).item() == 1.0
    assert iou_per_image(something, nothing).item() == 0.0
    assert iou_per_image(nothing, something).item() == 0.0


def test_iou_is_the_mean_over_images_and_not_over_the_batch_of_pixels():
    torch.manual_seed(0)
    prediction, target = torch.rand(5, 1, 17, 13), (torch.rand(5, 1, 17, 13) > 0.3).float()
    library = BinaryJaccardIndex()
    expected = [library(p, t.int()).item() for p, t in zip(prediction, target, strict=True)]
    assert iou_per_image(prediction, target).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.filterwarnings("ignore:This class will be removed")
def test_validation_equals_pysodmetrics():
    """MAE and maxF (mean precision and recall over the images, then the best F) as PySODMetrics computes them."""
    rng = np.random.default_rng(1)
    predictions = [rng.random((24, 31)).astype(np.float32) for _ in range(7)]
    masks = [rng.random((24, 31)) > q for q in (0.2, 0.5, 0.8, 0.9, 0.5, 0.99, 0.4)]
    predictions = [0.6 * p + 0.35 * m for p, m in zip(predictions, masks, strict=True)]
    mae, fmeasure = MAE(), Fmeasure(beta=0.3)
    ours = SODMetric()
    for p, m in zip(predictions, masks, strict=True):
        mae.step(p, m, normalize=False)
        fmeasure.step(p, m, normalize=False)
    for part in (slice(0, 3), slice(3, 7)):  # in two batches
        stack = [torch.from_numpy(np.stack(x[part]).astype(np.float32))[:, None] for x in (predictions, masks)]
        ours.update(*stack)
    result = ours.compute()
    precision, recall = (fmeasure.get_results()["pr"][k] for k in ("p", "r"))
    best = (1.3 * precision * recall / np.maximum(0.3 * precision + recall, 1e-12)).max()
    assert result["MAE"] == pytest.approx(mae.get_results()["mae"], abs=1e-6)
    assert result["maxF"] == pytest.approx(best, abs=1e-6)


def one_batch():
    return Batch(torch.randn(2, 3, 8, 8), torch.ones(2, 1, 8, 8), torch.zeros(2, 4), 0.0)


def test_validation_leaves_modes_statistics_and_random_numbers_as_they_were():
    net, batch, random = Net().train(), one_batch(), torch.get_rng_state()
    net.bn.eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert set(validate(net, [batch], StopSignal())) == {"IoU", "MAE", "maxF"}
    assert net.training and net.conv.training and not net.bn.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_validation_of_no_images_has_no_scores_and_one_cut_short_does_not_count():
    assert validate(Net(), [], StopSignal()) == {}
    stop = StopSignal()
    stop.exit_code = 143
    with pytest.raises(Stopped):
        validate(Net(), [one_batch()], stop)
