"""Imported first by the scripts: Ctrl-C in the seconds that PyTorch takes to load ends them without a traceback.

`engine.run.one_line_errors` takes over from there.
"""

import signal
import sys
from pathlib import Path

if Path(sys.argv[0]).name.startswith("u2mamba_") and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # not where a test or a notebook imports a script
