"""What goes wrong before a script has loaded its libraries ends it without a traceback."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

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
    [(f"u2mamba_{name}.py", "torch, numpy, ") for name in ("train", "predict", "eval", "export")]
    + [("train_data/prepare_duts.py", "numpy, PIL: ")],
)
def test_missing_packages_are_named(script, first):
    """-S: as a Python in which nothing was installed."""
    done = subprocess.run([sys.executable, "-S", script, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {sys.executable} has no {first}")
    assert done.stderr.count("\n") == 1


def start(tmp_path, modules, *words, **options):
    """A script, with modules of this content in place of the real ones."""
    for name, content in modules.items():
        (tmp_path / f"{name}.py").write_text(content)
    env = os.environ | {"PYTHONPATH": str(tmp_path)} | options.pop("env", {})
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=env, **options)


def test_a_torchvision_of_another_pytorch_is_named_before_the_run(tmp_path):
    broken = {"torchvision": "raise RuntimeError('operator torchvision::nms does not exist')"}
    done = start(tmp_path, broken, "u2mamba_train.py", "demo")
    assert done.returncode == 2 and done.stderr.startswith("error: torch") and done.stderr.count("\n") == 1
    assert "operator torchvision::nms does not exist" in done.stderr
    for script in ("predict", "export"):
        assert start(tmp_path, broken, f"u2mamba_{script}.py", "--help").returncode == 0


def test_python_3_14_evaluates_not_and_says_so(tmp_path):
    newer = {"sitecustomize": "import sys; sys.version_info = (3, 14, 0); sys.modules['py_sod_metrics'] = None"}
    done = start(tmp_path, newer, "u2mamba_eval.py", "--help")
    assert done.returncode == 2 and "does not support Python 3.14" in done.stderr and done.stderr.count("\n") == 1
    requirements = (ROOT / "requirements.txt").read_text()
    assert 'pysodmetrics>=1.6; python_version < "3.14"' in requirements


@pytest.mark.skipif(os.name == "nt", reason="POSIX file descriptors")
def test_a_prediction_without_stderr_or_the_scripts_folder_on_the_path(tmp_path):
    Image.new("RGB", (40, 30), "red").save(image := tmp_path / "a.png")
    words = ["u2mamba_predict.py", str(image), "--size", "48", "--device", "cpu", "--out", str(tmp_path / "out")]
    done = start(tmp_path, {}, *words, env={"PYTHONSAFEPATH": "1"}, stderr=None, preexec_fn=lambda: os.close(2))
    assert done.returncode == 0 and (tmp_path / "out" / "map" / "a.png").is_file()


@pytest.mark.parametrize(
    ("machine", "words", "line"),
    [
        ("import sys; sys.stdin = None", "- --out - --device cpu", "standard input: empty file"),
        ("import sys; sys.stdout = open('/dev/full', 'w')", "a.png", "No space left on device"),
    ],
)
def test_a_machine_without_input_or_space_is_one_line(machine, words, line, tmp_path):
    if "/dev/full" in machine and not Path("/dev/full").exists():
        pytest.skip("a device of Linux")
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    words = words.replace("a.png", str(tmp_path / "a.png")).split()
    done = start(tmp_path, {"sitecustomize": machine}, "u2mamba_predict.py", *words, stdin=subprocess.DEVNULL)
    (error,) = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert done.returncode == 2 and line in error and "Traceback" not in done.stderr
