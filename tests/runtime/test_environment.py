"""Device and precision fall back with a reason; memory on the CPU is retained and released."""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from u2mamba.runtime import cores
from u2mamba.runtime import environment as choices
from u2mamba.runtime.errors import UserError

CPU = torch.device("cpu")


def test_the_cpu_is_named_and_a_missing_gpu_is_refused():
    device, line = choices.choose_device("cpu")
    assert device == CPU and line.startswith("CPU, ")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match='device = "cuda"'):
            choices.choose_device("cuda")
        assert choices.choose_device("auto")[0].type in ("cpu", "mps")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="changes what glibc does")
@pytest.mark.parametrize("kept", [True, False])
def test_freed_memory_is_kept_where_there_is_enough(kept):
    """How many pages the system had to bring for a tensor of 64 MB, made again and again.

    Each is smaller by 16 KB than the last: glibc keeps a few bytes of a block it aligned, and one as large may not fit.
    """
    code = f"""
import resource, torch
from u2mamba.runtime import environment
environment.available_memory = lambda: {2**40 if kept else 0}
memory = environment.HeapRetention(torch.device("cpu"))
for i in range(7):
    before = before if i > 2 else resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    with memory:
        torch.ones(2**24 - i * 2**12)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    pages = int(subprocess.check_output([sys.executable, "-c", code], text=True))
    assert (pages < 5 * 2**26 // os.sysconf("SC_PAGE_SIZE") / 20) == kept


def test_bf16_falls_back_with_the_reason(monkeypatch):
    monkeypatch.setattr(choices, "_cpu_has_bf16", lambda: False)
    assert choices.choose_precision("bf16", CPU) == ("fp32", "fp32 (this CPU has no bf16 instructions)")
    monkeypatch.setattr(choices, "_cpu_has_bf16", lambda: True)
    assert choices.choose_precision("bf16", CPU) == ("bf16", "bf16")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    precision, line = choices.choose_precision("bf16", torch.device("cuda", 0))
    assert precision == "fp32" and "8.0" in line


def test_the_environment_of_a_run_on_a_cpu(capsys, monkeypatch):
    from u2mamba.engine.distributed import DistContext

    monkeypatch.setattr(choices, "_cpu_has_bf16", lambda: True)
    settings = {"device": "cpu", "gpu": 0, "seed": 3, "deterministic": False, "batch_size_train": 4}
    for precision, channels_last in (("fp32", False), ("bf16", True)):  # NCHW is faster in fp32 on a CPU
        env = choices.Environment.choose(SimpleNamespace(precision=precision, **settings), DistContext())
        assert env == choices.Environment(CPU, precision) and env.channels_last == channels_last
        with env.autocast():
            assert torch.is_autocast_enabled("cpu") == (precision == "bf16")
    assert "device: CPU, " in (out := capsys.readouterr().out) and "processes: 1, batch size 4" in out
    assert torch.initial_seed() == 3


def test_granted_cores_are_those_of_affinity_and_container(tmp_path, monkeypatch):
    monkeypatch.setattr(cores.psutil, "Process", lambda: SimpleNamespace(cpu_affinity=lambda: range(8)))
    quota, period = tmp_path / "quota", tmp_path / "period"
    period.write_text("100000\n")
    for text, files, granted in (
        ("350000 100000\n", [quota], 3),
        ("50000 100000\n", [quota], 1),
        ("max 100000\n", [quota], 8),
        ("200000\n", [quota, period], 2),
        ("-1\n", [quota, period], 8),
    ):
        quota.write_text(text)
        monkeypatch.setattr(cores, "QUOTA_FILES", [files, [tmp_path / "none"]])
        assert cores.granted_cores() == granted


def test_free_memory_is_that_of_the_container(tmp_path, monkeypatch):
    assert choices.available_memory() > 2**27
    (tmp_path / "memory.stat").write_text("inactive_file 1000\nfile 5\n")
    (tmp_path / "max").write_text("50000\n")
    (tmp_path / "current").write_text("20000\n")
    monkeypatch.setattr(choices, "CGROUP_FILES", [(tmp_path, "max", "current")])
    assert choices.available_memory() == 31000
    (tmp_path / "max").write_text("max\n")
    assert choices.available_memory() > 2**27
