"""The real script killed at random moments and stopped while it saves; benchmarks.faults is the long version."""

import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import faults
from u2mamba.dataset.demo import make_demo


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_a_run_that_is_killed_and_stopped_ends_like_an_undisturbed_one(tmp_path):
    make_demo(tmp_path / "data", n=faults.PAIRS)
    counts = faults.killed_run(tmp_path / "broken", epochs=3, kills=2, seed=1)
    assert counts["checkpoints"] and counts["most_repeated"] <= faults.SAVE_FRQ
    process = subprocess.Popen(faults.command(tmp_path / "broken", epochs=3), cwd=faults.ROOT)
    run = tmp_path / "broken/run"
    while process.poll() is None and not any(run.glob(".last*.tmp")):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 143
    for name in ("broken", "whole"):
        faults.finish(tmp_path / name, epochs=3)
    assert not faults.difference(tmp_path / "whole", tmp_path / "broken") and not list(run.glob(".*.tmp"))
    content = torch.load(run / "last.pth", weights_only=True)
    content["model"]["side1.weight"].view(torch.int32)[0, 0, 0, 0] ^= 1
    torch.save(content, run / "last.pth")
    assert "side1.weight" in faults.difference(tmp_path / "whole", tmp_path / "broken")  # one bit is seen
