"""prepare_duts.py, run as a user runs it or through its `main`: layout, flipped copies, twice, hostile zips."""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import u2mamba_train
from tests.dataset.samples import disc, photo
from u2mamba.dataset.decode import read_image, read_mask
from u2mamba.dataset.image_file import DataError
from u2mamba.dataset.pairs import pair_folders

SCRIPT = Path(__file__).parents[2] / "train_data" / "prepare_duts.py"
spec = importlib.util.spec_from_file_location("prepare_duts", SCRIPT)
prepare_duts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare_duts)


def command(source: Path, out: Path, *options: str) -> int:
    """The exit code, as `one_line_errors` makes it of errors."""
    try:
        return prepare_duts.main([str(source), "--out", str(out), *options])
    except DataError as error:
        print(error, file=sys.stderr)
        return 2


def encoded(array: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def members(count: int = 3, root: str = "DUTS-TR/") -> dict[str, bytes]:
    out = {}
    for k in range(count):
        out[f"{root}DUTS-TR-Image/n{k}.jpg"] = encoded(photo(32, 48, seed=k), "JPEG")
        out[f"{root}DUTS-TR-Mask/n{k}.png"] = encoded(disc(32, 48), "PNG")
    return out


def make_zip(path: Path, content: dict) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, data in content.items():
            file.writestr(name, data)
    return path


def files(root: Path) -> dict[str, int]:
    return {p.relative_to(root).as_posix(): p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}


def test_zip_to_layout_with_flipped_copies_twice(tmp_path, capsys):
    source, out = make_zip(tmp_path / "DUTS-TR.zip", members()), tmp_path / "out"
    assert command(source, out, "--mirror") == 0
    made = files(out)
    expected = {f"DUTS-TR/DUTS-TR/im_aug/n{k}{m}.jpg" for k in range(3) for m in ("", "_mirror")}
    expected |= {f"DUTS-TR/DUTS-TR/gt_aug/n{k}{m}.png" for k in range(3) for m in ("", "_mirror")}
    assert set(made) == expected
    root = out / "DUTS-TR" / "DUTS-TR"
    assert (root / "im_aug/n1.jpg").read_bytes() == members()["DUTS-TR/DUTS-TR-Image/n1.jpg"]
    image, mirrored = (read_image(root / f"im_aug/n1{m}.jpg").astype(int) for m in ("", "_mirror"))
    assert np.abs(image[:, ::-1] - mirrored).mean() < 4  # saved as JPEG again; without the flip: 90
    mask, turned = (read_mask(root / f"gt_aug/n1{m}.png") for m in ("", "_mirror"))
    np.testing.assert_array_equal(mask[:, ::-1], turned)
    pairs = pair_folders(root / "im_aug", root / "gt_aug")
    assert len(pairs) == 6
    assert not pairs.skipped

    (root / "im_aug/n0.jpg").unlink()
    (root / "gt_aug/n2_mirror.png").unlink()
    again = files(out)
    assert command(source, out, "--mirror") == 0
    assert "3 of 3 pairs, 4 files written" in capsys.readouterr().out
    after = files(out)
    assert set(after) == expected
    untouched = {n for n in again if "n1" in n}
    assert {n: after[n] for n in untouched} == {n: again[n] for n in untouched}
    assert command(source, out, "--mirror") == 0
    assert "3 of 3 pairs, 0 files written" in capsys.readouterr().out


def test_bad_files_are_skipped(tmp_path, capsys):
    content = members(4)
    content["DUTS-TR/DUTS-TR-Image/n0.jpg"] = content["DUTS-TR/DUTS-TR-Image/n0.jpg"][:-200]
    content["DUTS-TR/DUTS-TR-Mask/n1.png"] = encoded(np.zeros((32, 32), np.uint8), "PNG")
    content["DUTS-TR/DUTS-TR-Image/alone.jpg"] = b"x"
    content["__MACOSX/DUTS-TR/DUTS-TR-Image/._n2.jpg"] = b"x"
    source = make_zip(tmp_path / "a.zip", content)
    with open(source, "r+b") as file:  # n2's image: damaged inside the zip
        at = source.read_bytes().index(content["DUTS-TR/DUTS-TR-Image/n2.jpg"]) + 200
        file.seek(at)
        file.write(b"\0\1\2\3\4")
    out = tmp_path / "out"
    assert command(source, out) == 1
    said = capsys.readouterr().out
    assert "DUTS-TR-Image/n0.jpg (image file is truncated" in said
    assert "DUTS-TR-Mask/n1.png (mask is 32x32, its image 48x32)" in said
    assert "DUTS-TR-Image/n2.jpg (Bad CRC-32 for file" in said
    assert "skipped 1 images without a mask: alone.jpg" in said
    assert set(files(out)) == {f"DUTS-TR/DUTS-TR/{n}" for n in ("im_aug/n3.jpg", "gt_aug/n3.png")}


def test_a_zip_that_leaves_the_folder_is_refused_before_writing(tmp_path, capsys):
    out = tmp_path / "out"
    for name in ("../n9.jpg", "/n9.jpg", "C:/n9.jpg", "DUTS-TR/DUTS-TR-Image/../../n9.jpg", "..\\n9.jpg"):
        source = make_zip(tmp_path / "a.zip", members() | {name: b"/etc/passwd"})
        assert command(source, out) == 2
        assert "nothing was written" in capsys.readouterr().err
        assert not out.exists()


def test_a_full_disk(tmp_path, capsys, monkeypatch):
    source, out = make_zip(tmp_path / "a.zip", members()), tmp_path / "out"

    def full(*_args, **_options):
        raise OSError(28, "No space left on device", str(out))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert command(source, out) == 2
    monkeypatch.undo()
    assert capsys.readouterr().err.strip() == f"{out}: No space left on device; fix that and run it again"
    assert not files(out)
    assert command(source, out) == 0


def test_unusable_sources_as_a_user_runs_it(tmp_path):
    (tmp_path / "text.zip").write_text("hello")
    (tmp_path / "empty").mkdir()
    for name in ("text.zip", "empty"):
        assert command(tmp_path / name, tmp_path / "out") == 2
    done = subprocess.run([sys.executable, SCRIPT, "missing.zip"], capture_output=True, text=True, cwd=tmp_path)
    line = f"error: {tmp_path}/missing.zip: not found; DUTS-TR.zip is at http://saliencydetection.net/duts/\n"
    assert (done.returncode, done.stderr) == (2, line)


def backslashes(name: str) -> str:
    """As old Windows tools write names into a zip."""
    return name.replace("/", "\\")


@pytest.mark.parametrize(
    "zipped, root, change",
    [(0, "", str), (0, "DUTS-TR/", str.lower), (1, "a/b/DUTS-TR/", str.lower), (1, "DUTS-TR/", backslashes)],
)
def test_the_two_folders_are_found_wherever_they_lie(zipped, root, change, tmp_path):
    source = make_zip(tmp_path / "DUTS-TR.zip", {change(name): data for name, data in members(root=root).items()})
    if not zipped:
        zipfile.ZipFile(source).extractall(tmp_path / "unpacked")
        (source := tmp_path / "linked").mkdir()  # data sets often lie on another disk
        for folder in (tmp_path / "unpacked").iterdir():
            (source / folder.name).symlink_to(folder, target_is_directory=True)
    assert command(source, tmp_path / "out") == 0
    assert len(files(tmp_path / "out")) == 6


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_below_a_path_that_is_not_utf_8_without_a_temporary_folder(tmp_path):
    """By default the pairs are put where the trainer looks for them."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/d\xfcts"))
    folder.mkdir()
    make_zip(folder / "DUTS-TR.zip", members())
    (tmp_path / "sitecustomize.py").write_text("import tempfile\ntempfile._get_default_tempdir = None")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "DUTS-TR.zip"], capture_output=True, text=True, cwd=folder, check=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert f"3 pairs in {tmp_path}/d\\udcfcts/train_data/DUTS-TR/DUTS-TR" in done.stdout
    cfg = u2mamba_train.Config()
    assert len(pair_folders(*(folder / cfg.data_dir / name for name in (cfg.tra_image_dir, cfg.tra_label_dir)))) == 3


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"DUTS-TE/DUTS-TE-Image/a.jpg": b"", "DUTS-TE/DUTS-TE-Mask/a.png": b""}, "this is the test set, DUTS-TE"),
        ({"download/DUTS-TR.zip": b""}, "unpack download/DUTS-TR.zip and pass the result"),
        ({"a/b.txt": b""}, "DUTS-TR-Image"),
    ],
)
def test_what_is_there_instead_is_named(content, says, tmp_path, capsys):
    assert command(make_zip(tmp_path / "source.zip", content), tmp_path / "out") == 2
    assert says in capsys.readouterr().err
