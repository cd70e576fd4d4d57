from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from PIL import Image

from raydiff.config import DataConfig
from raydiff.distributed import data as module
from raydiff.distributed.data import prepare, streaming
from raydiff.errors import ConfigError, DataError, StorageError
from raydiff.images import ImageSpec
from raydiff.shards import ShardSet, TrainingBatch, TrainingOrder, cached_stream, write_shards

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.timeout(180),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 pictures of real strokes: digits drawn large, as PNG and JPEG."""
    from sklearn.datasets import load_digits

    root = tmp_path_factory.mktemp("strokes")
    for number, image in enumerate(load_digits().images[:300]):
        large = Image.fromarray((image * 15).astype(np.uint8)).resize((48, 40)).convert("RGB")
        large.save(root / f"{number:04d}.{'png' if number % 3 else 'jpg'}")
    return root


def config_of(folder: Path, **fields: Any) -> DataConfig:
    dataset = {"name": "folder", "source": str(folder)}
    return DataConfig(**{"dataset": dataset, "image_size": (40, 48), "channels": 3} | fields)


@pytest.fixture(scope="module", params=["encoded", "raw"])
def shards(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    config = config_of(folder, shard_format=request.param, shard_mb=1)
    return write_shards(config, str(tmp_path_factory.mktemp("shards") / request.param))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few images, so that these small shards make many."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 100_000)


SPEC = ImageSpec((40, 48), 3)


def order_of(shards: ShardSet) -> TrainingOrder:
    return TrainingOrder.of(shards, seed=2, window=80)


def assert_same(mine: Iterator[TrainingBatch], theirs: Iterator[TrainingBatch], count: int) -> None:
    for step in range(count):
        left, right = next(mine), next(theirs)
        assert left.ids == right.ids, step
        for name in ("epochs", "images", "labels"):
            assert getattr(left, name).dtype == getattr(right, name).dtype
            assert np.array_equal(getattr(left, name), getattr(right, name)), (step, name)
    assert next(mine, None) is None


def test_prepare_writes_what_one_process_writes(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, shard_format="raw", shard_mb=1)
    seen: list[tuple[int, int]] = []
    by_ray = prepare(config, str(tmp_path / "ray"), progress=lambda done, total: seen.append((done, total)))
    alone = write_shards(config, str(tmp_path / "alone"))
    assert by_ray.records == alone.records
    assert len(by_ray.records) > 2
    for record in by_ray.records:
        assert (tmp_path / "ray" / record.name).read_bytes() == (tmp_path / "alone" / record.name).read_bytes()
    assert seen == sorted(seen)
    assert len(seen) == len(by_ray.records)
    assert seen[-1] == (300, 300)


def test_prepare_goes_on_after_an_interruption(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, shard_format="raw", shard_mb=1)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(config, str(tmp_path / "out"), progress=interrupt)
    assert not (tmp_path / "out/manifest.json").exists()
    finished = {path.name: path.stat().st_ino for path in (tmp_path / "out").glob("*.parquet")}
    assert finished
    prepare(config, str(tmp_path / "out"))
    for name, inode in finished.items():
        assert (tmp_path / "out" / name).stat().st_ino == inode


def test_prepare_names_a_truncated_image(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "images")
    bad = tmp_path / "images/0001.png"
    bad.write_bytes(bad.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"^/.*/images: 0001.png: cannot be decoded .*data.on_bad_image: skip$"):
        prepare(config_of(tmp_path / "images"), str(tmp_path / "out"))
    shards = prepare(config_of(tmp_path / "images", on_bad_image="skip"), str(tmp_path / "out"))
    assert [skipped.image_id for skipped in shards.skipped] == ["0001.png"]


def test_prepare_finds_an_unwritable_place_first(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file/x: cannot be made"):
        prepare(config_of(folder), str(tmp_path / "file/x"))


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2), (2, 5)])
@pytest.mark.usefixtures("small_chunks")
def test_streaming_equals_the_cached_stream(shards: ShardSet, rank: int, world_size: int) -> None:
    where = {"batch_size": 32, "start_step": 3, "rank": rank, "world_size": world_size}
    streamed = streaming(shards, SPEC, order_of(shards), num_steps=20, **where)
    assert_same(streamed, cached_stream(shards, SPEC, order_of(shards), **where), 20)


@pytest.mark.usefixtures("small_chunks")
def test_three_workers_see_every_image_once_per_epoch(shards: ShardSet) -> None:
    steps = 2 * shards.count("train") // 20
    seen: Counter[tuple[int, str]] = Counter()
    for rank in range(3):
        for batch in streaming(
            shards, SPEC, order_of(shards), batch_size=20, num_steps=steps, rank=rank, world_size=3, num_decoders=2
        ):
            seen.update(zip(batch.epochs.tolist(), batch.ids, strict=True))
    assert set(seen.values()) == {1}
    assert sum(epoch == 0 for epoch, _ in seen) == shards.count("train")


def own_tasks() -> list[int]:
    """Processes that read or decode, of the Ray that this process started."""
    parents, tasks = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if (folder / "cmdline").read_bytes().startswith((b"ray::_read", b"ray::_decode")):
                tasks.append(int(folder.name))

    def descends(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and descends(parents[pid]))

    return [pid for pid in tasks if descends(pid)]


@pytest.mark.usefixtures("small_chunks")
def test_a_lost_process_is_replaced(shards: ShardSet) -> None:
    stream = streaming(shards, SPEC, order_of(shards), batch_size=32, num_steps=40, num_decoders=2)
    seen = [next(stream) for _ in range(3)]
    while not (tasks := own_tasks()) and len(seen) < 30:  # none between two tasks; the next batch begins some
        seen.append(next(stream))
    assert tasks, "no task was found to kill"
    with contextlib.suppress(ProcessLookupError):  # it has just ended, and another runs
        os.kill(tasks[0], signal.SIGKILL)
    expected = cached_stream(shards, SPEC, order_of(shards), batch_size=32)
    assert_same(chain(seen, stream), expected, 40)


def test_streaming_beside_workers_that_hold_every_cpu(shards: ShardSet) -> None:
    @ray.remote
    class Worker:
        def run(self, shards: ShardSet, rank: int) -> list[str]:
            stream = streaming(shards, SPEC, order_of(shards), batch_size=32, num_steps=6, rank=rank, world_size=2)
            return [image_id for batch in stream for image_id in batch.ids]

    cpus = ray.cluster_resources()["CPU"]
    workers = [Worker.options(num_cpus=cpus / 2).remote() for _ in range(2)]  # type: ignore[attr-defined]
    results = ray.get([worker.run.remote(shards, rank) for rank, worker in enumerate(workers)], timeout=120)
    whole = list(islice(cached_stream(shards, SPEC, order_of(shards), batch_size=32), 6))
    expected = [[image_id for batch in whole for image_id in batch.ids[rank * 16 : rank * 16 + 16]] for rank in (0, 1)]
    assert results == expected
    for worker in workers:
        ray.kill(worker)


def test_leaving_a_stream_early_stops_it(shards: ShardSet) -> None:
    stream = streaming(shards, SPEC, order_of(shards), batch_size=32, num_steps=100_000)
    assert len(next(stream).ids) == 32
    stream.close()  # type: ignore[attr-defined]
    again = streaming(shards, SPEC, order_of(shards), batch_size=32, num_steps=1)
    assert len(list(again)) == 1


def test_a_garbled_shard_is_named(shards: ShardSet, tmp_path: Path) -> None:
    shutil.copytree(shards.uri, tmp_path / "copy")
    path = tmp_path / "copy/train-00000.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    copy = ShardSet.open(str(tmp_path / "copy"))
    message = (
        r"copy/train-00000.parquet: the shard cannot be read \(.*CRC.*; its SHA-256 is not the manifest's, so it was "
        r"changed\); run raydiff prepare again, or leave it out with data.on_bad_shard: skip$"
    )
    with pytest.raises(DataError, match=message):
        list(streaming(copy, SPEC, order_of(copy), batch_size=32, num_steps=8))


def test_an_image_that_does_not_fit_is_named(shards: ShardSet) -> None:
    strict = ImageSpec((40, 40), 3, "strict")
    with pytest.raises(DataError, match=r"\.(png|jpg): (is 40 x 48 .* expects 40 x 40|the shard holds raw pixels)"):
        list(streaming(shards, strict, order_of(shards), batch_size=32, num_steps=2))


def test_a_batch_that_cannot_be_shared_out(shards: ShardSet) -> None:
    with pytest.raises(ConfigError, match=r"training.batch_size is 3; it must be at least the number of workers"):
        streaming(shards, SPEC, order_of(shards), batch_size=3, num_steps=1, world_size=4)


def test_chunks_are_small_as_stored_and_as_pixels(shards: ShardSet) -> None:
    """Large files that become small pixels (photographs at 256 px) would else fill the object store."""
    large = replace(shards, records=tuple(replace(record, bytes=record.rows * 2**20) for record in shards.records))
    store = ray.cluster_resources()["object_store_memory"]
    for one, spec, size in (
        (large, SPEC, 2**20), (shards, ImageSpec((512, 512), 3), 512 * 512 * 3), (large, ImageSpec((2048, 2048), 3), 0),
    ):  # fmt: skip
        for world_size in (1, 2, 7):
            rows = module._rows_per_chunk(one, spec, world_size)
            assert rows >= 1
            assert rows == 1 or rows * size <= min(module.CHUNK_BYTES, store / world_size / 48)
    assert module._rows_per_chunk(large, ImageSpec((2048, 2048), 3), 7) == 1


def test_windows_larger_than_memory_are_refused(shards: ShardSet) -> None:
    huge = replace(shards, records=tuple(replace(record, bytes=record.rows * 2**30) for record in shards.records))
    message = (
        r"data.shuffle_window is 80 and an image takes 1024.0 MB in its shard: 2 windows are read at a time, more than "
        r"half of the cluster's memory \([\d.]+ GB\); set it to \d+ or less"
    )
    with pytest.raises(ConfigError, match=message):
        streaming(huge, SPEC, order_of(huge), batch_size=32, num_steps=1)
