"""Fault injection: a run that is killed at random times must end exactly like one that was not.

    python -m benchmarks.faults --kills 50

Starts the real training script, tiny and on the CPU, with slow checkpoint writes, so that kills also happen during
writes. Sends SIGKILL at random times, reads every checkpoint that is left, and restarts the run. Then
compares weights, optimizer state and log with those of an uninterrupted run, bitwise. Linux and macOS.
"""

import csv
import io
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.hardware import cli, print_hardware
from u2mamba.dataset.demo import make_demo

ROOT = Path(__file__).parents[1]
SAVE_FRQ = 3  # iterations
PAIRS, BATCH = 24, 4  # 23 for training: 6 iterations per epoch
MAX_AHEAD = 2 * SAVE_FRQ  # iterations that a start may do before it is killed
PIECES, PAUSE = 8, 0.06  # a checkpoint is written in so many pieces; seconds after each, and before the rename
COLUMNS = ("ite", "loss", "tar", "IoU", "lr", "val_maxF")  # of log.csv, all but the times


@dataclass
class Config:
    kills: int = 50
    seed: int = 0  # of the moments


def run_slowly() -> None:
    """`python -c "... run_slowly()" SCRIPT ...` runs a script whose checkpoints are written slowly."""
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
    runpy.run_path(sys.argv[0], run_name="__main__")


def command(folder: Path, epochs: int) -> list[str]:
    words = f"--arch u2mambap --rescale 40 --crop 40 --batch_size_train {BATCH} --log_frq 1 --save_frq {SAVE_FRQ}"
    words += f" --epoch_num {epochs} --device cpu --ema_decay 0.9 --model_name run"
    script = [sys.executable, "-c", "from benchmarks.faults import run_slowly; run_slowly()", "u2mamba_train.py"]
    return [*script, *words.split(), "--data_dir", str(folder.parent / "data"), "--saved_models", str(folder)]


def killed_run(folder: Path, epochs: int, kills: int, seed: int) -> Counter[str]:
    """Kills the run in `folder` that many times and leaves it unfinished; counts what it found after each kill.

    Every checkpoint must be readable, whatever moment the kill hit; torch.load raises otherwise.
    """
    chance, run, counts = random.Random(seed), folder / "run", Counter(most_repeated=0)
    for _ in range(kills):
        process = subprocess.Popen(command(folder, epochs), cwd=ROOT, stdout=subprocess.PIPE, text=True)
        steps, printed = chance.randint(0, MAX_AHEAD), ""
        while printed.count("ite: ") < steps and (line := process.stdout.readline()):
            printed += line
        time.sleep(chance.random() * (0.6 if steps else 6))
        process.kill()
        printed += process.communicate()[0]
        if process.returncode != -signal.SIGKILL:
            raise RuntimeError(f"the run ended before the kill, with exit code {process.returncode}")
        contents = {path.name: torch.load(path, weights_only=True) for path in run.glob("*.pth")}
        counts.update(checkpoints=len(contents), kills_while_saving=any(run.glob(".*.tmp")))
        last = max(map(int, re.findall(r"ite: (\d+)]", printed)), default=0)
        repeated = last - (contents["last.pth"]["state"]["iteration"] if "last.pth" in contents else 0)
        counts["most_repeated"] = max(counts["most_repeated"], repeated)  # iterations
    return counts


def finish(folder: Path, epochs: int) -> None:
    """Runs the run in `folder` to its end."""
    subprocess.run(command(folder, epochs), cwd=ROOT, stdout=subprocess.DEVNULL, check=True)


def difference(a: Path, b: Path) -> str:
    """The first difference between two finished runs, in weights, optimizer state, log or files; "" without any."""
    (state_a, *others_a), (state_b, *others_b) = (_end_of(folder / "run") for folder in (a, b))
    try:
        torch.testing.assert_close(state_a, state_b, rtol=0, atol=0)
    except AssertionError as error:
        return str(error)
    return "" if others_a == others_b else f"{others_a} and {others_b}"


def _end_of(run: Path) -> tuple[dict[str, Any], list[str], list[list[str]]]:
    last = torch.load(run / "last.pth", weights_only=True)
    with (run / "log.csv").open(newline="") as file:
        log = [[row[column] for column in COLUMNS] for row in csv.DictReader(file)]
    return {key: last[key] for key in ("model", "step")}, sorted(path.name for path in run.glob("run_*.pth")), log


def main(cfg: Config) -> None:
    epochs = cfg.kills * MAX_AHEAD // (PAIRS // BATCH) + 1
    print_hardware(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as root:
        make_demo(Path(root, "data"), n=PAIRS)
        whole, broken = Path(root, "whole"), Path(root, "broken")
        print(*(f"{k}: {v}" for k, v in killed_run(broken, epochs, cfg.kills, cfg.seed).items()), sep="\n", flush=True)
        finish(broken, epochs)
        finish(whole, epochs)
        iterations = epochs * (PAIRS // BATCH)
        print(f"{iterations} iterations; difference from an undisturbed run: {difference(whole, broken) or 'none'}")


if __name__ == "__main__":
    cli(main, Config, __doc__)
