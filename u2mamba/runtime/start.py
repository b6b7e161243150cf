"""Imported first by the scripts: what can go wrong before their packages are loaded ends them without a traceback.

A missing package is named. Ctrl-C in the seconds that PyTorch takes to load ends the script at once;
`runtime.errors.one_line_errors` takes over from there.
"""

import importlib
import importlib.util
import signal
import sys
from pathlib import Path

COMMON = ("torch", "torchvision", "numpy", "skimage", "PIL", "tyro", "filelock", "psutil", "joblib", "tqdm")
REQUIRED = {  # script -> packages that it cannot do without
    "u2mamba_train.py": (*COMMON, "torchmetrics"),
    "u2mamba_eval.py": (*COMMON, "torchmetrics", "matplotlib", "py_sod_metrics"),
    "u2mamba_predict.py": COMMON,
    "u2mamba_export.py": COMMON,
    "prepare_duts.py": ("numpy", "PIL"),
}


def exit_without(packages: tuple[str, ...]) -> None:
    """Ends the process with exit code 2 and one line where one of `packages` is there and cannot be imported (PyPI's
    torchvision next to a PyTorch of another build, say)."""
    for name in packages:
        try:
            importlib.import_module(name)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            print(f"error: {name} cannot be imported ({reason}): reinstall it with the PyTorch here", file=sys.stderr)
            sys.exit(2)


script = Path(sys.argv[0]).name
if script in REQUIRED:  # not where a test or a notebook imports a script
    if missing := [name for name in REQUIRED[script] if importlib.util.find_spec(name) is None]:
        print(
            f"error: {sys.executable} has no {', '.join(missing)}: activate the environment with the packages "
            "(README: . .venv/*/activate), or install them: pip install -r requirements.txt",
            file=sys.stderr,
        )
        sys.exit(2)
    if script != "prepare_duts.py" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if script == "u2mamba_train.py":
        exit_without(("torchvision", "torchmetrics"))
