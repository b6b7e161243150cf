"""A tiny run: its lines, its files, stopping and going on, unusable input, and machines that are not as usual."""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from model import U2MAMBAP
from tests.engine.tiny import draw_pairs, same, start, train, weights
from u2mamba.engine.distributed import init_distributed
from u2mamba.runtime.errors import UserError

RICH = "--ema_decay 0.9 --precision bf16 --lr_schedule cosine --weight_decay 0.1 --grad_clip 1".split()


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    saved = tmp_path_factory.mktemp("saved")
    done = train(data, saved, *RICH)
    assert done.returncode == 0, done.stderr
    return saved / "tiny", done.stdout


LINE = re.compile(
    r"\[epoch: (\d+)/2, batch: (\d+)/(\d+), ite: (\d+)\] "
    r"train loss: (\d+\.\d{3}), tar: (\d+\.\d{3}), IoU: (\d\.\d{3}) \| "
)


def test_lines_and_csv(finished):
    folder, out = finished
    lines = [m.groups() for m in LINE.finditer(out)]
    pairs = int(lines[0][2])
    per_epoch = -(-pairs // 4)
    assert [int(m[3]) for m in lines] == list(range(1, 2 * per_epoch + 1))
    assert [int(m[1]) for m in lines] == [min(4 * (i + 1), pairs) for i in range(per_epoch)] * 2
    assert float(lines[-1][4]) < float(lines[0][4])  # the loss falls
    assert abs(float(lines[0][4]) - 7 * 0.69) < 1.5  # seven outputs that know nothing yet: log 2 each
    with (folder / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    training = [r for r in rows if r["loss"]]
    assert [r["ite"] for r in training] == [m[3] for m in lines]
    for row, line in zip(training, lines, strict=True):
        assert f"{float(row['loss']):.3f}" == line[4] and f"{float(row['IoU']):.3f}" == line[6]
        assert float(row["loss"]) == pytest.approx(
            sum(float(row[k]) for k in ("tar", *(f"d{i}" for i in range(1, 7)))), rel=1e-4
        )
    held_out = [r for r in rows if r["val_IoU"]]
    assert [r["epoch"] for r in held_out] == ["1", "2"]
    assert all(0 <= float(r[k]) <= 1 for r in held_out for k in ("val_IoU", "val_MAE", "val_maxF"))
    for said in ("device: CPU", "precision: ", "network: u2mambap, "):
        assert said in out


def test_files(finished):
    folder, _ = finished
    names = {p.name for p in folder.iterdir()}
    assert {"last.pth", "last_before.pth", "best.pth", "preview.png", "log.csv", "tensorboard"} <= names
    assert not any(n.startswith(".") for n in names), names
    periodic = sorted(n for n in names if re.fullmatch(r"tiny_bce_itr_\d+_train_\d+\.\d{6}_tar_\d+\.\d{6}\.pth", n))
    assert sorted(int(n.split("_")[3]) for n in periodic) == [3, 6, 9, 12]
    assert len(list(folder.glob("*.pth"))) == len(periodic) + 3
    for name in (*periodic, "best.pth"):
        U2MAMBAP().load_state_dict(torch.load(folder / name, weights_only=True))
    with Image.open(folder / "preview.png") as sheet:
        assert sheet.size[0] == 3 * 48 + 4 * 4


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGKILL", -9)])
def test_a_run_stopped_in_the_middle_of_an_epoch_ends_as_if_it_never_was(number, code, finished, data, tmp_path):
    """SIGTERM: tests/test_faults.py."""
    process = start(data, tmp_path, *RICH)
    assert any("ite: 4]" in line for line in process.stdout)
    process.send_signal(getattr(signal, number))
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "Traceback" not in err
    kept = torch.load(tmp_path / "tiny" / "last.pth", weights_only=True)["state"]["iteration"]
    if number == "SIGKILL":
        assert kept % 3 == 0  # the last save_frq: 3, or a later one when this process was slow to read
    else:
        assert kept >= 4
        assert f"stopped at iteration {kept}" in out
    again = train(data, tmp_path, *RICH)
    assert again.returncode == 0 and f"iteration {kept}" in again.stdout
    assert same(weights(tmp_path / "tiny"), weights(finished[0]))
    assert same(*(torch.load(f / "best.pth", weights_only=True) for f in (tmp_path / "tiny", finished[0])))
    rows = [list(csv.DictReader((f / "log.csv").open(newline=""))) for f in (tmp_path / "tiny", finished[0])]
    columns = ("ite", "loss", "tar", "IoU", "lr", "val_IoU", "val_MAE", "val_maxF")
    assert [[r[k] for k in columns] for r in rows[0]] == [[r[k] for k in columns] for r in rows[1]]


def test_other_settings_are_not_mixed_into_a_run_unless_forced_to(run, tmp_path):
    """From Adam without an average to AdamW with one: nothing of the old run is in the way."""
    run()
    more = {"ema_decay": 0.5, "lr": 1e-3, "weight_decay": 0.1, "epoch_num": 2}
    with pytest.raises(UserError, match=r"lr: 0\.0001 -> 0\.001.*--resume"):
        run(**more)
    code, out = run(resume="force", **more)
    assert code == 0 and "iteration 6" in out and "[epoch: 2/2, batch: 23/23, ite: 12]" in out
    assert (tmp_path / "tiny" / "best.pth").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"lr": -1.0}, "lr = -1.0: must be from 0 to 10"),
        ({"lr": "1e-3"}, "lr = '1e-3': must be of type float"),
        ({"crop": 64}, "crop = 64: cannot be larger than rescale = 40"),
        ({"tra_image_dir": "nowhere"}, "nowhere"),
        ({"tra_image_dir": "nowhere", "tra_label_dir": "nowhere"}, "u2mamba_train.py demo"),
        ({"device": "cuda"}, 'device = "cuda"'),
        ({"arch": "u3net"}, "arch = 'u3net'"),
        ({"model_name": "../up"}, "model_name = '../up'"),
        ({"model_name": ".."}, "model_name = '..'"),
        ({"model_name": "x" * 181}, "too long, the limit is 180 bytes"),
        ({"model_name": "x" * 256}, "too long, the limit is 180 bytes"),
        ({"saved_models": __file__}, "cannot be written"),
        ({"early_crop": 16}, "early_crop = 16"),
        ({"scale_min": 0.5}, "scale_min = 0.5"),
        ({"grad_accum_steps": 5}, "grad_accum_steps = 5"),
    ],
)
def test_unusable_input_is_one_line(settings, says, run, tmp_path):
    if "device" in settings and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UserError) as error:
        run(**settings)
    assert says in str(error.value) and ("\n" not in str(error.value) or "demo" in says)  # which lists ways to get data
    assert not list(tmp_path.rglob("*.pth"))


def test_fewer_pairs_than_a_batch_and_no_held_out_pair(run, tmp_path):
    draw_pairs(tmp_path, ("d11", "d12"))
    code, out = run(data_dir=str(tmp_path), drop_last=True)
    assert code == 0 and "batch: 2/2, ite: 1]" in out
    assert (tmp_path / "tiny" / "preview.png").exists()


def test_damaged_files_are_set_aside_and_the_exit_code_tells(run, tmp_path):
    draw_pairs(tmp_path, [f"d{i}" for i in range(10, 16)])
    (tmp_path / "images" / "d11.png").write_bytes(b"not an image")
    (tmp_path / "masks" / "d12.png").unlink()
    code, out = run(data_dir=str(tmp_path))
    assert code == 1 and "d11.png" in out and "d12" in out


def test_two_runs_do_not_share_a_folder(data, tmp_path):
    """As processes, of which the second ends with one line."""
    first = start(data, tmp_path, "--epoch_num", "200")
    try:
        assert any("ite: 1]" in line for line in first.stdout)
        second = train(data, tmp_path, "--epoch_num", "200")
    finally:
        first.kill()
        first.communicate(timeout=60)
    assert second.returncode == 2 and "in use by another run" in second.stderr and second.stderr.count("\n") == 1


def test_when_the_reader_of_a_pipe_goes_the_run_is_saved(data, tmp_path):
    """As `python u2mamba_train.py 2>&1 | tee log` and Ctrl-C, which ends tee as well."""
    more = ("--epoch_num", "500", "--save_frq", "100000", "--val_frq", "1000")
    process = start(data, tmp_path, *more, stderr=subprocess.STDOUT)
    assert any("ite: 2]" in line for line in process.stdout)
    process.stdout.close()
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) in (130, 143)  # by what came first
    assert torch.load(tmp_path / "tiny" / "last.pth", weights_only=True)["state"]["iteration"] >= 2


# ------- where the machine or the caller is not as usual

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
