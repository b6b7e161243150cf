"""What a run prints and records: lines, log.csv, TensorBoard, preview.png."""

import codecs
import contextlib
import csv
import datetime
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn

from u2mamba.dataset.augment import INDEX
from u2mamba.dataset.batches import Batch
from u2mamba.engine.schedule import Schedule, TrainState
from u2mamba.engine.step import HISTORY, RunningMeans
from u2mamba.runtime.errors import UserError, discard_output
from u2mamba.runtime.files import replacing

MAX_NONFINITE_STEPS = 20  # in a row, before a run ends
ACTIVATION_LIMIT = 1e4  # standard deviation of a batch norm's input; in trained networks it stays below 100


class NonFiniteError(UserError):
    """Too many consecutive steps gave NaN or Inf."""


class TrainLogger:
    """Prints and records. names: of the training pairs, for messages about single batches. state: where the run starts;
    rows of later iterations, which a killed run left in log.csv, are dropped. writes: in the main process only."""

    def __init__(self, folder: Path, names: Sequence[str], schedule: Schedule, state: TrainState, writes: bool = True):
        self.folder, self.names, self.schedule, self.state, self.writes = folder, names, schedule, state, writes
        self._start = time.monotonic() - state.seconds
        self._columns: list[str] = []
        self._warned: set[str] = set()  # layers, and "disk"
        self._first_line = True
        self._rows: deque[Tensor] = deque(maxlen=HISTORY)  # of the most recent batches, newest first
        self._restart_clock()
        if writes and state.iteration:
            self._write_csv(_read_csv(folder / "log.csv", state))
        self._board = self._tensorboard() if writes else None

    def log(self, text: str) -> None:
        """Prints a line at once."""
        try:
            print(text, flush=True)
        except OSError:  # the reader (tee, head) or the terminal has closed: the run saves and ends, as after a signal
            discard_output(sys.stdout)
            signal.raise_signal(signal.SIGTERM)

    def update(self, batch: Batch) -> None:
        """Counts an iteration."""
        self.state.seconds = time.monotonic() - self._start
        self._rows.appendleft(batch.rows)
        self._images += len(batch.rows)
        self._waited += batch.wait

    def log_train(self, means: RunningMeans, lr: float) -> None:
        """The line of an iteration in U-2-Net's form, and its row; warns of batches that gave NaN or Inf.

        Raises NonFiniteError after MAX_NONFINITE_STEPS of them in a row.
        """
        now, state = time.monotonic(), self.state
        elapsed = max(now - self._mark[0], 1e-9)
        speed, wait = self._images / elapsed, self._waited / elapsed
        per_iteration = elapsed / max(state.iteration - self._mark[1], 1)
        eta = datetime.timedelta(seconds=round((self.schedule.total_iterations - state.iteration) * per_iteration))
        self._name_nonfinite_batches(means)
        self._rows.clear()
        self.log(
            f"{self._prefix()}, batch: {state.position}/{len(self.names)}, ite: {state.iteration}] "
            f"train loss: {means.loss:.3f}, tar: {means.tar:.3f}, IoU: {means.iou:.3f}"
            f" | lr {lr:.2e}, {speed:.1f} images/s, wait {wait:.0%}, {means.memory:.1f} GiB"
            + ("" if self._first_line else f", eta {eta}")
            + (f", {means.nonfinite_steps} skipped steps" if means.nonfinite_steps else "")
        )
        self._first_line = False
        row = {"loss": means.loss, "tar": means.tar, "IoU": means.iou, "lr": lr}
        row |= {f"d{i}": value for i, value in enumerate(means.losses) if i}
        row |= {"images_s": speed, "wait": wait, "memory_GiB": means.memory, "skipped_steps": means.nonfinite_steps}
        self._record("train", row)
        self._restart_clock()
        if means.consecutive_nonfinite >= MAX_NONFINITE_STEPS:
            raise NonFiniteError(
                f"{means.consecutive_nonfinite} steps in a row gave NaN or Inf (the last: {means.nonfinite[0]}); "
                f"resume {self.folder / 'last.pth'} with a lower lr, grad_clip = 1 or fp32 (and --resume force)"
            )

    def log_validation(self, scores: Mapping[str, float], best: bool, seconds: float, net: nn.Module) -> None:
        if not scores:  # there are no validation pairs
            return
        values = ", ".join(f"{name}: {value:.4f}" for name, value in scores.items())
        self.log(f"{self._prefix()}] validation {values}{' (best)' if best else ''} | {seconds:.1f} s")
        self._record("val", {f"val_{name}": value for name, value in scores.items()})
        self._warn_large_activations(net)
        self._restart_clock()  # validation time must not count in images/s

    def log_image(self, sheet: Tensor) -> None:
        """preview.png and TensorBoard's panel; sheet: uint8 (3, H, W)."""
        with self._one_warning():
            write_image(sheet, self.folder / "preview.png")
        self._to_board("add_image", "validation/image, mask, d0", sheet, self.state.iteration)

    def __enter__(self) -> "TrainLogger":
        return self

    def __exit__(self, *_: object) -> None:
        self._to_board("close")

    def _prefix(self) -> str:
        return f"[epoch: {self.state.epoch + 1}/{self.schedule.cfg.epoch_num}"

    def _restart_clock(self) -> None:
        self._mark, self._images, self._waited = (time.monotonic(), self.state.iteration), 0, 0.0

    def _name_nonfinite_batches(self, means: RunningMeans) -> None:
        recent = {ago: outputs for ago, outputs in means.nonfinite.items() if ago < len(self._rows)}
        for ago, outputs in sorted(recent.items(), reverse=True)[-3:]:
            files = ", ".join(self.names[i] for i in self._rows[ago][:, INDEX].tolist())
            self.log(
                f"warning: skipped iteration {self.state.iteration - ago}: NaN or Inf in {outputs}; images: {files}"
            )

    def _warn_large_activations(self, net: nn.Module) -> None:
        """A warning, once per layer, if a batch norm's input is too large for the layers before it to learn."""
        variances = {key.removesuffix(".running_var"): v for key, v in net.state_dict().items() if "running_var" in key}
        deviations = {name: float(v.max()) ** 0.5 for name, v in variances.items() if name not in self._warned}
        if large := {name: v for name, v in deviations.items() if v > ACTIVATION_LIMIT}:
            self._warned |= large.keys()
            names = ", ".join(f"{name} ({value:.0e})" for name, value in large.items())
            without_norm = any(getattr(module, "norm_at", "") == "none" for module in net.modules())
            self.log(
                f"warning: activations explode (standard deviation) at {names}; earlier layers no longer receive "
                f"useful gradients: lower lr or clip the gradient{', or set mamba_norm = gate' if without_norm else ''}"
            )

    def _record(self, group: str, row: dict[str, Any]) -> None:
        if not self.writes:
            return
        values = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
        place = {"ite": self.state.iteration, "epoch": self.state.epoch + 1}
        full = place | values | {"seconds": f"{self.state.seconds:.1f}"}
        if new := [name for name in full if name not in self._columns]:  # a new score
            self._columns += new
            self._write_csv([*_read_csv(self.folder / "log.csv"), full])
        else:
            with self._one_warning(), (self.folder / "log.csv").open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns).writerow(full)
        for name, value in row.items():
            label = {"tar": "d0", "wait": "data wait"}.get(name, name.removeprefix("val_"))
            self._to_board("add_scalar", f"{group}/{label}", float(value), self.state.iteration)

    def _write_csv(self, rows: list[dict[str, Any]]) -> None:
        self._columns = self._columns or list(dict.fromkeys(name for row in rows for name in row))
        with self._one_warning(), replacing(self.folder / "log.csv", flush=False) as file:
            writer = csv.DictWriter(codecs.getwriter("utf-8")(file), self._columns)
            writer.writeheader()
            writer.writerows(rows)

    def _to_board(self, method: str, *values: Any) -> None:
        with self._one_warning():
            if self._board:
                getattr(self._board, method)(*values)

    def _tensorboard(self):
        try:
            from torch.utils.tensorboard import SummaryWriter

            with self._one_warning():
                iteration = self.state.iteration
                return SummaryWriter(str(self.folder / "tensorboard"), purge_step=iteration + 1 if iteration else None)
        except Exception as error:  # not installed, or incompatible with protobuf or NumPy
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            self.log(f"warning: TensorBoard is not used ({reason}): pip install --upgrade tensorboard")
        return None

    @contextlib.contextmanager
    def _one_warning(self) -> Iterator[None]:
        """Warns once if the disk cannot be written, for all files here; training continues."""
        try:
            yield
        except OSError as error:
            if "disk" not in self._warned:
                self.log(f"warning: {self.folder} could not be written ({error.strerror or error}); training continues")
            self._warned.add("disk")


def _read_csv(path: Path, state: TrainState | None = None) -> list[dict[str, str]]:
    """The rows of a log, up to `state` and without validations of unfinished epochs. [] for a damaged file."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if None not in row and None not in row.values()]
        if state:
            rows = [r for r in rows if int(r["ite"]) <= state.iteration]
            rows = [r for r in rows if not r.get("val_maxF") or int(r["epoch"]) <= state.epoch]
        return rows
    except (OSError, ValueError, KeyError, csv.Error):
        return []


def write_image(sheet: Tensor, path: Path) -> None:
    """sheet: uint8 (3, H, W). Raises OSError."""
    with replacing(path, flush=False) as file:
        Image.fromarray(sheet.permute(1, 2, 0).contiguous().numpy()).save(file, "PNG")
