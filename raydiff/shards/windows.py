"""Reading one window of the training order: the images that one worker takes of it, in order, a chunk at a time.

To give the images of a window in random order, all its row groups are read. A worker keeps its own share of them, still
encoded: about ``window`` / W images. It reads every byte of the window, though, so W workers read the training split W
times per epoch between them; decoding, which costs far more, is done once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from raydiff.images import ImageSpec
from raydiff.shards.order import Share, TrainingBatch, TrainingOrder, Window
from raydiff.shards.reading import GroupReader, ShardSet, StoredImage

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["StoredChunk", "cut", "parts_of", "stored_chunks"]


@dataclass(frozen=True)
class StoredChunk:
    """Consecutive images of a worker's stream, not decoded; ``epochs`` and ``labels`` int64 (n,)."""

    epochs: NDArray[np.int64]
    images: list[StoredImage]
    labels: NDArray[np.int64]

    def decode(self, spec: ImageSpec) -> TrainingBatch:
        """The pixels of all, in order.

        Raises:
            DataError: an image cannot be brought to ``spec``; the message names it.
        """
        pixels = np.empty((len(self.images), *spec.image_size, spec.channels), dtype=np.uint8)  # (n, H, W, C)
        for row, image in zip(pixels, self.images, strict=True):
            row[...] = image.pixels(spec)
        return TrainingBatch([image.image_id for image in self.images], self.epochs, pixels, self.labels)


def stored_chunks(
    shards: ShardSet,
    order: TrainingOrder,
    share: Share,
    window: Window,
    *,
    rows_per_chunk: int,
    stop_step: int | None = None,
) -> Iterator[StoredChunk]:
    """A worker's images of one window in training order, at most ``rows_per_chunk`` at a time.

    Where chunks hold whole batches they begin with one, so that :func:`cut` rarely has to copy.

    Raises:
        DataError: a shard cannot be read; the message names it.
    """
    rows, epochs = share.of(order, window, stop_step)
    groups, inside = order.locate(rows)
    images: list[StoredImage | None] = [None] * len(rows)
    labels = np.empty(len(rows), dtype=np.int64)
    index = {name: label for label, name in enumerate(shards.classes)}
    with GroupReader(shards, "train") as reader:
        for group in np.unique(groups).tolist():
            places = np.flatnonzero(groups == group)
            once, which = np.unique(inside[places], return_inverse=True)  # one may be there several times
            stored = list(reader.images(group, once, keep=len(once) == order.row_groups[group]))
            for place, (image, class_name) in zip(places.tolist(), (stored[i] for i in which.tolist()), strict=True):
                images[place] = image
                labels[place] = index[class_name]
    for part in parts_of(len(rows), share.rows_before(window), share.rows_per_step, rows_per_chunk):
        chunk = [image for image in images[part] if image is not None]
        images[part] = [None] * len(chunk)  # what was handed on is held no longer
        yield StoredChunk(epochs[part], chunk, labels[part])


def parts_of(count: int, before: int, batch: int, most: int) -> Iterator[slice]:
    """``count`` rows, of a stream of which ``before`` came earlier, in parts of at most ``most``.

    Where that holds whole batches of ``batch`` rows they begin with one, so that :func:`cut` rarely has to copy.
    """
    start = 0
    whole = most // batch * batch or most
    while start < count:
        to_boundary = -(before + start) % batch
        stop = min(count, start + (to_boundary if 0 < to_boundary <= most else whole))
        yield slice(start, stop)
        start = stop


def cut(pieces: Iterable[TrainingBatch], size: int) -> Iterator[TrainingBatch]:
    """The same images in batches of ``size``; what is left over at the end is dropped."""
    held: list[TrainingBatch] = []
    count = 0
    for piece in pieces:
        held.append(piece)
        count += len(piece.ids)
        if count < size:
            continue
        joined = TrainingBatch.joined(held)
        for start in range(0, count - size + 1, size):
            yield joined.rows(slice(start, start + size))
        rest = count % size
        held, count = ([joined.rows(slice(count - rest, count))] if rest else []), rest
