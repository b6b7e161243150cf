"""Does a run that is killed again and again end as one that nobody touched?

    python -m benchmarks.faults --kills 50

Starts the real script, tiny, on a disk slowed down so that kills fall into the writing of checkpoints too; sends it
SIGKILL at random moments, looks at every checkpoint it left, starts it again; lets it finish, and compares weights,
optimizer and log with those of a run without kills, bit for bit. On the CPU. Linux and macOS.
"""

import csv
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.hardware import lines
from u2mamba.dataset.demo import make_demo

ROOT = Path(__file__).parents[1]
SAVE_FRQ = 3  # iterations
PAIRS, BATCH = 24, 4  # 23 for training: 6 iterations an epoch
AHEAD = 2 * SAVE_FRQ  # most iterations that a start is left to do before it is killed


@dataclass
class Options:
    kills: int = 50
    seed: int = 0  # of the moments


@dataclass
class Figures:
    """What came of the kills."""

    kills: int = 0
    while_saving: int = 0  # a part of a checkpoint lay under a temporary name
    before_a_step: int = 0  # the process was still starting
    checkpoints: int = 0  # looked at, under their final names
    unreadable: int = 0
    most_repeated: int = 0  # iterations done and not kept


def command(folder: Path, epochs: int) -> list[str]:
    words = f"--arch u2mambap --rescale 40 --crop 40 --batch_size_train {BATCH} --log_frq 1 --save_frq {SAVE_FRQ}"
    words += f" --epoch_num {epochs} --device cpu --ema_decay 0.9 --model_name run"
    script = [sys.executable, "-m", "benchmarks.slow_disk", str(ROOT / "u2mamba_train.py")]
    return [*script, *words.split(), "--data_dir", str(folder.parent / "data"), "--saved_models", str(folder)]


def iteration_of(line: str) -> int:
    """The iteration that a printed line is about, 0 for other lines."""
    return int(line.split("ite: ")[1].split("]")[0]) if "ite: " in line else 0


def killed_run(folder: Path, epochs: int, kills: int, seed: int) -> Figures:
    """Kills the run in `folder` that many times; it is left unfinished."""
    chance, figures = random.Random(seed), Figures()
    run = folder / "run"
    for _ in range(kills):
        process = subprocess.Popen(command(folder, epochs), cwd=ROOT, stdout=subprocess.PIPE, text=True)
        steps = chance.randint(0, AHEAD)
        printed = 0
        started = time.monotonic()
        while steps and (line := process.stdout.readline()):
            if iteration_of(line):
                printed, steps = iteration_of(line), steps - 1
        time.sleep(chance.random() * (0.6 if printed else 6))
        process.kill()
        rest, _ = process.communicate()
        if process.returncode != -signal.SIGKILL:
            raise RuntimeError(
                f"the run ended by itself with {process.returncode} after {time.monotonic() - started} s"
            )
        printed = max(printed, *map(iteration_of, rest.splitlines()), 0)
        figures.kills += 1
        figures.before_a_step += not printed
        figures.while_saving += any(run.glob(".*.tmp"))
        contents = [_read(path) for path in run.glob("*.pth")]
        figures.checkpoints += len(contents)
        figures.unreadable += contents.count(None)
        kept = _read(run / "last.pth")["progress"]["iteration"] if (run / "last.pth").exists() else 0
        figures.most_repeated = max(figures.most_repeated, printed - kept)
    return figures


def _read(path: Path) -> Any:
    try:
        return torch.load(path, weights_only=True)
    except Exception:  # whatever a damaged file makes of it, it is counted
        return None


def finish(folder: Path, epochs: int) -> None:
    """Runs the run in `folder` to its end."""
    subprocess.run(command(folder, epochs), cwd=ROOT, stdout=subprocess.DEVNULL, check=True)


def differences(a: Path, b: Path) -> list[str]:
    """Names of what is not the same in the folders of two finished runs."""
    runs = [torch.load(folder / "run" / "last.pth", weights_only=True) for folder in (a, b)]
    flat = [dict(_tensors({k: run[k] for k in ("model", "step")})) for run in runs]
    different = [k for k in flat[0] if not torch.equal(flat[0][k], flat[1].get(k, torch.empty(0)))]
    names = [sorted(path.name for path in (folder / "run").glob("run_*.pth")) for folder in (a, b)]
    different += ["names of the weight files"] if names[0] != names[1] else []
    return different + (["log.csv"] if _log(a) != _log(b) else [])


def _tensors(content: Any, name: str = ""):
    if isinstance(content, torch.Tensor):
        yield name, content
    elif isinstance(content, (dict, list)):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from _tensors(value, f"{name}.{key}")


def _log(folder: Path) -> list[tuple[str, ...]]:
    with (folder / "run" / "log.csv").open(newline="") as file:
        return [tuple(row[k] for k in ("ite", "loss", "tar", "IoU", "lr", "val_maxF")) for row in csv.DictReader(file)]


def main(options: Options) -> None:
    epochs = options.kills * AHEAD // (PAIRS // BATCH) + 1
    print("\n".join(lines(torch.device("cpu"))))
    with tempfile.TemporaryDirectory() as root:
        make_demo(Path(root, "data"), n=PAIRS)
        whole, broken = Path(root, "whole"), Path(root, "broken")
        figures = killed_run(broken, epochs, options.kills, options.seed)
        print(figures, flush=True)
        for folder in (broken, whole):
            finish(folder, epochs)
        print(
            f"{epochs * (PAIRS // BATCH)} iterations; differences from a run without kills:", differences(whole, broken)
        )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__, use_underscores=True))
