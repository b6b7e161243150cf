"""Files are written whole or not at all; checksums of source files see code and nothing else."""

import os
from pathlib import Path

import pytest

from u2mamba.runtime.errors import UserError
from u2mamba.runtime.files import atomic_write, check_folder, replacing
from u2mamba.runtime.source import source_checksum, source_checksums


def test_a_file_appears_whole_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    atomic_write(path, b"one")
    atomic_write(path, b"two", flush=False)
    assert path.read_bytes() == b"two" and os.listdir(path.parent) == ["a.txt"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), replacing(path) as file:
        file.write(b"half")
        raise OSError(28, "full")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
@pytest.mark.parametrize(("mask", "mode"), [(0o002, 0o664), (0o077, 0o600)])
def test_the_umask_is_honored_also_where_chmod_is_refused(tmp_path, monkeypatch, mask, mode):
    """Samba, an S3 mount, vfat of another user."""

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refuse)
    monkeypatch.setattr(os, "fchmod", refuse)
    path, before = tmp_path / f"{'ä' * 120}.txt", os.umask(mask)  # a name near the limit of 255 bytes
    try:
        check_folder(tmp_path)
        atomic_write(path, b"")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode and os.listdir(tmp_path) == [path.name]


def test_a_folder_is_checked_by_what_a_write_does(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match="cannot be written"):
        check_folder(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    for act in (check_folder, lambda folder: atomic_write(folder / "x", b"")):
        with pytest.raises(UserError) as error:
            act(tmp_path / "file" / "folder")
        assert str(tmp_path / "file") in str(error.value) and "\n" not in str(error.value)


SOURCE = '''"""Module."""
LIMIT = 3
class Config:
    """Settings."""
    lr: float = 1e-4  # rate
PRESETS = {"fast": 1}
def loss(x):
    """Loss."""
    return x * 2
'''


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("# rate", "# learning rate", True),
        ('"""Loss."""', '"""The loss."""', True),
        ("1e-4", "1e-3", True),
        ('{"fast": 1}', '{"fast": 2}', True),
        ("x * 2", "x * 3", False),
        ("LIMIT = 3", "LIMIT = 4", False),
        ("lr: float", "rate: float", False),
    ],
)
def test_a_checksum_sees_code_and_no_comments_or_settings(tmp_path, old, new, same):
    a, b = tmp_path / "a.py", tmp_path / "b.py"
    a.write_text(SOURCE)
    b.write_text(SOURCE.replace(old, new))
    assert old in SOURCE and (source_checksum(a) == source_checksum(b)) == same


def test_the_files_that_decide_what_a_run_computes():
    files = source_checksums(Path(__file__).parents[2])
    assert {"u2mamba_train.py", "data_loader.py", "model/u2net.py", "u2mamba/dataset/decode.py"} <= files.keys()
    assert not any("fast/" in name or "tests" in name for name in files)
