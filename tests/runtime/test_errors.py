"""Exit codes and stop signals."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from u2mamba.runtime.errors import StopSignal, UserError, one_line_errors

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [(UserError("lr is wrong"), 2, "error: lr is wrong\n"), (KeyboardInterrupt(), 130, "interrupted\n")],
)
def test_what_the_user_can_fix_is_one_line(error, code, line, capsys):
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as end, one_line_errors():
            raise error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert end.value.code == code and capsys.readouterr().err == line


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_is_remembered_and_its_handler_comes_back(number, code):
    number = getattr(signal, number)
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop and stop.exit_code == 0
        signal.raise_signal(number)
        assert stop and stop.exit_code == code
    assert signal.getsignal(number) is before


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_what_the_shell_ignores_stays_ignored(name):
    """SIGINT in a background job, SIGHUP under nohup."""
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            signal.raise_signal(number)
        assert not stop and signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


CLOSED_TERMINAL = """
import fcntl, termios, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from u2mamba.runtime.errors import StopSignal
with StopSignal() as stop:
    print("ready", flush=True)
    while not stop:
        time.sleep(0.01)
print("saved", flush=True)
raise SystemExit(stop.exit_code)
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX terminals")
def test_a_run_whose_terminal_is_closed_ends_by_itself():
    import pty

    terminal, end = pty.openpty()
    command = [sys.executable, "-c", CLOSED_TERMINAL]
    process = subprocess.Popen(command, cwd=ROOT, stdin=end, stdout=end, stderr=end, start_new_session=True)
    os.close(end)
    assert os.read(terminal, 100).startswith(b"ready")
    os.close(terminal)
    assert process.wait(timeout=60) == 129


def test_a_second_ctrl_c_interrupts_at_once():
    with pytest.raises(KeyboardInterrupt), StopSignal():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
