"""Crop size, augmentation and progress over the epochs of a run."""

from dataclasses import replace

import pytest

import u2mamba_train as script
from u2mamba.engine.schedule import Schedule, TrainState

CFG = script.Config(epoch_num=10, batch_size_train=4, scale_min=0.5, scale_max=1.3, whole_fraction=0.4, early_crop=192)


def test_the_last_epochs_use_whole_images_and_the_first_small_crops():
    schedule = Schedule(CFG, 23)
    scales = [(a.scale_min, a.scale_max) for a in map(schedule.augmentation, range(10))]
    assert scales == [(0.5, 1.3)] * 6 + [(1.0, 1.0)] * 4
    assert [schedule.crop_size(epoch) for epoch in range(10)] == [192] * 6 + [288] * 4
    assert schedule.plan(9).shape[1] == schedule.plan(0).shape[1] > 4  # random numbers for each


@pytest.mark.parametrize(("drop_last", "pairs"), [(False, 23), (True, 20)])
def test_progress_and_iterations_are_those_of_the_pairs_used(drop_last, pairs):
    schedule = Schedule(replace(CFG, drop_last=drop_last), 23)
    assert schedule.pairs_per_epoch == len(schedule.plan(0)) == pairs
    state = TrainState(epoch=4, position=8, iteration=26)
    schedule.start_from(state)
    assert schedule.total_iterations == 26 + (6 if not drop_last else 5) * 6 - 2
    assert schedule.progress(state) == pytest.approx((4 + 8 / pairs) / 10)


def test_the_best_is_the_highest_score_the_lowest_error_and_the_later_of_equals():
    state = TrainState(best=0.5, best_name="MAE")
    assert [state.is_best("MAE", {"MAE": value}) for value in (0.4, 0.5, 0.6, float("nan"))] == [
        True,
        True,
        False,
        False,
    ]
    assert state.is_best("IoU", {"IoU": 0.1})  # the run so far was judged by another score
    assert not TrainState(best=0.5, best_name="IoU").is_best("IoU", {"IoU": 0.4})
