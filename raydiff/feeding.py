"""What a backward pass of training is fed with: made on the host, from a batch of the stream, before it is needed.

All that is random about an image, its noise apart, is drawn here: by (seed, epoch, image).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from raydiff.config import ExperimentConfig
from raydiff.core.diffusion import keyed_seed
from raydiff.detector import trained_steps
from raydiff.images import to_tensor
from raydiff.latents import Latents
from raydiff.overlap import Courier, Sent
from raydiff.shards import COPY, TrainingBatch
from raydiff.views import Key, View, Views
from raydiff.weighting import Weights

__all__ = ["Feed", "Meal"]


@dataclass(frozen=True)
class Meal:
    """Images of one backward pass.

    ``keys``, ``views`` and ``names`` are of each image; ``t`` (b,) int64 its step; ``labels`` (b,) int64 what the
    denoiser is told; ``counted`` (b,) what it counts; ``size`` is how many images there were with those that do not
    count. One of ``pictures``, float32 (b, C, h, w) on the host, and ``grids``, what a space made of them, is there.
    ``epoch`` is that of the last one.
    """

    keys: list[Key]
    views: list[View]
    names: list[str]
    t: Tensor
    labels: Tensor
    counted: Tensor
    size: int
    epoch: int
    pictures: Tensor | None = None
    grids: Sent | None = None


class Feed:
    """Batches made into meals; ``latents`` says of which pictures the pixels will not be looked at."""

    def __init__(
        self,
        config: ExperimentConfig,
        views: Views,
        weights: Weights,
        latents: Latents,
        *,
        num_classes: int | None,
        device: str,
    ) -> None:
        self._config, self._views, self._weights, self._latents = config, views, weights, latents
        self._num_classes, self._courier = num_classes, Courier(device)

    def meals(self, batches: Iterator[TrainingBatch]) -> Iterator[list[Meal]]:
        """For each batch of this rank its backward passes: ``training.accumulation_steps`` of them."""
        for batch in batches:
            yield [self._meal(part) for part in _split(batch, self._config.training.accumulation_steps)]

    def _meal(self, batch: TrainingBatch) -> Meal:
        config, size, epoch = self._config, len(batch.ids), int(batch.epochs[-1] % COPY)
        batch, counted = self._weights.counted(batch)
        keys = [(config.seed, int(e), i) for e, i in zip(batch.epochs, batch.ids, strict=True)]
        views = self._views.drawn(keys)
        steps = trained_steps(config)
        t = torch.tensor([steps[keyed_seed("step", *key) % len(steps)] for key in keys])
        names = [view.name(image_id) for view, image_id in zip(views, batch.ids, strict=True)]
        labels = self._labels(batch, keys, views)
        if batch.grids is not None:
            sent = self._courier.send(torch.from_numpy(batch.grids))
            return Meal(keys, views, names, t, labels, counted, size, epoch, grids=sent)
        pictures = self._pictures(batch, views, names)
        return Meal(keys, views, names, t, labels, counted, size, epoch, pictures=pictures)

    def _labels(self, batch: TrainingBatch, keys: list[Key], views: list[View]) -> Tensor:
        labels = torch.tensor([v.turns for v in views]) if self._views.rotates else torch.as_tensor(batch.labels)
        if self._num_classes is None:
            return labels
        share = 10**6 * self._config.objective.condition_dropout
        dropped = torch.tensor([keyed_seed("label", *key) % 10**6 < share for key in keys])
        return torch.where(dropped, self._num_classes, labels)

    def _pictures(self, batch: TrainingBatch, views: list[View], names: list[str]) -> Tensor:
        drawn = views
        if self._views.augmentation is not None and self._views.crops is None:
            known = self._latents.know(names, [v.flip for v in views], [v.turns for v in views])
            drawn = [view._replace(number=0) if seen else view for view, seen in zip(views, known, strict=True)]
        return to_tensor(self._views.pictures(batch.images, batch.ids, drawn))


def _split(batch: TrainingBatch, parts: int) -> list[TrainingBatch]:
    """The batch in ``parts`` pieces, in order, whose sizes differ by one at most."""
    size = len(batch.ids)
    return [batch.rows(slice(i * size // parts, (i + 1) * size // parts)) for i in range(parts)]
