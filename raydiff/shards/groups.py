"""Row groups of stored shards, read one at a time in any order.

A shard that breaks while it is in use is looked at again, all of it: the error names the file and says what is wrong
with it. One whose bytes turn out to be right is read a second time; a store that does not answer is another error.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydiff.contracts import Split
from raydiff.errors import DataError
from raydiff.images import DecodedImage, ImageSpec, decode_file
from raydiff.shards.integrity import REMEDY, SKIP, fault_of
from raydiff.shards.layout import ShardRecord
from raydiff.storage import Storage

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from raydiff.shards.reading import ShardSet

__all__ = ["GroupReader", "StoredImage"]

_MAX_OPEN_FILES = 16


@dataclass(frozen=True)
class StoredImage:
    """An image as a shard holds it: a file, or raw uint8 pixels (height, width, channels); ``content`` is a buffer."""

    image_id: str
    content: Any
    format: str
    shape: tuple[int, int, int]

    def pixels(self, spec: ImageSpec) -> NDArray[np.uint8]:
        """uint8 (H, W, C).

        Raises:
            DataError: the file cannot be decoded to the spec, or raw pixels are of another size.
        """
        if self.format != "raw":
            return self.decoded(spec).pixels
        if self.shape != (*spec.image_size, spec.channels):
            raise DataError(
                f"{self.image_id}: the shard holds raw pixels of {_size(self.shape)}, the config asks for "
                f"{_size((*spec.image_size, spec.channels))}; {REMEDY}, or use data.shard_format: encoded"
            )
        return np.frombuffer(self.content, np.uint8).reshape(self.shape)

    def decoded(self, spec: ImageSpec) -> DecodedImage:
        """The file's image at the spec's size; of raw pixels there is no file.

        Raises:
            DataError: it cannot be decoded to the spec.
        """
        return decode_file(bytes(self.content), spec, self.image_id)


class GroupReader:
    """Row groups of a split by number, in any order; keeps the files it used last open.

    Not for use from two threads at once.
    """

    COLUMNS = ("image_id", "image", "format", "height", "width", "channels", "class_name")

    def __init__(self, shards: ShardSet, split: Split) -> None:
        self._storage = Storage.of(shards.uri, field="data.shards")
        self._records = [record for record in shards.records if record.split == split]
        self._first = [0, *accumulate(len(record.row_groups) for record in self._records)]
        self._open: OrderedDict[str, pq.ParquetFile] = OrderedDict()

    def __enter__(self) -> GroupReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        while self._open:
            self._open.popitem()[1].close()

    def groups_of(self, only: Sequence[str] | None) -> list[int]:
        """The numbers of the row groups in the named shards, or of all."""
        return [
            number
            for record, first in zip(self._records, self._first, strict=False)
            if only is None or record.name in only
            for number in range(first, first + len(record.row_groups))
        ]

    def table(self, group: int, columns: Sequence[str] = COLUMNS) -> pa.Table:
        """One row group.

        Raises:
            DataError: the shard is missing, truncated or garbled; the message names it.
            StorageError: the place cannot be reached.
        """
        shard = int(np.searchsorted(self._first, group, side="right")) - 1
        record, inside = self._records[shard], group - self._first[shard]
        try:
            return self._read(record, inside, columns)
        except (OSError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
        if (fault := fault_of(self._storage, record)) is None:  # it is whole: that passed, or is not the shard's fault
            self._forget(record.name)
            try:
                return self._read(record, inside, columns)
            except (OSError, pa.ArrowException) as error:
                reason, fault = " ".join(str(error).split()), "its bytes are the manifest's"
        raise DataError(
            f"{self._storage.label}/{record.name}: the shard cannot be read ({reason}; {fault}); {REMEDY}, {SKIP}"
        )

    def images(self, group: int, rows: NDArray[np.int64], *, keep: bool = False) -> Iterator[tuple[StoredImage, str]]:
        """Some rows of a row group with their class names, in the order of ``rows``.

        Their content is a view: of the whole row group if ``keep``, else of a copy of these rows alone.
        """
        table = self.table(group)
        if not keep:
            table, rows = table.take(pa.array(rows)), np.arange(len(rows))
        columns = table.combine_chunks().to_batches()[0]
        names = ("image_id", "format", "class_name", "height", "width", "channels")
        ids, formats, classes, *shape = (columns.column(name).to_pylist() for name in names)
        content = columns.column("image")
        for row in rows.tolist():
            size = (shape[0][row], shape[1][row], shape[2][row])
            yield StoredImage(ids[row], content[row].as_buffer(), formats[row], size), classes[row]

    def rows(self, group: int) -> list[dict[str, Any]]:
        """All columns of one row group, a mapping per row."""
        rows: list[dict[str, Any]] = self.table(group, (*self.COLUMNS, "defect", "is_anomaly", "mask")).to_pylist()
        return rows

    def _read(self, record: ShardRecord, group: int, columns: Sequence[str]) -> pa.Table:
        file = self._file(record.name)
        if file.num_row_groups != len(record.row_groups):
            raise OSError(f"it has {file.num_row_groups} row groups, the manifest says {len(record.row_groups)}")
        table = file.read_row_group(group, columns=list(columns), use_threads=False)
        if table.num_rows != record.row_groups[group]:
            raise OSError(f"row group {group} has {table.num_rows} rows, the manifest says {record.row_groups[group]}")
        return table

    def _forget(self, name: str) -> None:
        if name in self._open:
            self._open.pop(name).close()

    def _file(self, name: str) -> pq.ParquetFile:
        if name not in self._open:
            if len(self._open) >= _MAX_OPEN_FILES:
                self._open.popitem(last=False)[1].close()
            self._open[name] = pq.ParquetFile(self._storage.open(name), page_checksum_verification=True)
        self._open.move_to_end(name)
        return self._open[name]


def column_of(shards: ShardSet, split: Split, name: str) -> list[Any]:
    """One column of a split, in stored order; no other is read.

    Raises:
        DataError: a shard is missing, truncated or garbled; the message names it.
        StorageError: the place cannot be reached.
    """
    with GroupReader(shards, split) as reader:
        groups = (reader.table(group, (name,)) for group in reader.groups_of(None))
        return [value for group in groups for value in group.column(name).to_pylist()]


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(str(side) for side in shape)
