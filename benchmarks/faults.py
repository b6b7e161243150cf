"""Fault campaign: a run that is killed at random moments must end exactly as one that was not.

    python -m benchmarks.faults --kills 50

Starts the real training script, tiny and on the CPU, with checkpoints that are written slowly, so that kills fall into
the writing too. Sends SIGKILL at random moments, reads every checkpoint that is left, and starts the run again. Then
compares weights, optimizer state and log with those of an undisturbed run, bitwise. Linux and macOS.
"""

import csv
import io
import os
import random
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
import tyro

from benchmarks.hardware import lines
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


def iteration_of(line: str) -> int:
    """The iteration that a printed line reports, 0 for other lines."""
    return int(line.split("ite: ")[1].split("]")[0]) if "ite: " in line else 0


def killed_run(folder: Path, epochs: int, kills: int, seed: int) -> Counter[str]:
    """Kills the run in `folder` that many times and leaves it unfinished; counts what it found after each kill."""
    chance, run, counts = random.Random(seed), folder / "run", Counter(unreadable=0, most_repeated=0)
    for _ in range(kills):
        process = subprocess.Popen(command(folder, epochs), cwd=ROOT, stdout=subprocess.PIPE, text=True)
        steps, printed = chance.randint(0, MAX_AHEAD), 0
        while steps and (line := process.stdout.readline()):
            if iteration_of(line):
                printed, steps = iteration_of(line), steps - 1
        time.sleep(chance.random() * (0.6 if printed else 6))
        process.kill()
        rest, _ = process.communicate()
        if process.returncode != -signal.SIGKILL:
            raise RuntimeError(f"the run ended before the kill, with exit code {process.returncode}")
        printed = max(printed, *map(iteration_of, rest.splitlines()), 0)
        contents = {path.name: _read(path) for path in run.glob("*.pth")}
        kept = contents["last.pth"]["state"]["iteration"] if contents.get("last.pth") else 0
        counts.update(kills=1, before_the_first_iteration=not printed, checkpoints=len(contents))
        counts.update(while_saving=any(run.glob(".*.tmp")), unreadable=list(contents.values()).count(None))
        counts["most_repeated"] = max(counts["most_repeated"], printed - kept)  # iterations
    return counts


def _read(path: Path) -> Any:
    try:
        return torch.load(path, weights_only=True)
    except Exception:  # whatever torch.load makes of a damaged file, it is counted
        return None


def finish(folder: Path, epochs: int) -> None:
    """Runs the run in `folder` to its end."""
    subprocess.run(command(folder, epochs), cwd=ROOT, stdout=subprocess.DEVNULL, check=True)


def differences(a: Path, b: Path) -> list[str]:
    """Names of the tensors and files that differ between two finished runs."""
    (state_a, names_a, log_a), (state_b, names_b, log_b) = (_end_of(folder / "run") for folder in (a, b))
    different = [k for k in state_a if not torch.equal(state_a[k], state_b.get(k, torch.empty(0)))]
    return different + ["weight files"] * (names_a != names_b) + ["log.csv"] * (log_a != log_b)


def _end_of(run: Path) -> tuple[dict[str, torch.Tensor], list[str], list[list[str]]]:
    last = torch.load(run / "last.pth", weights_only=True)
    with (run / "log.csv").open(newline="") as file:
        log = [[row[column] for column in COLUMNS] for row in csv.DictReader(file)]
    return dict(_tensors([last["model"], last["step"]])), sorted(path.name for path in run.glob("run_*.pth")), log


def _tensors(content: Any, name: str = ""):
    if isinstance(content, torch.Tensor):
        yield name, content
    elif isinstance(content, (dict, list)):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from _tensors(value, f"{name}.{key}")


def main(cfg: Config) -> None:
    epochs = cfg.kills * MAX_AHEAD // (PAIRS // BATCH) + 1
    print("\n".join(lines(torch.device("cpu"))))
    with tempfile.TemporaryDirectory() as root:
        make_demo(Path(root, "data"), n=PAIRS)
        whole, broken = Path(root, "whole"), Path(root, "broken")
        print(*(f"{k}: {v}" for k, v in killed_run(broken, epochs, cfg.kills, cfg.seed).items()), sep="\n", flush=True)
        finish(broken, epochs)
        finish(whole, epochs)
        iterations = epochs * (PAIRS // BATCH)
        print(f"{iterations} iterations; differences from an undisturbed run: {differences(whole, broken) or 'none'}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, use_underscores=True))
