"""Checkpoints of a run: written whole or not at all, resumed from the newest that is whole.

A run's folder holds weights files in U-2-Net's naming every `save_frq` iterations, best.pth, and last.pth with
everything to resume from; the last.pth of before stays as last_before.pth, in case the newest turns out to be corrupt.
"""

import contextlib
import errno
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn

from model.weights import CorruptFileError, cpu_state_dict, load_state_dict, read_file
from u2mamba.engine.distributed import DistContext
from u2mamba.engine.schedule import TrainState
from u2mamba.engine.step import TrainStep
from u2mamba.runtime.config import differences, to_dict
from u2mamba.runtime.environment import ROOT, provenance
from u2mamba.runtime.errors import UserError
from u2mamba.runtime.files import atomic_write, check_folder, replacing
from u2mamba.runtime.source import source_checksums

CONFIG_FILE = "config.json"
SAVE_SECONDS = 300.0  # at most between two last.pth
FIX_HINT = "move it away, or use --resume never"
WEIGHTS_NAME = re.compile(r".+_bce_itr_(\d+)_train_[^_]+_tar_[^_]+\.pth")
RESUME_IGNORED_KEYS = {  # settings that do not change what a run computes
    "resume", "model_name", "saved_models", "data_dir", "tra_image_dir", "tra_label_dir", "log_frq", "val_frq", "save_frq",
    "keep_checkpoints", "grad_accum_steps", "deterministic", "device", "gpu", "plain", "processes",
}  # fmt: skip
PER_RANK_KEYS = RESUME_IGNORED_KEYS - {"val_frq", "log_frq"}  # settings that the processes of a run may have otherwise


class CheckpointError(UserError):
    """A checkpoint that cannot be read, or does not fit."""


def save(content: Any, path: Path, before_rename: Callable[[], None] = lambda: None) -> None:
    """Writes `content` to a temporary file, then renames it. Raises OSError."""
    with replacing(path, before_rename=before_rename) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's zip writer hides the error of the disk
            cause = error.__context__
            raise cause if isinstance(cause, OSError) else OSError(errno.EIO, os.strerror(errno.EIO)) from None


def weights_name(model_name: str, iteration: int, train_loss: float, tar_loss: float) -> str:
    """U-2-Net's name of a weights file, which users sort and parse by eye."""
    return f"{model_name}_bce_itr_{iteration}_train_{train_loss:3f}_tar_{tar_loss:3f}.pth"


def weights_files(folder: Path) -> list[tuple[int, Path]]:
    """(iteration, file) of the weights files of the run in `folder`, oldest first."""
    return sorted(
        (int(match[1]), folder / match[0]) for match in map(WEIGHTS_NAME.fullmatch, os.listdir(folder)) if match
    )


def prune(folder: Path, keep: int, iteration: int) -> None:
    """Deletes all but the `keep` newest weights files up to `iteration`'s; 0 keeps all. Later ones belong to a run that
    was resumed from an earlier checkpoint."""
    written = [path for number, path in weights_files(folder) if number <= iteration]
    for path in written[:-keep] if keep else []:
        with contextlib.suppress(OSError):
            path.unlink()


_locks: list[FileLock] = []


@contextlib.contextmanager
def release_run_locks() -> Iterator[None]:
    """Releases at its end what `acquire_run_dir` locked in it; also a decorator."""
    try:
        yield
    finally:
        while _locks:
            _locks.pop().release()


def acquire_run_dir(folder: Path) -> None:
    """Makes the folder of a run and locks it until `release_run_locks` or the end of the process.

    Raises UserError when it cannot be written, or another run uses it.
    """
    check_folder(folder)
    try:
        lock = FileLock(folder / "run.lock")
        lock.acquire(timeout=0)
        _locks.append(lock)
    except Timeout:
        raise UserError(f"{folder} is in use by another run: wait for it, or choose another model_name") from None
    except (OSError, NotImplementedError) as error:  # a file system without locks
        print(f"warning: {folder} cannot be locked ({error}): start no second run in it")
    for file in folder.glob(".*.tmp"):  # left by a killed run
        with contextlib.suppress(OSError):
            file.unlink()


def archive_run(folder: Path) -> None:
    """Renames what an earlier run left in `folder`, adding a number."""
    names = ("last.pth", "last_before.pth", "best.pth", "preview.png", "log.csv", CONFIG_FILE, "tensorboard")
    files = [folder / name for name in names]
    files = [f for f in (*files, *(path for _, path in weights_files(folder))) if f.exists()]
    number = 1
    while any(f.with_stem(f"{f.stem}_{number}").exists() for f in files):
        number += 1
    for f in files:
        f.rename(f.with_stem(f"{f.stem}_{number}"))
    if files:
        print(f"new run: the {len(files)} files of the earlier one ({files[0].name}, ...) now end in _{number}")


class Checkpointer:
    """Saves and resumes the run in `folder`. data: what identifies the training and validation pairs (name -> value)."""

    def __init__(self, folder: Path, cfg: Any, step: TrainStep, dist: DistContext, data: Mapping[str, Any]):
        self.folder, self.cfg, self.step, self.dist = folder, cfg, step, dist
        self.last, self.before = folder / "last.pth", folder / "last_before.pth"
        self.settings = to_dict(cfg) | {"processes": dist.size}
        self.run = {
            "settings": self.settings, "defaults": to_dict(type(cfg)()), "data": dict(data),
            "code": source_checksums(ROOT), "made": provenance(step.device),
        }  # fmt: skip
        self.last_is_whole = False  # whether the file there was read or written whole, and may become last_before.pth
        self.saved = True  # whether the last writing of last.pth succeeded
        self._written, self._took = time.monotonic(), 0.0  # end and seconds of the last writing of last.pth

    # ------- resume

    def restore(self) -> TrainState:
        """Resumes the run in the folder, or begins one; the state in which the loop starts.

        Raises UserError where the run there was made with settings, data or code that would now compute something else,
        and for damaged or foreign files.
        """
        saved, path = self.dist.broadcast_object(self._find_latest)
        if saved is None:
            if self.dist.is_main:
                archive_run(self.folder)
                self._write_config()
            return TrainState()
        try:
            state = TrainState(**saved["state"])
            if not all(isinstance(v, (int, float, str)) for v in saved["state"].values()):
                raise TypeError(f"state is {state}")
            self._check_settings(saved, state, path)
            load_state_dict(self.step.net, saved["model"], path)
            if saved["step"] is not None:  # else it is a weights file
                self.step.load_state_dict(saved["step"])
                torch.set_rng_state(saved["random"])
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise CheckpointError(f"{path}: does not hold a run to resume ({reason}); {FIX_HINT}") from None
        if state.finished and state.epoch < self.cfg.epoch_num:
            state.finished = False
        if not state.finished:
            print(f"resuming from {path}: epoch {state.epoch + 1}, iteration {state.iteration}")
            if self.dist.is_main:
                self._write_config()
        self.last_is_whole = path == self.last
        return state

    def _find_latest(self) -> tuple[dict[str, Any] | None, Path]:
        """The content and path of the first whole file of last.pth, last_before.pth and the weights files, newest first;
        (None, ...) where there is no run, or resume is "never"."""
        files = [path for path in (self.last, self.before) if path.exists()]
        if self.cfg.resume == "never" or not files:
            return None, self.last
        for path in files:
            try:
                content = read_file(path)
            except CorruptFileError as error:
                print(f"warning: {error}")
                continue
            except ValueError as error:
                raise CheckpointError(f"{error}; {FIX_HINT}") from None
            if isinstance(content, dict) and "progress" in content:
                raise CheckpointError(f"{path}: holds a run of an earlier version, which cannot be resumed; {FIX_HINT}")
            if not isinstance(content, dict) or not {"run", "state", "step", "model", "random"} <= content.keys():
                raise CheckpointError(f"{path}: does not hold a run to resume; {FIX_HINT}")
            return content, path
        for _, path in reversed(weights_files(self.folder)):
            try:
                weights = read_file(path)
                made = weights._metadata["u2mamba"]
                content = {"run": made["run"], "state": made["state"], "step": None, "model": weights}
            except (ValueError, AttributeError, KeyError, TypeError) as error:
                print(f"warning: {error}")
                continue
            print(f"warning: {path} holds weights only: the state of the optimizer and of the averages is lost")
            return content, path
        raise CheckpointError(f"{files[0]}: is damaged, and no other checkpoint in {self.folder} is whole; {FIX_HINT}")

    def _check_settings(self, saved: Mapping[str, Any], state: TrainState, path: Path) -> None:
        before, after, old_defaults = saved["run"]["settings"], self.settings, saved["run"]["defaults"]
        known = self.run["defaults"] | before  # a setting that the run did not know counts as its default
        gone = {k for k in before if k not in after and before[k] == old_defaults.get(k)}
        extends = self.cfg.epoch_num > before["epoch_num"]
        extendable = self.cfg.lr_schedule == "constant" and not self.cfg.early_crop  # neither depends on epoch_num
        ignored = RESUME_IGNORED_KEYS | gone | ({"epoch_num"} if extendable else set())
        other = differences(known, after, ignored)
        data_before, data_after = saved["run"]["data"], self.run["data"]
        if data_before != data_after:
            other.append("other training or validation pairs (names, sizes or contents)")
        folders = [k for k in ("data_dir", "tra_image_dir", "tra_label_dir") if before.get(k) != after.get(k)]
        if folders and not other:
            print(f"the same pairs in another folder: {', '.join(f'{k} = {after[k]!r}' for k in folders)}")
        if other and self.cfg.resume == "auto":
            raise UserError(
                f"{path} was made with other settings ({'; '.join(other)}): set them back, choose another --model_name, "
                f"or use --resume force (resume with the new ones, at the learning rate of a run of {self.cfg.epoch_num} "
                "epochs) or --resume never (start over)"
            )
        code = [
            k
            for k in {**saved["run"]["code"], **self.run["code"]}
            if saved["run"]["code"].get(k) != self.run["code"].get(k)
        ]
        if code and state.finished and not extends and self.cfg.resume == "auto":
            raise UserError(
                f"{path} holds a finished run, and the code has changed since: {', '.join(code)}; --resume never trains from scratch"
            )
        if code:
            print(f"the code has changed since this run was started: {', '.join(code)}")
        if before["processes"] != self.dist.size:
            print(
                f"processes: {before['processes']} before, now {self.dist.size}: other batches, the same learning rate"
            )

    def _write_config(self) -> None:
        content = {**self.settings, **{k: v for k, v in self.run.items() if k not in ("settings", "defaults")}}
        try:
            atomic_write(self.folder / CONFIG_FILE, json.dumps(content, indent=1).encode())
        except UserError as error:
            print(f"warning: {error}; training continues")

    # ------- save

    def save_last(self, state: TrainState) -> None:
        """Writes last.pth, in the main process."""
        if not self.dist.is_main:
            return
        started = time.monotonic()
        content = {
            "run": self.run, "state": asdict(state), "model": cpu_state_dict(self.step.net, self.cfg.rescale),
            "step": self.step.state_dict(), "random": torch.get_rng_state(),
        }  # fmt: skip

        def keep_before() -> None:
            if self.last_is_whole and self.last.exists():
                os.replace(self.last, self.before)

        try:
            save(content, self.last, keep_before)
            self.saved = True
        except OSError as error:
            if (
                error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None))
                and self.last_is_whole
                and self.last.exists()
            ):
                self.before.unlink(missing_ok=True)  # the newer file needs the space more
            self.saved = self._save_or_warn(content, self.last)
        self.last_is_whole |= self.saved
        self._written = time.monotonic()
        self._took = self._written - started

    def is_due(self) -> bool:
        """Whether the last last.pth is old enough for another."""
        return time.monotonic() - self._written > SAVE_SECONDS

    def is_cheap(self) -> bool:
        """Whether another last.pth adds less than 2 % to the run, by the time that the one before took."""
        return time.monotonic() - self._written > 50 * self._took

    def save_weights(self, net: nn.Module, state: TrainState, loss: float, tar: float) -> None:
        """Writes the weights file of an iteration and deletes old ones, in the main process."""
        path = self.folder / weights_name(self.cfg.model_name, state.iteration, loss, tar)
        if self.dist.is_main and self._save_or_warn(self._weights(net, state), path):
            prune(self.folder, self.cfg.keep_checkpoints, state.iteration)

    def save_best(self, net: nn.Module, state: TrainState) -> bool:
        """Writes best.pth, in the main process; False where the disk failed."""
        return not self.dist.is_main or self._save_or_warn(self._weights(net, state), self.folder / "best.pth")

    def _weights(self, net: nn.Module, state: TrainState) -> dict[str, torch.Tensor]:
        weights = cpu_state_dict(net, self.cfg.rescale)
        weights._metadata["u2mamba"] |= {"state": asdict(state), "run": self.run}
        return weights

    def _save_or_warn(self, content: Any, path: Path) -> bool:
        try:
            save(content, path)
        except OSError as error:
            print(f"warning: {path} could not be written ({error.strerror or error}); training continues", flush=True)
            return False
        return True

    def resume_hint(self) -> str:
        """What a run that stops now says."""
        where = "here" if self.saved else f"what was saved before, since {self.last} could not be written"
        return f"the same command{' without --resume never' * (self.cfg.resume == 'never')} resumes from {where}"
