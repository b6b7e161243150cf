"""The training script in a fork of a process that has loaded PyTorch: a run of its own without its 5 s of imports."""

import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "u2mamba_train.py"
LOADED = ["u2mamba_train", "torch._dynamo", "torch.utils.tensorboard", "tests.engine.forked"]


def _script(words: list[str], cwd: Path, outputs: list[str]) -> None:
    os.chdir(cwd)
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = [str(SCRIPT), *words]
    runpy.run_path(str(SCRIPT), run_name="__main__")


def run_script(words: list[str], cwd: Path, outputs: Path, timeout: float = 300) -> subprocess.CompletedProcess:
    """As `python u2mamba_train.py *words` in `cwd`; stdout and stderr pass through files in the folder `outputs`."""
    if "forkserver" not in multiprocessing.get_all_start_methods():  # Windows
        command = [sys.executable, str(SCRIPT), *words]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LOADED)
    paths = [outputs / "stdout", outputs / "stderr"]
    process = context.Process(target=_script, args=(words, cwd, list(map(str, paths))))
    process.start()
    process.join(timeout)
    process.kill()
    assert process.exitcode is not None, f"still running after {timeout} s: {words}"
    return subprocess.CompletedProcess(words, process.exitcode, *(path.read_text() for path in paths))
