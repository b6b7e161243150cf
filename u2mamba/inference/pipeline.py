"""Image files -> saliency maps; files are read while the network runs. For prediction and evaluation.

for source, saliency, extra in compute_maps(predict, sources, read, batch=8):
    ...
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from u2mamba.dataset.decode import BadFile, Pair, open_pair
from u2mamba.dataset.masks import MaskRule
from u2mamba.dataset.rescale import rescale_image
from u2mamba.inference.predictor import Predictor
from u2mamba.runtime.workers import THREADS, ordered_map

if TYPE_CHECKING:  # prediction does not need PySODMetrics
    from u2mamba.inference.evaluation import Item

S = TypeVar("S")  # has the image file as its attribute `image`
Read = Callable[[S], tuple[np.ndarray, Any]]  # -> (image of the network's size, (S, S, 3) uint8; what goes with it)


def compute_maps(
    predict: Predictor, sources: Iterable[S], read: Read, batch: int
) -> Iterator[tuple[S, np.ndarray | BadFile, Any]]:
    """(source, saliency map (S, S) float32 or why there is none, what `read` returned with the image).

    In the order of `sources`. Files are read ahead of the network.
    """

    def read_or_say_why(source: S) -> tuple[np.ndarray | BadFile, Any]:
        try:
            return read(source)
        except BadFile as error:
            return error, None
        except MemoryError:
            return BadFile(source.image, "does not fit into memory"), None

    def launch() -> Iterator[tuple[list, torch.Tensor | None]]:
        results = ordered_map(read_or_say_why, sources, ahead=2 * batch + THREADS)
        while chunk := list(itertools.islice(results, batch)):
            images = [image for _, (image, _) in chunk if not isinstance(image, BadFile)]
            yield chunk, predict(torch.from_numpy(np.stack(images))) if images else None

    # pairwise is one batch ahead: a GPU computes its maps while those before are used
    for (chunk, maps), _ in itertools.pairwise(itertools.chain(launch(), (None,))):
        values = iter(() if maps is None else maps[:, 0].cpu().numpy())
        for source, (image, extra) in chunk:
            saliency = image if isinstance(image, BadFile) else next(values)
            if saliency is not image and not np.isfinite(saliency).all():
                saliency = BadFile(source.image, "its map has NaN/Inf values: damaged weights, or try --precision fp32")
            yield source, saliency, extra


def predict_items(predict: Predictor, items: Iterable[Item], size: int, batch: int, rule: MaskRule) -> Iterator[Item]:
    """The items with mask and map in memory; if prediction failed, the map is a BadFile."""

    def read(item: Item) -> tuple[np.ndarray, np.ndarray]:
        with open_pair(Pair(item.stem, item.image, item.mask), rule.as_stored) as pair:
            return rescale_image(pair.image, size), pair.mask.by(rule)

    for item, saliency, mask in compute_maps(predict, items, read, batch):
        yield item._replace(map=saliency, mask=item.mask if mask is None else mask)
