"""The trainer where the machine or the caller is not as usual: in a thread, with odd variables, names and packages."""

import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest

from u2mamba.engine.distributed import init_distributed
from u2mamba.runtime.errors import UserError

SIGNALS = [number for number in map(signal.Signals.__members__.get, ("SIGINT", "SIGTERM", "SIGHUP")) if number]


def test_run_works_in_a_thread_and_leaves_signal_handlers_as_they_were(run, tmp_path, monkeypatch):
    before, codes = [signal.getsignal(number) for number in SIGNALS], []
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert run(save_frq=1000, saved_models=Path("~/runs"))[0] == 0
    assert (tmp_path / "home" / "runs" / "tiny" / "last.pth").is_file() or os.name == "nt"
    assert [signal.getsignal(number) for number in SIGNALS] == before
    thread = threading.Thread(target=lambda: codes.append(run(model_name="thread", save_frq=1000)[0]))
    thread.start()
    thread.join()
    assert codes == [0]


@pytest.mark.parametrize("others", [{}, {"RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}])
def test_world_size_that_is_not_torchruns_is_one_line(others, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WORLD_SIZE": "2", **others}.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(UserError, match=r"WORLD_SIZE = '2' .*LOCAL_RANK.* unset it, or start with torchrun"),
        init_distributed(),
    ):
        pass
    monkeypatch.setenv("WORLD_SIZE", "")
    with init_distributed() as dist:
        assert dist.size == 1


def test_the_longest_name_is_trained_under(run, tmp_path):
    assert run(model_name="x" * 180)[0] == 0
    assert len(list((tmp_path / ("x" * 180)).glob("x*_bce_itr_*.pth"))) == 3


def test_a_tensorboard_that_cannot_be_imported_is_one_line(run, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    (tmp_path / "tensorboard.py").write_text("raise TypeError('Descriptors cannot be created directly')")
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    code, out = run(save_frq=1000)
    assert (
        code == 0
        and out.count("warning: TensorBoard is not used (TypeError: Descriptors cannot be created directly)") == 1
    )


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_paths_that_are_not_utf_8(run, data, tmp_path):
    folder = tmp_path / "d\udcfcts"
    shutil.copytree(data, folder)
    sys.stdout.reconfigure(errors="backslashreplace")  # as every command does
    assert run(data_dir=str(folder), saved_models=str(folder), save_frq=1000)[0] == 0
    assert run(data_dir=str(folder), saved_models=str(folder), save_frq=1000, epoch_num=2)[0] == 0  # resumed
