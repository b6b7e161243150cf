"""u2mamba/inference/predictor.py: the prepared network computes what the network computes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from model import U2MAMBAP, U2NETP, build_model
from model.u2net import REBNCONV
from model.weights import cpu_state_dict
from tests.trained import trained
from u2mamba.dataset.augment import normalize
from u2mamba.dataset.rescale import rescale_image
from u2mamba.inference import Predictor, load_model
from u2mamba.inference.predictor import fold_batch_norm, input_size, weights_path

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(256, (2, 64, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 0.05)])  # bf16 has 8 bits: 2^-8 a layer
def test_predictor_gives_the_networks_d0(precision, tolerance, images):
    net = trained(U2MAMBAP())
    with torch.no_grad():
        expected = net(normalize(images))[0]
    d0 = Predictor(net, torch.device("cpu"), precision)(images)
    assert d0.shape == (2, 1, 64, 96) and d0.dtype == torch.float32
    assert (d0 - expected).abs().max() <= tolerance
    assert next(net.parameters()).dtype == torch.float32 and next(net.parameters()).requires_grad  # left as it was


def norm_last(block, x, residual=0):
    return block.bn_s1(block.conv_s1(x).relu()) + residual


def norm_first(block, x, residual=0):
    return block.conv_s1(block.bn_s1(x).relu()) + residual


@pytest.mark.parametrize("forward", [norm_last, norm_first])
def test_edited_blocks_are_predicted_as_they_were_trained(forward, images, monkeypatch):
    monkeypatch.setattr(REBNCONV, "forward", forward)
    net = U2NETP()
    net.side1 = torch.nn.Sequential(torch.nn.PReLU(), net.side1)
    for block in net.modules():
        if forward is norm_first and isinstance(block, REBNCONV):
            block.bn_s1 = torch.nn.BatchNorm2d(block.conv_s1.in_channels)
    expected = trained(net)(normalize(images))[0].detach()
    for precision, tolerance in (("fp32", 1e-5), ("bf16", 0.1)):
        assert (Predictor(net, torch.device("cpu"), precision)(images) - expected).abs().max() <= tolerance


def test_weights_of_unknown_size_and_of_several_outputs_are_said(tmp_path, capsys):
    torch.save(U2NETP(out_ch=4).state_dict(), tmp_path / "net.pth")
    assert input_size(load_model(tmp_path / "net.pth")) == 320
    said = capsys.readouterr().out
    assert "has 4 outputs" in said and "does not record its training size: using 320" in said
    torch.save(cpu_state_dict(build_model({"arch": "u2netp"}), size=96), tmp_path / "copy.pth")
    assert input_size(load_model(tmp_path / "copy.pth")) == 96 and not capsys.readouterr().out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="requires a CUDA GPU")
@torch.no_grad()
def test_the_graph_computes_what_the_network_does(images):
    net = trained(U2MAMBAP())
    predict, batches = Predictor(net, torch.device("cuda")), (images, images.flip(1))
    found = [predict(batch) for batch in batches]  # a later call does not write into an earlier result
    for batch, maps in zip(batches, found, strict=True):
        assert (maps.cpu() - net(normalize(batch))[0]).abs().max() <= 1e-4


def test_the_included_weights_find_the_cup_and_not_the_table():
    """On scikit-image's photo of a cup of coffee, which was not in their training data."""
    net = load_model()
    assert weights_path().stat().st_size < 6e6 and weights_path("large").stat().st_size <= 47e6
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in fold_batch_norm(net).modules())
    image = torch.from_numpy(rescale_image(skimage.data.coffee(), 320))
    d0 = Predictor(net, torch.device("cpu"))(image[None])[0, 0]
    assert d0[80:160, 130:190].mean() > 0.9  # the coffee
    assert max(d0[:40, :40].max(), d0[-40:, -40:].max(), d0[-40:, :40].max()) < 0.1  # corners of the table


def test_prediction_and_export_import_only_what_they_need():
    code = "import sys, u2mamba_predict\nassert 'skimage' not in sys.modules\n"
    code += "import u2mamba_export\nprint(set(sys.argv) & set(sys.modules))"
    names = ("torchmetrics", "torchvision", "matplotlib", "py_sod_metrics", "onnx")
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "set()\n", done.stderr


def test_a_file_and_an_array_give_a_map_of_their_size(tmp_path):
    photo = skimage.data.rocket()[:, :500]
    Image.fromarray(photo).save(tmp_path / "photo.png")
    predict = Predictor(load_model("small"))
    found, same = predict.saliency(tmp_path / "photo.png"), predict.saliency(photo)
    small = predict(torch.from_numpy(rescale_image(photo, 320))[None])
    expected = torch.nn.functional.interpolate(small, photo.shape[:2], mode="bilinear")[0, 0]
    assert np.array_equal(found, same) and np.abs(found - expected.numpy()).max() < 1e-4  # its weights are fp32
