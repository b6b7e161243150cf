"""u2mamba_eval.py: PySODMetrics' scores, its files, and bad input."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import py_sod_metrics as psm
import pytest
import skimage.data
import torch
from PIL import Image
from torch.nn import functional as F

from model import U2NETP
from tests.dataset.samples import make_set
from tests.forked import run_script
from u2mamba.dataset.decode import BadFile, read_map
from u2mamba.dataset.rescale import rescale_image
from u2mamba.inference.evaluation import METRICS, DatasetMetrics, Item, list_items, score_item, score_map
from u2mamba.inference.plots import GAP, LINE, TILE
from u2mamba.inference.predictor import Predictor, load_model
from u2mamba.runtime import workers
from u2mamba.runtime.errors import UserError
from u2mamba.runtime.workers import ordered_map
from u2mamba_eval import Config, main

SCRIPT = Path(__file__).parents[2] / "u2mamba_eval.py"
GOLDEN = Path(__file__).with_name("golden_scores.json")


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(array).save(path)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    return make_set(tmp_path_factory.mktemp("set"), 14, (72, 96), seed=3)


@pytest.fixture
def three(folders, tmp_path) -> tuple[Path, Path]:
    """A copy of three pairs, to be spoiled."""
    for kind, source in zip(("maps", "masks"), folders, strict=True):
        (tmp_path / kind).mkdir()
        for name in ("00000.png", "00001.png", "00002.png"):
            (tmp_path / kind / name).write_bytes((source / name).read_bytes())
    return tmp_path / "maps", tmp_path / "masks"


def evaluate_maps(folders: tuple[Path, Path], **more) -> int:
    """The exit code of the script on (maps, masks), in this process."""
    return main(Config(pred=(str(folders[0]),), gt=(str(folders[1]),), **more))


def scores_of(pred: Path, gt: Path) -> DatasetMetrics:
    scores = DatasetMetrics("set")
    for item in list_items(gt, pred)[0]:
        scores.add(item.stem, score_item(item))
    return scores


# ---------------------------------------------------------------------------------------------------- numbers


def test_golden_scores():
    """Scores of PySODMetrics 1.6.2 for maps and masks of integers: a later version that differs shows here."""
    y, x = np.mgrid[:60, :80]
    scores = DatasetMetrics("golden")
    for i in range(5):
        distance = (y - 20 - 5 * i) ** 2 + (x - 30 - 4 * i) ** 2
        saliency = np.clip(300 - distance // (i + 1) + (7 * x + 13 * y) % 64, 0, 255)
        scores.add(str(i), score_map(saliency / 255, distance < 150 + 40 * i))
    expected = json.loads(GOLDEN.read_text())
    assert list(scores.summary()) == ["name", "n", *METRICS]
    assert scores.summary() == {k: pytest.approx(v, abs=1e-9) for k, v in expected.items()}


def test_normalization_is_pysodmetrics_default(folders):
    mae, wf, em, scores = psm.MAE(), psm.WeightedFmeasure(), psm.Emeasure(), DatasetMetrics("halved")
    for path in sorted(folders[1].iterdir()):
        halved = np.asarray(Image.open(folders[0] / path.name)) // 2
        for metric in (mae, wf, em):
            metric.step(halved, np.array(Image.open(path)))
        scores.add(path.stem, score_item(Item(path.stem, None, path, halved / 255), normalize=True))
    got = scores.summary()
    assert got["mae"] == pytest.approx(mae.get_results()["mae"], abs=1e-9)
    assert got["wf"] == pytest.approx(wf.get_results()["wfm"], abs=1e-9)
    assert got["em_max"] == pytest.approx(em.get_results()["em"]["curve"].max(), abs=1e-9)


def test_scores_by_object_size(tmp_path, capsys):
    """Masks of 100 pixels. The map: 0.8 on the first 20 pixels, 0.2 elsewhere, and 0 in the image that is empty."""
    pixels = {"small": 5, "medium": 10, "medium2": 30, "large": 40, "empty": 0, "full": 100}
    saliency = np.where(np.arange(100) < 20, 0.8, 0.2)
    for name, n in pixels.items():
        save(tmp_path / "masks" / f"{name}.png", ((np.arange(100) < n) * 255).astype(np.uint8).reshape(10, 10))
        save(tmp_path / "maps" / f"{name}.npy", (saliency * (n > 0)).reshape(10, 10))
    more = {"json": str(tmp_path / "s.json"), "name": ("set",)}
    assert evaluate_maps((tmp_path / "maps", tmp_path / "masks"), **more) == 0
    (got,) = json.loads((tmp_path / "s.json").read_text())
    expected = {  # n, missed, extra, IoU
        "small": (1, 5 * 0.2, 15 * 0.8 + 80 * 0.2, 5 / 20),
        "medium": (2, (10 * 0.2 + 20 * 0.2 + 10 * 0.8) / 2, (10 * 0.8 + 150 * 0.2) / 2, (10 / 20 + 20 / 30) / 2),
        "large": (1, 20 * 0.2 + 20 * 0.8, 60 * 0.2, 20 / 40),
        "empty": (1, 0, 0, 1),
        "full": (1, 20 * 0.2 + 80 * 0.8, 0, 20 / 100),
    }
    for name, (n, missed, extra, iou) in expected.items():
        values = {"n": n, "mae": (missed + extra) / 100, "missed": missed / 100, "extra": extra / 100, "iou": iou}
        assert got["by_size"][name] == pytest.approx(values, abs=1e-12), name
    assert "large: over 30 %                     1  0.3200  0.2000  0.1200  0.5000" in capsys.readouterr().out
    (tmp_path / "masks" / "large.png").unlink()
    assert evaluate_maps((tmp_path / "maps", tmp_path / "masks"), **more) == 1
    nothing = {"n": 0} | dict.fromkeys(("mae", "missed", "extra", "iou"))
    assert json.loads((tmp_path / "s.json").read_text())[0]["by_size"]["large"] == nothing
    assert "over 30 %" not in capsys.readouterr().out


@pytest.mark.parametrize("level", [0.0, 0.25, 0.75])
def test_an_empty_mask(level):
    got = score_map(np.full((6, 9), level), np.zeros((6, 9), bool))
    assert got.size == "empty" and got.constant and not got.resized
    assert (got.mae, got.sm) == pytest.approx((level, 1 - level))
    assert got.wf == 0 and not any(curve.any() for curve in got.curves[:3])  # precision, recall, F
    assert got.iou == (1.0 if level <= 0.5 else 0.0)


def test_an_object_on_the_border_has_an_s_measure():
    """PySODMetrics answers NaN: three of the four quadrants around its center hold no pixel."""
    mask, saliency = np.zeros((30, 40), bool), np.full((30, 40), 0.3)
    mask[-1, -1], saliency[-1, -1] = True, 0.9
    direct = psm.Smeasure()
    expected = 0.5 * direct.object(saliency, mask) + 0.5 * direct.ssim(saliency, mask)
    assert score_map(saliency, mask).sm == pytest.approx(expected, abs=1e-12)
    with pytest.warns(RuntimeWarning):
        direct.step(saliency, mask, normalize=False)
    assert np.isnan(direct.get_results()["sm"])  # once it does not, our own ssim can go


# ---------------------------------------------------------------------------------------------- files of maps


@pytest.mark.parametrize(
    ("name", "array", "expected"),
    [
        ("a.png", np.array([[0, 51], [255, 128]], np.uint8), [[0, 0.2], [1, 128 / 255]]),
        ("a.png", np.array([[0, 13107], [65535, 1]], np.uint16), [[0, 0.2], [1, 1 / 65535]]),
        ("a.tif", np.array([[0, 0.2], [1, 0.5]], np.float32), [[0, 0.2], [1, 0.5]]),
        ("a.png", np.full((2, 2, 3), (0, 90, 255), np.uint8), "holds colors"),
        ("a.npy", np.array([[[[0, 0.2], [1, 0.5]]]], np.float32), [[0, 0.2], [1, 0.5]]),
        ("a.npy", np.array([[0, 51], [255, 128]], np.uint8), [[0, 0.2], [1, 128 / 255]]),
        ("a.npy", np.array([[0, 1 + 1e-7], [1, -1e-8]]), [[0, 1], [1, 0]]),
        ("a.npy", np.array([[0, np.nan]]), "holds NaN or infinite values"),
        ("a.npy", np.array([[0, 255.0]]), "holds values from 0 to 255"),
        ("a.npy", np.zeros((2, 3, 3)), "of shape (2, 3, 3)"),
        ("a.npy", np.zeros((3, 3), np.int64), "holds int64"),
        ("a.npy", np.zeros((0, 3)), "of shape (0, 3)"),
    ],
)
def test_maps_of_any_depth(name, array, expected, tmp_path):
    path = save(tmp_path / name, array)
    if isinstance(expected, str):
        with pytest.raises(BadFile, match=re.escape(expected)):
            read_map(path)
    else:
        assert read_map(path).dtype == np.float64
        assert read_map(path) == pytest.approx(np.array(expected), abs=1e-7 if array.dtype == np.float32 else 1e-12)


# -------------------------------------------------------------------------------------------------- the script


def test_two_sets_in_one_call(folders, tmp_path):
    """As a process: table, JSON, curves, scores per image, sheet. All threads compute exactly what one does."""
    again = make_set(tmp_path / "again", 3, (40, 50), seed=5)
    report = tmp_path / "new" / "report"
    words = ["--pred", folders[0], again[0], "--gt", folders[1], again[1], "--name", "first", "second"]
    done = run_script(SCRIPT, [*words, "--json", report / "s.json", "--out", report], tmp_path, tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    expected = [scores_of(*folders).summary() | {"name": "first"}, scores_of(*again).summary() | {"name": "second"}]
    sets = json.loads((report / "s.json").read_text())
    assert [list(row.pop("by_size")) for row in sets] == [["small", "medium", "large", "empty", "full"]] * 2
    assert sets == expected
    assert f"S-measure              {expected[0]['sm']:.4f}  {expected[1]['sm']:.4f}" in done.stdout
    assert {p.name for p in report.iterdir()} == {
        "s.json", "curves.png", "error_by_size.png",
        *(f"{name}_{what}" for name in ("first", "second") for what in ("images.csv", "worst.png")),
    }  # fmt: skip
    rows = list(csv.DictReader((report / "first_images.csv").read_text().splitlines()))
    assert [row["image"] for row in rows] == [f"{i:05}" for i in range(14)]
    assert np.mean([float(row["mae"]) for row in rows]) == pytest.approx(expected[0]["mae"])
    with Image.open(report / "first_worst.png") as sheet:  # two columns of mask | map
        assert sheet.size == (2 * (2 * (TILE[0] + GAP) + GAP), 7 * (TILE[1] + LINE + GAP) + GAP)


@pytest.fixture
def photos(tmp_path) -> tuple[str, str, str]:
    """Images of different sizes, masks of their bright parts, and a checkpoint."""
    for name in ("astronaut", "cat", "coffee"):
        image = getattr(skimage.data, name)()[::3, ::4]
        save(tmp_path / "images" / f"{name}.png", np.ascontiguousarray(image))
        save(tmp_path / "masks" / f"{name}.png", ((image.mean(-1) > 128) * 255).astype(np.uint8))
    torch.manual_seed(0)
    torch.save(U2NETP().state_dict(), tmp_path / "best.pth")
    return str(tmp_path / "images"), str(tmp_path / "masks"), str(tmp_path / "best.pth")


@pytest.mark.parametrize("tta", [False, True])
def test_a_checkpoint_is_scored_on_fp32_maps_at_the_masks_size(tta, photos, tmp_path, capsys):
    images, masks, checkpoint = photos
    cfg = Config(
        gt=(masks,), image=(images,), checkpoint=checkpoint, size=64, batch=2, device="cpu", tta=tta,
        json=str(tmp_path / "s.json"), out=str(tmp_path),
    )  # fmt: skip
    assert main(cfg) == 0
    out = capsys.readouterr().out
    assert "U2NETP" in out and ("flip test-time augmentation" in out) == tta
    predict, mae, sm = Predictor(load_model(checkpoint)), psm.MAE(), psm.Smeasure()
    for path in sorted(Path(masks).iterdir()):
        mask = np.asarray(Image.open(path)) > 128
        image = rescale_image(np.asarray(Image.open(Path(images, path.name))), 64)
        maps = [predict(torch.from_numpy(image)[None])]
        if tta:
            maps.append(predict(torch.from_numpy(image[:, ::-1].copy())[None]).flip(3))
        saliency = F.interpolate(sum(maps) / len(maps), mask.shape, mode="bilinear", align_corners=False)
        for metric in (mae, sm):
            metric.step(saliency[0, 0].double().numpy(), mask, normalize=False)
    (got,) = json.loads((tmp_path / "s.json").read_text())
    assert got["n"] == 3
    assert got["mae"] == pytest.approx(mae.get_results()["mae"], abs=1e-6)  # fp32, batches of another size
    assert got["sm"] == pytest.approx(sm.get_results()["sm"], abs=1e-6)
    with Image.open(tmp_path / f"{got['name']}_worst.png") as sheet:  # image | mask | map
        assert sheet.size[0] == 2 * (3 * (TILE[0] + GAP) + GAP)


# --------------------------------------------------------------------------------------------------- bad input


def test_files_that_cannot_be_used_are_named_and_the_exit_code_is_1(folders, tmp_path, capsys, monkeypatch):
    """Odd maps and masks are used, and named too; as many threads work as cores are granted."""
    maps, masks = (shutil.copytree(folder, tmp_path / folder.name) for folder in folders)
    save(maps / "00000.png", np.full((72, 96), 90, np.uint8))
    save(maps / "00001.png", np.asarray(Image.open(maps / "00001.png").resize((48, 48))))
    save(masks / "00002.png", np.zeros((72, 96), np.uint8))
    cfg = Config(pred=(str(maps),), gt=(str(masks),), json=str(tmp_path / "s.json"))
    assert main(cfg) == 0
    (maps / "00003.png").unlink()
    (masks / "00004.png").unlink()
    for bad in (maps / "00005.png", masks / "00006.png"):
        bad.write_bytes(b"not an image")
    pools = []
    monkeypatch.setattr("u2mamba_eval.granted_cores", lambda: 3)
    monkeypatch.setattr(workers, "ThreadPoolExecutor", lambda n: pools.append(n) or ThreadPoolExecutor(n))
    assert main(cfg) == 1 and pools == [3, 3]
    out = capsys.readouterr().out
    for line in (
        "warning: skipped 1 maps without a mask: 00004.png",
        "warning: skipped 1 masks without a map: 00003.png",
        f"2 skipped files that cannot be used: {maps / '00005.png'}: not an image",
        "1 maps that were resized to the size of their mask: 00001",
        "1 constant maps (used): 00000",
        "1 masks without an object (used): 00002",
    ):
        assert line in out
    (row,) = json.loads((tmp_path / "s.json").read_text())
    assert row["n"] == 10 and all(np.isfinite(row[key]) for key in METRICS)


def test_images_that_cannot_be_used_with_a_checkpoint(photos, capsys):
    images, masks, checkpoint = photos
    Path(images, "cat.png").write_bytes(b"not an image")
    save(Path(masks, "coffee.png"), np.zeros((40, 40), np.uint8))  # another shape than its image
    cfg = Config(gt=(masks,), image=(images,), checkpoint=checkpoint, size=32, device="cpu")
    assert main(cfg) == 1
    out = capsys.readouterr().out
    assert "2 skipped files that cannot be used: " in out and "cat.png: not an image" in out
    assert "coffee.png: mask is 40x40" in out
    save(Path(masks, "astronaut.png"), np.zeros((40, 40), np.uint8))
    with pytest.raises(UserError, match=r"no image could be evaluated; .*png: "):
        main(cfg)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"pred": ()}, "either --checkpoint with --image"),
        ({"checkpoint": "x.pth"}, "either --checkpoint with --image"),
        ({"checkpoint": "x.pth", "pred": ()}, "--image is missing"),
        ({"gt": ()}, "--gt is missing"),
        ({"gt": ("masks", "masks")}, "--pred has 1 entries, --gt 2"),
        ({"name": ("a", "b")}, "--name has 2 entries, --gt 1"),
        ({"name": ("../a",)}, "without a path"),
        ({"gt": ("masks", "masks"), "pred": ("maps", "maps")}, "give one --name"),
        ({"gt": ("nowhere",)}, "nowhere: No such file"),
        ({"pred": ("masks",)}, "masks is used for maps and masks"),
        ({"gt": ("empty",)}, "no pairs: 3 maps in maps, 0 masks in empty"),
        ({"tta": True}, "--tta requires a network"),
        ({"json": "masks/00000.png/s.json"}, "cannot be written"),
        ({"out": "masks/00000.png"}, "cannot be written"),
        ({"json": "masks"}, "is a folder"),
        ({"checkpoint": "net.pth", "size": 8}, "size = 8: must be from 32"),
        ({"checkpoint": "nothing.pth"}, "nothing.pth: there is no such checkpoint"),
    ],
)
def test_unusable_input_is_one_line_before_any_work(change, says, three, monkeypatch, capsys):
    folder = three[0].parent
    monkeypatch.chdir(folder)
    (folder / "empty").mkdir()
    torch.save(U2NETP().state_dict(), folder / "net.pth")
    before = sorted(folder.rglob("*"))
    if "checkpoint" in change and "--" not in says:
        change = {"pred": (), "image": ("maps",)} | change
    with pytest.raises(UserError) as error:
        main(Config(**{"gt": ("masks",), "pred": ("maps",)} | change))
    assert says in str(error.value) and "\n" not in str(error.value)
    assert capsys.readouterr().out == ""
    assert sorted(folder.rglob("*")) == before


def test_a_mask_drawn_on_the_photo_as_stored_is_rotated_with_it(three, tmp_path):
    """Without the photo nobody can know, and the map is resized to the mask's shape."""
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.zeros((72, 96, 3), np.uint8)).save(tmp_path / "photos" / "00001.png", exif=exif)
    with Image.open(three[1] / "00001.png") as mask:
        mask.transpose(Image.Transpose.ROTATE_270).save(three[0] / "00001.png")
    iou = []
    for image in ((), (str(tmp_path / "photos"),)):
        assert evaluate_maps(three, image=image, json=str(tmp_path / "s")) == 0
        iou.append(json.loads((tmp_path / "s").read_text())[0]["iou_mean"])
    assert iou[1] > iou[0] + 0.1


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such file names")
def test_names_that_are_not_text_are_used(three, tmp_path):
    for folder in three:
        (folder / "00001.png").rename(folder / "$\udcff.png")
        (folder / "00002.png").rename(folder / "船.png")
    assert evaluate_maps(three, out=str(tmp_path / "o")) == 0
    rows = (tmp_path / "o" / f"{tmp_path.name}_images.csv").read_text(errors="surrogateescape").splitlines()
    assert [row.split(",")[0] for row in rows] == ["image", "$\udcff", "00000", "船"]


# ------------------------------------------------------------------------------------------------------- threads


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_evaluation(number, code, tmp_path):
    pred, gt = make_set(tmp_path, 4, (40, 50))
    for i in range(4, 3000):
        for folder in (pred, gt):
            os.link(folder / f"{i % 4:05}.png", folder / f"{i:05}.png")
    command = [sys.executable, SCRIPT, "--pred", pred, "--gt", gt, "--json", tmp_path / "s.json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while psutil.Process(process.pid).num_threads() < 2:
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (code, "interrupted\n" if code == 130 else "")
    assert not (tmp_path / "s.json").exists()


@pytest.mark.parametrize("allowed", [0, 1, 4])
def test_results_come_in_order_from_as_many_threads_as_can_be_started(allowed, monkeypatch, capsys):
    begin, begun, taken = threading.Thread.start, [], []

    def limited(self):
        begun.append(self)
        if len(begun) > allowed:
            raise RuntimeError("can't start new thread")
        begin(self)

    def items():
        for i in range(20):
            taken.append(i)
            yield i

    monkeypatch.setattr(threading.Thread, "start", limited)
    results = ordered_map(lambda i: i * i, items(), threads=4, ahead=4)
    assert next(results) == (0, 0) and len(taken) <= 5  # they are taken as they are needed
    assert list(results) == [(i, i * i) for i in range(1, 20)]
    said = "" if allowed == 4 else "fewer than 4 threads can be started (can't start new thread)\n"
    assert capsys.readouterr().out == said
