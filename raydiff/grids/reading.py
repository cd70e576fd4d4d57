"""Streaming grids in the training order: the batches that training would see, with grids in place of images.

Memory: the rows of a block, up to 32 MB (one batch at least), four times: one that is read, with what it is read from,
one that waits, and one that is cut into batches; and the footers of 64 files. Of each image its name is kept.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydiff.errors import DataError
from raydiff.grids.layout import METADATA, GridSet, Part
from raydiff.overlap import ahead
from raydiff.shards import TrainingBatch, TrainingOrder
from raydiff.shards.order import Share
from raydiff.shards.windows import cut, parts_of
from raydiff.storage import Storage
from raydiff.views import Views

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["GridFiles", "fault_of_part", "grid_stream"]

_BLOCK_BYTES = 32 * 2**20
_MAX_OPEN_FILES = 64
_FAULTS = (OSError, pa.ArrowException, ValueError, KeyError)
_REMEDY = "remove it and resume the run, which makes it anew"


@dataclass(frozen=True)
class _Names:
    ids: list[str]
    classes: list[str]


class GridFiles:
    """The files of a set, opened as they are needed; not for use from two threads at once."""

    def __init__(self, grids: GridSet, storage: Storage) -> None:
        self._grids, self._storage = grids, storage
        self._open: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._names: dict[int, _Names] = {}

    def close(self) -> None:
        """Close all files."""
        while self._open:
            self._open.popitem()[1].close()

    def images(self, rows: NDArray[np.int64]) -> list[tuple[str, str]]:
        """(image id, class name) of rows of the split.

        Raises:
            DataError: a file cannot be read, or is not what it should be; the message names it.
        """
        parts, inside = self._grids.locate(rows)
        for part in np.unique(parts).tolist():
            if part not in self._names:
                self._file(part)
        named = (self._names[part] for part in parts.tolist())
        return [(names.ids[i], names.classes[i]) for names, i in zip(named, inside.tolist(), strict=True)]

    def read(self, rows: NDArray[np.int64], views: NDArray[np.int64]) -> NDArray[np.float32]:
        """View ``views[i]`` of row ``rows[i]`` of the split, float32 (k, *shape).

        Raises:
            DataError: as :meth:`images`.
        """
        parts, inside = self._grids.locate(rows)
        found = np.empty((len(rows), *self._grids.shape), dtype=np.float32)
        for part in np.unique(parts).tolist():
            places = np.flatnonzero(parts == part)
            found[places] = self._rows(part, inside[places] * self._grids.num_views + views[places])
        return found

    def _rows(self, part: int, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Rows of a part's file, as stored; each row group they are in is read once."""
        size = self._grids.group_rows
        groups, where = np.unique(rows // size, return_inverse=True)
        try:
            table = self._file(part).read_row_groups(groups.tolist(), columns=["grid"], use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(part, " ".join(str(error).split())) from error
        stored = _values(table.column("grid"), self._grids)
        lengths = np.full(len(groups), size)
        lengths[-1] = len(stored) - size * (len(groups) - 1)
        starts = np.cumsum(lengths) - lengths
        chosen: NDArray[Any] = stored[starts[where] + rows % size]
        return chosen

    def _file(self, part: int) -> pq.ParquetFile:
        if part not in self._open:
            if len(self._open) >= _MAX_OPEN_FILES:
                self._open.popitem(last=False)[1].close()
            try:
                file, names = _opened(self._grids, self._storage, self._grids.parts[part])
            except _FAULTS as error:
                raise self._unreadable(part, " ".join(str(error).split())) from error
            self._open[part] = file
            self._names.setdefault(part, names)
        self._open.move_to_end(part)
        return self._open[part]

    def _unreadable(self, part: int, reason: str) -> DataError:
        name = self._grids.parts[part].name
        return DataError(f"{self._storage.label}/{name}: these grids cannot be read ({reason}); {_REMEDY}")


def _values(column: pa.ChunkedArray, grids: GridSet) -> NDArray[Any]:
    """(n, *shape) of a column of grids' bytes; a view where it is in one piece."""
    pieces = []
    for chunk in column.chunks:
        content = np.frombuffer(chunk.buffers()[1], dtype=np.uint8)
        content = content[chunk.offset * grids.row_bytes : (chunk.offset + len(chunk)) * grids.row_bytes]
        pieces.append(content.view(grids.dtype).reshape(len(chunk), *grids.shape))
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _opened(grids: GridSet, storage: Storage, part: Part) -> tuple[pq.ParquetFile, _Names]:
    """A part's file; raises one of ``_FAULTS`` where it is not whole, or another's."""
    file = pq.ParquetFile(storage.open(part.name), page_checksum_verification=True, pre_buffer=not storage.is_local)
    try:
        said = _description(file)
        for name, wanted in grids.describe(part).items():
            if said.get(name) != wanted:
                raise ValueError(f"its {name} is {said.get(name)!r} and must be {wanted!r}")
        rows, groups = part.count * grids.num_views, -(-part.count * grids.num_views // grids.group_rows)
        if file.metadata.num_rows != rows or file.num_row_groups != groups or len(said["ids"]) != part.count:
            raise ValueError(f"it has {file.metadata.num_rows} rows and must have {rows}")
    except BaseException:
        file.close()
        raise
    return file, _Names(said["ids"], said["classes"])


def _description(file: pq.ParquetFile) -> Mapping[str, Any]:
    content = (file.metadata.metadata or {}).get(METADATA)
    described = json.loads(content) if content is not None else None
    if not isinstance(described, dict):
        raise ValueError("it holds no grids of raydiff's")
    return described


def fault_of_part(grids: GridSet, storage: Storage, part: Part) -> str | None:
    """Why a part cannot be used: missing, truncated, another's; None where it can. Its pages are not read."""
    try:
        _opened(grids, storage, part)[0].close()
    except FileNotFoundError:
        return "is missing"
    except _FAULTS as error:
        return " ".join(str(error).split())
    return None


def grid_stream(
    grids: GridSet, storage: Storage, order: TrainingOrder, share: Share, views: Views, classes: tuple[str, ...]
) -> Iterator[TrainingBatch]:
    """A worker's slices of the global batches from ``share.start_step`` on, without end, with grids for images.

    Bit for bit what the space makes of what :func:`raydiff.shards.cached_stream` gives, in float32.

    Raises:
        DataError: a file cannot be read; the message names it.
    """
    files = GridFiles(grids, storage)
    most = max(share.rows_per_step, _BLOCK_BYTES // (4 * grids.row_bytes // np.dtype(grids.dtype).itemsize))
    labels = {name: label for label, name in enumerate(classes)}

    def blocks() -> Iterator[TrainingBatch]:
        for window in order.windows(share.start):
            rows, epochs = share.of(order, window)
            for part in parts_of(len(rows), share.rows_before(window), share.rows_per_step, most):
                yield _block(files, order.seed, epochs[part], rows[part], views, labels)

    try:
        with closing(ahead(blocks(), 1)) as pieces:  # the next block is read while this one is trained on
            yield from cut(pieces, share.rows_per_step)
    finally:
        files.close()


def _block(
    files: GridFiles,
    seed: int,
    epochs: NDArray[np.int64],
    rows: NDArray[np.int64],
    views: Views,
    labels: Mapping[str, int],
) -> TrainingBatch:
    images = files.images(rows)
    drawn = views.drawn([(seed, epoch, name) for epoch, (name, _) in zip(epochs.tolist(), images, strict=True)])
    numbers = np.array([views.index[view] for view in drawn], dtype=np.int64)
    return TrainingBatch(
        [image_id for image_id, _ in images],
        epochs,
        np.empty((len(rows), 0, 0, 1), dtype=np.uint8),
        np.array([labels[class_name] for _, class_name in images], dtype=np.int64),
        files.read(rows, numbers),
    )
