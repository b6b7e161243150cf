"""Batches: they follow the plan, streaming gives the same, the split is the caller's."""

import numpy as np
import pytest
import torch
from PIL import Image

from data_loader import ToTensorLab, augment, batches, epoch_plan, validation_batches
from tests.dataset.samples import disc, make_folders, open_folders, photo, sample
from u2mamba.dataset import batches as batches_module
from u2mamba.dataset.augment import INDEX
from u2mamba.dataset.batches import DataSource, open_data
from u2mamba.dataset.image_file import DataError
from u2mamba.dataset.pairs import pair_folders
from u2mamba.dataset.rescale import rescale_image


def test_batches_follow_the_plan(tmp_path):
    images, masks = make_folders(tmp_path, 20)
    data, *_ = open_folders(images, masks)
    n = len(data.train)
    plan = epoch_plan(n, 0, 0, rescale=32, crop=24)
    whole = list(batches(data.train, plan, 6, crop=24))
    assert [len(b.x) for b in whole] == [6] * (n // 6) + [n % 6] * (n % 6 > 0)
    assert torch.equal(torch.cat([b.rows for b in whole]), plan)
    cache, moved = data.train.cache, plan.clone()
    moved[:, INDEX] = data.train.rows[plan[:, INDEX]]
    x, y = augment(cache.images, cache.masks, moved, crop=24)
    assert torch.equal(torch.cat([b.x for b in whole]), x)
    assert torch.equal(torch.cat([b.y for b in whole]), y)
    late = list(batches(data.train, plan[12:], 6, crop=24))  # what is left after a stop
    assert torch.equal(torch.cat([b.x for b in late]), x[12:])
    assert all(b.wait >= 0 for b in whole)


def test_validation_batches_are_whole_images(tmp_path):
    images, masks = make_folders(tmp_path, 5)
    data, *_ = open_folders(images, masks)
    got = list(validation_batches(data.train, batch_size=2))
    image = rescale_image(photo(60, 80, seed=0), 32)
    expected = ToTensorLab()(sample(image / 255.0, disc(32, 32)))["image"].float()
    torch.testing.assert_close(got[0].x[0], expected)
    assert sum(len(b.x) for b in got) == len(data.train)
    (one,) = validation_batches(data.train, indices=[3, 1])
    assert torch.equal(one.x, torch.cat([got[1].x[1:], got[0].x[1:]]))


@pytest.mark.filterwarnings("error")  # of PyTorch, about the read-only arrays of pairs that need no rescaling
def test_streaming_gives_what_the_cache_gives(tmp_path, monkeypatch):
    monkeypatch.setattr(batches_module, "THREADS", 1)
    images, masks = make_folders(tmp_path, 8)
    for path in (images / "p001.png", masks / "p001.png"):
        Image.open(path).resize((32, 32)).save(path)
    cached, *_ = open_folders(images, masks)
    monkeypatch.setattr(batches_module, "available_memory", lambda: 8 * 32 * 32 * 4)  # all of it, not four fifths
    streamed, log, _ = open_folders(images, masks)
    assert "streaming from disk with 1 threads" in log and streamed.train.cache is None
    assert (streamed.report, streamed.fingerprint) == (cached.report, cached.fingerprint)
    for epoch in range(2):
        plan = epoch_plan(len(cached.train), epoch, 0, rescale=32, crop=24)
        for pair in zip(*(batches(data.train, plan, 3, crop=24) for data in (cached, streamed)), strict=True):
            assert all(torch.equal(getattr(pair[0], name), getattr(pair[1], name)) for name in ("x", "y", "rows"))
        next(batches(streamed.train, plan, 2, crop=24))  # stopped in the middle of an epoch
    gone = cached.train.pairs[0].image
    gone.unlink()
    with pytest.raises(DataError, match=f"{gone.name}.*readable at the start"):
        list(batches(streamed.train, plan, 3, crop=24))


def test_masks_without_any_object_are_refused(tmp_path):
    images, masks = make_folders(tmp_path, 3)
    for path in masks.iterdir():
        Image.fromarray(np.zeros((60, 80), np.uint8)).save(path)
    with pytest.raises(DataError, match=r"no mask in .* shows an object"):
        open_folders(images, masks)


def test_any_split_is_served_by_the_same_cache(tmp_path):
    pairs = pair_folders(*make_folders(tmp_path, 9))
    lines: list[str] = []
    for fold in range(3):
        val = pairs[fold::3][::-1]  # in any order
        train = [pair for pair in pairs if pair not in val]
        data = open_data(train, val, 32, log=lines.append)
        assert (data.train.pairs, data.val.pairs) == (train, val)
        for source in (data.train, data.val):
            x = torch.cat([batch.x for batch in validation_batches(source, batch_size=2)])
            expected = torch.cat([batch.x for batch in validation_batches(DataSource(source.pairs, 32))])
            assert torch.equal(x, expected)
    assert sum("filled" in line for line in lines) == 1
    assert lines.count("data: 6 pairs for training, 3 for validation") == 3
