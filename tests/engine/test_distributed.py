"""Several processes: what they share and agree on, a step of two equals a step of one, the script under torchrun."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import u2mamba_train as script
from data_loader import epoch_plan
from tests.engine import tiny
from u2mamba.engine.distributed import DistContext
from u2mamba.engine.step import TrainStep
from u2mamba.engine.validation import SODMetric
from u2mamba.runtime.environment import Environment
from u2mamba.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
PATIENCE = 60  # seconds in which a run must end when one of its processes has died
linux = pytest.mark.skipif(sys.platform != "linux", reason="finds torchrun's processes in /proc")

# ------- in two processes that this one starts --------


def make(world, net=tiny.NetWithoutNorm, **options):
    net = net()
    net.conv.weight.data.add_(world.rank)  # other weights in each process, until the main one's are broadcast
    world.broadcast_weights(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    return TrainStep(net, optimizer, script.multi_bce_loss_fusion, Environment(torch.device("cpu")), world, **options)


def steps(world):
    step = make(world, grad_clip=0.01, ema_decay=0.9)
    for i in range(3):
        step(*(world.shard(t) for t in tiny.batch(i)))
    means = {name: value for name, value in vars(step.read()).items() if name != "memory"}  # each process's own
    return {"net": step.net.state_dict(), "average": step.ema_model().state_dict(), "means": means}


def own_statistics(world):
    step = make(world, tiny.Net)
    step(*(world.shard(t) for t in tiny.batch(0)))
    return {"net": step.net.state_dict(), "seen": world.shard(tiny.batch(0)[0])}


def nan_in_the_second(world):
    step = make(world)
    step(*tiny.batch(0))
    before = {k: v.clone() for k, v in step.net.state_dict().items()}
    images, masks = tiny.batch(1)
    images[0] = math.nan if world.rank == 1 else images[0]
    step(images, masks)
    after = step.net.state_dict()
    return {"same": all(torch.equal(v, after[k]) for k, v in before.items()), "skipped": step.read().nonfinite_steps}


def validation(world):
    metric = SODMetric()
    images, masks = torch.sigmoid(tiny.batch(0, n=5)[0][:, :1]), tiny.batch(0, n=5)[1]
    rows = slice(world.rank, None, world.size)  # three and two
    metric.update(images[rows], masks[rows])
    return metric.compute()


def agreements(world):
    got = {"largest": world.all_reduce_max(143 if world.rank else 0)}
    world.check_same({"lr": 1.0, "gpu": world.rank}, {"gpu"})
    for name, constants in (("lr", {"lr": 1.0 + world.rank}), ("pairs", {"names_checksum": world.rank})):
        try:
            world.check_same(constants, set())
            got[name] = ""
        except UserError as error:
            got[name] = str(error)
    return got


CASES = (steps, own_statistics, nan_in_the_second, validation, agreements)


def work(rank, folder):
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    world = DistContext(rank, 2, rank, 2)
    torch.save({case.__name__: case(world) for case in CASES}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each of CASES returned, in the first process and in the second."""
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_two_processes_train_as_one_with_the_doubled_batch(both):
    first, second = (b["steps"] for b in both)
    one = steps(DistContext())
    for part in ("net", "average"):
        for key, value in one[part].items():
            assert torch.allclose(value, first[part][key], rtol=0, atol=1e-5), key
            assert torch.equal(first[part][key], second[part][key]), key
    assert first["means"] == second["means"]
    assert first["means"].pop("nonfinite") == one["means"].pop("nonfinite") == {}
    assert first["means"].pop("losses") == pytest.approx(one["means"].pop("losses"), abs=1e-6)
    assert first["means"] == pytest.approx(one["means"], abs=1e-6)


def test_the_statistics_of_batch_norm_are_the_mean_of_the_processes(both):
    first, second = (b["own_statistics"] for b in both)
    for key, value in first["net"].items():
        assert torch.equal(value, second["net"][key]), key
    net = tiny.Net()
    maps = [net.conv(b["seen"]) for b in (first, second)]
    mean, variance = (sum(f(m) for m in maps) / 2 for f in (lambda m: m.mean((0, 2, 3)), lambda m: m.var((0, 2, 3))))
    assert torch.allclose(first["net"]["bn.running_mean"], 0.1 * mean, atol=1e-7)
    assert torch.allclose(first["net"]["bn.running_var"], 0.9 + 0.1 * variance, atol=1e-6)


def test_nan_in_one_process_changes_nothing_in_any(both):
    assert [b["nan_in_the_second"] for b in both] == [{"same": True, "skipped": 1}] * 2


def test_validation_shared_out_gives_the_figures_of_one_process(both):
    one = validation(DistContext())
    for b in both:
        assert b["validation"] == pytest.approx(one, abs=1e-6)


def test_agreements(both):
    first, second = (b["agreements"] for b in both)
    assert first["largest"] == second["largest"] == 143
    assert first["lr"] == first["pairs"] == ""
    assert "lr: 1.0 -> 2.0" in second["lr"] and "names_checksum" in second["pairs"]


# ------- alone --------


@pytest.mark.parametrize(("n", "size", "batch_size"), [(23, 2, 4), (24, 4, 3), (9, 4, 2), (5, 5, 2)])
def test_shares_of_a_plan(n, size, batch_size):
    """Step by step the shares together are the next stretch of the plan, each process having as many as the others."""
    plan = epoch_plan(n, epoch=0, seed=0)
    shares = [DistContext(rank, size).shard(plan).split(batch_size) for rank in range(size)]
    position = 0
    for parts in zip(*shares, strict=True):
        assert len({len(p) for p in parts}) == 1
        rows = torch.cat(parts)
        expected = plan[position : position + len(rows)]
        assert sorted(rows.tolist()) == sorted(expected.tolist())
        position += len(rows)
    assert n - position == n % size
    assert torch.equal(DistContext().shard(plan), plan)


# ------- the real script under torchrun --------


def torchrun(data, saved, *more, restarts=0):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", f"--max-restarts={restarts}"]
    words = tiny.words(data, saved, "--arch", "u2netp", "--batch_size_train", "2", *more)
    command = [sys.executable, "-u", *launch, str(tiny.SCRIPT), *words]
    return subprocess.Popen(command, cwd=data, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def read_until(process, text):
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"{text!r} never came: {''.join(lines)}")


def workers(process):
    return [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def figures(lines, iteration):
    return [line.split(" | ")[0] for line in lines if f"ite: {iteration}]" in line]


@linux
def test_a_killed_process_ends_all_and_the_run_goes_on_from_last_pth(data, tmp_path):
    process = torchrun(data, tmp_path, restarts=1)
    before = read_until(process, "ite: 4]")
    os.kill(workers(process)[1], signal.SIGKILL)
    killed = time.monotonic()
    read_until(process, "resuming from")
    assert time.monotonic() - killed < PATIENCE
    after, _ = process.communicate(timeout=120)
    assert process.returncode == 0, after
    assert figures(after.splitlines(), 4) == figures(before, 4)  # from last.pth of iteration 3 the same step again
    assert "ite: 12]" in after and "done: 12 iterations" in after
    run = torch.load(tmp_path / "tiny" / "last.pth", weights_only=True)
    assert run["state"]["epoch"] == 2 and run["run"]["settings"]["processes"] == 2


@linux
def test_a_signal_to_one_process_stops_all_and_one_alone_goes_on(data, tmp_path):
    process = torchrun(data, tmp_path)
    lines = read_until(process, "ite: 4]")
    os.kill(workers(process)[1], signal.SIGTERM)
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 1, rest  # torchrun's own code; each process's is 143
    assert rest.count("(exitcode: 143)") >= 1, rest
    stopped = re.search(r"stopped at iteration (\d+)", rest)
    kept = torch.load(tmp_path / "tiny" / "last.pth", weights_only=True)["state"]
    assert kept["iteration"] == int(stopped[1]) >= 4
    assert kept["position"] == 4 * kept["iteration"]
    assert len(figures(lines, 1)) == 1  # printed by one process alone
    alone = tiny.train(data, tmp_path, "--arch", "u2netp", "--batch_size_train", "2", "--epoch_num", "1")
    assert alone.returncode == 0, alone.stderr
    assert f"iteration {kept['iteration']}" in alone.stdout and "processes: 2 before, now 1" in alone.stdout
    first = re.search(r"batch: (\d+)/(\d+), ite: (\d+)]", alone.stdout)
    assert [int(v) for v in first.groups()[::2]] == [kept["position"] + 2, kept["iteration"] + 1]


def test_an_error_in_one_process_is_said_once(tmp_path):
    (tmp_path / "run.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from u2mamba.engine.distributed import init_distributed\n"
        "from u2mamba.runtime.errors import UserError\n"
        "with init_distributed() as world:\n"
        "    print('hello')\n"
        "    if world.rank == 1:\n"
        "        raise UserError('the disk is gone: bring it back')\n"
        "    world.all_reduce_max(0)\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "run.py"]
    done = subprocess.run(launch, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stdout.count("hello") == 1
    assert done.stderr.count("error: process 1: the disk is gone: bring it back") == 1
    assert "another process" not in done.stderr
    assert "exitcode  : 2" in done.stderr
