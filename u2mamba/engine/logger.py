"""What a run prints and keeps to look at: lines, log.csv, TensorBoard, preview.png, a progress bar on a terminal."""

import csv
import datetime
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from u2mamba.dataset.augment import INDEX
from u2mamba.engine.step import RECENT, Means

COLUMNS = (
    "ite", "epoch", "loss", "tar", "d1", "d2", "d3", "d4", "d5", "d6", "IoU", "lr", "img_s", "wait", "memory_GiB",
    "bad_steps", "val_IoU", "val_MAE", "val_maxF", "seconds",
)  # fmt: skip
GROWN = 1e4  # deviation of what a batch norm gets; in trained networks it stays below 100


class TrainLogger:
    """Prints and records. names: of the training pairs, by which a bad batch is told. iteration: where the run goes on;
    rows of later ones, and validations after `epoch` epochs, left by a killed run, go. writes: False in all processes
    but the one whose files these are."""

    def __init__(
        self,
        folder: Path,
        epochs: int,
        names: Sequence[str],
        iterations: int,
        iteration: int = 0,
        seconds: float = 0.0,
        writes: bool = True,
        epoch: int = 0,
    ):
        self.folder, self.epochs, self.names, self.iterations = folder, epochs, names, iterations
        self._start = time.monotonic() - seconds
        self._csv_path = folder / "log.csv"
        self._warned = False
        self._grown: set[str] = set()  # layers named so far
        self.writes = writes
        if writes:
            self._keep_rows(iteration, epoch)
        self._board = _tensorboard(folder / "tensorboard", iteration, self.say) if writes else None
        self._bar = None
        self._mark = (time.monotonic(), 0)  # the time and iteration of the last printed line
        self._images = self._waited = 0.0
        self._rows: deque[Tensor] = deque(maxlen=RECENT)  # of the last batches, the newest first
        if sys.stderr.isatty():
            self._bar = tqdm(total=iterations, initial=iteration, unit="ite", dynamic_ncols=True, smoothing=0.05)

    @property
    def seconds(self) -> float:
        """Time spent on the run, over all its starts."""
        return time.monotonic() - self._start

    def say(self, text: str) -> None:
        """A plain line, above the progress bar where there is one."""
        try:
            if getattr(self, "_bar", None):
                tqdm.write(text)
            else:
                print(text, flush=True)
        except BrokenPipeError:  # the reader (tee, head) has gone: the run saves and ends, as by a signal
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            signal.raise_signal(signal.SIGTERM)

    def count(self, rows: Tensor, waited: float) -> None:
        """One iteration with `rows` of the plan, for which the loop waited `waited` seconds."""
        self._rows.appendleft(rows)
        self._images += len(rows)
        self._waited += waited
        if self._bar:
            self._bar.update()

    def training_line(self, epoch: int, position: int, iteration: int, means: Means, lr: float) -> None:
        now = time.monotonic()
        since, since_iteration = self._mark
        elapsed = max(now - since, 1e-9)
        speed, wait = self._images / elapsed, self._waited / elapsed
        done = iteration - since_iteration if since_iteration else None
        eta = (self.iterations - iteration) * elapsed / done if done else None
        self._name_bad_batches(iteration, {a: what for a, what in means.not_finite.items() if a < len(self._rows)})
        self._rows.clear()
        self._mark, self._images, self._waited = (now, iteration), 0.0, 0.0
        self.say(
            f"[epoch: {epoch}/{self.epochs}, batch: {position}/{len(self.names)}, ite: {iteration}] "
            f"train loss: {means.loss:.3f}, tar: {means.losses[0]:.3f}, IoU: {means.iou:.3f}"
            f" | lr {lr:.2e}, {speed:.1f} img/s, wait {wait:.0%}, {means.memory:.1f} GiB"
            + (f", eta {datetime.timedelta(seconds=round(eta))}" if eta is not None else "")
            + (f", {means.bad_steps} bad steps" if means.bad_steps else "")
        )
        row = {"ite": iteration, "epoch": epoch, "loss": means.loss, "tar": means.losses[0], "IoU": means.iou, "lr": lr}
        row |= {f"d{i}": means.losses[i] for i in range(1, 7)}
        row |= {"img_s": speed, "wait": wait, "memory_GiB": means.memory, "bad_steps": means.bad_steps}
        self._record("train", iteration, row)

    def _name_bad_batches(self, iteration: int, not_finite: dict[int, str]) -> None:
        for ago, what in sorted(not_finite.items(), reverse=True)[-3:]:
            files = ", ".join(self.names[row] for row in self._rows[ago][:, INDEX].tolist())
            self.say(f"warning: iteration {iteration - ago} is left out, {what} not finite, of {files}")

    def validation_line(self, epoch: int, iteration: int, values: dict[str, float], best: bool, took: float) -> None:
        figures = ", ".join(f"{name}: {value:.4f}" for name, value in values.items())
        self.say(f"[epoch: {epoch}/{self.epochs}] held-out {figures}{' (best)' if best else ''} | {took:.1f} s")
        self._record("val", iteration, {"ite": iteration, "epoch": epoch} | {f"val_{k}": v for k, v in values.items()})
        # the time of a validation is nobody's img/s
        self._mark, self._images, self._waited = (time.monotonic(), iteration), 0.0, 0.0

    def name_grown_layers(self, net: nn.Module) -> None:
        """One line, once for a layer, where what a batch norm gets is too large for the layers before it to learn."""
        norms = {name: m for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
        if not norms:
            return
        largest = torch.stack([m.running_var.max() for m in norms.values()]).sqrt().tolist()
        grown = {name: size for name, size in zip(norms, largest, strict=True) if size > GROWN}
        if new := [f"{name} ({size:.0e})" for name, size in grown.items() if name not in self._grown]:
            without = any(getattr(m, "norm_at", "") == "none" for m in net.modules())
            advice = ', clip the gradient or set mamba_norm = "gate"' if without else " or clip the gradient"
            self.say(
                f"warning: the numbers that reach {', '.join(new)} are too large for the layers before to learn: lower "
                f"lr{advice}"
            )
        self._grown |= grown.keys()

    def picture(self, sheet: Tensor, iteration: int) -> None:
        """preview.png and TensorBoard's panel; sheet: uint8 (3, H, W)."""
        try:
            write_picture(sheet, self.folder / "preview.png")
        except OSError as error:
            self._warn(error)
        self._draw("add_image", "held-out/image, mask, d0", sheet, iteration)

    def close(self) -> None:
        if self._bar:
            self._bar.close()
        self._draw("close")

    def _record(self, group: str, iteration: int, row: dict) -> None:
        if not self.writes:
            return
        try:
            with self._csv_path.open("a", newline="", encoding="utf-8") as file:
                row = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
                csv.DictWriter(file, COLUMNS).writerow(row | {"seconds": f"{self.seconds:.1f}"})
        except OSError as error:
            self._warn(error)
        for name, value in row.items():
            if name not in ("ite", "epoch"):
                label = {"tar": "d0", "wait": "data wait"}.get(name, name.removeprefix("val_"))
                self._draw("add_scalar", f"{group}/{label}", float(value), iteration)

    def _draw(self, what: str, *values) -> None:
        """Calls a method of TensorBoard's writer, which also tells what its thread could not write a while ago."""
        try:
            if self._board:
                getattr(self._board, what)(*values)
        except OSError as error:
            self._warn(error)
            self._board = None

    def _keep_rows(self, iteration: int, epoch: int) -> None:
        """Leaves the rows up to `iteration`, of validations those of `epoch` epochs; starts the file where none are."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            rows = []
            if iteration and self._csv_path.exists():
                with self._csv_path.open(newline="", encoding="utf-8") as file:
                    if not file.readline().startswith("ite,"):
                        raise ValueError("it has no header")
                    file.seek(0)
                    rows = [
                        r
                        for r in csv.DictReader(file)
                        if (r.get("ite") or "x").isdigit()
                        and int(r["ite"]) <= iteration
                        and not (r["val_maxF"] and int(r["epoch"]) > epoch)
                    ]
            temporary = self._csv_path.with_suffix(".tmp")
            with temporary.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)
            os.replace(temporary, self._csv_path)
        except OSError as error:
            self._warn(error)
        except (ValueError, csv.Error) as error:  # not ours any more, or cut by a power failure
            aside = self._csv_path.with_name(f"log_damaged_{iteration}.csv")
            os.replace(self._csv_path, aside)
            self.say(f"warning: {self._csv_path} is damaged ({error}); it is now {aside.name}, and a new one begins")
            self._keep_rows(0, 0)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self.say(f"warning: {self._csv_path.parent} cannot be written ({error}); training goes on")
        self._warned = True


def best_in_log(folder: Path) -> float:
    """The largest held-out max F-measure in the log.csv of a run; -1 where there is none."""
    try:
        with (folder / "log.csv").open(newline="", encoding="utf-8") as file:
            return max((float(row["val_maxF"]) for row in csv.DictReader(file) if row["val_maxF"]), default=-1.0)
    except (OSError, ValueError, KeyError, csv.Error):
        return -1.0


def write_picture(sheet: Tensor, path: Path) -> None:
    """sheet: uint8 (3, H, W), to a temporary name and renamed. Raises OSError."""
    temporary = path.with_stem(f".{path.stem}")
    Image.fromarray(sheet.permute(1, 2, 0).contiguous().numpy()).save(temporary)
    os.replace(temporary, path)


def _tensorboard(folder: Path, iteration: int, say):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        say("TensorBoard is not installed: its scalars and pictures are left out (pip install tensorboard)")
        return None
    other = threading.excepthook
    # its thread ends with a traceback when the disk refuses; the next call tells us, see `_draw`
    threading.excepthook = lambda args: None if issubclass(args.exc_type, OSError) else other(args)
    try:
        return SummaryWriter(str(folder), purge_step=iteration + 1 if iteration else None)
    except OSError:
        return None
