"""Runs a script as `python SCRIPT ...` does, but its checkpoints are written slowly: so that faults.py can kill there.

python -m benchmarks.slow_disk SCRIPT [WORD ...]
"""

import io
import os
import runpy
import sys
import time
from pathlib import Path

import torch

PIECES, PAUSE = 8, 0.06  # a checkpoint goes out in so many pieces; seconds after each, and before a file's new name


def main() -> None:
    save, replace = torch.save, os.replace

    def save_slowly(content, file) -> None:
        whole = io.BytesIO()
        save(content, whole)
        whole.seek(0)
        while piece := whole.read(whole.getbuffer().nbytes // PIECES + 1):
            file.write(piece)
            file.flush()
            time.sleep(PAUSE)

    def replace_slowly(old, new) -> None:
        time.sleep(PAUSE)
        replace(old, new)

    torch.save, os.replace = save_slowly, replace_slowly
    del sys.argv[0]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
