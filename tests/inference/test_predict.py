"""u2mamba_predict.py on small files: what it writes, where, what it skips and names, and how it stops."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model import ARCHS, U2NETP
from u2mamba.dataset.cache import rescale_image
from u2mamba.dataset.pairs import BadFile
from u2mamba.inference import predictor as predictor_module
from u2mamba.inference.pipeline import PixelBudget, at_size
from u2mamba.inference.predictor import Predictor
from u2mamba.runtime import files as files_module
from u2mamba.runtime.errors import UserError
from u2mamba.runtime.workers import in_order
from u2mamba_predict import MODES, Options, run

SIZE = 48


def weights(seed: int = 0, arch: str = "u2netp") -> dict:
    """A network whose maps differ from pixel to pixel; as initialised they are 0.5 nearly everywhere."""
    torch.manual_seed(seed)
    net = ARCHS[arch]()
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.weight.data.uniform_(1, 3)
            m.running_var.uniform_(0.05, 0.5)
    return net.state_dict()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "net.pth"
    torch.save(weights(), path)
    return path


def photograph(seed: int, width: int = 70, height: int = 50) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def photos(tmp_path):
    """a.png and below/b.jpg."""
    (tmp_path / "photos" / "below").mkdir(parents=True)
    photograph(0).save(tmp_path / "photos" / "a.png")
    photograph(1).save(tmp_path / "photos" / "below" / "b.jpg")
    return tmp_path / "photos"


@pytest.fixture
def predict(checkpoint, tmp_path):
    """run() with these options, into tmp_path/out, on the CPU in fp32."""

    def call(*inputs, **more) -> int:
        options = {"checkpoint": str(checkpoint), "out": str(tmp_path / "out"), "size": SIZE, "precision": "fp32"}
        return run(Options(tuple(map(str, inputs)), device="cpu", **options | more))

    return call


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def network_map(image: Image.Image) -> np.ndarray:
    net = U2NETP()
    net.load_state_dict(weights())
    squashed = torch.from_numpy(rescale_image(np.asarray(image), SIZE))[None]
    return Predictor(net, torch.device("cpu"))(squashed)[0, 0].numpy()


# ----------------------------------------------------------------------------------------- what it writes


def test_maps_are_the_networks_at_the_images_size(photos, predict, tmp_path):
    assert predict(photos, mode=("soft", "binary"), threshold=0.3) == 0
    d0 = network_map(photograph(0))
    assert np.ptp(d0) > 0.2  # else the test says nothing
    whole = np.asarray(Image.fromarray(d0).resize((70, 50), Image.Resampling.BILINEAR))
    soft, binary = (pixels(tmp_path / "out" / mode / "a.png") for mode in ("soft", "binary"))
    assert soft.shape == (50, 70) and soft.dtype == np.uint8
    assert np.abs(soft - whole * 255).max() <= 0.51
    assert set(np.unique(binary)) == {0, 255}
    assert ((binary == 255) != (whole > 0.3)).sum() == 0


def test_strips_are_the_whole():
    d0 = np.random.default_rng(0).random((32, 32), np.float32)
    for width, height in ((3000, 1500), (7, 2001), (20, 10)):
        whole = np.asarray(Image.fromarray(d0).resize((width, height), Image.Resampling.BILINEAR))
        assert np.abs(at_size(d0, width, height) - whole * 255).max() <= 0.51
        assert ((at_size(d0, width, height, 0.4) == 255) != (whole > 0.4)).mean() < 1e-5  # fp32 roundings at 0.4


def test_cut_out_keeps_every_pixel_and_the_colour_profile(photos, predict, tmp_path):
    photograph(0).save(photos / "a.png", icc_profile=b"made up, but kept")
    assert predict(photos / "a.png", mode=("soft", "rgba")) == 0
    with Image.open(tmp_path / "out/rgba/a.png") as file:
        assert file.mode == "RGBA" and file.info["icc_profile"] == b"made up, but kept"
    rgba = pixels(tmp_path / "out/rgba/a.png")
    assert np.array_equal(rgba[..., :3], np.asarray(photograph(0)))
    assert np.array_equal(rgba[..., 3], pixels(tmp_path / "out/soft/a.png"))


def test_overlay_and_sheet(photos, predict, tmp_path, monkeypatch):
    state = weights()
    state["outconv.weight"].zero_()
    state["outconv.bias"].fill_(40)  # a map of 1 everywhere: the overlay is the image, the cut-out too
    torch.save(state, tmp_path / "white.pth")
    photograph(0, 1000, 600).save(photos / "a.png")
    assert predict(photos / "a.png", mode=("overlay", "sheet"), checkpoint=str(tmp_path / "white.pth")) == 0
    image, sheet = np.asarray(photograph(0, 1000, 600), int), pixels(tmp_path / "out/sheet/a.jpg").astype(int)
    assert np.abs(pixels(tmp_path / "out/overlay/a.jpg") - image).mean() < 4  # JPEG
    assert sheet.shape == (307, 3 * 512 + 16, 3)
    assert (sheet[:, 530:1020] > 250).all()
    assert np.abs(sheet[:, :512] - sheet[:, -512:]).mean() < 4


@pytest.mark.parametrize("orientation", [3, 6])
def test_maps_are_upright(orientation, tmp_path, predict):
    upright, tag = photograph(0), Image.Exif()
    tag[0x0112] = orientation
    stored = upright.transpose(Image.Transpose.ROTATE_180 if orientation == 3 else Image.Transpose.ROTATE_90)
    upright.save(tmp_path / "upright.png")
    stored.save(tmp_path / "stored.png", exif=tag)
    assert predict(tmp_path / "upright.png", tmp_path / "stored.png", mode=("soft", "rgba")) == 0
    for mode in ("soft", "rgba"):
        assert np.array_equal(*(pixels(tmp_path / "out" / mode / f"{n}.png") for n in ("upright", "stored")))


def test_mirrored_mean_of_a_mirrored_image_is_the_mirrored_map(tmp_path, predict):
    photograph(0, 48, 48).save(tmp_path / "a.png")
    photograph(0, 48, 48).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "b.png")
    difference = []
    for tta in (False, True):
        assert predict(tmp_path / "a.png", tmp_path / "b.png", tta=tta, overwrite=True) == 0
        a, b = (pixels(tmp_path / "out/soft" / n).astype(int) for n in ("a.png", "b.png"))
        difference.append(np.abs(a - b[:, ::-1]).max())
    assert difference[0] > 5 and difference[1] <= 1


def test_batches_do_not_change_maps(tmp_path, predict):
    for i in range(7):
        photograph(i).save(tmp_path / f"{i}.png")
    for batch in (1, 3):
        assert predict(tmp_path / "*.png", batch=batch, out=str(tmp_path / str(batch))) == 0
    for i in range(7):
        one, three = (pixels(tmp_path / n / "soft" / f"{i}.png").astype(int) for n in "13")
        assert np.abs(one - three).max() <= 1


# ------------------------------------------------------------------------------------- where, and what not again


def test_folders_are_kept_and_what_is_done_is_skipped(photos, predict, tmp_path, capsys):
    out = photos / "maps"  # inside the input: what was made is no input of the next call
    assert predict(photos, out=str(out)) == 0
    assert files(out) == ["soft/a.png", "soft/below/b.png"]
    times = [p.stat().st_mtime_ns for p in sorted(out.rglob("*.png"))]
    assert predict(photos, out=str(out)) == 0
    assert "images: 2, of which 2 are done" in capsys.readouterr().out
    assert [p.stat().st_mtime_ns for p in sorted(out.rglob("*.png"))] == times
    assert predict(photos, out=str(out), mode=("soft", "binary")) == 0
    assert files(out) == ["binary/a.png", "binary/below/b.png", "soft/a.png", "soft/below/b.png"]
    assert [p.stat().st_mtime_ns for p in sorted((out / "soft").rglob("*.png"))] == times
    assert predict(photos, out=str(out), overwrite=True) == 0
    assert all(p.stat().st_mtime_ns not in times for p in (out / "soft").rglob("*.png"))


def test_maps_of_other_weights_do_not_pass_for_done(photos, predict, checkpoint, tmp_path):
    assert predict(photos) == 0
    before = {name: pixels(tmp_path / "out" / name) for name in files(tmp_path / "out")}
    state = torch.load(checkpoint, weights_only=True)
    state["outconv.weight"] *= -1  # the opposite of each map
    other = str(tmp_path / "other.pth")
    torch.save(state, other)
    for more, was in (({"checkpoint": other}, "crc32"), ({"size": 96}, "size 48"), ({"tta": True}, "tta False")):
        with pytest.raises(UserError, match=rf"a\.png is there, made by net\.pth, {was}.*--overwrite"):
            predict(photos, **more)
    with pytest.raises(UserError, match=r"nope\.pth: there is no such checkpoint"):  # though there is nothing to do
        predict(photos, checkpoint=str(tmp_path / "nope.pth"))
    assert predict(photos, checkpoint=other, mode=("binary",)) == 0  # each mode by itself
    with pytest.raises(UserError, match=r"a\.png is there, made by other\.pth, threshold 0\.5"):
        predict(photos, checkpoint=other, mode=("binary",), threshold=0.4)
    assert predict(photos, threshold=0.4) == 0  # of which a soft map knows nothing
    assert predict(photos, checkpoint=other, overwrite=True) == 0
    assert all(not np.array_equal(pixels(tmp_path / "out" / name), kept) for name, kept in before.items())
    assert predict(photos, checkpoint=other) == 0


def test_what_is_of_another_image_or_of_nobody_does_not_pass_for_done(photos, predict, tmp_path):
    out = tmp_path / "out"
    assert predict(photos, mode=("rgba", "sheet")) == 0
    whole = (out / "rgba/a.png").read_bytes()
    (tmp_path / "more").mkdir()
    photograph(5).save(tmp_path / "more" / "a.png")
    for mode in ("rgba", "sheet"):
        with pytest.raises(UserError, match=r"a\.\w+ is there, made of another image, or of an earlier state"):
            predict(tmp_path / "more", mode=(mode,))
    assert (out / "rgba/a.png").read_bytes() == whole
    for content in (photos.joinpath("a.png").read_bytes(), b"notes"):
        (out / "rgba/a.png").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.png is there, not made by this script, or by an earlier version"):
            predict(photos, mode=("rgba",))
    for content in (whole[:200], bytes(300), b""):  # what a power cut leaves is made again
        (out / "rgba/a.png").write_bytes(content)
        assert predict(photos, mode=("rgba",)) == 0
        assert (out / "rgba/a.png").read_bytes() == whole
    (out / "rgba/a.png").unlink()
    (out / "rgba/a.png").mkdir()
    with pytest.raises(UserError, match=r"a\.png is there"):
        predict(photos, mode=("rgba",))


def test_a_photograph_that_cannot_be_opened_is_set_aside_though_its_map_is_there(photos, predict, monkeypatch, capsys):
    assert predict(photos) == 0

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    def set_aside(path):
        raise BadFile(path, "Permission denied")

    monkeypatch.setattr("u2mamba_predict.file_crc32", refuse)
    monkeypatch.setattr("u2mamba.inference.pipeline.read_image", set_aside)
    assert predict(photos) == 2
    assert "b.jpg: Permission denied" in capsys.readouterr().err


def test_an_overwriting_call_that_made_some_does_not_hide_the_others(photos, predict, checkpoint, tmp_path):
    assert predict(photos) == 0
    state = torch.load(checkpoint, weights_only=True)
    state["outconv.weight"] *= -1
    torch.save(state, tmp_path / "other.pth")
    other = str(tmp_path / "other.pth")
    assert predict(photos / "a.png", checkpoint=other, overwrite=True) == 0
    with pytest.raises(UserError, match=r"b\.png is there, made by net\.pth"):
        predict(photos, checkpoint=other)


def test_files_of_other_types_are_told(photos, predict, capsys):
    for name in ("c.heic", "d.gif", ".DS_Store"):
        (photos / name).write_bytes(b"x")
    assert predict(photos) == 0
    assert "passed by, of another type: 2 (c.heic, d.gif)" in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes among files")
def test_a_pipe_among_the_images_is_set_aside(photos, predict, capsys):
    os.mkfifo(photos / "p.jpg")
    assert predict(photos) == 1
    assert "p.jpg: not a regular file" in capsys.readouterr().err


def test_patterns_and_the_same_file_twice(photos, predict, tmp_path, capsys):
    assert predict(photos / "**" / "*.*", photos / "a.png") == 0
    assert files(tmp_path / "out") == ["soft/a.png", "soft/below/b.png"]
    assert "images: 2," in capsys.readouterr().out


def test_images_of_one_name_do_not_overwrite_one_another(photos, predict, tmp_path):
    photograph(2).save(photos / "a.jpg")
    assert predict(photos) == 0
    assert files(tmp_path / "out") == ["soft/a.jpg.png", "soft/a.png.png", "soft/below/b.png"]
    assert not np.array_equal(*(pixels(tmp_path / "out/soft" / n) for n in ("a.jpg.png", "a.png.png")))
    (tmp_path / "more").mkdir()
    photograph(3).save(tmp_path / "more" / "a.png")
    with pytest.raises(UserError, match=r"more.a\.png would both become a\.png: give each an --out"):
        predict(photos, tmp_path / "more", out=str(tmp_path / "both"))
    assert not (tmp_path / "both").exists()


# ------------------------------------------------------------------------------------------------- bad input


def test_files_that_are_not_images_are_named_and_counted(photos, predict, tmp_path, capsys):
    (photos / "broken.jpg").write_bytes(b"not an image")
    cut = (photos / "below" / "b.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(cut[: len(cut) // 2])
    (photos / "notes.txt").write_text("passed by")
    assert predict(photos, mode=tuple(MODES)) == 1
    said = capsys.readouterr()
    assert "broken.jpg: not an image" in said.err and "cut.jpg: " in said.err and "notes" not in said.err
    assert "done: 2 images" in said.out and "2 set aside" in said.out
    assert len(files(tmp_path / "out")) == 2 * len(MODES)
    assert predict(photos / "broken.jpg", photos / "notes.txt") == 2


def test_a_network_that_gives_no_numbers(photos, predict, tmp_path, capsys):
    state = weights()
    state["outconv.bias"].fill_(float("nan"))
    torch.save(state, tmp_path / "nan.pth")
    assert predict(photos, checkpoint=str(tmp_path / "nan.pth")) == 2
    assert "its map is not finite" in capsys.readouterr().err
    assert not files(tmp_path / "out")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"inputs": "nowhere.jpg"}, "nowhere.jpg: there is no such file or folder"),
        ({"inputs": "x" * 300}, ": there is no such file or folder"),
        ({"inputs": "empty"}, "empty: no image in it"),
        ({"checkpoint": "nowhere.pth"}, "nowhere.pth: there is no such checkpoint"),
        ({"checkpoint": "other.pth"}, "another network than U²-Net"),
        ({"checkpoint": "cut.pth"}, "truncated or damaged"),
        ({"checkpoint": ""}, "no weights: give --checkpoint PATH"),
        ({"out": "photos/a.png"}, "cannot be written"),
        ({"size": 8}, "size = 8: must be from 32 to 4096"),
        ({"threshold": float("nan")}, "threshold = nan: must be from 0 to 1"),
        ({"mode": ()}, "no mode: give one or several of soft, binary"),
        ({"mode": ("soft", "alpha")}, "mode = ('soft', 'alpha')"),
    ],
)
def test_unusable_input_is_one_line(more, says, photos, predict, tmp_path, monkeypatch):
    monkeypatch.setattr(predictor_module, "SHIPPED", tmp_path)
    (tmp_path / "empty").mkdir()
    torch.save({"conv1.weight": torch.ones(1)}, tmp_path / "other.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "other.pth").read_bytes()[:700])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        predict(more.pop("inputs", "photos"), **more)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not files(tmp_path / "out") if (tmp_path / "out").exists() else True


def test_weights_that_ship_are_found(photos, predict, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predictor_module, "SHIPPED", tmp_path)
    torch.save(weights(arch="u2mambap"), tmp_path / "u2mambap.pth")
    assert predict(photos, checkpoint="") == 0
    assert "u2mambap.pth" in capsys.readouterr().out


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
        assert "set aside" in capsys.readouterr().err
    else:
        with pytest.raises(UserError, match=r"No space left on device\); the same command goes on from there"):
            predict(photos)
    assert set(files(tmp_path / "out")) <= {"soft/below/b.png"}


def test_no_input(predict):
    with pytest.raises(UserError, match="no input: name images"):
        predict()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to catch")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_by_a_signal(number, code, checkpoint, tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(30):
        photograph(i, 600, 400).save(tmp_path / "photos" / f"{i}.jpg")
    script = str(Path(__file__).parents[2] / "u2mamba_predict.py")
    words = f"photos --checkpoint {checkpoint} --out out --mode soft rgba --size 160 --batch 1 --device cpu".split()
    process = subprocess.Popen(
        [sys.executable, script, *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    out, deadline = tmp_path / "out", time.monotonic() + 100
    while not list(out.rglob("*.png")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    written = [out / name for name in files(out)]
    assert 0 < len(written) < 60
    assert all(pixels(p).shape[:2] == (400, 600) for p in written)  # whole; none has a temporary name


# ------------------------------------------------------------------------------------------------- threads


def test_budget_bounds_what_is_held_and_lets_a_single_one_pass():
    budget, held, most, lock = PixelBudget(10), 0, 0, threading.Lock()

    def hold(pixels: int) -> None:
        nonlocal held, most
        with budget.hold(pixels):
            with lock:
                held += pixels
                most = max(most, held)
            time.sleep(0.002)
            with lock:
                held -= pixels

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(hold, [4] * 40))
        assert most == 8
        assert pool.submit(hold, 25).result(timeout=10) is None


def test_in_order_keeps_order_and_does_not_run_ahead_of_its_reader():
    begun = []

    def items():
        for i in range(20):
            begun.append(i)
            yield i

    with ThreadPoolExecutor(4) as pool:
        results = in_order(pool, lambda i: i * i, items(), 4)
        assert next(results) == (0, 0) and len(begun) == 5
        assert list(results) == [(i, i * i) for i in range(1, 20)]
