"""The real script killed at random moments and stopped while it saves; the long version is benchmarks.faults."""

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


def test_a_run_killed_at_random_moments_ends_as_if_it_never_was(folder):
    figures = faults.killed_run(folder / "broken", epochs=2, kills=2, seed=1)
    assert figures.kills == 2 and figures.checkpoints > 0
    assert figures.unreadable == 0
    assert figures.most_repeated <= faults.SAVE_FRQ
    for name in ("broken", "whole"):
        faults.finish(folder / name, epochs=2)
    assert faults.differences(folder / "whole", folder / "broken") == []
    assert not list((folder / "broken" / "run").glob(".*.tmp"))  # what the killed ones left half written
    last = folder / "broken" / "run" / "last.pth"
    content = torch.load(last, weights_only=True)
    content["model"]["side1.weight"].view(torch.int32)[0, 0, 0, 0] ^= 1
    torch.save(content, last)
    assert faults.differences(folder / "whole", folder / "broken") == [".model.side1.weight"]  # it sees one bit


def test_a_signal_while_it_saves_waits_for_the_file(folder):
    process = subprocess.Popen(
        faults.command(folder / "stopped", epochs=9), cwd=faults.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    run = folder / "stopped" / "run"
    end = time.monotonic() + 120
    while not any(run.glob(".last-*.tmp")) and time.monotonic() < end:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 143, said
    kept = torch.load(run / "last.pth", weights_only=True)["progress"]["iteration"]
    assert f"stopped at iteration {kept};".encode() in said
    assert not list(run.glob(".*.tmp"))
