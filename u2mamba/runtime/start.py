"""Imported first by the scripts: what can go wrong before their libraries are loaded ends them without a traceback.

A package that is missing is named. Ctrl-C in the seconds that PyTorch takes to load ends the script at once;
`u2mamba.runtime.errors.one_line_errors` takes over from there.
"""

import importlib.util
import signal
import sys
from pathlib import Path

NEEDED = {  # beginning of a script's name -> packages that it cannot do without
    "u2mamba_": ("torch", "torchvision", "numpy", "skimage", "PIL", "matplotlib", "tyro", "filelock", "tqdm"),
    "prepare_": ("numpy", "PIL"),
}
script = Path(sys.argv[0]).name[:8]

if script in NEEDED:  # not where a test or a notebook imports a script
    if missing := [name for name in NEEDED[script] if importlib.util.find_spec(name) is None]:
        print(
            f"error: {sys.executable} has no {', '.join(missing)}: activate the environment with the packages "
            "(README: . .venv/*/activate), or install them: pip install -r requirements.txt",
            file=sys.stderr,
        )
        sys.exit(2)
    if script == "u2mamba_" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
