"""Runs that start from weights of before."""

import pytest
import torch

from model import U2MAMBAP, U2NET, U2NETP
from tests.engine.tiny import same, weights
from u2mamba.runtime.environment import seed_everything
from u2mamba.runtime.errors import UserError

SMALL = {"arch": "u2mambap", "batch_size_train": 12, "save_frq": 100}


def parameters(folder):
    return {k: v for k, v in weights(folder).items() if "running" not in k and "num_batches" not in k}


def test_a_run_starts_from_pretrained_weights_once(run, tmp_path, monkeypatch):
    torch.manual_seed(5)
    public = U2NETP().state_dict()
    file = tmp_path / "u2netp.pth"
    torch.save({f"module.{k}": v for k, v in public.items()}, file)
    settings = SMALL | {"pretrained": str(file), "lr": 0.0}
    code, out = run(**settings)
    assert code == 0
    new = len(U2MAMBAP().state_dict()) - len(public)
    assert f"pretrained: {len(public)} tensors matched, {new} new ({file})" in out
    for key, value in parameters(tmp_path / "tiny").items():
        if key in public:
            assert torch.equal(value, public[key]), key
        elif key.endswith("out_proj.weight"):
            assert not value.any(), key
    file.unlink()  # a resumed run does not need it
    code, out = run(epoch_num=2, **settings)
    assert code == 0 and "resuming from" in out and "pretrained" not in out
    with pytest.raises(UserError, match=r"u2netp\.pth' -> 'other\.pth'"):
        run(epoch_num=3, **settings | {"pretrained": "other.pth"})


def test_a_new_run_starts_from_the_best_weights_of_the_old_one(run, tmp_path):
    run(lr=1e-2)
    best = tmp_path / "tiny" / "best.pth"
    before = torch.load(best, weights_only=True)
    code, out = run(lr=0.0, resume="never", pretrained=str(best))
    assert code == 0 and f"({best})" in out and "now end in _1" in out
    assert torch.equal(weights(tmp_path / "tiny")["conv.weight"], before["conv.weight"])
    assert same(torch.load(tmp_path / "tiny" / "best_1.pth", weights_only=True), before)


@pytest.mark.parametrize(
    ("content", "says"), [(None, "there is no such checkpoint"), (U2NET, "fits arch u2net and u2mamba")]
)
def test_pretrained_weights_that_do_not_fit(content, says, run, tmp_path):
    """Missing ones are named before the data are read."""
    file, before, settings = tmp_path / "weights.pth", tmp_path / "tiny" / "best.pth", SMALL
    before.parent.mkdir()
    before.write_bytes(b"an earlier run")
    if content:
        torch.save(content().state_dict(), file)
    else:
        settings = SMALL | {"data_dir": "nowhere"}
    with pytest.raises(UserError) as error:
        run(pretrained=str(file), **settings)
    assert str(file) in str(error.value) and says in str(error.value) and "\n" not in str(error.value)
    assert before.read_bytes() == b"an earlier run"


def test_the_same_seed_gives_the_same_weights_and_deterministic_is_asked_of_pytorch(run, tmp_path):
    try:
        run(model_name="plain")
        assert not torch.are_deterministic_algorithms_enabled()
        run(model_name="exact", deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    finally:
        seed_everything(0)
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "exact"))
    run(model_name="other", seed=1)
    assert not same(weights(tmp_path / "plain"), weights(tmp_path / "other"))
