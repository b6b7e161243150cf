"""The real script killed at random moments and stopped while it saves; benchmarks.faults is the long version."""

import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import faults
from u2mamba.dataset.demo import make_demo

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("faults")
    make_demo(root / "data", n=faults.PAIRS)
    return root


def test_a_killed_run_ends_like_an_undisturbed_one(folder):
    counts = faults.killed_run(folder / "broken", epochs=2, kills=2, seed=1)
    assert counts["kills"] == 2 and counts["checkpoints"] > 0
    assert counts["unreadable"] == 0 and counts["most_repeated"] <= faults.SAVE_FRQ
    for name in ("broken", "whole"):
        faults.finish(folder / name, epochs=2)
    assert faults.differences(folder / "whole", folder / "broken") == []
    assert not list((folder / "broken" / "run").glob(".*.tmp"))  # files that the killed processes left
    last = folder / "broken" / "run" / "last.pth"
    content = torch.load(last, weights_only=True)
    content["model"]["side1.weight"].view(torch.int32)[0, 0, 0, 0] ^= 1
    torch.save(content, last)
    assert faults.differences(folder / "whole", folder / "broken") == [".0.side1.weight"]  # one bit is seen


def test_a_signal_during_saving_waits_for_the_file(folder):
    command = faults.command(folder / "stopped", epochs=9)
    process = subprocess.Popen(command, cwd=faults.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    run, end = folder / "stopped" / "run", time.monotonic() + 120
    while not any(run.glob(".last-*.tmp")) and time.monotonic() < end:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 143, printed
    kept = torch.load(run / "last.pth", weights_only=True)["progress"]["iteration"]
    assert f"stopped at iteration {kept};".encode() in printed
    assert not list(run.glob(".*.tmp"))
