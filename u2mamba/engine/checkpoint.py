"""Checkpoints of a run: written atomically, resumed from the newest intact one.

A run's folder holds weights files in U-2-Net's naming every `save_frq` iterations, best.pth, and last.pth with
everything to resume from; the previous last.pth is kept as last_before.pth, in case the newest turns out to be corrupt.
"""

import errno
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.weights import METADATA_KEY, CorruptFileError, cpu_state_dict, load_pretrained, load_state_dict, read_file
from u2mamba.engine.run_folder import CONFIG_FILE, archive_run, prune, weights_files, weights_name
from u2mamba.engine.schedule import TrainState
from u2mamba.engine.step import TrainStep
from u2mamba.runtime.config import differences, to_dict
from u2mamba.runtime.environment import ROOT, provenance
from u2mamba.runtime.errors import EXIT_OK, EXIT_SKIPPED, UserError
from u2mamba.runtime.files import atomic_write, replacing
from u2mamba.runtime.source import PUBLISHED_LOADER, source_checksums

SAVE_SECONDS = 300.0  # maximum time between two writes of last.pth
FIX_HINT = "move it away, or use --resume never"
RESUME_IGNORED_KEYS = {  # settings that do not change what a run computes
    "resume", "model_name", "saved_models", "data_dir", "tra_image_dir", "tra_label_dir", "val_image_dir",
    "val_label_dir", "log_frq", "val_frq", "save_frq", "keep_checkpoints", "grad_accum_steps", "deterministic",
    "device", "gpu", "plain", "processes",
}  # fmt: skip
PER_RANK_KEYS = RESUME_IGNORED_KEYS - {"val_frq", "log_frq"}  # settings in which the processes of a run may differ


class Checkpointer:
    """Saves and resumes the run in `folder`. fingerprint: a checksum of names and contents of its pairs."""

    def __init__(self, folder: Path, cfg: Any, step: TrainStep, fingerprint: int):
        self.folder, self.cfg, self.step, self.dist = folder, cfg, step, step.dist
        self.last, self.before = folder / "last.pth", folder / "last_before.pth"
        self.settings = to_dict(cfg) | {"processes": self.dist.size}
        self.run = {
            "settings": self.settings, "defaults": to_dict(type(cfg)()), "data": fingerprint,
            "code": source_checksums(ROOT), "made": provenance(step.device),
        }  # fmt: skip
        if self.run["code"].get("data_loader.py", PUBLISHED_LOADER) != PUBLISHED_LOADER:
            print("warning: data_loader.py was edited, but no run uses its classes: edit u2mamba/dataset/augment.py")
        self.dist.check_same(self.settings | {"fingerprint": fingerprint}, PER_RANK_KEYS)
        self.last_is_whole = False  # whether last.pth is known to be intact, and may become last_before.pth
        self.saved = True  # whether the last write of last.pth succeeded
        self._written, self._took = time.monotonic(), 0.0  # end and duration of the last write of last.pth

    # ------- resume

    def restore(self) -> TrainState:
        """Restores network, step and random state from the run in the folder -> its progress; a new one without a run.

        Raises UserError if the run used settings, data or code that differ in a way that changes the result, and for
        damaged or foreign files.
        """
        saved, path = self.dist.broadcast_object(self._find_latest)
        if saved is None:
            return TrainState()
        try:
            state = TrainState(**saved["state"])
            self._check_settings(saved["run"], state, path)
            load_state_dict(self.step.net, saved["model"], path)
            if saved["step"] is not None:  # else it is a weights file
                self.step.load_state_dict(saved["step"])
                torch.set_rng_state(saved["random"])
            where = f"resuming from {path}: epoch {state.epoch + 1}, iteration {state.iteration}"
            done = f"{self.folder} holds a finished run of {state.epoch} epochs; increase --epoch_num to continue it"
            print(done if state.finished else where)
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(
                f"{path}: does not contain a run that this version can resume ({reason}); {FIX_HINT}"
            ) from None
        self.last_is_whole = path == self.last
        return state

    def begin(self, state: TrainState) -> None:
        """Archives an earlier run if this one is new, writes config.json, and broadcasts the weights of the main
        process."""
        self.dist.broadcast_weights(self.step.net)
        if self.dist.is_main:
            if not state.iteration:
                archive_run(self.folder)
            content = self.settings | {k: self.run[k] for k in ("data", "code", "made")}
            try:
                atomic_write(self.folder / CONFIG_FILE, json.dumps(content, indent=1).encode())
            except UserError as error:
                print(f"warning: {error}; training continues")

    def _find_latest(self) -> tuple[Any, Path]:
        """The content and path of the first intact file among last.pth, last_before.pth and the weights files, newest
        first; (None, ...) if there is no run, or resume is "never"."""
        files = [path for path in (self.last, self.before) if path.exists()]
        if self.cfg.resume == "never" or not files:
            return None, self.last
        for path in (*files, *(path for _, path in reversed(weights_files(self.folder)))):
            try:
                content = read_file(path)
            except CorruptFileError as error:
                print(f"warning: {error}")
                continue
            except ValueError as error:
                raise UserError(f"{error}; {FIX_HINT}") from None
            if path not in files:
                print(f"warning: {path} holds weights only: the states of the optimizer and the EMA are lost")
                content = getattr(content, "_metadata", {}).get(METADATA_KEY, {}) | {"step": None, "model": content}
            return content, path
        raise UserError(f"{files[0]}: is damaged, and no other checkpoint in {self.folder} is intact; {FIX_HINT}")

    def _check_settings(self, run: Mapping[str, Any], state: TrainState, path: Path) -> None:
        before, after, auto = run["settings"], self.settings, self.cfg.resume == "auto"
        gone = {k for k in before if k not in after and before[k] == run["defaults"].get(k)}
        # a larger epoch_num continues a finished run, including one that was stopped early
        longer = state.finished and after["epoch_num"] > before["epoch_num"]
        state.finished &= not longer
        extendable = (longer or self.cfg.lr_schedule == "constant") and not self.cfg.early_crop
        ignored = RESUME_IGNORED_KEYS | gone | ({"epoch_num"} if extendable else set())
        # a setting that the saved run does not have counts as its default
        other = differences(self.run["defaults"] | before, after, ignored)
        if run["data"] != self.run["data"]:
            other.append("different training or validation pairs (names, sizes or contents)")
        folders = [k for k in ("data_dir", "tra_image_dir", "tra_label_dir") if before.get(k) != after.get(k)]
        if folders and not other:
            print(f"the same pairs in another folder: {', '.join(f'{k} = {after[k]!r}' for k in folders)}")
        if other and auto:
            raise UserError(
                f"{path} was saved with other settings ({'; '.join(other)}): restore them, choose another "
                "--model_name, or use --resume force (resume with the new ones, at the learning rate of a run of "
                f"{self.cfg.epoch_num} epochs) or --resume never (start over)"
            )
        if longer and self.cfg.lr_schedule != "constant":
            print(f"epoch_num: {before['epoch_num']} -> {after['epoch_num']}: lr follows the longer run's schedule")
        old, new = run["code"], self.run["code"]
        if code := ", ".join(file for file in old | new if old.get(file) != new.get(file)):
            if state.finished and auto:
                raise UserError(
                    f"{path} holds a finished run, and the code has changed since: {code}; "
                    "use --resume never to train from scratch"
                )
            print(f"the code has changed since this run was saved: {code}")
        if (processes := before["processes"]) != self.dist.size:
            print(f"processes: {processes} before, now {self.dist.size}: the learning rate stays the same")

    # ------- save

    def save_last(self, state: TrainState, finished: bool = False) -> None:
        """Writes last.pth, in the main process. finished: the run has ended, after its last epoch or by a `break`."""
        state.finished = finished
        if not self.dist.is_main:
            return
        started = time.monotonic()
        content = {
            "run": self.run, "state": asdict(state), "model": cpu_state_dict(self.step.net, self.cfg.rescale),
            "step": self.step.state_dict(), "random": torch.get_rng_state(),
        }  # fmt: skip
        before = self.before if self.last_is_whole and self.last.exists() else None
        self.saved = self._save(content, self.last, before)
        self.last_is_whole |= self.saved
        self._written = time.monotonic()
        self._took = self._written - started

    def is_due(self) -> bool:
        """Whether last.pth is old enough to be written again."""
        return time.monotonic() - self._written > SAVE_SECONDS

    def is_cheap(self) -> bool:
        """Whether writing last.pth now adds less than 2 % to the run time, judging by the previous write."""
        return time.monotonic() - self._written > 50 * self._took

    def save_weights(self, net: nn.Module, state: TrainState, loss: float, tar: float) -> None:
        """Writes the weights file of an iteration and deletes old ones, in the main process."""
        path = self.folder / weights_name(self.cfg.model_name, state.iteration, loss, tar)
        if self.dist.is_main and self._save(self._weights(net, state), path):
            prune(self.folder, self.cfg.keep_checkpoints, state.iteration)

    def save_best(self, net: nn.Module, state: TrainState) -> bool:
        """Writes best.pth, in the main process; False where the disk failed."""
        return not self.dist.is_main or self._save(self._weights(net, state), self.folder / "best.pth")

    def _weights(self, net: nn.Module, state: TrainState) -> dict[str, torch.Tensor]:
        weights = cpu_state_dict(net, self.cfg.rescale)
        weights._metadata[METADATA_KEY] |= {"state": asdict(state), "run": self.run}
        return weights

    def _save(self, content: Any, path: Path, before: Path | None = None) -> bool:
        """Writes a file; the existing one becomes `before`. False, with a warning, where the disk fails."""
        try:
            with replacing(path, before=before) as file:
                torch.save(content, file)
            return True
        except (OSError, RuntimeError) as error:  # torch's zip writer hides the disk's error
            cause = error if isinstance(error, OSError) else error.__context__
            number = getattr(cause, "errno", None) or errno.EIO
        if before and number in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
            before.unlink(missing_ok=True)  # frees the space for the newer file
            return self._save(content, path)
        print(f"warning: {path} could not be written ({os.strerror(number)}); training continues", flush=True)
        return False

    def resume_hint(self) -> str:
        """The message of a run that stops now."""
        where = "here" if self.saved else f"the previous save, since {self.last} could not be written"
        return f"the same command{' without --resume never' * (self.cfg.resume == 'never')} resumes from {where}"

    def report_end(self, state: TrainState, skipped: int) -> int:
        """Prints how the run ended -> exit code. Raises UserError where its last.pth could not be written."""
        if not self.saved:
            raise UserError(
                f"the run is finished, but {self.last} could not be written; saved files are in {self.folder}"
            )
        took = timedelta(seconds=round(state.seconds))
        files = f", {skipped} files skipped (exit code {EXIT_SKIPPED})" if skipped else ""
        print(f"done: {state.iteration} iterations in {took}, checkpoints in {self.folder}{files}")
        return EXIT_SKIPPED if skipped else EXIT_OK


def warm_start(net: nn.Module, path: Path, size: int) -> str:
    """`load_pretrained`, with a UserError for a file that cannot be used."""
    try:
        return load_pretrained(net, path, size)
    except ValueError as error:
        raise UserError(str(error)) from None
