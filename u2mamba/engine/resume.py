"""Where a run stands and goes on: from the newest checkpoint that is whole and was made with the same constants."""

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import nn

from u2mamba.dataset.batches import DataSource
from u2mamba.dataset.pairs import DataError
from u2mamba.engine import checkpoint
from u2mamba.engine.checkpoint import CheckpointError, Damaged
from u2mamba.engine.logger import best_in_log
from u2mamba.engine.step import TrainStep
from u2mamba.runtime.config import CONSTANTS, MAY_CHANGE, differences
from u2mamba.runtime.errors import UserError
from u2mamba.runtime.files import atomic_write

MEND = "move it away, or give --resume never"
FOLDERS, NAMES = ("data_dir", "tra_image_dir", "tra_label_dir"), "names_checksum"  # of the constants


@dataclass
class Progress:
    """Where the run stands; with the constants it says which pairs the next step takes."""

    epoch: int = 0  # epochs finished, validation included
    position: int = 0  # pairs of the current epoch that were trained on
    iteration: int = 0  # steps done
    best: float = -1.0  # largest held-out max F-measure
    seconds: float = 0.0  # spent, over all starts


def find_last(folder: Path, resume: str, constants: Mapping[str, Any]) -> tuple[dict[str, Any] | None, Path]:
    """What the run in `folder` goes on from, and the file that holds it: the first that is whole of last.pth,
    last_before.pth and the weight files from the newest on; each that is not is named. None where there is no run, or
    resume is "never". From a weight file "step" is None, and the place in the run follows from the `constants`.

    Raises CheckpointError when there is a run but no such file, or one that is whole holds something else.
    """
    last = folder / "last.pth"
    files = [path for path in (last, folder / "last_before.pth") if path.exists()]
    if resume == "never" or not files:
        return None, last
    for path in files:
        try:
            content = checkpoint.load(path)
        except Damaged as error:
            print(f"warning: {error}")
            continue
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {MEND}") from None
        if not isinstance(content, dict) or not {"config", "progress", "step", "model", "random"} <= content.keys():
            raise CheckpointError(f"{path}: does not hold a run to go on from; {MEND}")
        return content, path
    for iteration, path in reversed(checkpoint.weight_files(folder)):
        try:
            weights = checkpoint.load_weights(path)
        except CheckpointError as error:
            print(f"warning: {error}")
            continue
        print(f"warning: {path} holds weights only: the state of the optimizer and of the averages is lost")
        batch, processes = constants["batch_size_train"], constants["processes"]
        per_epoch = constants["pairs"] // processes / batch
        whole = constants.get("whole_batches") and int(per_epoch)
        epoch, done = divmod(iteration, whole or math.ceil(per_epoch))
        place = {"epoch": epoch, "position": done * batch * processes, "iteration": iteration}
        rest = {"config": constants, "step": None, "random": torch.get_rng_state()}
        return rest | {"progress": place | {"best": best_in_log(folder)}, "model": weights}, path
    raise CheckpointError(f"{files[0]}: is damaged, and no other checkpoint in {folder} is whole; {MEND}")


def knows_no_end(lr_schedule: str, crop_early: int) -> bool:
    """Whether nothing in a run depends on how long it will be, so that one may become longer."""
    return lr_schedule == "constant" and not crop_early


def saving(save: Callable[[], None], batches: Iterable[Any]) -> Iterator[Any]:
    """The batches; when the data end the run, because a file has become unreadable, save() first. (Of several processes
    the first one saves, if it is the one that met the file; else the run goes on from the last.pth that is there.)"""
    try:
        yield from batches
    except DataError:
        save()
        raise


def go_on(
    saved: Mapping[str, Any], found: Path, net: nn.Module, step: TrainStep, constants: Mapping[str, Any]
) -> Progress:
    """Puts the run that `find_last` found into `net`, `step` and the random state -> where it stands.

    Raises UserError where it was made with constants that would now compute something else (unless resume is
    "anyway"), and for contents that are not those of a run.
    """
    with contents_of(found):
        before, open_end = saved["config"], knows_no_end(constants["lr_schedule"], constants["crop_early"])
        may_change = MAY_CHANGE | ({"epoch_num"} if open_end else set())
        other = differences(before, constants, may_change | {NAMES})
        if NAMES in before and before[NAMES] != constants[NAMES]:
            other.append("other pairs, by their names")
        elif moved := differences(*({k: c.get(k) for k in FOLDERS} for c in (before, constants)), set()):
            print(f"pairs of the same names as before, in other folders: {'; '.join(moved)}")
        if other and constants["resume"] == "auto":
            raise UserError(
                f"{found} was made with other constants ({'; '.join(other)}): set them back, choose another "
                "model_name, or give --resume anyway (go on with the new ones, at the learning rate that a run of "
                f"{constants['epoch_num']} epochs has there) or --resume never (start anew)"
            )
        checkpoint.fill(net, saved["model"], found, constants["arch"])
        if saved["step"] is not None:  # else it is a weight file
            step.load_state_dict({"ema_decay": before.get("ema_decay", step.ema_decay)} | saved["step"])
        torch.set_rng_state(saved["random"])
        if (count := before.get("processes", 1)) != constants["processes"]:
            print(f"processes: {count} before, now {constants['processes']}: other batches, at the same learning rate")
        progress = Progress(**saved["progress"])
        if not all(isinstance(value, (int, float)) for value in asdict(progress).values()):
            raise TypeError(f"progress is {progress}")
        return progress


def what_is_there(source: DataSource, held_out: DataSource, processes: int) -> dict[str, int]:
    """What counts of a run besides its constants. The checksum tells sets of pairs apart by their names."""
    names = "\n\n".join("\n".join(pair.stem for pair in pairs.pairs) for pairs in (source, held_out))
    checksum = crc32(names.encode(errors="surrogateescape"))
    return {"pairs": len(source), "processes": processes, NAMES: checksum}


def keep_constants(folder: Path, constants: Mapping[str, Any], anew: bool) -> None:
    """Leaves the run's constants where a reader, and whoever opens its weights, finds them. anew: puts what an earlier
    run left in `folder` aside before."""
    if anew:
        put_aside(folder)
    try:
        atomic_write(folder / CONSTANTS, json.dumps(constants, indent=1).encode())
    except UserError as error:
        print(f"warning: {error}; training goes on")


def put_aside(folder: Path) -> None:
    """Renames what an earlier run left in `folder`, under a number."""
    names = ("last.pth", "last_before.pth", "best.pth", "preview.png", "log.csv", CONSTANTS, "tensorboard")
    files = [folder / name for name in names]
    files = [f for f in (*files, *(path for _, path in checkpoint.weight_files(folder))) if f.exists()]
    number = 1
    while any(f.with_stem(f"{f.stem}_{number}").exists() for f in files):
        number += 1
    for f in files:
        f.rename(f.with_stem(f"{f.stem}_{number}"))
    if files:
        print(f"starting anew: the {len(files)} files of the earlier run ({files[0].name}, ...) now end in _{number}")


@contextlib.contextmanager
def contents_of(path: Path) -> Iterator[None]:
    """Turns what odd contents of a checkpoint raise into a CheckpointError that names it."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CheckpointError(f"{path}: does not hold a run to go on from ({reason}); {MEND}") from None
