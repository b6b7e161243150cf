"""Fixtures: 24 pairs of a bright disc, and the trainer in this process with a network of one convolution."""

import dataclasses

import pytest

import model
import u2mamba_train as script
from tests.engine.tiny import Net, draw_pairs
from u2mamba.engine import schedule


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """24 pairs; d27 is the validation split."""
    return draw_pairs(tmp_path_factory.mktemp("data"), [f"d{i}" for i in range(10, 34)])


@pytest.fixture
def run(data, tmp_path, capsys, monkeypatch):
    """The trainer in this process with a network of one convolution: epochs of 6 iterations -> (code, output)."""
    monkeypatch.setitem(model.ARCHS, "u2netp", Net)
    planned = schedule.batches

    def start(at=None, poison=None, **settings):
        """at: batch of an epoch -> what happens before it; poison: what is done to each batch."""

        def watched(source, plan, size, *more):
            done = (len(source) - len(plan)) // size
            for i, batch in enumerate(planned(source, plan, size, *more), done + 1):
                (at or {}).get(i, lambda: None)()
                yield poison(source, batch) if poison else batch

        monkeypatch.setattr(schedule, "batches", watched)
        cfg = script.Config(
            model_name="tiny", saved_models=str(tmp_path), arch="u2netp", rescale=40, crop=40, batch_size_train=4,
            epoch_num=1, log_frq=1, save_frq=2, device="cpu", data_dir=str(data), tra_image_dir="images",
            tra_label_dir="masks",
        )  # fmt: skip
        code = script.run(dataclasses.replace(cfg, **settings), script.DistContext())
        return code, capsys.readouterr().out

    return start
