"""Imported first by the scripts: problems before their packages are loaded end them without a traceback.

A missing package is named. Ctrl-C in the seconds that PyTorch takes to load ends the script at once;
`runtime.errors.one_line_errors` takes over from there.
"""

import importlib.util
import os
import signal
import sys
from pathlib import Path

COMMON = ("torch", "numpy", "skimage", "PIL", "tyro", "psutil", "tqdm")
REQUIRED = {  # script -> packages that it requires
    "u2mamba_train.py": (*COMMON, "filelock", "torchvision", "torchmetrics"),
    "u2mamba_eval.py": (*COMMON, "matplotlib", "py_sod_metrics"),
    "u2mamba_predict.py": COMMON,
    "u2mamba_export.py": COMMON,
    "prepare_duts.py": ("numpy", "PIL"),
}


def find_problem(packages: tuple[str, ...]) -> str:
    """One line naming `packages` that are missing or do not match PyTorch; empty if all is well."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing == ["py_sod_metrics"] and sys.version_info >= (3, 14):
        return "evaluation requires pysodmetrics, which does not support Python 3.14: use 3.10 to 3.13"
    if missing:
        return (
            f"{sys.executable} has no {', '.join(missing)}: activate the environment with the packages "
            "(README: . .venv/*/activate), or install them: pip install -r requirements.txt"
        )
    for name in {"torchvision", "torchmetrics"} & set(packages):  # torchmetrics imports torchvision
        try:
            importlib.import_module(name)
        except Exception as error:  # a torchvision that was built for another PyTorch raises RuntimeError
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            # an OSError is about the machine, such as no usable folder for temporary files
            fix = "" if isinstance(error, OSError) else ": reinstall it to match the installed PyTorch"
            return f"{name} cannot be imported ({reason}){fix}"
    return ""


for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
    if getattr(sys, name) is None:  # a service, pythonw, 2>&-
        setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - it stays open
script = Path(sys.argv[0]).name
if script in REQUIRED:  # not where a test or a notebook imports a script
    if script != "prepare_duts.py" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if problem := find_problem(REQUIRED[script]):
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
