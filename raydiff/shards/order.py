"""The order in which training sees images: one endless stream, the same for any number of workers.

Per epoch the row groups are permuted and gathered into windows of about ``window`` images, and the images of a window
are permuted: nearly a full shuffle, read in large pieces. The epochs follow each other without a gap, and the stream is
cut into global batches; every batch is full and every image appears exactly once per epoch. Where classes are balanced
it appears as often as brings its class nearest to the largest one: there are several passes over its row group in an
epoch, permuted with all others. Rank r of W takes the r-th of W slices of each batch, whose sizes differ by one at
most: the number of workers may change in the middle of a run.

The permutations are keyed by (seed, epoch), so any batch can be found again without replaying those before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count as numbers
from typing import TYPE_CHECKING

import numpy as np

from raydiff.config import ExperimentConfig
from raydiff.core.diffusion import keyed_seed
from raydiff.errors import ConfigError, DataError
from raydiff.images import ImageSpec
from raydiff.shards.groups import column_of
from raydiff.shards.reading import ShardSet

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["COPY", "Share", "TrainingBatch", "TrainingOrder", "Window", "balancing", "cached_stream", "fits_in_memory"]


COPY = 2**32
"""What the epoch of an image has more for each time that it was seen in it already: another view, noise and step."""


@dataclass(frozen=True)
class TrainingBatch:
    """One worker's slice of a global batch.

    ``ids`` has b strings; ``epochs`` int64 (b,), the epoch each image belongs to (a batch may span two or more), and
    :data:`COPY` more for each time before in the same epoch;
    ``images`` uint8 (b, H, W, C); ``labels`` int64 (b,), indices into ``ShardSet.normal_classes``. Where what a space
    makes of the images was kept (:mod:`raydiff.grids`), ``grids`` is that, float32 (b, *space.shape), and ``images``
    are of no size, (b, 0, 0, C).
    """

    ids: list[str]
    epochs: NDArray[np.int64]
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    grids: NDArray[np.float32] | None = None

    def rows(self, chosen: slice | Sequence[int]) -> TrainingBatch:
        """Some of it, in the order of ``chosen``."""
        ids = self.ids[chosen] if isinstance(chosen, slice) else [self.ids[i] for i in chosen]
        grids = None if self.grids is None else self.grids[chosen]
        return TrainingBatch(ids, self.epochs[chosen], self.images[chosen], self.labels[chosen], grids)

    @staticmethod
    def joined(pieces: Sequence[TrainingBatch]) -> TrainingBatch:
        """All of them, one behind the other; at least one."""
        if len(pieces) == 1:
            return pieces[0]
        grids = [piece.grids for piece in pieces if piece.grids is not None]
        return TrainingBatch(
            [image_id for piece in pieces for image_id in piece.ids],
            np.concatenate([piece.epochs for piece in pieces]),
            np.concatenate([piece.images for piece in pieces]),
            np.concatenate([piece.labels for piece in pieces]),
            np.concatenate(grids) if grids else None,
        )


@dataclass(frozen=True)
class Window:
    """Passes over row groups, shuffled together; the first image stands at ``start`` in the endless stream."""

    epoch: int
    index: int
    start: int
    passes: tuple[int, ...]
    num_rows: int


@dataclass(frozen=True)
class TrainingOrder:
    """A pure function of the sizes of the training split's row groups, a seed and the window in images.

    ``repeats`` says of each row, in stored order, how often it is seen in an epoch; once where it is empty.
    """

    row_groups: tuple[int, ...]
    seed: int
    window: int
    repeats: tuple[int, ...] = ()

    @classmethod
    def of(cls, shards: ShardSet, *, seed: int, window: int, balance: bool = False) -> TrainingOrder:
        """The order of a shard set's training split; with ``balance`` all classes are seen about equally often.

        Raises:
            DataError: the split is empty, or a shard cannot be read.
        """
        if not shards.count("train"):
            raise DataError(f"{shards.label}: has no training images; run raydiff prepare again")
        repeats = balancing(column_of(shards, "train", "class_name")) if balance else ()
        return cls(shards.row_groups("train"), seed, window, repeats)

    @classmethod
    def of_run(cls, shards: ShardSet, config: ExperimentConfig) -> TrainingOrder:
        """The one that a config asks for; raises as :meth:`of`."""
        return cls.of(
            shards, seed=config.seed, window=config.data.shuffle_window, balance=config.training.balance_classes
        )

    @cached_property
    def passes(self) -> list[tuple[int, int, int]]:
        """Those of an epoch: the row group, how many passes over it came before, and how many images it takes."""
        if not self.repeats:
            return [(group, 0, size) for group, size in enumerate(self.row_groups)]
        found = []
        for group, size in enumerate(self.row_groups):
            times = self._times[self.first_rows[group] :][:size]
            found += [(group, copy, int((times > copy).sum())) for copy in range(times.max())]
        return found

    @cached_property
    def _times(self) -> NDArray[np.int64]:
        return np.array(self.repeats, dtype=np.int64)

    @cached_property
    def num_rows(self) -> int:
        """Images per epoch, repeats and all."""
        return sum(self.repeats or self.row_groups)

    @cached_property
    def first_rows(self) -> NDArray[np.int64]:
        """(groups,): the row number, in stored order, at which each row group begins."""
        return np.concatenate([[0], np.cumsum(self.row_groups[:-1], dtype=np.int64)]).astype(np.int64)

    def epoch(self, epoch: int) -> Iterator[Window]:
        """The windows of one epoch. A window takes passes while they fit, at least one."""
        start = epoch * self.num_rows
        passes: list[int] = []
        rows = index = 0
        for number in _permutation(len(self.passes), "groups", self.seed, epoch).tolist():
            size = self.passes[number][2]
            if passes and rows + size > self.window:
                yield Window(epoch, index, start, tuple(passes), rows)
                start, index, passes, rows = start + rows, index + 1, [], 0
            passes.append(number)
            rows += size
        yield Window(epoch, index, start, tuple(passes), rows)

    def windows(self, position: int = 0) -> Iterator[Window]:
        """All windows from the one that holds ``position`` of the stream on, without end."""
        for epoch in numbers(position // self.num_rows):
            for window in self.epoch(epoch):
                if window.start + window.num_rows > position:
                    yield window

    def images(self, window: Window) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The window's images in training order: row numbers of the split in stored order, and epochs (num_rows,).

        The epoch of an image is the window's, and :data:`COPY` more for each time before in it.
        """
        rows, copies = [], []
        for group, copy, size in (self.passes[number] for number in window.passes):
            there = np.arange(self.row_groups[group], dtype=np.int64) + self.first_rows[group]
            rows.append(there[self._times[there] > copy] if self.repeats else there)
            copies.append(np.full(size, copy, dtype=np.int64))
        shuffle = _permutation(window.num_rows, "rows", self.seed, window.epoch, window.index)
        return np.concatenate(rows)[shuffle], window.epoch + COPY * np.concatenate(copies)[shuffle]

    def rows(self, window: Window) -> NDArray[np.int64]:
        """The row numbers of :meth:`images`."""
        return self.images(window)[0]

    def locate(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Row group, and row inside it, of row numbers (k,): two arrays (k,)."""
        groups = np.searchsorted(self.first_rows, rows, side="right").astype(np.int64) - 1
        return groups, rows - self.first_rows[groups]


@dataclass(frozen=True)
class Share:
    """What one of ``world_size`` workers takes of the stream, from the global batch number ``start_step`` on."""

    batch_size: int
    start_step: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        if self.batch_size < self.world_size:
            raise ConfigError(
                f"training.batch_size is {self.batch_size}; it must be at least the number of workers"
                f" ({self.world_size})"
            )
        if not 0 <= self.rank < self.world_size or self.start_step < 0:
            raise ValueError(f"rank {self.rank} of {self.world_size}, start_step {self.start_step}")

    @property
    def first_row(self) -> int:
        """Where this worker's slice of a global batch begins."""
        return self.rank * self.batch_size // self.world_size

    @property
    def rows_per_step(self) -> int:
        """Images this worker takes of each global batch."""
        return (self.rank + 1) * self.batch_size // self.world_size - self.first_row

    @property
    def start(self) -> int:
        """The stream position of the first batch."""
        return self.start_step * self.batch_size

    def rows_before(self, window: Window) -> int:
        """How many of this worker's images, from ``start`` on, come before a window."""
        whole, rest = divmod(max(window.start, self.start), self.batch_size)
        mine = min(max(rest - self.first_row, 0), self.rows_per_step)
        return (whole - self.start_step) * self.rows_per_step + mine

    def of(
        self, order: TrainingOrder, window: Window, stop_step: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The row numbers and epochs of a window's images that are this worker's, in training order (k,).

        ``stop_step`` is exclusive.
        """
        positions = window.start + np.arange(window.num_rows)
        places = positions % self.batch_size
        mine = (places >= self.first_row) & (places < self.first_row + self.rows_per_step)
        mine &= positions >= self.start
        if stop_step is not None:
            mine &= positions < stop_step * self.batch_size
        rows, epochs = order.images(window)
        return rows[mine], epochs[mine]


def fits_in_memory(shards: ShardSet, spec: ImageSpec, cache_mb: int) -> bool:
    """Whether the decoded training split takes no more than ``cache_mb`` MB (2^20 bytes)."""
    return shards.count("train") * spec.image_size[0] * spec.image_size[1] * spec.channels <= cache_mb * 2**20


def cached_stream(
    shards: ShardSet,
    spec: ImageSpec,
    order: TrainingOrder,
    *,
    batch_size: int,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[TrainingBatch]:
    """This worker's slices of the global batches from ``start_step`` on, without end.

    The training split is decoded once, when the first batch is asked for, and kept: N x H x W x C bytes per worker.

    Args:
        shards: where the images are.
        spec: what to bring them to.
        order: the order, made from the same shards.
        batch_size: images per global batch, over all workers.
        start_step: the first global batch.
        rank: which worker, from 0.
        world_size: of how many.

    Raises:
        DataError: a shard or an image cannot be read.
        ConfigError: ``batch_size`` is less than ``world_size``.
    """
    share = Share(batch_size, start_step, rank, world_size)
    return _from_memory(shards, spec, order, share)


def _from_memory(shards: ShardSet, spec: ImageSpec, order: TrainingOrder, share: Share) -> Iterator[TrainingBatch]:
    count = shards.count("train")
    images = np.empty((count, *spec.image_size, spec.channels), dtype=np.uint8)  # (N, H, W, C)
    labels = np.empty(count, dtype=np.int64)
    ids: list[str] = []
    for part in shards.read("train", spec):
        images[len(ids) : len(ids) + len(part.ids)] = part.images
        labels[len(ids) : len(ids) + len(part.ids)] = part.labels
        ids += part.ids
    rows, epochs = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    size = share.rows_per_step
    for window in order.windows(share.start):
        taken, of_epochs = share.of(order, window)
        rows, epochs = np.concatenate([rows, taken]), np.concatenate([epochs, of_epochs])
        while len(rows) >= size:
            batch, rows = rows[:size], rows[size:]
            yield TrainingBatch([ids[row] for row in batch], epochs[:size], images[batch], labels[batch])
            epochs = epochs[size:]


def balancing(classes: Sequence[str]) -> tuple[int, ...]:
    """How often each image is to be seen in an epoch so that its class comes nearest to the largest one."""
    count = Counter(classes)
    largest = max(count.values())
    return tuple(round(largest / count[name]) for name in classes)


def _permutation(size: int, *key: int | str) -> NDArray[np.int64]:
    """0 to size - 1 in an order that depends on the key alone (raw bits, whose stream numpy guarantees)."""
    bits = np.random.PCG64(keyed_seed("order", *key)).random_raw(size)
    return np.argsort(bits, kind="stable").astype(np.int64)
