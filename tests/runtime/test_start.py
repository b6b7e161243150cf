"""What goes wrong before a script has loaded its libraries ends it without a traceback."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("script", ["train", "predict", "eval", "export"])
def test_no_traceback_while_libraries_load(tmp_path, script):
    for name in ("torch.py", "numpy.py"):  # u2mamba_eval.py loads PyTorch later
        (tmp_path / name).write_text('import time\nprint("loading", flush=True)\ntime.sleep(60)\n')
    command = [sys.executable, f"u2mamba_{script}.py", "--help"]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline() == "loading\n"
        run.send_signal(signal.SIGINT)
        assert "Traceback" not in run.communicate(timeout=30)[1]
    assert run.returncode == -signal.SIGINT


@pytest.mark.parametrize(
    "script, first",
    [(f"u2mamba_{name}.py", "torch, torchvision, numpy, ") for name in ("train", "predict", "eval", "export")]
    + [("train_data/prepare_duts.py", "numpy, PIL: ")],
)
def test_missing_packages_are_named(script, first):
    """-S: as a Python in which nothing was installed."""
    done = subprocess.run([sys.executable, "-S", script, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {sys.executable} has no {first}")
    assert done.stderr.count("\n") == 1
