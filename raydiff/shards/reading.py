"""``ShardSet``: finished shards, opened; and their images, streamed with bounded memory."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydiff.config import DataConfig
from raydiff.contracts import Split
from raydiff.errors import DataError
from raydiff.images import ImageSpec, decode, decode_mask
from raydiff.shards.layout import CHOICES, FORMAT_VERSION, MANIFEST, ShardRecord, Skipped, recorded_fields
from raydiff.shards.storage import Storage

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["GroupReader", "LabelledImages", "ShardSet", "StoredImage"]

_logger = logging.getLogger(__name__)
_MAX_OPEN_FILES = 16
_PLACES = ("source", "mnist")  # options of data sets that say where files lie
_REMEDY = "run raydiff prepare again"


@dataclass(frozen=True)
class LabelledImages:
    """A batch of a split.

    ``ids`` and ``defects`` have B strings; ``images`` uint8 (B, H, W, C); ``labels`` int64 (B,), indices into
    ``ShardSet.classes``; ``is_anomaly`` bool (B,); ``masks`` bool (B, H, W), False for normal images, or None where the
    data set has no masks.
    """

    ids: list[str]
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    is_anomaly: NDArray[np.bool_]
    defects: list[str]
    masks: NDArray[np.bool_] | None


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
            return decode(bytes(self.content), spec, self.image_id)
        if self.shape != (*spec.image_size, spec.channels):
            raise DataError(
                f"{self.image_id}: the shard holds raw pixels of {_size(self.shape)}, the config asks for "
                f"{_size((*spec.image_size, spec.channels))}; {_REMEDY}, or use data.shard_format: encoded"
            )
        return np.frombuffer(self.content, np.uint8).reshape(self.shape)


@dataclass(frozen=True)
class ShardSet:
    """Shards that are complete. Small, and can be sent to any worker.

    ``classes`` are the class names by label: first ``normal_classes``, those that are trained on, then the others.
    ``digest`` depends on the images, labels, masks and splits alone, not on how they are stored: for ``raw`` shards it
    is over the files they were made from.
    """

    uri: str
    digest: str
    data: dict[str, Any]
    normal_classes: tuple[str, ...]
    classes: tuple[str, ...]
    records: tuple[ShardRecord, ...]

    @classmethod
    def open(cls, uri: str) -> ShardSet:
        """Read the manifest and check that every shard is there with the size it should have.

        Garbled content of the right size is found when it is read (each page has a checksum), or by :meth:`verify`.

        Raises:
            DataError: no manifest, one of a newer format, or a missing or truncated shard.
            StorageError: the place cannot be reached.
        """
        storage = Storage.of(uri)
        sizes = storage.sizes()
        if MANIFEST not in sizes:
            state = "is not finished" if sizes else "holds no shards"
            raise DataError(f"{storage.label}: {state} ({MANIFEST} is missing); {_REMEDY}")
        shards = _parse_manifest(storage)
        for record in shards.records:
            if record.name not in sizes:
                raise DataError(f"{storage.label}/{record.name}: the shard is missing; {_REMEDY}")
            if sizes[record.name] != record.bytes:
                raise DataError(
                    f"{storage.label}/{record.name}: the shard has {sizes[record.name]} bytes, the manifest says "
                    f"{record.bytes}; {_REMEDY}"
                )
        return shards

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Images that were left out when the shards were written."""
        return tuple(skipped for record in self.records for skipped in record.skipped)

    @property
    def normal_digest(self) -> str:
        """Like ``digest``, over the training and calibration splits alone: no test label can change it."""
        normal = [record for record in self.records if record.split != "test"]
        total = sum(int(record.content, 16) for record in normal) % 2**256
        return hashlib.sha256(f"{total:064x} {sum(record.rows for record in normal)}".encode()).hexdigest()

    @classmethod
    def is_finished(cls, uri: str) -> bool:
        """Whether there is a manifest; opens nothing, and is False where there is no such place."""
        return MANIFEST in Storage.of(uri).sizes()

    @property
    def can_be_tested(self) -> bool:
        """Whether the test split has normal and anomalous images."""
        test = [record for record in self.records if record.split == "test"]
        return 0 < sum(record.anomalies for record in test) < sum(record.rows for record in test)

    @property
    def has_masks(self) -> bool:
        """Whether every anomalous image has a mask."""
        anomalies = sum(record.anomalies for record in self.records)
        return 0 < anomalies <= sum(record.masks for record in self.records)

    def count(self, split: Split) -> int:
        """Images in a split."""
        return sum(record.rows for record in self.records if record.split == split)

    def row_groups(self, split: Split) -> tuple[int, ...]:
        """Rows in each row group of a split, in stored order."""
        return tuple(rows for record in self.records if record.split == split for rows in record.row_groups)

    def shard_names(self, split: Split) -> tuple[str, ...]:
        """The shards of a split, in stored order."""
        return tuple(record.name for record in self.records if record.split == split)

    def verify(self) -> None:
        """Read every byte and compare SHA-256 with the manifest.

        Raises:
            DataError: a shard was changed; the message names it.
        """
        storage = Storage.of(self.uri)
        for record in self.records:
            if hashlib.sha256(storage.read(record.name)).hexdigest() != record.sha256:
                raise DataError(
                    f"{storage.label}/{record.name}: its SHA-256 is not the manifest's, so it was changed; {_REMEDY}"
                )

    def check(self, data: DataConfig) -> None:
        """Refuse shards that were made for another config; needs the config alone, not the data set's files.

        Where the files lay (``data.dataset.source``, say) is left out: shards made on one machine serve on another.

        Raises:
            DataError: names the first field that differs.
        """
        self._check_dataset(data)
        wanted = recorded_fields(data)
        for name in sorted(wanted.keys() | self.data.keys()):
            optional = name not in wanted and name not in CHOICES
            if name in ("dataset", "shard_format") or (optional and self.data["shard_format"] != "raw"):
                continue  # both formats give the same pixels; encoded files can be brought to any size
            asked = data.model_dump(mode="json")[name]
            made = self.data.get(name, CHOICES.get(name, asked))
            if made != asked:
                raise self._mismatch(name, made, asked)
        if self.skipped and data.on_bad_image == "error":
            raise DataError(
                f"{Storage.of(self.uri).label}: was prepared without {len(self.skipped)} bad image(s), the first "
                f"{self.skipped[0].image_id}; replace it and prepare again, or set data.on_bad_image: skip"
            )

    def _check_dataset(self, data: DataConfig) -> None:
        asked, made = recorded_fields(data)["dataset"], self.data["dataset"]
        others = sorted((asked.keys() | made.keys()) - {"name", *_PLACES})
        for option in ("name", *others):  # of another data set, the name says more than any option
            if made.get(option) != asked.get(option):
                raise self._mismatch(f"dataset.{option}", made.get(option), asked.get(option))

    def _mismatch(self, name: str, made: Any, asked: Any) -> DataError:
        return DataError(
            f"{Storage.of(self.uri).label}: was prepared with data.{name} = {made}, the config says {asked}; "
            f"{_REMEDY}, or give another data.shards"
        )

    def read(
        self,
        split: Split,
        spec: ImageSpec,
        *,
        batch_size: int = 64,
        on_bad_image: Literal["error", "skip"] = "error",
        only: Sequence[str] | None = None,
    ) -> Iterator[LabelledImages]:
        """The images of a split in stored order, in batches of ``batch_size`` (the last one may be smaller).

        Holds one row group (at most 64 images) and one batch at a time.

        Args:
            split: which.
            spec: what to bring the images to.
            batch_size: images per batch.
            on_bad_image: ``skip`` leaves out, and logs, an image that cannot be brought to ``spec``.
            only: names of the shards to read; all of the split by default.

        Raises:
            DataError: a shard or an image cannot be read; the message names it.
        """
        rows: list[_Row] = []
        with GroupReader(self, split) as reader:
            for index in reader.groups_of(only):
                for row in reader.rows(index):
                    decoded = _decode_row(row, spec, on_bad_image)
                    if decoded is not None:
                        rows.append(decoded)
                    if len(rows) == batch_size:
                        yield self._batch(rows, spec)
                        rows = []
        if rows:
            yield self._batch(rows, spec)

    def _batch(self, rows: list[_Row], spec: ImageSpec) -> LabelledImages:
        index = {name: label for label, name in enumerate(self.classes)}
        masks = None
        if self.has_masks:
            empty = np.zeros(spec.image_size, dtype=np.bool_)
            masks = np.stack([empty if row.mask is None else row.mask for row in rows])  # (B, H, W)
        return LabelledImages(
            ids=[row.image_id for row in rows],
            images=np.stack([row.pixels for row in rows]),  # (B, H, W, C)
            labels=np.array([index[row.class_name] for row in rows], dtype=np.int64),
            is_anomaly=np.array([row.is_anomaly for row in rows], dtype=np.bool_),
            defects=[row.defect for row in rows],
            masks=masks,
        )


class GroupReader:
    """Row groups of a split by number, in any order; keeps the files it used last open.

    Not for use from two threads at once.
    """

    COLUMNS = ("image_id", "image", "format", "height", "width", "channels", "class_name")

    def __init__(self, shards: ShardSet, split: Split) -> None:
        self._storage = Storage.of(shards.uri)
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
        """
        shard = int(np.searchsorted(self._first, group, side="right")) - 1
        record = self._records[shard]
        try:
            table = self._file(record.name).read_row_group(
                group - self._first[shard], columns=list(columns), use_threads=False
            )
            if table.num_rows != record.row_groups[group - self._first[shard]]:
                raise OSError(f"row group {group - self._first[shard]} has {table.num_rows} rows")
        except (OSError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"{self._storage.label}/{record.name}: the shard cannot be read ({reason}); {_REMEDY}"
            ) from error
        return table

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

    def _file(self, name: str) -> pq.ParquetFile:
        if name not in self._open:
            if len(self._open) >= _MAX_OPEN_FILES:
                self._open.popitem(last=False)[1].close()
            self._open[name] = pq.ParquetFile(self._storage.open(name), page_checksum_verification=True)
        self._open.move_to_end(name)
        return self._open[name]


@dataclass(frozen=True)
class _Row:
    image_id: str
    pixels: NDArray[np.uint8]
    class_name: str
    is_anomaly: bool
    defect: str
    mask: NDArray[np.bool_] | None


def _decode_row(row: dict[str, Any], spec: ImageSpec, on_bad_image: Literal["error", "skip"]) -> _Row | None:
    shape = (row["height"], row["width"], row["channels"])
    name = f"mask of {row['image_id']}"
    try:
        pixels = StoredImage(row["image_id"], row["image"], row["format"], shape).pixels(spec)
        mask = None
        if row["mask"] is not None and row["format"] == "raw":
            mask = np.frombuffer(row["mask"], np.uint8).reshape(shape[:2]).astype(np.bool_)
        elif row["mask"] is not None:
            mask = decode_mask(row["mask"], spec, name, expected_size=shape[:2])
    except DataError as error:
        if on_bad_image == "error":
            raise
        _logger.warning("left out: %s", error)
        return None
    return _Row(row["image_id"], pixels, row["class_name"], row["is_anomaly"], row["defect"], mask)


def _parse_manifest(storage: Storage) -> ShardSet:
    where = f"{storage.label}/{MANIFEST}"
    try:
        manifest = json.loads(storage.read(MANIFEST))
        if manifest["kind"] != "raydiff-shards":
            raise DataError(f"{where}: is a {manifest['kind']!r}, not a set of shards; give another data.shards")
        if manifest["format_version"] > FORMAT_VERSION:
            raise DataError(
                f"{where}: has format version {manifest['format_version']}, this raydiff reads up to {FORMAT_VERSION}; "
                f"update raydiff, or {_REMEDY}"
            )
        return ShardSet(
            uri=storage.uri,
            digest=manifest["digest"],
            data=manifest["data"],
            normal_classes=tuple(manifest["normal_classes"]),
            classes=tuple(manifest["classes"]),
            records=tuple(ShardRecord.from_dict(record) for record in manifest["shards"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where}: is not a manifest of shards ({type(error).__name__}: {error}); {_REMEDY}") from error


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(str(side) for side in shape)
