"""u2mamba_predict.py on small files: outputs, their places, what is skipped or refused, and how it stops."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import u2mamba_predict
from model import U2NETP
from tests.trained import trained
from u2mamba.dataset.rescale import rescale_image
from u2mamba.inference import predictor as predictor_module
from u2mamba.inference.foreground import foreground_colors
from u2mamba.inference.predictor import Predictor
from u2mamba.runtime import files as files_module
from u2mamba.runtime.errors import UserError
from u2mamba_predict import MODES, Config, main

ROOT = Path(__file__).parents[2]
SIZE = 48


def weights() -> dict:
    """Of a network whose maps differ from pixel to pixel."""
    torch.manual_seed(0)
    net = trained(U2NETP())
    net.outconv.weight.data *= 30
    return net.state_dict()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "net.pth"
    torch.save(weights(), path)
    return path


def photo(seed: int, width: int = 70, height: int = 50) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def photos(tmp_path):
    """a.png and below/b.jpg."""
    (tmp_path / "photos" / "below").mkdir(parents=True)
    photo(0).save(tmp_path / "photos" / "a.png")
    photo(1).save(tmp_path / "photos" / "below" / "b.jpg")
    return tmp_path / "photos"


@pytest.fixture
def predict(checkpoint, tmp_path):
    """main() with these options, into tmp_path/out, on the CPU in fp32."""

    def call(*inputs, **more) -> int:
        options = {"checkpoint": str(checkpoint), "out": str(tmp_path / "out"), "size": SIZE, "precision": "fp32"}
        return main(Config(tuple(map(str, inputs)), device="cpu", **options | more))

    return call


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def network_map(image: Image.Image) -> np.ndarray:
    net = U2NETP()
    net.load_state_dict(weights())
    resized = torch.from_numpy(rescale_image(np.asarray(image), SIZE))[None]
    return Predictor(net, torch.device("cpu"))(resized)[0, 0].numpy()


# ----------------------------------------------------------------------------------------- what it writes


def test_maps_are_the_networks_at_the_images_size(photos, predict, tmp_path):
    assert predict(photos, mode=("map", "mask"), threshold=0.3) == 0
    d0 = network_map(photo(0))
    assert np.ptp(d0) > 0.2  # else the test says nothing
    whole = np.asarray(Image.fromarray(d0).resize((70, 50), Image.Resampling.BILINEAR))
    soft, binary = (pixels(tmp_path / "out" / mode / "a.png") for mode in ("map", "mask"))
    assert soft.shape == (50, 70) and soft.dtype == np.uint8
    assert np.abs(soft - whole * 255).max() <= 0.51
    assert set(np.unique(binary)) == {0, 255}
    assert ((binary == 255) != (whole > 0.3)).sum() == 0


def test_cut_out_keeps_every_pixel_and_the_color_profile(photos, predict, tmp_path):
    photo(0).save(photos / "a.png", icc_profile=b"any profile")
    assert predict(photos / "a.png", mode=("map", "cutout"), foreground=False) == 0
    with Image.open(tmp_path / "out/cutout/a.png") as file:
        assert file.mode == "RGBA" and file.info["icc_profile"] == b"any profile"
    rgba = pixels(tmp_path / "out/cutout/a.png")
    assert np.array_equal(rgba[..., :3], np.asarray(photo(0)))
    assert np.array_equal(rgba[..., 3], pixels(tmp_path / "out/map/a.png"))


def test_overlay_and_sheet(photos, predict, tmp_path, monkeypatch):
    state = weights()
    state["outconv.weight"].zero_()
    state["outconv.bias"].fill_(40)  # a map of 1 everywhere: the overlay is the image, the cut-out too
    torch.save(state, tmp_path / "white.pth")
    photo(0, 1000, 600).save(photos / "a.png")
    assert predict(photos / "a.png", mode=("overlay", "sheet"), checkpoint=str(tmp_path / "white.pth")) == 0
    image, sheet = np.asarray(photo(0, 1000, 600), int), pixels(tmp_path / "out/sheet/a.jpg").astype(int)
    assert np.abs(pixels(tmp_path / "out/overlay/a.jpg") - image).mean() < 4  # JPEG
    assert sheet.shape == (307, 3 * 512 + 16, 3)
    assert (sheet[:, 530:1020] > 250).all()
    assert np.abs(sheet[:, :512] - sheet[:, -512:]).mean() < 4


@pytest.mark.parametrize("orientation", [3, 6])
def test_maps_are_upright(orientation, tmp_path, predict):
    upright, tag = photo(0), Image.Exif()
    tag[0x0112] = orientation
    stored = upright.transpose(Image.Transpose.ROTATE_180 if orientation == 3 else Image.Transpose.ROTATE_90)
    upright.save(tmp_path / "upright.png")
    stored.save(tmp_path / "stored.png", exif=tag)
    assert predict(tmp_path / "upright.png", tmp_path / "stored.png", mode=("map", "cutout")) == 0
    for mode in ("map", "cutout"):
        assert np.array_equal(*(pixels(tmp_path / "out" / mode / f"{n}.png") for n in ("upright", "stored")))


def disk(height: int, width: int, edge: float) -> np.ndarray:
    """Alpha of a disk in the middle, falling from 1 to 0 over `edge` pixels."""
    y, x = np.mgrid[:height, :width] + 0.5
    distance = np.hypot(y - height / 2, x - width / 2) - min(height, width) / 3
    return np.rint(np.clip(0.5 - distance / edge, 0, 1) * 255).astype(np.uint8)


@pytest.mark.parametrize(("height", "width", "edge"), [(90, 120, 6), (700, 500, 10), (900, 1501, 40)])
def test_soft_edges_lose_the_old_background(height, width, edge):
    alpha, rng = disk(height, width, edge), np.random.default_rng(0)
    a = alpha[..., None] / 255
    colors = np.array([200, 60, 30]) + rng.normal(0, 8, (height, width, 3))
    image = np.rint((a * colors + (1 - a) * [20, 110, 190]).clip(0, 255)).astype(np.uint8)
    before = image.copy()
    result, soft = foreground_colors(image, alpha), (alpha > 0) & (alpha < 255)
    assert np.array_equal(image, before)
    assert np.array_equal(result[~soft], image[~soft])  # opaque pixels are the photo's
    errors = [np.abs(c - colors)[soft].mean() for c in (image, result)]
    assert errors[1] < errors[0] / 4


@pytest.mark.parametrize("value", [0, 255])
def test_constant_maps_of_small_transparent_and_large_images(value, predict, tmp_path, capsys):
    """A cut-out has the image's colors and at most its alpha; what is too large is refused before it is decoded."""
    state = weights() | {"outconv.weight": torch.zeros(1, 6, 1, 1), "outconv.bias": torch.tensor([value - 127.5])}
    torch.save(state, tmp_path / "net.pth")
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (1, 1), (10, 130, 250)).save(tmp_path / "photos/pixel.png")
    Image.new("RGBA", (9, 5), (255, 255, 255, 70)).save(tmp_path / "photos/transparent.png")
    Image.new("1", (8193, 8192)).save(tmp_path / "photos/large.png")
    assert predict(tmp_path / "photos", checkpoint=str(tmp_path / "net.pth"), mode=tuple(MODES)) == 1
    lines = capsys.readouterr().err.splitlines()
    assert sum(f"its map is constant ({value} of 255)" in line for line in lines) == 2
    assert sum("large.png: declares 8193x8192 pixels" in line for line in lines) == 1
    assert len(files(tmp_path / "out")) == 3 * len(MODES)  # with settings.json
    for name, pixel in (("pixel", (10, 130, 250, value)), ("transparent", (255, 255, 255, min(value, 70)))):
        assert (pixels(tmp_path / f"out/cutout/{name}.png") == pixel).all()


# ------------------------------------------------------------------------------------- where, and what not again


def test_folders_are_kept_and_what_is_done_is_skipped(photos, predict, tmp_path, capsys):
    out = photos / "maps"  # inside the input: outputs are no input of the next call
    assert predict(photos / "**" / "*.*", photos / "a.png", out=str(out)) == 0  # a pattern, and a file twice
    assert files(out) == ["map/a.png", "map/below/b.png", "map/settings.json"]
    times = [p.stat().st_mtime_ns for p in sorted(out.rglob("*.png"))]
    assert predict(photos, out=str(out)) == 0
    assert "images: 2, of which 2 are already done" in capsys.readouterr().out
    assert [p.stat().st_mtime_ns for p in sorted(out.rglob("*.png"))] == times
    assert predict(photos, out=str(out), mode=("map", "mask")) == 0
    assert [n for n in files(out) if n.endswith("png")] == [
        f"{mode}/{name}" for mode in ("map", "mask") for name in ("a.png", "below/b.png")
    ]
    assert [p.stat().st_mtime_ns for p in sorted((out / "map").rglob("*.png"))] == times
    assert predict(photos, out=str(out), overwrite=True) == 0
    assert all(p.stat().st_mtime_ns not in times for p in (out / "map").rglob("*.png"))


@pytest.fixture
def other(checkpoint, tmp_path) -> str:
    """Weights whose maps are the opposite."""
    state = torch.load(checkpoint, weights_only=True)
    state["outconv.weight"] *= -1
    torch.save(state, tmp_path / "other.pth")
    return str(tmp_path / "other.pth")


def test_outputs_with_other_settings_do_not_count_as_done(photos, predict, other, tmp_path):
    assert predict(photos) == 0
    before = {name: pixels(tmp_path / "out" / name) for name in files(tmp_path / "out") if name.endswith("png")}
    for more, was in (({"checkpoint": other}, "crc32 "), ({"size": 96}, "size 48"), ({"tta": True}, "tta False")):
        with pytest.raises(UserError, match=rf"a\.png exists, predicted by net\.pth with {was}.*--overwrite"):
            predict(photos, **more)
    with pytest.raises(UserError, match=r"nope\.pth: there is no such checkpoint"):  # though there is nothing to do
        predict(photos, checkpoint=str(tmp_path / "nope.pth"))
    assert predict(photos, checkpoint=other, mode=("mask",)) == 0  # each mode by itself
    with pytest.raises(UserError, match=r"a\.png exists, predicted by other\.pth with threshold 0\.5"):
        predict(photos, checkpoint=other, mode=("mask",), threshold=0.4)
    assert predict(photos, threshold=0.4) == 0  # which a map does not depend on
    assert predict(photos / "a.png", checkpoint=other, overwrite=True) == 0
    with pytest.raises(UserError, match=r"b\.png exists, predicted by net\.pth"):
        predict(photos, checkpoint=other)
    assert predict(photos, checkpoint=other, overwrite=True) == 0
    assert all(not np.array_equal(pixels(tmp_path / "out" / name), kept) for name, kept in before.items())
    assert predict(photos, checkpoint=other) == 0


def test_the_record_names_settings_and_the_state_of_each_image(photos, predict, checkpoint, tmp_path):
    assert predict(photos, mode=("mask",)) == 0
    record = json.loads((tmp_path / "out/mask/settings.json").read_text())
    crc = f"{zlib.crc32(checkpoint.read_bytes()):08x}"
    assert record["settings"] == [{"weights": "net.pth", "crc32": crc, "size": SIZE, "tta": False, "threshold": 0.5}]
    assert list(record["outputs"]) == ["a.png", "below/b.png"]
    entry, status = record["outputs"]["a.png"], (photos / "a.png").stat()
    assert entry["input"] == str(photos / "a.png") and entry["settings"] == 0
    assert (entry["bytes"], entry["modified"]) == (status.st_size, status.st_mtime_ns)


def test_outputs_of_another_image_or_of_unknown_origin_do_not_count_as_done(photos, predict, tmp_path):
    out = tmp_path / "out"
    assert predict(photos, mode=("cutout", "sheet")) == 0
    cutout = out / "cutout/a.png"
    whole = cutout.read_bytes()
    (tmp_path / "more").mkdir()
    photo(5).save(tmp_path / "more" / "a.png")
    for mode in ("cutout", "sheet"):
        with pytest.raises(UserError, match=r"a\.\w+ exists, predicted from another image, or before .*more.a\.png"):
            predict(tmp_path / "more", mode=(mode,))
    assert cutout.read_bytes() == whole
    cutout.write_bytes(cutout.read_bytes()[:100])  # what a power cut leaves is predicted again
    assert predict(photos, mode=("cutout",)) == 0
    assert cutout.read_bytes() == whole
    cutout.unlink()
    cutout.mkdir()
    with pytest.raises(UserError, match=r"a\.png exists"):
        predict(photos, mode=("cutout",))
    cutout.rmdir()
    for content in ("{}", "[]", '{"settings": [1], "outputs": {"a.png": {"settings": 0}}}', "notes"):
        (out / "sheet/settings.json").write_text(content)
        with pytest.raises(UserError, match=r"a\.jpg exists, but .*settings\.json does not list it"):
            predict(photos, mode=("sheet",))


def test_a_folder_called_like_a_mode_is_read_and_only_outputs_are_passed_over(photos, predict, tmp_path, capsys):
    (photos / "mask").mkdir()
    photo(3).save(photos / "mask" / "teddy.jpg")
    assert predict(photos, out=str(photos), mode=("mask",)) == 0
    assert {"mask/mask/teddy.png", "mask/a.png", "mask/teddy.jpg"} <= set(files(photos))
    photos.rename(tmp_path / "moved")
    assert predict(tmp_path / "moved") == 0
    assert "skipped 3 outputs of this command" in capsys.readouterr().out
    assert [n for n in files(tmp_path / "out") if n.endswith("png")] == [
        "map/a.png", "map/below/b.png", "map/mask/teddy.png"
    ]  # fmt: skip


def test_images_of_one_name_do_not_overwrite_one_another(photos, predict, tmp_path):
    photo(2).save(photos / "a.jpg")
    assert predict(photos) == 0
    assert files(tmp_path / "out") == ["map/a.jpg.png", "map/a.png.png", "map/below/b.png", "map/settings.json"]
    assert not np.array_equal(*(pixels(tmp_path / "out/map" / n) for n in ("a.jpg.png", "a.png.png")))
    (tmp_path / "more").mkdir()
    photo(3).save(tmp_path / "more" / "a.png")
    with pytest.raises(UserError, match=r"more.a\.png would both become a\.png: use a separate --out"):
        predict(photos, tmp_path / "more", out=str(tmp_path / "both"))
    assert not (tmp_path / "both").exists()


# ------------------------------------------------------------------------------------------------- bad input


def test_files_that_are_not_images_are_named_and_counted(photos, predict, tmp_path, capsys):
    (photos / "broken.jpg").write_bytes(b"not an image")
    cut = (photos / "below" / "b.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(cut[: len(cut) // 2])
    for name in ("notes.txt", "c.heic", ".DS_Store"):
        (photos / name).write_text("passed by")
    bad = 2
    if hasattr(os, "mkfifo"):  # Windows has no named pipes among files
        os.mkfifo(photos / "p.jpg")
        bad = 3
    assert predict(photos, mode=tuple(MODES)) == 1
    said = capsys.readouterr()
    assert "broken.jpg: not an image" in said.err and "cut.jpg: " in said.err and "notes" not in said.err
    assert "p.jpg: not a regular file" in said.err or bad == 2
    assert "done: 2 images" in said.out and f"{bad} skipped" in said.out
    assert "skipped 2 files of other types: c.heic, notes.txt" in said.out
    assert len(files(tmp_path / "out")) == 3 * len(MODES)
    assert predict(photos / "broken.jpg", photos / "notes.txt") == 2


def test_a_network_that_gives_no_numbers(photos, predict, tmp_path, capsys):
    state = weights()
    state["outconv.bias"].fill_(float("nan"))
    torch.save(state, tmp_path / "nan.pth")
    assert predict(photos, checkpoint=str(tmp_path / "nan.pth")) == 2
    assert "its map has NaN/Inf values" in capsys.readouterr().err
    assert files(tmp_path / "out") == ["map/settings.json"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"inputs": ()}, "no input: give images"),
        ({"inputs": ("nowhere.jpg",)}, "nowhere.jpg: there is no such file or folder"),
        ({"inputs": ("x" * 300,)}, ": there is no such file or folder"),
        ({"inputs": ("empty",)}, "empty: contains no image"),
        ({"checkpoint": "nowhere.pth"}, "nowhere.pth: there is no such checkpoint"),
        ({"checkpoint": "empty"}, "empty: is a folder"),
        ({"checkpoint": "photos/last.pth"}, "there is no such checkpoint; that folder contains net.pth"),
        ({"checkpoint": "large"}, "u2mamba.pth not found; give the path of a weights file"),
        ({"out": "photos/a.png"}, "cannot be written"),
        ({"size": 8}, "size = 8: must be from 32 to 4096"),
        ({"threshold": float("nan")}, "threshold = nan: must be from 0 to 1"),
        ({"mode": ()}, "no mode: give one or more of map, mask"),
        ({"mode": ("map", "alpha")}, "mode = ('map', 'alpha')"),
    ],
)
def test_unusable_input_is_one_line(more, says, photos, predict, tmp_path, monkeypatch):
    monkeypatch.setattr(predictor_module, "PRETRAINED_DIR", tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos/net.pth").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        predict(*more.pop("inputs", ("photos",)), **more)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not files(tmp_path / "out") if (tmp_path / "out").exists() else True


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, None), (errno.ENAMETOOLONG, 1)])
def test_a_disk_that_refuses_leaves_nothing_half_written(number, code, photos, predict, tmp_path, monkeypatch, capsys):
    """A full disk stops the run; a name that the disk does not take costs that file."""
    rename = os.replace

    def refuse(source, target):
        if Path(target).name == "a.png":
            raise OSError(number, os.strerror(number))
        rename(source, target)

    monkeypatch.setattr(files_module.os, "replace", refuse)
    if code:
        assert predict(photos) == code
        assert "skipped: " in capsys.readouterr().err
    else:
        with pytest.raises(UserError, match=r"No space left on device\); repeat the command to continue"):
            predict(photos)
    assert set(files(tmp_path / "out")) <= {"map/below/b.png", "map/settings.json"}


# --------------------------------------------------------------------------------- streams, start


def test_standard_streams_carry_what_the_file_would_hold(photos, predict, checkpoint, tmp_path):
    assert predict(photos / "a.png", mode=("cutout",)) == 0
    words = f"- --out - --checkpoint {checkpoint} --mode cutout --size {SIZE} --device cpu --precision fp32".split()
    command = [sys.executable, ROOT / "u2mamba_predict.py", *words]
    done = subprocess.run(command, input=(photos / "a.png").read_bytes(), capture_output=True)
    assert done.returncode == 0 and done.stdout == (tmp_path / "out/cutout/a.png").read_bytes()
    assert b"device: " in done.stderr


def no_folder():
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


@pytest.mark.parametrize(
    ("content", "more", "says"),
    [
        (b"not an image", {}, "standard input: not an image"),
        (b"", {}, "standard input: empty file"),
        (b"", {"mode": ("map", "mask")}, "--out - requires exactly one mode"),
        (b"", {"out": "somewhere"}, "standard input and output go together"),
        (None, {}, "standard input cannot be copied to a temporary folder: No such file or directory"),
    ],
)
def test_unusable_standard_input_is_one_line(content, more, says, predict, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content or b"")))
    if content is None:
        monkeypatch.setattr(tempfile, "gettempdir", no_folder)
    with pytest.raises(UserError) as caught:
        predict("-", **{"out": "-"} | more)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_progress_is_a_line_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(u2mamba_predict, "PROGRESS_SECONDS", 0)
    assert list(u2mamba_predict.progress([1, 2, 3], 3)) == [1, 2, 3]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["1 of 3 images", "2 of 3 images"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to catch")
@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 143), ("SIGKILL", -9)])
def test_a_stopped_command_continues_where_it_was(number, code, photos, predict, other, tmp_path):
    """Though it was replacing the outputs of other weights."""
    for i in range(12):
        photo(i, 300, 200).save(photos / f"{i}.jpg")
    assert predict(photos, size=160) == 0
    assert predict(photos, checkpoint=other, size=160, out=str(tmp_path / "expected")) == 0
    words = f"{photos} --checkpoint {other} --size 160 --batch 1 --device cpu --precision fp32 --overwrite --out"
    command, out = [sys.executable, str(ROOT / "u2mamba_predict.py"), *words.split()], tmp_path / "out"
    before = (out / "map/settings.json").stat().st_mtime_ns
    process = subprocess.Popen([*command, str(out)], stderr=subprocess.PIPE, text=True)
    while process.poll() is None:  # it deletes all outputs, then records the new ones, then writes them
        if (out / "map/settings.json").stat().st_mtime_ns != before and list(out.rglob("*.png")):
            break
        time.sleep(0.005)
    process.send_signal(getattr(signal, number))
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err, err
    written = list(out.rglob("*.png"))
    assert 0 < len(written) < 14
    assert number == "SIGKILL" or len(written) + 1 == len(files(out))  # no temporary names
    assert predict(photos, checkpoint=other, size=160) == 0
    for name in (name for name in files(tmp_path / "expected") if name.endswith("png")):
        a, b = (pixels(tmp_path / folder / name).astype(int) for folder in ("out", "expected"))
        assert np.abs(a - b).max() <= 1
