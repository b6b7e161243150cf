"""How a command ends: exit codes, one-line errors for what the user can fix, signals deferred to the end of an
iteration."""

import contextlib
import os
import signal
import stat
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

EXIT_OK, EXIT_SKIPPED, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_TERMINATED = 0, 1, 2, 130, 143
HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)  # the terminal was closed; Windows has no such signal


class UserError(ValueError):
    """An error the user can fix; the message says what, where and how, in one line."""


class Stopped(Exception):
    """A stop signal was received; the caller saves and ends with `exit_code`."""

    def __init__(self, exit_code: int):
        self.exit_code = exit_code


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns an exception into one line on stderr and exit code 2, Ctrl-C into exit code 130, SIGTERM 143, SIGHUP 129.

    Signals unwind the stack as Ctrl-C does, so that temporary files are removed; training catches them (`StopSignal`).
    """
    for number in _catchable(signal.SIGTERM, HANGUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # set by runtime/start.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # for file names that the terminal cannot display
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader of the pipe (head, less) has exited; nobody is left to read a message
        discard_output(sys.stdout)
        sys.exit(EXIT_TERMINATED)
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        print(f"error: {locate(error)} (python -X dev shows the traceback)", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # a full disk
            discard_output(sys.stdout)
        sys.exit(EXIT_USAGE)


def discard_output(stream: TextIO) -> None:
    """What is still written to `stream` is lost; else Python's own flush at exit fails."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def locate(error: Exception) -> str:
    """An exception that nobody expected, of edited code say, in one line: file, line, what it says."""
    root, frames = Path(__file__).parents[2], traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).resolve().is_relative_to(root)]
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return f"{(ours or frames)[-1].filename}, line {(ours or frames)[-1].lineno}: {reason}"


def _catchable(*numbers: int) -> set[int]:
    """The signals that are not ignored: nohup ignores SIGHUP, a shell ignores SIGINT in background jobs."""
    return {number for number in numbers if signal.getsignal(number) not in (signal.SIG_IGN, None)}


class StopSignal:
    """Inside the block SIGINT, SIGTERM and SIGHUP are deferred, so that the loop can save; a second Ctrl-C interrupts.

    `exit_code` is 0 until a signal is received, then 130, 143 or 129. The previous handlers are restored at the end.
    Outside the main thread, where Python allows no handlers, no signal is caught.
    """

    def __init__(self) -> None:
        self.exit_code = self._interrupts = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            numbers = _catchable(signal.SIGINT, signal.SIGTERM, HANGUP)
            self._previous = {number: signal.signal(number, self._remember) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.exit_code != 0

    def _remember(self, number: int, _frame: object) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        self.exit_code = self.exit_code or 128 + number
        # os.write, because print is not safe inside a signal handler; the reader of a pipe may have exited too
        with contextlib.suppress(OSError, ValueError):
            os.write(sys.stderr.fileno(), b"\nstopping: saving after this iteration (Ctrl-C again stops at once)\n")
        for stream in (sys.stdout, sys.stderr) if number != signal.SIGINT else ():
            with contextlib.suppress(OSError, ValueError):
                if stat.S_ISCHR(os.fstat(stream.fileno()).st_mode) and not stream.isatty():  # a closed terminal
                    discard_output(stream)
