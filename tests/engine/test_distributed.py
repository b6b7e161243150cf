"""Several processes: what they share and agree on, a step of two equals a step of one, the script under torchrun.

An untrained network multiplies a difference in rounding by about a hundred at each step (measured with SGD: 5e-14,
7e-12, 1e-10), so the comparison with one process is made in double precision.
"""

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
from torch.nn import functional as F

from data_loader import epoch_plan
from model import U2NETP
from tests.engine import test_train
from tests.engine.test_step import Net
from u2mamba.engine.distributed import DistContext
from u2mamba.engine.metrics import ValidationMetrics
from u2mamba.engine.step import EAGER_STEPS, TrainStep
from u2mamba.runtime.errors import UserError

data = test_train.data  # the fixture
ROOT = Path(__file__).parents[2]
PATIENCE = 60  # seconds in which a run must end when one of its processes has died
linux = pytest.mark.skipif(sys.platform != "linux", reason="finds torchrun's processes in /proc")

# ------- in two processes that this one starts --------


def loss(logits, masks):
    return torch.stack([F.binary_cross_entropy_with_logits(d.to(masks.dtype), masks) for d in logits])


def batch(seed, n=4, size=64):  # at 32 the deepest maps are one pixel: batch norm of four values
    g = torch.Generator().manual_seed(seed)
    masks = (torch.rand(n, 1, size // 8, size // 8, generator=g) > 0.6).double()
    return torch.randn(n, 3, size, size, generator=g).double(), F.interpolate(masks, scale_factor=8)


def make(world, net, synchronise=True, **options):
    torch.manual_seed(world.rank)  # each process its own weights, until it is given the first one's
    net = net().double()
    world.prepare(net, synchronise)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
    return TrainStep(net, optimizer, loss, torch.device("cpu"), world=world, **options)


def network_steps(world):
    return steps(world, U2NETP, ema_decay=0.9)


def clipped_steps(world):
    return steps(world, Net, clip=0.01, ema_decay=0.9)


def steps(world, net, **options):
    step = make(world, net, **options)
    for i in range(3):
        step(*(world.shard(t) for t in batch(i)))
    means = {name: value for name, value in vars(step.read()).items() if name != "memory"}  # each process's own
    return {"net": step.net.state_dict(), "average": step.averaged().state_dict(), "means": means}


def own_statistics(world):
    step = make(world, Net, synchronise=False)
    step(*(world.shard(t) for t in batch(0)))
    return {"net": step.net.state_dict(), "seen": world.shard(batch(0)[0])}


def bad_batch_in_the_second(world):
    step = make(world, Net)
    step(*batch(0))
    before = {k: v.clone() for k, v in step.net.state_dict().items() if "num_batches" not in k}
    images, masks = batch(1)
    images[0] = math.nan if world.rank == 1 else images[0]
    step(images, masks)
    after = step.net.state_dict()
    return {"same": all(torch.equal(v, after[k]) for k, v in before.items()), "bad": step.read().bad_steps}


def validation(world):
    metrics = ValidationMetrics(torch.device("cpu"))
    images, masks = torch.sigmoid(batch(0, n=5)[0][:, :1]), batch(0, n=5)[1]
    rows = slice(world.rank, None, world.size)  # three and two
    metrics.update(images[rows], masks[rows])
    metrics.gather(world)
    return metrics.result()


def agreements(world):
    got = {
        "largest": world.all_reduce_max(143 if world.rank else 0),
        "from first": world.broadcast_object(lambda: [world.rank]),
    }
    world.check_same({"lr": 1.0, "gpu": world.rank}, {"gpu"})
    for name, constants in (("lr", {"lr": 1.0 + world.rank}), ("pairs", {"names_checksum": world.rank})):
        try:
            world.check_same(constants, set())
            got[name] = ""
        except UserError as error:
            got[name] = str(error)
    return got


CASES = (network_steps, clipped_steps, own_statistics, bad_batch_in_the_second, validation, agreements)


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


@pytest.mark.parametrize("case", [network_steps, clipped_steps])
def test_two_processes_train_as_one_with_the_doubled_batch(case, both):
    first, second = (b[case.__name__] for b in both)
    one = case(DistContext())
    for part in ("net", "average"):
        for key, value in one[part].items():
            assert torch.allclose(value, first[part][key], rtol=0, atol=1e-5), key
            assert torch.equal(first[part][key], second[part][key]), key
    assert first["means"] == second["means"]
    assert first["means"].pop("not_finite") == one["means"].pop("not_finite") == {}
    assert first["means"].pop("losses") == pytest.approx(one["means"].pop("losses"), abs=1e-6)
    assert first["means"] == pytest.approx(one["means"], abs=1e-6)


def test_without_synchronised_batch_norm_the_statistics_are_the_mean(both):
    first, second = (b["own_statistics"] for b in both)
    for key, value in first["net"].items():
        assert torch.equal(value, second["net"][key]), key
    net = Net().double()
    torch.manual_seed(0)
    net.conv.weight.data.copy_(make(DistContext(), Net).net.conv.weight)
    maps = [net.conv(b["seen"]) for b in (first, second)]
    mean, variance = (sum(f(m) for m in maps) / 2 for f in (lambda m: m.mean((0, 2, 3)), lambda m: m.var((0, 2, 3))))
    assert torch.allclose(first["net"]["bn.running_mean"], 0.1 * mean, atol=1e-7)
    assert torch.allclose(first["net"]["bn.running_var"], 0.9 + 0.1 * variance, atol=1e-6)


def test_a_bad_batch_in_one_process_changes_nothing_in_any(both):
    assert [b["bad_batch_in_the_second"] for b in both] == [{"same": True, "bad": 1}] * 2


def test_validation_shared_out_gives_the_figures_of_one_process(both):
    one = validation(DistContext())
    for b in both:
        assert b["validation"] == pytest.approx(one, abs=1e-6)


def test_agreements(both):
    first, second = (b["agreements"] for b in both)
    assert first["largest"] == second["largest"] == 143
    assert first["from first"] == second["from first"] == [0]
    assert first["lr"] == first["pairs"] == ""
    assert "lr: 1.0 -> 2.0" in second["lr"] and "names_checksum" in second["pairs"]


# ------- alone --------


@pytest.mark.parametrize(("n", "size", "batch_size"), [(23, 2, 4), (24, 4, 3), (9, 4, 2), (5, 5, 2)])
def test_shares_of_a_plan(n, size, batch_size):
    """Step by step the shares together are the next stretch of the plan, each process having as many as the others."""
    plan = epoch_plan(n, epoch=0, seed=0)
    shares = [DistContext(rank, size).shard(plan).split(batch_size) for rank in range(size)]
    assert {len(s) for s in shares} == {DistContext(0, size).steps(n, batch_size)}
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
    words = test_train.words(data, saved, "--arch", "u2netp", "--batch_size_train", "2", *more)
    command = [sys.executable, "-u", *launch, str(test_train.SCRIPT), *words]
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
    read_until(process, "going on from")
    assert time.monotonic() - killed < PATIENCE
    after, _ = process.communicate(timeout=120)
    assert process.returncode == 0, after
    assert figures(after.splitlines(), 4) == figures(before, 4)  # from last.pth of iteration 3 the same step again
    assert "ite: 12]" in after and "done: 12 iterations" in after
    run = torch.load(tmp_path / "tiny" / "last.pth", weights_only=True)
    assert run["progress"]["epoch"] == 2 and run["config"]["processes"] == 2


@linux
def test_a_signal_to_one_process_stops_all_and_one_alone_goes_on(data, tmp_path):
    process = torchrun(data, tmp_path)
    lines = read_until(process, "ite: 4]")
    os.kill(workers(process)[1], signal.SIGTERM)
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 1, rest  # torchrun's own code; each process's is 143
    assert rest.count("(exitcode: 143)") >= 1, rest
    stopped = re.search(r"stopped at iteration (\d+)", rest)
    kept = torch.load(tmp_path / "tiny" / "last.pth", weights_only=True)["progress"]
    assert kept["iteration"] == int(stopped[1]) >= 4
    assert kept["position"] == 4 * kept["iteration"]
    assert len(figures(lines, 1)) == 1  # printed by one process alone
    alone = test_train.train(data, tmp_path, "--arch", "u2netp", "--batch_size_train", "2", "--epoch_num", "1")
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


# ------- on GPUs --------


def gpu_steps(rank, folder):
    torch.cuda.set_device(rank)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=rank, world_size=2)
    world, device, got = DistContext(rank, 2, rank, 2), torch.device("cuda", rank), []
    for graph, fast in ((False, False), (True, False), (True, True)):  # fast: fused kernels, each GPU loads its own
        torch.manual_seed(rank)
        net = U2NETP().to(device, memory_format=torch.channels_last if fast else torch.contiguous_format)
        world.prepare(net, synchronise_batch_norm=not fast)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
        step = TrainStep(
            net, optimizer, loss, device, "bf16" if fast else "fp32", graph=graph, kernels=fast, world=world
        )
        for i in range(EAGER_STEPS + 4):
            step(*(world.shard(t).float().to(device) for t in batch(i)))
        got.append({"graph": step.graph is not None, "loss": step.read().loss, "net": {**step.net.state_dict()}})
    torch.save(got, f"{folder}/{rank}.pt")
    os._exit(0)  # as u2mamba.engine.distributed.init_distributed does: with a captured graph NCCL is not taken down


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_two_gpus_the_captured_step_computes_what_the_eager_one_does(tmp_path):
    torch.multiprocessing.spawn(gpu_steps, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", map_location="cpu") for rank in range(2))
    assert [g["graph"] for g in first] == [False, True, True]
    assert first[1]["loss"] == pytest.approx(first[0]["loss"], rel=5e-3)  # cuDNN adds in no fixed order: 1.4e-3 seen
    assert first[2]["loss"] == pytest.approx(first[0]["loss"], rel=0.1)  # bf16, each batch norm by its own pictures
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(v, b["net"][k]) for k, v in a["net"].items())
