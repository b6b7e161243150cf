"""Forks of a process that has loaded PyTorch and the other packages: runs of a script without their 5 s of imports."""

import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path

PACKAGES = (
    "torch._dynamo torch.utils.tensorboard torchvision.utils torchmetrics.functional.image scipy.sparse scipy.ndimage "
    "torchmetrics.functional.classification skimage.transform skimage.data PIL.Image tyro filelock psutil tqdm "
    "py_sod_metrics onnx onnxruntime torch.onnx.symbolic_opset17"
).split()


def _script(script: str, words: list[str], cwd: str, outputs: list[str]) -> None:
    assert not {"model", "u2mamba", "data_loader"} & sys.modules.keys()  # `script` brings its own
    os.chdir(cwd)
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv, sys.path[0] = [script, *words], os.path.dirname(script)
    runpy.run_path(script, run_name="__main__")


def context() -> multiprocessing.context.BaseContext:
    """Whose processes are forks where the system has them."""
    if "forkserver" not in multiprocessing.get_all_start_methods():  # Windows
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PACKAGES, __name__])
    return context


def run_script(script: Path, words: list, cwd: Path, outputs: Path, timeout: float = 300):
    """As subprocess.run of the script in `cwd`; stdout and stderr pass through files in the folder `outputs`."""
    words, paths = list(map(str, words)), [outputs / "stdout", outputs / "stderr"]
    process = context().Process(target=_script, args=(str(script), words, str(cwd), list(map(str, paths))))
    process.start()
    process.join(timeout)
    process.kill()
    assert process.exitcode is not None, f"still running after {timeout} s: {words}"
    return subprocess.CompletedProcess(words, process.exitcode, *(path.read_text() for path in paths))
