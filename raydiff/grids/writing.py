"""Making the parts of a set of grids that are missing, by all workers of a run together.

Each worker makes every W-th part; after each round they wait for one another. A worker that is killed loses the part it
was at, up to 32 MB of grids (or the views of one image), and so much memory does it take, twice.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from raydiff.core.diffusion import keyed_seed
from raydiff.errors import StorageError, TrainingError
from raydiff.grids.layout import GridSet, Part, schema_of
from raydiff.grids.reading import fault_of_part
from raydiff.images import ImageSpec, to_tensor
from raydiff.latents import Latents
from raydiff.overlap import ahead
from raydiff.runtime import Runtime
from raydiff.shards import ShardSet, TrainingOrder
from raydiff.shards.groups import GroupReader
from raydiff.storage import PARTIAL, Storage
from raydiff.views import View, Views

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Maker", "encoded_part", "write_missing"]

_logger = logging.getLogger(__name__)
_ENCODED_TOGETHER = 32
_LOOKING = 8  # files at a time
_REPORT_S = 5.0
_DAY_S = 86_400.0
_MARGIN = 1.02  # what Parquet adds


class Maker:
    """Makes parts: reads a shard's images, decodes them in a thread, and has the space encode all their views."""

    def __init__(self, shards: ShardSet, spec: ImageSpec, views: Views, latents: Latents) -> None:
        self._shards, self._spec, self._views, self._latents = shards, spec, views, latents
        self._order = TrainingOrder.of(shards, seed=0, window=1)  # for where rows lie

    def content(self, grids: GridSet, part: Part) -> pa.Buffer:
        """The bytes of a part's file.

        Raises:
            DataError: an image cannot be read; the message names it.
            TrainingError: the space gave something that is not a number, or too large for float16.
        """
        stored = np.empty((part.count * grids.num_views, *grids.shape), dtype=grids.dtype)
        ids, classes, done = list[str](), list[str](), 0
        with closing(ahead(self._pictures(part, ids, classes), _ENCODED_TOGETHER)) as pictures:
            while batch := list(islice(pictures, _ENCODED_TOGETHER)):
                names, views, pixels = zip(*batch, strict=True)
                encoded = self._latents.of(
                    to_tensor(np.stack(pixels)), names, flips=[v.flip for v in views], turns=[v.turns for v in views]
                )
                with np.errstate(over="ignore"):  # said below
                    stored[done : done + len(batch)] = encoded.cpu().numpy()
                done += len(batch)
        if not np.isfinite(stored).all():
            where = f"{part.shard}: for one of images {part.start} to {part.start + part.count - 1}"
            if grids.dtype == "float16":
                raise TrainingError(
                    f"{where} the space gave what is no number, or too large for data.grids_dtype float16; set"
                    " data.grids_dtype to float32"
                )
            raise TrainingError(f"{where} the space gave what is no number; fit the space again, with other settings")
        return encoded_part(grids, part, ids, classes, stored)

    def _pictures(
        self, part: Part, ids: list[str], classes: list[str]
    ) -> Iterator[tuple[str, View, NDArray[np.uint8]]]:
        """(name, view, picture (h, w, C)) of all views of all images; ``ids`` and ``classes`` grow as it goes."""
        rows = np.arange(part.start, part.start + part.count)
        groups, inside = self._order.locate(rows)
        with GroupReader(self._shards, "train") as reader:
            for group in np.unique(groups).tolist():
                for image, class_name in reader.images(group, inside[groups == group]):
                    ids.append(image.image_id)
                    classes.append(class_name)
                    for view, picture in self._views.every(np.array(image.pixels(self._spec)), image.image_id):
                        yield view.name(image.image_id), view, picture


def encoded_part(
    grids: GridSet, part: Part, ids: Sequence[str], classes: Sequence[str], stored: NDArray[Any]
) -> pa.Buffer:  # fmt: skip
    """A part's file: all views of images ``ids``, of ``classes``, (n * num_views, *shape) as they are stored."""
    description = {**grids.describe(part), "ids": list(ids), "classes": list(classes)}
    column = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(grids.row_bytes), len(stored), [None, pa.py_buffer(np.ascontiguousarray(stored))]
    )
    names = pa.array([image_id for image_id in ids for _ in range(grids.num_views)], pa.string())
    views = pa.array(np.tile(np.arange(grids.num_views, dtype=np.int32), len(ids)))
    table = pa.Table.from_arrays([names, views, column], schema=schema_of(grids, description))
    sink = pa.BufferOutputStream()
    pq.write_table(
        table, sink, row_group_size=grids.group_rows, compression="none", use_dictionary=False, write_statistics=False,
        write_page_checksum=True,
    )  # fmt: skip
    return sink.getvalue()


def write_missing(
    grids: GridSet,
    storage: Storage,
    origin: Mapping[str, Any],
    make: Callable[[GridSet, Part], pa.Buffer],
    runtime: Runtime,
    *,
    start_at: str = "",
    step: int = 0,
) -> int:
    """Make the parts that are not there, or not whole, with the other workers of ``runtime``; how many were missing.

    Every worker must call it. Runs that make the same set at the same time share the work: each begins at a part that
    ``start_at`` chooses, and passes over what is there by then.

    Raises:
        StorageError: there is no room for them, the place cannot be written, or it is not the same one for all workers.
        DataError: an image cannot be read.
    """
    if runtime.rank == 0:
        _tidy(storage)
    missing = missing_parts(grids, storage, runtime)
    if not missing:
        return 0
    _check_room(grids, storage, missing)
    storage.write("origin.json", json.dumps(origin, indent=1, sort_keys=True).encode())
    _wait(runtime)  # until all have looked how much room there is
    first = keyed_seed("grids", start_at) % len(missing)
    turned = [*missing[first:], *missing[:first]]
    begun = said = time.monotonic()
    for done in range(0, len(turned), runtime.world_size):
        number = done + runtime.rank
        if number < len(turned) and fault_of_part(grids, storage, turned[number]) is not None:
            storage.write(turned[number].name, make(grids, turned[number]))
        _wait(runtime)
        now, finished = time.monotonic(), min(len(turned), done + runtime.world_size)
        if now - said >= _REPORT_S or finished == len(turned):
            said = now
            runtime.report(
                {"step": step, "grids_made": finished, "grids_missing": len(turned), "grids_seconds": now - begun}
            )
    there = storage.sizes()
    if lost := [part.name for part in turned if part.name not in there]:
        raise StorageError(
            f"{storage.label}/{lost[0]}: is not there on node {socket.gethostname()}, though another worker made it;"
            f" give data.grids a folder that all nodes share, or s3://bucket/path"
        )
    return len(turned)


def missing_parts(grids: GridSet, storage: Storage, runtime: Runtime) -> list[Part]:
    """Those that are not there, or not whole; each worker looks at a share, and all get the same list."""
    sizes = storage.sizes()
    faulty = torch.zeros(len(grids.parts), dtype=torch.float64)
    mine = range(runtime.rank, len(grids.parts), runtime.world_size)

    def fault(number: int) -> str | None:
        part = grids.parts[number]
        return fault_of_part(grids, storage, part) if part.name in sizes else "is missing"

    with ThreadPoolExecutor(_LOOKING) as pool:
        for number, reason in zip(mine, pool.map(fault, mine), strict=True):
            if reason is None:
                continue
            faulty[number] = 1
            if (name := grids.parts[number].name) in sizes:
                _logger.warning("%s/%s: %s; it is made anew", storage.label, name, reason)
    found = runtime.reduce_mean(faulty.to(runtime.device)).cpu()
    return [part for part, share in zip(grids.parts, found.tolist(), strict=True) if share]


def _tidy(storage: Storage) -> None:
    """Remove what killed processes left half written, once it is a day old: until then another may be writing it."""
    if storage.local_path is None:
        return
    for left in storage.local_path.glob(f"{PARTIAL}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _DAY_S:
                left.unlink()


def _check_room(grids: GridSet, storage: Storage, missing: Sequence[Part]) -> None:
    """A full disk is better known before an hour's work than after it. Object stores do not say."""
    if storage.local_path is None:
        return
    folder = storage.local_path
    while not folder.exists():
        folder = folder.parent
    needed = _MARGIN * grids.row_bytes * grids.num_views * sum(part.count for part in missing)
    free = shutil.disk_usage(folder).free
    if needed > free:
        smaller = " or data.grids_dtype to float16," if grids.dtype == "float32" else ""
        raise StorageError(
            f"{storage.label}: the grids need {_size(needed)} ({grids.num_views} view(s) of each image) and"
            f" {_size(free)} are free; make room, set data.grids to another place,{smaller} or leave data.grids out"
        )


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GB" if count >= 2**30 else f"{count / 2**20:.1f} MB"


def _wait(runtime: Runtime) -> None:
    """Until every worker is here."""
    runtime.reduce_mean(torch.zeros(1, device=runtime.device))
