"""Ray Data around :mod:`raydiff.shards`: writing shards in parallel, and streaming them to training workers.

Streaming is two stages. A read task takes one window of the training order and hands on this worker's images, still
encoded, in chunks; decode tasks turn chunks into pixels, in parallel; order is preserved. (Raw pixels need no second
stage.) All tasks ask for no CPU and are limited in number instead, so that they can run beside training workers that
hold every CPU of the cluster.

Memory: at most ``READ_AHEAD`` windows are in the read tasks' memory, encoded, this worker's share only; what is decoded
and not yet consumed lies in the object store, a few chunks of about ``CHUNK_BYTES`` per task, and Ray Data holds the
tasks back when it fills. See :mod:`raydiff.shards.windows` for how many bytes are read.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from ray.data import DataContext, TaskPoolStrategy
from ray.exceptions import RayError

from raydiff.config import DataConfig
from raydiff.errors import RaydiffError, WorkerError
from raydiff.images import ImageSpec
from raydiff.shards import ShardPlan, ShardRecord, ShardSet, TrainingBatch, TrainingOrder, write_shards
from raydiff.shards.order import Share, Window
from raydiff.shards.reading import StoredImage
from raydiff.shards.windows import StoredChunk, cut, stored_chunks

__all__ = ["CHUNK_BYTES", "READ_AHEAD", "prepare", "streaming"]

READ_AHEAD = 2
"""Windows that are read at the same time."""

CHUNK_BYTES = 8 * 2**20
"""Decoded size of the chunks that pass between tasks."""

_BLOCK_BYTES = 2**18
_WINDOWS_PER_PIPELINE = 512


def prepare(data: DataConfig, destination: str, *, progress: Callable[[int, int], None] | None = None) -> ShardSet:
    """Write the shards of ``data.dataset`` on all CPUs of the cluster, then the manifest.

    An interrupted call goes on where it stopped when it is made again.

    Args:
        data: the config; ``destination`` counts, ``data.shards`` is not looked at.
        destination: a folder that every node can reach, or a URI such as ``s3://bucket/path``.
        progress: called with (images done, images in all) after each shard.

    Raises:
        StorageError: the destination cannot be written; raised before any image is read.
        DataError: the data set is not usable, or an image cannot be decoded and ``on_bad_image`` is ``error``.
        WorkerError: Ray lost a task for another reason.
    """
    return write_shards(data, destination, map_plans=_map_plans, progress=progress)


def _map_plans(write: Callable[[ShardPlan], ShardRecord], plans: list[ShardPlan]) -> Iterator[ShardRecord]:
    """``map`` as Ray Data tasks, one shard each; records come as they are done."""
    arguments = {"write": write, "plans": [ray.put(plan) for plan in plans]}
    with DataContext.current(_context(preserve_order=False)):
        dataset = ray.data.range(len(plans), override_num_blocks=len(plans)).map_batches(
            _write_one, fn_kwargs=arguments, batch_size=1, batch_format="pyarrow", num_cpus=1
        )
    for block in _blocks(dataset):
        for record in block.column("record").to_pylist():
            yield ShardRecord.from_dict(json.loads(record))


def _write_one(
    batch: pa.Table, write: Callable[[ShardPlan], ShardRecord], plans: list[ray.ObjectRef[ShardPlan]]
) -> pa.Table:
    plan = ray.get(plans[batch.column("id")[0].as_py()])
    return pa.table({"record": [json.dumps(write(plan).to_dict())]})


def streaming(
    shards: ShardSet,
    spec: ImageSpec,
    order: TrainingOrder,
    *,
    batch_size: int,
    num_steps: int,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_decoders: int | None = None,
) -> Iterator[TrainingBatch]:
    """This worker's slices of ``num_steps`` global batches, decoded by Ray Data tasks as they are needed.

    Bit for bit what :func:`raydiff.shards.cached_stream` gives, epoch after epoch without a pause, with memory that
    does not grow with the data set.

    Args:
        shards: where the images are.
        spec: what to bring them to.
        order: the order, made from the same shards.
        batch_size: images per global batch, over all workers.
        num_steps: how many global batches.
        start_step: the first global batch.
        rank: which worker, from 0.
        world_size: of how many.
        num_decoders: decode tasks at a time, for this worker; by default its share of the CPUs that training leaves.

    Raises:
        DataError: a shard or an image cannot be read; the message names it.
        ConfigError: ``batch_size`` is not a multiple of ``world_size``.
    """
    share = Share(batch_size, start_step, rank, world_size)
    pixels = spec.image_size[0] * spec.image_size[1] * spec.channels
    job = _Job(shards, spec, order, share, start_step + num_steps, max(1, CHUNK_BYTES // pixels))
    return cut(_pieces(job, num_decoders or _spare_cpus(world_size)), share.rows_per_step)


@dataclass(frozen=True)
class _Job:
    """What every task of a stream must know."""

    shards: ShardSet
    spec: ImageSpec
    order: TrainingOrder
    share: Share
    stop_step: int
    rows_per_chunk: int

    def windows(self) -> Iterator[Window]:
        """The windows that hold the batches asked for."""
        stop = self.stop_step * self.share.batch_size
        return takewhile(lambda window: window.start < stop, self.order.windows(self.share.start))

    def chunks(self, epoch: int, index: int) -> Iterator[StoredChunk]:
        """This worker's images of one window."""
        window = next(islice(self.order.epoch(epoch), index, None))
        return stored_chunks(
            self.shards, self.order, self.share, window, rows_per_chunk=self.rows_per_chunk, stop_step=self.stop_step
        )


def _pieces(job: _Job, num_decoders: int) -> Iterator[TrainingBatch]:
    """Chunks of the stream in order. A pipeline ends after many windows, to keep Ray's task lists short."""
    windows = job.windows()
    while part := list(islice(windows, _WINDOWS_PER_PIPELINE)):
        for block in _blocks(_pipeline(job, part, num_decoders)):
            for row in range(block.num_rows):
                yield _decoded_from_row(block, row, job.spec)


def _pipeline(job: _Job, windows: list[Window], num_decoders: int) -> ray.data.Dataset:
    with DataContext.current(_context(preserve_order=True)):
        items = [{"epoch": window.epoch, "index": window.index} for window in windows]
        source = ray.data.from_items(items, override_num_blocks=len(items))
        raw = job.shards.data["shard_format"] == "raw"
        stage = {"fn_kwargs": {"job": job}, "batch_format": "pyarrow", "num_cpus": 0}
        read = source.map_batches(
            _read_raw if raw else _read_encoded,
            batch_size=1,
            compute=TaskPoolStrategy(min(READ_AHEAD, len(windows))),
            **stage,
        )
        if raw:
            return read
        # max_calls=0 is the default, spelt out: with equal arguments Ray would fuse the two into one task per window
        return read.map_batches(_decode, batch_size=None, compute=TaskPoolStrategy(num_decoders), max_calls=0, **stage)


def _read_encoded(batch: pa.Table, job: _Job) -> Iterator[pa.Table]:
    for chunk in job.chunks(batch.column("epoch")[0].as_py(), batch.column("index")[0].as_py()):
        yield _encoded_to_row(chunk)


def _read_raw(batch: pa.Table, job: _Job) -> Iterator[pa.Table]:
    for chunk in job.chunks(batch.column("epoch")[0].as_py(), batch.column("index")[0].as_py()):
        yield _decoded_to_row(chunk.decode(job.spec))


def _decode(block: pa.Table, job: _Job) -> Iterator[pa.Table]:
    for row in range(block.num_rows):
        yield _decoded_to_row(_encoded_from_row(block, row).decode(job.spec))


# A chunk travels as one table row, so that Ray neither splits nor copies it.


def _encoded_to_row(chunk: StoredChunk) -> pa.Table:
    return pa.table(
        {
            "epoch": [chunk.epoch],
            "label": pa.array([chunk.labels], pa.list_(pa.int64())),
            "image_id": [[image.image_id for image in chunk.images]],
            "format": [[image.format for image in chunk.images]],
            "shape": [[image.shape for image in chunk.images]],
            "content": pa.array([[bytes(image.content) for image in chunk.images]], pa.list_(pa.binary())),
        }
    )


def _encoded_from_row(block: pa.Table, row: int) -> StoredChunk:
    fields = {name: block.column(name)[row].as_py() for name in ("epoch", "label", "image_id", "format", "shape")}
    content = block.column("content")[row].values
    images = [
        StoredImage(image_id, content[place].as_buffer(), kind, tuple(shape))
        for place, (image_id, kind, shape) in enumerate(
            zip(fields["image_id"], fields["format"], fields["shape"], strict=True)
        )
    ]
    return StoredChunk(fields["epoch"], images, np.array(fields["label"], dtype=np.int64))


def _decoded_to_row(piece: TrainingBatch) -> pa.Table:
    offsets = pa.array([0, piece.images.nbytes], pa.int32()).buffers()[1]
    images = pa.Array.from_buffers(pa.binary(), 1, [None, offsets, pa.py_buffer(piece.images)])
    return pa.table(
        {
            "image_id": [piece.ids],
            "epoch": pa.array([piece.epochs], pa.list_(pa.int64())),
            "label": pa.array([piece.labels], pa.list_(pa.int64())),
            "images": images,
        }
    )


def _decoded_from_row(block: pa.Table, row: int, spec: ImageSpec) -> TrainingBatch:
    pixels = np.frombuffer(block.column("images")[row].as_buffer(), dtype=np.uint8)
    return TrainingBatch(
        block.column("image_id")[row].as_py(),
        np.array(block.column("epoch")[row].as_py(), dtype=np.int64),
        pixels.reshape(-1, *spec.image_size, spec.channels),
        np.array(block.column("label")[row].as_py(), dtype=np.int64),
    )


def _blocks(dataset: ray.data.Dataset) -> Iterator[pa.Table]:
    """The blocks of a pipeline as they come; errors of ours that a task met are raised as themselves."""
    blocks: Iterable[Any] = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
    try:
        yield from blocks
    except RayError as error:
        raise _ours(error) or WorkerError(f"Ray Data failed: {' '.join(str(error).split())[:500]}") from error


def _ours(error: BaseException | None) -> RaydiffError | None:
    """The error that a task raised, out of Ray's wrapping (which poses as the class it wraps, and adds lines)."""
    while error is not None and (isinstance(error, RayError) or not isinstance(error, RaydiffError)):
        error = getattr(error, "cause", None) or error.__cause__
    return None if error is None else type(error)(str(error).partition("\n")[0])


def _context(*, preserve_order: bool) -> DataContext:
    """Ray Data's settings for our pipelines; it also hushes what it says about them."""
    warnings.filterwarnings("ignore", message="The maximum number of concurrent tasks for", category=UserWarning)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = preserve_order
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    context.target_max_block_size = _BLOCK_BYTES
    return context


def _spare_cpus(world_size: int) -> int:
    """This worker's share of the CPUs that nothing holds, at least one."""
    return max(1, int(ray.available_resources().get("CPU", 0)) // world_size)
