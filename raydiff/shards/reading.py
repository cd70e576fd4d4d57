"""``ShardSet``: finished shards, opened; and their images, streamed with bounded memory."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from raydiff.config import DataConfig
from raydiff.contracts import Split
from raydiff.errors import DataError
from raydiff.images import ImageSpec, decode_mask
from raydiff.shards.groups import GroupReader, StoredImage
from raydiff.shards.integrity import REMEDY, SKIP, LeftOut, fault_of_size, find_faults
from raydiff.shards.layout import CHOICES, FORMAT_VERSION, MANIFEST, SPLITS, ShardRecord, Skipped, recorded_fields
from raydiff.storage import Storage
from raydiff.uri import label_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["GroupReader", "LabelledImages", "ShardSet", "StoredImage"]

_logger = logging.getLogger(__name__)
_PLACES = ("source", "mnist")  # options of data sets that say where files lie


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
class ShardSet:
    """Shards that are complete. Small, and can be sent to any worker.

    ``classes`` are the class names by label: first ``normal_classes``, those that are trained on, then the others.
    ``digest`` depends on the images, labels, masks and splits alone, not on how they are stored: for ``raw`` shards it
    is over the files they were made from. ``records`` are the shards that are read; those in ``left_out`` count
    nowhere, neither in ``digest`` nor in the training order, so that every worker passes over the same images.
    """

    uri: str
    digest: str
    data: dict[str, Any]
    normal_classes: tuple[str, ...]
    classes: tuple[str, ...]
    records: tuple[ShardRecord, ...]
    left_out: tuple[LeftOut, ...] = ()

    @classmethod
    def open(cls, uri: str, *, on_bad_shard: Literal["error", "skip"] = "error") -> ShardSet:
        """Read the manifest and check that every shard is there with the size it should have.

        Garbled content of the right size is found when it is read (each page has a checksum), or by :meth:`verify`.

        Args:
            uri: where they lie.
            on_bad_shard: ``skip`` reads every byte, and leaves out, and logs, each shard that is not as it was written:
                missing, empty, truncated or changed. Nothing is left out where the place cannot be reached.

        Raises:
            DataError: no manifest, one of a newer format, or a missing or truncated shard; with ``skip``, no training
                or no calibration image is left.
            StorageError: the place cannot be reached.
        """
        storage = Storage.of(uri, field="data.shards")
        sizes = storage.sizes()
        if MANIFEST not in sizes:
            state = "is not finished" if sizes else "holds no shards"
            raise DataError(f"{storage.label}: {state} ({MANIFEST} is missing); {REMEDY}")
        shards = _parse_manifest(storage)
        if on_bad_shard == "skip":
            return shards.without(find_faults(storage, shards.records))
        for record in shards.records:
            if (fault := fault_of_size(record, sizes)) is not None:
                raise DataError(f"{storage.label}/{record.name}: {fault}; {REMEDY}, {SKIP}")
        return shards

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Images that were left out when the shards were written."""
        return tuple(skipped for record in self.records for skipped in record.skipped)

    @property
    def normal_digest(self) -> str:
        """Like ``digest``, over the training and calibration splits alone: no test label can change it."""
        return _digest(record for record in self.records if record.split != "test")

    @property
    def whole_normal_digest(self) -> str:
        """What ``normal_digest`` is when no shard is left out."""
        every = (*self.records, *(left.record for left in self.left_out))
        return _digest(record for record in every if record.split != "test")

    def left_out_normals(self) -> dict[str, Any]:
        """What a run records of the shards that it learnt without, as plain JSON; empty where there are none.

        ``shards`` is a mapping of names to reasons, of the training and calibration splits alone.
        """
        normal = [left for left in self.left_out if left.record.split != "test"]
        if not normal:
            return {}
        lost = {split: sum(left.record.rows for left in normal if left.record.split == split) for split in SPLITS}
        return {
            "shards": {left.record.name: left.reason for left in normal},
            "num_train_images": lost["train"],
            "num_calibration_images": lost["calibration"],
            "whole_data_digest": self.whole_normal_digest,
        }

    def without(self, faults: Mapping[str, str]) -> ShardSet:
        """The same without some shards: their names, and what is wrong with each, which is logged.

        Raises:
            DataError: no training or no calibration image is left.
        """
        bad = tuple(LeftOut(record, faults[record.name]) for record in self.records if record.name in faults)
        if not bad:
            return self
        for left in bad:
            _logger.warning(
                "left out: %s/%s (%d %s images): %s",
                self.label, left.record.name, left.record.rows, left.record.split, left.reason,
            )  # fmt: skip
        kept = tuple(record for record in self.records if record.name not in faults)
        for split in ("train", "calibration"):
            first = next((left for left in bad if left.record.split == split), None)
            if first is not None and not sum(record.rows for record in kept if record.split == split):
                raise DataError(
                    f"{self.label}/{first.record.name}: {first.reason}, and without it no {split} image is left;"
                    f" {REMEDY}"
                )
        return replace(self, digest=_digest(kept), records=kept, left_out=(*self.left_out, *bad))

    @classmethod
    def is_finished(cls, uri: str) -> bool:
        """Whether there is a manifest; opens nothing, and is False where there is no such place."""
        return MANIFEST in Storage.of(uri, field="data.shards").sizes()

    @property
    def label(self) -> str:
        """The place, for messages: without what may be a secret."""
        return label_of(self.uri)

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
        storage = Storage.of(self.uri, field="data.shards")
        for name, fault in find_faults(storage, self.records).items():
            raise DataError(f"{storage.label}/{name}: {fault}; {REMEDY}, {SKIP}")

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
                f"{self.label}: was prepared without {len(self.skipped)} bad image(s), the first "
                f"{self.skipped[0].image_id}; replace it and prepare again, or set data.on_bad_image: skip"
            )
        if self.left_out and data.on_bad_shard == "error":
            first = self.left_out[0]
            raise DataError(
                f"{self.label}/{first.record.name}: {first.reason} ({len(self.left_out)} such shard(s) "
                f"left out); {REMEDY}, or set data.on_bad_shard: skip"
            )

    def _check_dataset(self, data: DataConfig) -> None:
        asked, made = recorded_fields(data)["dataset"], self.data["dataset"]
        others = sorted((asked.keys() | made.keys()) - {"name", *_PLACES})
        for option in ("name", *others):  # of another data set, the name says more than any option
            if (made.get(option) or None) != (asked.get(option) or None):  # one that is off may be newer than they are
                raise self._mismatch(f"dataset.{option}", made.get(option), asked.get(option))

    def _mismatch(self, name: str, made: Any, asked: Any) -> DataError:
        return DataError(
            f"{self.label}: was prepared with data.{name} = {made}, the config says {asked}; "
            f"{REMEDY}, or give another data.shards"
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
        stored = StoredImage(row["image_id"], row["image"], row["format"], shape)
        mask = None
        if row["format"] == "raw":
            pixels = stored.pixels(spec)
            if row["mask"] is not None:
                mask = np.frombuffer(row["mask"], np.uint8).reshape(shape[:2]).astype(np.bool_)
        else:
            image = stored.decoded(spec)
            pixels = image.pixels
            if row["mask"] is not None:
                mask = decode_mask(row["mask"], spec, name, image=image)
    except DataError as error:
        if on_bad_image == "error":
            raise
        _logger.warning("left out: %s", error)
        return None
    return _Row(row["image_id"], pixels, row["class_name"], row["is_anomaly"], row["defect"], mask)


def _digest(records: Iterable[ShardRecord]) -> str:
    """Of what some shards hold, however it is spread over them."""
    counted = [(int(record.content, 16), record.rows) for record in records]
    total = sum(content for content, _ in counted) % 2**256
    return hashlib.sha256(f"{total:064x} {sum(rows for _, rows in counted)}".encode()).hexdigest()


def _parse_manifest(storage: Storage) -> ShardSet:
    where = f"{storage.label}/{MANIFEST}"
    try:
        manifest = json.loads(storage.read(MANIFEST))
        if manifest["kind"] != "raydiff-shards":
            raise DataError(f"{where}: is a {manifest['kind']!r}, not a set of shards; give another data.shards")
        if manifest["format_version"] > FORMAT_VERSION:
            raise DataError(
                f"{where}: has format version {manifest['format_version']}, this raydiff reads up to {FORMAT_VERSION}; "
                f"update raydiff, or {REMEDY}"
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
        raise DataError(f"{where}: is not a manifest of shards ({type(error).__name__}: {error}); {REMEDY}") from error
