from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydiff.config import ExperimentConfig
from raydiff.errors import ConfigError, DataError
from raydiff.images import ImageSpec
from raydiff.shards import COPY, ShardSet, TrainingBatch, TrainingOrder, cached_stream, fits_in_memory
from raydiff.shards.order import Share
from raydiff.shards.windows import cut, stored_chunks

SPEC = ImageSpec((8, 8), 1)


def rows_of(order: TrainingOrder, share: Share, stop_step: int) -> list[int]:
    rows: list[int] = []
    for window in order.windows(share.start):
        if window.start >= stop_step * share.batch_size:
            return rows
        rows += share.of(order, window, stop_step)[0].tolist()
    return rows


@st.composite
def orders(draw: st.DrawFn) -> TrainingOrder:
    groups = draw(st.lists(st.integers(1, 9), min_size=1, max_size=12))
    repeats = draw(st.just([]) | st.lists(st.integers(1, 4), min_size=sum(groups), max_size=sum(groups)))
    return TrainingOrder(tuple(groups), draw(st.integers(0, 99)), draw(st.integers(1, 40)), tuple(repeats))


@settings(max_examples=60, deadline=None)
@given(orders(), st.integers(0, 3))
def test_every_image_as_often_as_it_should_per_epoch(order: TrainingOrder, epoch: int) -> None:
    """Once, or with repeats each time as if in an epoch of its own."""
    windows = list(order.epoch(epoch))
    rows, epochs = (np.concatenate(parts) for parts in zip(*(order.images(window) for window in windows), strict=True))
    times = order.repeats or (1,) * sum(order.row_groups)
    assert len(rows) == order.num_rows
    assert sorted(zip(rows.tolist(), epochs.tolist(), strict=True)) == [
        (row, epoch + COPY * copy) for row, count in enumerate(times) for copy in range(count)
    ]
    assert [window.start for window in windows] == list(
        epoch * order.num_rows + np.cumsum([0, *(window.num_rows for window in windows[:-1])])
    )
    for window in windows:
        assert window.num_rows <= max(order.window, max(order.row_groups))
        groups, inside = order.locate(order.rows(window))
        assert set(groups.tolist()) == {order.passes[number][0] for number in window.passes}
        assert (inside < np.array(order.row_groups)[groups]).all()


@settings(max_examples=60, deadline=None)
@given(orders(), st.integers(7, 12), st.integers(0, 7), st.sampled_from([1, 2, 3, 5, 7]))
def test_slices_of_the_ranks_make_the_global_batch(order: TrainingOrder, batch: int, start: int, world: int) -> None:
    """Whatever the number of workers, which may change from one step to the next."""
    stop = start + 5
    whole = np.array(rows_of(order, Share(batch, start, 0, 1), stop)).reshape(5, batch)
    slices = [np.array(rows_of(order, Share(batch, start, rank, world), stop)).reshape(5, -1) for rank in range(world)]
    assert np.array_equal(np.concatenate(slices, axis=1), whole)
    assert {part.shape[1] for part in slices} <= {batch // world, batch // world + 1}


def test_the_order_changes_with_seed_epoch_and_window_and_with_nothing_else() -> None:
    order = TrainingOrder((16,) * 8, seed=0, window=48)

    def first(order: TrainingOrder, epoch: int = 0) -> list[int]:
        return order.rows(next(order.epoch(epoch))).tolist()

    assert first(order) == first(TrainingOrder((16,) * 8, 0, 48))
    others = [first(order, 1), first(TrainingOrder((16,) * 8, 1, 48)), first(TrainingOrder((16,) * 8, 0, 64))]
    assert all(other != first(order) for other in others)


def test_the_order_is_pinned() -> None:
    order = TrainingOrder((3, 2, 3), seed=7, window=5)
    assert [order.rows(window).tolist() for window in islice(order.windows(), 4)] == [
        [1, 2, 0, 3, 4],
        [7, 6, 5],
        [2, 1, 0],
        [5, 6, 7, 4, 3],
    ]


def test_the_order_with_repeats_is_pinned() -> None:
    """Passes over a row group that take fewer and fewer of its images lie anywhere in the epoch."""
    order = TrainingOrder((3, 2), seed=7, window=4, repeats=(1, 1, 2, 1, 3))
    images = [order.images(window) for window in islice(order.windows(), 3)]
    assert [rows.tolist() for rows, _ in images] == [[1, 2, 0, 4], [4, 4, 3, 2], [1, 0, 2, 4]]
    assert [(epochs // COPY).tolist() for _, epochs in images] == [[0, 0, 0, 2], [0, 1, 0, 1], [0, 0, 0, 1]]
    assert [(epochs % COPY).tolist() for _, epochs in images] == [[0] * 4, [0] * 4, [1] * 4]


def test_an_image_that_is_seen_often_is_spread_over_the_epoch() -> None:
    order = TrainingOrder((8,) * 64, seed=0, window=32, repeats=(400,) + (1,) * 511)
    shares = [(order.rows(window) == 0).mean() for window in order.epoch(0)]
    assert max(shares) < 0.85


def test_small_classes_are_seen_as_often_as_the_largest(
    uneven_config: ExperimentConfig, uneven_shards: ShardSet
) -> None:
    """30 of one, 7 of the other: four times each, with another view and noise each time."""
    order = TrainingOrder.of(uneven_shards, seed=5, window=20, balance=True)
    assert order.num_rows == 30 + 4 * 7
    spec = ImageSpec.of(uneven_config.data)
    taken = list(islice(cached_stream(uneven_shards, spec, order, batch_size=29), 4))
    keys = [key for batch in taken for key in zip(batch.ids, batch.epochs.tolist(), strict=True)]
    assert len(set(keys)) == len(keys) == 2 * order.num_rows
    labels = Counter(label for batch in taken for label in batch.labels.tolist())
    assert labels == {uneven_shards.classes.index("many"): 60, uneven_shards.classes.index("few"): 56}
    later = next(cached_stream(uneven_shards, spec, order, batch_size=29, start_step=3))
    assert later.ids == taken[3].ids
    assert np.array_equal(later.epochs, taken[3].epochs)


def test_the_window_mixes(digit_shards: ShardSet) -> None:
    order = TrainingOrder((64,) * 64, seed=0, window=4096)
    rows = order.rows(next(order.epoch(0)))
    assert abs(np.corrcoef(np.arange(4096), rows)[0, 1]) < 0.05
    groups, _ = order.locate(rows[:64])
    assert len(set(groups.tolist())) > 30


def batches(shards: ShardSet, count: int, balance: bool = False, **where: int) -> list[TrainingBatch]:
    order = TrainingOrder.of(shards, seed=5, window=100, balance=balance)
    return list(islice(cached_stream(shards, SPEC, order, batch_size=48, **where), count))


def test_the_cached_stream_gives_every_image_once_per_epoch(digit_shards: ShardSet) -> None:
    size = digit_shards.count("train")
    steps = 3 * size // 48
    for world_size in (1, 2, 4):
        seen: Counter[tuple[int, str]] = Counter()
        for rank in range(world_size):
            for batch in batches(digit_shards, steps, rank=rank, world_size=world_size):
                assert len(batch.ids) == 48 // world_size
                seen.update(zip(batch.epochs.tolist(), batch.ids, strict=True))
        assert set(seen.values()) == {1}
        assert sum(epoch < 2 for epoch, _ in seen) == 2 * size


def test_images_and_labels_belong_to_their_ids(digit_shards: ShardSet) -> None:
    stored = {}
    for part in digit_shards.read("train", SPEC):
        stored.update(zip(part.ids, zip(part.images, part.labels, strict=True), strict=True))
    for batch in batches(digit_shards, 12):
        for place, image_id in enumerate(batch.ids):
            image, label = stored[image_id]
            assert np.array_equal(batch.images[place], image)
            assert batch.labels[place] == label


def test_starting_later_is_skipping(digit_shards: ShardSet) -> None:
    later = batches(digit_shards, 4, start_step=13, rank=1, world_size=2)
    skipped = batches(digit_shards, 17, rank=1, world_size=2)[13:]
    assert [batch.ids for batch in later] == [batch.ids for batch in skipped]
    assert all(np.array_equal(a.epochs, b.epochs) for a, b in zip(later, skipped, strict=True))


def test_batches_larger_than_the_data_set(part_shards: ShardSet) -> None:
    order = TrainingOrder.of(part_shards, seed=0, window=100)
    batch = next(cached_stream(part_shards, ImageSpec((4, 4), 3), order, batch_size=70))
    assert batch.images.shape == (70, 4, 4, 3)
    assert Counter(batch.epochs.tolist()) == {0: 30, 1: 30, 2: 10}


@pytest.mark.parametrize("rows_per_chunk", [1, 7, 1000])
@pytest.mark.parametrize("fixture", ["digit_shards", "uneven_shards"])
def test_windows_read_from_shards_equal_the_cached_stream(
    fixture: str, rows_per_chunk: int, request: pytest.FixtureRequest
) -> None:
    shards, balance = request.getfixturevalue(fixture), fixture == "uneven_shards"
    order = TrainingOrder.of(shards, seed=5, window=100, balance=balance)
    for rank, world_size in ((0, 1), (1, 2), (2, 4), (4, 5)):
        share = Share(48, 3, rank, world_size)
        pieces = (
            chunk.decode(SPEC)
            for window in order.windows(share.start)
            for chunk in stored_chunks(shards, order, share, window, rows_per_chunk=rows_per_chunk)
        )
        expected = batches(shards, 20, balance, start_step=3, rank=rank, world_size=world_size)
        for mine, theirs in zip(islice(cut(pieces, share.rows_per_step), 20), expected, strict=True):
            assert mine.ids == theirs.ids
            assert np.array_equal(mine.images, theirs.images)
            assert np.array_equal(mine.labels, theirs.labels)
            assert np.array_equal(mine.epochs, theirs.epochs)


def test_an_image_that_is_seen_often_is_read_once(uneven_shards: ShardSet) -> None:
    """The bytes of its copies are one buffer: a large image of a small class does not fill the memory."""
    order = TrainingOrder.of(uneven_shards, seed=0, window=100, balance=True)
    window = next(order.epoch(0))
    chunks = stored_chunks(uneven_shards, order, Share(58, 0, 0, 1), window, rows_per_chunk=100)
    images = [image for chunk in chunks for image in chunk.images]
    assert len(images) == 30 + 4 * 7
    assert len({image.content.address for image in images}) == 30 + 7


def test_fits_in_memory(digit_shards: ShardSet) -> None:
    spec = ImageSpec((64, 64), 3)
    needed = digit_shards.count("train") * 64 * 64 * 3
    assert not fits_in_memory(digit_shards, spec, needed // 2**20)
    assert fits_in_memory(digit_shards, spec, needed // 2**20 + 1)


def test_a_batch_that_cannot_be_shared_out(digit_shards: ShardSet) -> None:
    order = TrainingOrder.of(digit_shards, seed=0, window=10)
    with pytest.raises(ConfigError, match=r"training.batch_size is 3; it must be at least the number of workers \(4"):
        cached_stream(digit_shards, SPEC, order, batch_size=3, world_size=4)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        Share(8, 0, 2, 2)


def test_no_training_images(digit_shards: ShardSet) -> None:
    from dataclasses import replace

    empty = replace(digit_shards, records=())
    with pytest.raises(DataError, match="has no training images"):
        TrainingOrder.of(empty, seed=0, window=10)


def test_a_lost_shard_is_named(digit_shards: ShardSet, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(digit_shards.uri, tmp_path / "copy")
    shards = ShardSet.open(str(tmp_path / "copy"))
    (tmp_path / "copy/train-00000.parquet").unlink()
    with pytest.raises(DataError, match=r"copy/train-00000.parquet: the shard cannot be read \(.*No such file"):
        batches(shards, 1)
