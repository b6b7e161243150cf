"""A process that has loaded PyTorch and the other packages, but no file of the project, and runs scripts in forks."""

import importlib
import json
import os
import runpy
import sys
import traceback

PACKAGES = (
    "torch._dynamo torch.utils.tensorboard torchvision.utils torchmetrics.functional.image scipy.sparse scipy.ndimage "
    "torchmetrics.functional.classification skimage.transform skimage.data PIL.Image tyro filelock psutil tqdm "
    "py_sod_metrics onnx onnxruntime torch.onnx.symbolic_opset17"
).split()


def run(folder: str, script: str, words: list[str]) -> int:
    """The script of the copy of the project in `folder`, as a command would run it -> exit code."""
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv, sys.path[0] = [script, *words], folder
    try:
        runpy.run_path(script, run_name="__main__")
        return 0
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    for name in PACKAGES:
        importlib.import_module(name)
    assert not {"model", "u2mamba", "data_loader"} & sys.modules.keys()
    print("ready", flush=True)
    for line in sys.stdin:
        if not (child := os.fork()):
            code = run(*json.loads(line))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
