"""How a run ends: exit codes, one line for what the user can mend, stop signals that wait for the step."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

EXIT_OK, EXIT_SKIPPED, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_TERMINATED = 0, 1, 2, 130, 143


class UserError(ValueError):
    """Something the user can mend; the message names it, where it is, and the mend."""


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns what a user can cause into one line on stderr and exit code 2, Ctrl-C into 130 and SIGTERM into 143.

    SIGTERM unwinds as Ctrl-C does, so that temporary files go; a training run catches both by `StopSignal`.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # by u2mamba.runtime.start
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a file name that the terminal cannot show is no error
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader of a pipe (head, less) has gone; nobody is left to read a line
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_TERMINATED)


class StopSignal:
    """Remembers SIGINT and SIGTERM so that the loop can save first; a second Ctrl-C interrupts at once.

    `exit_code` is 0 until a signal came, then 130 (Ctrl-C) or 143 (SIGTERM).
    """

    def __init__(self) -> None:
        self.exit_code = self._interrupts = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: object) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        self.exit_code = self.exit_code or (EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_TERMINATED)
        # os.write: print is not safe inside a signal handler
        # to sys.stderr's file: of many processes only the first one's is the terminal
        with contextlib.suppress(OSError):  # where Ctrl-C has ended the reader of the pipe too
            os.write(
                sys.stderr.fileno(), b"\nstopping: the step is finished and saved first (Ctrl-C again stops at once)\n"
            )

    def __bool__(self) -> bool:
        return self.exit_code != 0
