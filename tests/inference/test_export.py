"""u2mamba_export.py: ONNX Runtime's results equal PyTorch's, and rembg uses the files."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import u2mamba_export
from model import U2MAMBAP
from model.weights import cpu_state_dict
from u2mamba.dataset.augment import MEAN, STD, normalize
from u2mamba.dataset.decode import read_image
from u2mamba.dataset.demo import PHOTOGRAPHS
from u2mamba.dataset.rescale import rescale_image, rescale_mask
from u2mamba.inference.predictor import load_model
from u2mamba.runtime.errors import UserError
from u2mamba_export import Config, main

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

SIZE = 96  # pixels: up to 36 tokens, three chunks of the exported scan
REMBG = os.environ.get("REMBG_PYTHON", "")  # the Python of an environment with rembg

NAMES = ("astronaut", "chelsea", "coffee")


def photo(name: str) -> Image.Image:
    return Image.fromarray(read_image(PHOTOGRAPHS / f"{name}.png")).resize((90, 70))


def prepared(name: str) -> torch.Tensor:
    return normalize(torch.from_numpy(rescale_image(np.asarray(photo(name)), SIZE))[None])


@functools.cache
def network() -> torch.nn.Module:
    """As initialized, but batch norm has the photos' statistics: no layer is far from 1, as after training."""
    torch.manual_seed(0)
    net = U2MAMBAP()
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.momentum = 1.0
    with torch.no_grad():
        net(torch.cat([prepared(name) for name in NAMES]))
    return net.eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder with the checkpoint and the exported files, and what was printed."""
    folder = tmp_path_factory.mktemp("export")
    for kind in ("images", "masks"):
        (folder / kind).mkdir()
    for name in NAMES:
        image = photo(name)
        image.save(folder / "images" / f"{name}.png")
        image.convert("L").point(lambda v: 255 * (v > 128)).save(folder / "masks" / f"{name}.png")
    (folder / "images" / "broken.png").write_bytes(b"no image")
    (folder / "masks" / "broken.png").write_bytes(b"no image")
    torch.save(cpu_state_dict(network(), size=SIZE), folder / "net.pth")  # the training size, and that of the export
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        code = main(
            Config(
                checkpoint=str(folder / "net.pth"), out=str(folder / "out" / "net.onnx"),
                images=str(folder / "images"), gt=str(folder / "masks"), variants=("fp16", "int8"),
            )
        )  # fmt: skip
    assert code == 1  # because of the broken pair
    return folder, "\n".join(lines)


def run_onnx(path: Path, x: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"image": x})[0]


def test_the_file_is_one_and_plain(exported):
    folder, _ = exported
    assert sorted(p.name for p in (folder / "out").iterdir()) == ["net.onnx", "net_fp16.onnx", "net_int8.onnx"]
    model = onnx.load(folder / "out/net.onnx", load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
    assert {node.domain for node in model.graph.node} == {""}
    assert not {node.op_type for node in model.graph.node} & {"Scan", "Loop", "If", "BatchNormalization"}
    assert not any(t.HasField("data_location") and t.data_location for t in model.graph.initializer)
    shapes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {"image": ["N", 3, SIZE, SIZE], "d0": ["N", 1, SIZE, SIZE]}
    assert not any(n.doc_string for n in model.graph.node)  # no paths of this machine
    assert {p.key: p.value for p in model.metadata_props}["network"] == "U2MAMBAP"


def test_variants_and_the_printed_numbers(exported):
    folder, said = exported
    rows = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line.startswith("net")}
    assert list(rows) == ["net.onnx", "net_fp16.onnx", "net_int8.onnx"]
    x, masks = [prepared(name) for name in NAMES], []
    for name in NAMES:
        mask = np.asarray(Image.open(folder / "masks" / f"{name}.png"))
        masks.append(rescale_mask(mask, SIZE) / 255)
    with torch.no_grad():
        expected = network()(torch.cat(x))[0][:, 0].numpy()
    assert np.ptp(expected) > 0.2  # else the test says nothing
    one = run_onnx(folder / "out/net.onnx", x[0].numpy())  # batches of one and of three
    assert one.dtype == np.float32 and np.abs(one[0, 0] - expected[0]).max() <= 2e-5
    for name, (megabytes, mae, largest, mae_masks) in rows.items():
        path = folder / "out" / name
        saliency = run_onnx(path, torch.cat(x).numpy())[:, 0]
        difference = np.abs(saliency - expected)
        assert float(megabytes) == pytest.approx(path.stat().st_size / 1e6, abs=0.06)
        assert saliency.min() >= 0 and saliency.max() <= 1
        if name == "net.onnx":
            assert difference.max() <= 2e-5  # fp32, 60 layers: 1e-6 seen
        else:
            assert float(mae) == pytest.approx(difference.mean(), rel=0.06)
            assert float(largest) == pytest.approx(difference.max(), rel=0.06)
        assert float(mae_masks) == pytest.approx(np.abs(saliency - np.stack(masks)).mean(), abs=6e-5)
    assert float(rows["net.onnx"][1]) < 1e-6 < float(rows["net_fp16.onnx"][1]) < 0.01
    assert float(rows["net_int8.onnx"][1]) < 0.1
    half, bytes8 = (onnx.load(folder / "out" / f"net_{kind}.onnx") for kind in ("fp16", "int8"))
    types = {t.name: t.data_type for t in half.graph.initializer}
    for node in half.graph.node:  # Mamba layers stay in fp32, without casts to half and back between two nodes
        kinds = {types[name] for name in node.input if types.get(name) in (1, 10)}  # fp32, fp16
        if node.op_type == "Conv" or "/mamba" in node.name:
            assert kinds <= {1 if "/mamba" in node.name else 10}, node.name
    casts = {node.output[0]: node.input[0] for node in half.graph.node if node.op_type == "Cast"}
    assert len(casts) == 2 + 2 * 11 and not casts.keys() & set(casts.values())
    convolved = {n.input[1] for n in bytes8.graph.node if n.op_type == "Conv"}
    as_they_were = {name for name in convolved if "DequantizeLinear" not in name}
    assert len(convolved) == 130 and len(as_they_were) == 1 + 11  # the first and those of the Mamba layers
    assert re.search(r"maximum difference to PyTorch: \d\.\de-0[5-9]", said)


def test_a_file_that_computes_something_else_is_not_written(exported, tmp_path, monkeypatch):
    folder, _ = exported
    monkeypatch.setattr(u2mamba_export, "export", lambda net, path, *_: path.write_bytes(broken))
    model = onnx.load(folder / "out/net.onnx")
    last = next(n for n in model.graph.node if "d0" in n.output)
    assert last.op_type == "Sigmoid"
    last.op_type = "HardSigmoid"
    broken = model.SerializeToString()
    with pytest.raises(UserError, match=r"differs from PyTorch .* by \d\.\de-0[12], more than 1e-04; .* try another"):
        main(Config(checkpoint=str(folder / "net.pth"), out=str(tmp_path / "net.onnx"), size=SIZE))
    assert not list(tmp_path.iterdir())


def test_weights_files_of_fp32_and_of_int8(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnx", None)  # not needed
    source, out = str(exported[0] / "net.pth"), tmp_path / "out.pth"
    assert main(Config(checkpoint=source, out=str(out), variants=("int8",))) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("out")]
    assert [row[0] for row in rows] == ["out.pth", "out_int8.pth"]
    assert float(rows[0][3]) == 0 < float(rows[1][3]) < 0.2
    assert main(Config(checkpoint=str(tmp_path / "out_int8.pth"), out=str(tmp_path / "again.pth"))) == 0
    exact, rounded = (U2MAMBAP() for _ in range(2))
    exact.load_state_dict(torch.load(out, weights_only=True), strict=True)
    rounded.load_state_dict(torch.load(tmp_path / "again.pth", weights_only=True), strict=True)
    assert torch.equal(exact.side1.weight, network().side1.weight)
    assert 0 < (rounded.side1.weight - exact.side1.weight).abs().max() < 0.01 * exact.side1.weight.abs().max()
    assert load_model(tmp_path / "again.pth").settings["size"] == SIZE


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"out": "net.pt"}, "--out net.pt: must end in .onnx, or in .pth"),
        ({"out": "new.pth", "variants": ("fp16",)}, "--variants fp16: the only variant of a weights file"),
        ({"out": "net.pth/net.onnx"}, "cannot be written"),
        ({"checkpoint": "nowhere.pth"}, "there is no such checkpoint"),
        ({"gt": "masks"}, "--gt: also give the images of these masks"),
        ({"images": "out"}, "out: contains no image"),
        ({"images": "images", "gt": "nowhere"}, "nowhere: No such file or directory; set --gt"),
        ({"size": 20}, "size = 20: must be from 32"),
        ({"opset": 99}, "opset = 99: must be from 13 to 20"),
        ({"variants": ("int4",)}, "variants = ('int4',)"),
    ],
)
def test_unusable_input_is_one_line(more, says, exported, monkeypatch):
    monkeypatch.chdir(exported[0])
    with pytest.raises(UserError) as caught:
        main(Config(**{"checkpoint": "net.pth", "out": "new.onnx"} | more))
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not Path("new.onnx").exists()


def test_without_onnx_runtime(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-export\.txt"):
        main(Config())


REMBG_CODE = """
import sys
from PIL import Image
from rembg import new_session, remove
model, *images = sys.argv[1:]
session = new_session("u2net_custom", model_path=model)
for path in images:
    image = Image.open(path)
    session.predict(image)[0].save(path + ".map.png")
    remove(image, session=session).save(path + ".cut.png")
"""


@pytest.mark.skipif(not REMBG, reason="REMBG_PYTHON does not name the Python of an environment with rembg")
def test_rembg_uses_the_file_and_gives_our_maps(exported, tmp_path):
    images = []
    for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg"):  # a person, an animal, things
        images.append(tmp_path / f"{name[:-4]}.png")
        Image.fromarray(read_image(PHOTOGRAPHS / name)).save(images[-1])
    u2mamba_export.export(network(), tmp_path / "ours.onnx", 320, 17)
    words = [REMBG, "-c", REMBG_CODE, str(tmp_path / "ours.onnx"), *map(str, images)]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "U2NET_HOME")}
    done = subprocess.run(words, env=environment | {"REMBG_HOME": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for path in images:
        image, saliency = Image.open(path), np.asarray(Image.open(f"{path}.map.png"))
        x = np.asarray(image.convert("RGB").resize((320, 320), Image.Resampling.LANCZOS))  # as rembg 2 does, then
        x = torch.from_numpy(((x / x.max() - MEAN) / STD).transpose(2, 0, 1)[None]).float()
        with torch.no_grad():
            d0 = network()(x)[0][0, 0].numpy()
        d0 = Image.fromarray(((d0 - d0.min()) / np.ptp(d0) * 255).astype(np.uint8))  # its min-max normalization
        expected = np.asarray(d0.resize(image.size, Image.Resampling.LANCZOS))
        difference = np.abs(saliency.astype(int) - expected)
        assert np.ptp(expected) > 100 and difference.max() <= 2 and difference.mean() < 0.05  # 8 bits, truncated
        cut = np.asarray(Image.open(f"{path}.cut.png"))
        assert cut.shape == (*saliency.shape, 4) and np.array_equal(cut[..., 3], saliency)
