"""The images of a split as tensors: what is fitted on, held out, calibrated on. Whole images, or tiles of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raydiff.augmentation import Augmentation
from raydiff.config import ExperimentConfig
from raydiff.detector import Crops
from raydiff.errors import DataError
from raydiff.images import ImageSpec, images_per_batch, to_tensor
from raydiff.shards import LabelledImages, ShardSet
from raydiff.shards.groups import column_of
from raydiff.shards.order import balancing
from raydiff.storage import Place
from raydiff.training import HeldOut
from raydiff.weighting import Weights, read_weights

__all__ = ["held_out_images", "image_ids", "labelled_batches", "split_batches", "training_images", "weights_of"]

_Pixels = NDArray[np.uint8]
"""Images (n, H, W, C)."""

_MAX_VIEWED = 500
"""Training images and views of them that something is fitted on at once; more images than that are taken alone."""


def labelled_batches(shards: ShardSet, split: Any, config: ExperimentConfig) -> Iterator[LabelledImages]:
    """The images of a split with their ids, in stored order, a batch at a time."""
    yield from shards.read(
        split, ImageSpec.of(config.data), batch_size=images_per_batch(config), on_bad_image=config.data.on_bad_image
    )


def split_batches(
    shards: ShardSet, split: Any, config: ExperimentConfig, *, without: Collection[str] = ()
) -> Iterator[Tensor]:
    """The images of a split, float32 (B, C, H, W) in [-1, 1], in stored order, a batch at a time."""
    for part in _without(without, labelled_batches(shards, split, config)):
        yield to_tensor(part.images)


def image_ids(shards: ShardSet, split: Any) -> list[str]:
    """The ids of all images of a split, in stored order; no image is read."""
    return column_of(shards, split, "image_id")


def weights_of(run_dir: Place, shards: ShardSet, *, balance: bool = False) -> Weights:
    """What a run's training images count, less those that lay in shards which are left out.

    With ``balance`` in an epoch in which the classes are balanced (``training.balance_classes``).
    """
    weights = read_weights(run_dir, shards.count("train"))
    if weights.by_id and shards.left_out:
        there = set(image_ids(shards, "train"))
        weights = Weights({name: weight for name, weight in weights.by_id.items() if name in there}, weights.num_images)
    if weights.by_id and balance:
        return weights.with_repeats(image_ids(shards, "train"), balancing(column_of(shards, "train", "class_name")))
    return weights


def held_out_images(config: ExperimentConfig, shards: ShardSet, left_out: Collection[str] = ()) -> HeldOut:
    """The first ``training.validation_images`` calibration normals, or a tile of each, for the held-out denoising loss.

    Where none were set aside (``data.calibration_fraction`` 0) the training images that a fold has ``left_out``;
    without such, training images, in a view that is not trained on where augmentation makes one. What a run with
    ``contamination.max_share`` has left out are suspects, and not among them.

    Raises:
        DataError: there are none.
    """
    limit, crops = config.training.validation_images, Crops.of(config)
    aside = bool(config.data.calibration_fraction)
    suspects = bool(config.contamination.max_share)  # folds look for none
    augmentation = None if aside or (left_out and not suspects) else Augmentation.of(config)
    images, labels, ids = [], [], list[str]()
    for part in labelled_batches(shards, "calibration" if aside else "train", config):
        rows = [i for i, image_id in enumerate(part.ids) if aside or not left_out or (image_id in left_out) != suspects]
        names, pixels = [part.ids[i] for i in rows], part.images[rows]
        if not rows:
            continue
        if augmentation is not None:
            pixels = augmentation.apply(pixels, names, [-1] * len(names))
        if crops is not None:
            pixels, _ = crops.of_batch(pixels, names, [("held-out", config.seed, image_id) for image_id in names])
        images.append(to_tensor(pixels))
        labels.append(torch.as_tensor(part.labels[rows]))
        ids += names
        if len(ids) >= limit:
            break
    if not ids:
        raise DataError(f"{shards.label}: has no calibration images; raise data.calibration_fraction and prepare again")
    names = [f"{image_id} held out" for image_id in ids] if augmentation is not None else ids
    return HeldOut(torch.cat(images)[:limit], torch.cat(labels)[:limit], names[:limit])


def training_images(config: ExperimentConfig, shards: ShardSet, limit: int, *, without: Collection[str] = ()) -> Tensor:
    """The first so many training images, (n, C, H, W) in [-1, 1]; with tiles so many tiles, as many of each image.

    Of few images, where augmentation makes views: all views that training sees, or 16, 500 images or tiles at most.
    """
    found = _tiles(config, shards, limit, without) if config.tiles.size else _whole(config, shards, limit, without)
    parts = list(found)  # a quarter of the tensor's size
    height, width, channels = parts[0].shape[1:]
    images, first = torch.empty(sum(map(len, parts)), channels, height, width), 0
    for part in parts:
        images[first : first + len(part)] = to_tensor(part)
        first += len(part)
    return images


def _whole(config: ExperimentConfig, shards: ShardSet, limit: int, without: Collection[str]) -> Iterator[_Pixels]:
    kept = list(_up_to(limit, _without(without, labelled_batches(shards, "train", config))))
    yield from (part.images for part in kept)
    augmentation, count = Augmentation.of(config), sum(len(part.ids) for part in kept)
    if augmentation is None:
        return
    left = min(limit, _MAX_VIEWED) - count
    for number in range(1, config.augmentation.views or 16):
        for part in kept:
            if left <= 0:
                return
            rows = len(part.ids[:left])
            yield augmentation.apply(part.images[:rows], part.ids[:rows], [number] * rows)
            left -= rows


def _tiles(config: ExperimentConfig, shards: ShardSet, limit: int, without: Collection[str]) -> Iterator[_Pixels]:
    crops = Crops.of(config)
    assert crops is not None  # noqa: S101
    num_images = max(1, shards.count("train") - len(without))
    each, count, kept = -(-limit // num_images), 0, list[LabelledImages]()
    augmentation = Augmentation.of(config)
    left = min(limit, _MAX_VIEWED) - num_images * min(each, len(crops.tiling))
    for part in _without(without, labelled_batches(shards, "train", config)):
        for image, image_id in zip(part.images, part.ids, strict=True):
            places = crops.several(min(each, limit - count), "fit", image_id)
            for place in places:
                yield crops.cut(image[None], [place])
            count += len(places)
        if count >= limit:
            return
        if augmentation is not None and left > 0:
            kept.append(part)
    if augmentation is not None:
        yield from islice(_tiles_of_views(config, crops, augmentation, kept), max(0, left))


def _tiles_of_views(
    config: ExperimentConfig, crops: Crops, augmentation: Augmentation, parts: Sequence[LabelledImages]
) -> Iterator[_Pixels]:
    """All tiles of the views that are not the images themselves, one at a time."""
    for number in range(1, config.augmentation.views or 16):
        for part in parts:
            for image, image_id in zip(part.images, part.ids, strict=True):
                view = augmentation.apply(image[None], [image_id], [number])
                for place in crops.several(len(crops.tiling), "fit", image_id, number):
                    yield crops.cut(view, [place])


def _without(ids: Collection[str], batches: Iterable[LabelledImages]) -> Iterator[LabelledImages]:
    """The same batches without some images."""
    for part in batches:
        rows = [i for i, image_id in enumerate(part.ids) if image_id not in ids]
        if rows:
            yield part if len(rows) == len(part.ids) else _rows(part, rows)


def _up_to(limit: int, batches: Iterable[LabelledImages]) -> Iterator[LabelledImages]:
    for part in batches:
        yield part if len(part.ids) <= limit else _rows(part, list(range(limit)))
        limit -= len(part.ids)
        if limit <= 0:
            return


def _rows(part: LabelledImages, rows: list[int]) -> LabelledImages:
    return LabelledImages(
        [part.ids[i] for i in rows], part.images[rows], part.labels[rows], part.is_anomaly[rows],
        [part.defects[i] for i in rows], None if part.masks is None else part.masks[rows],
    )  # fmt: skip
