"""From a data set to shards: every image is decoded once here, so that a bad one is found before training starts."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydiff import registry
from raydiff.config import DataConfig
from raydiff.contracts import Dataset, Entry
from raydiff.errors import DataError, StorageError
from raydiff.images import ImageSpec, decode_file, decode_mask
from raydiff.shards.layout import (
    FORMAT_VERSION,
    MANIFEST,
    SCHEMA,
    ShardPlan,
    ShardRecord,
    Skipped,
    plan_shards,
    recorded_fields,
)
from raydiff.shards.reading import ShardSet
from raydiff.storage import PARTIAL, Storage

__all__ = ["MapPlans", "write_shard", "write_shards"]

MapPlans = Callable[[Callable[[ShardPlan], ShardRecord], list[ShardPlan]], Iterable[ShardRecord]]
"""``map(write, plans)``, the built-in or a parallel one; the order of the results does not matter."""

_METADATA_KEY = b"raydiff"
_SHARD_NAME = re.compile(r"(train|calibration|test)-\d{5,}\.parquet")


def write_shards(
    data: DataConfig,
    destination: str,
    *,
    map_plans: MapPlans = map,
    progress: Callable[[int, int], None] | None = None,
    dataset: Dataset | None = None,
) -> ShardSet:
    """Write every shard of ``data.dataset``, then the manifest, and open the result.

    Finished shards of the same plan are kept, so an interrupted call goes on where it stopped. Shards of another plan
    in the same folder are replaced, and so are those that are not as they were written: they get their old bytes back.

    Args:
        data: the config; all its fields that shards depend on travel in the manifest.
        destination: a folder or a URI such as ``s3://bucket/path``.
        map_plans: how the shards are written, one after the other by default.
        progress: called with (images done, images in all) after each shard.
        dataset: read this one instead of the one that ``data.dataset`` names, which is what the manifest says.

    Raises:
        StorageError: the destination cannot be written; raised before any image is read.
        DataError: the data set is not usable, or an image cannot be decoded and ``on_bad_image`` is ``error``.
    """
    storage = Storage.of(destination, field="data.shards")
    storage.prepare()
    dataset = dataset or registry.build("datasets", data.dataset)
    plans = plan_shards(dataset.entries(), data)
    existing = _finished_set(storage, plans, data)
    total = sum(len(plan.entries) for plan in plans)
    if existing is not None:
        if progress:
            progress(total, total)
        return existing
    if MANIFEST in storage.sizes():
        storage.delete(MANIFEST)
    write = partial(write_shard, dataset=dataset, data=data, destination=storage.uri)
    records: dict[str, ShardRecord] = {}
    for record in map_plans(write, plans):
        records[record.name] = record
        if progress:
            progress(sum(done.rows + len(done.skipped) for done in records.values()), total)
    _finish(storage, plans, [records[plan.name] for plan in plans], data)
    return ShardSet.open(storage.uri)


def write_shard(plan: ShardPlan, dataset: Dataset, data: DataConfig, destination: str) -> ShardRecord:
    """Write one shard, or keep the one that is there if it was made by the same plan.

    Equal plans and files give equal bytes. Takes about twice a shard's size in memory.

    Raises:
        DataError: an image cannot be read or decoded and ``on_bad_image`` is ``error``.
        StorageError: the destination cannot be written or is full; no half-written shard is left under its name.
    """
    storage = Storage.of(destination, field="data.shards")
    kept = _kept_record(storage, plan)
    if kept is not None and (data.on_bad_image == "skip" or not kept.skipped):
        return kept
    shard = _OpenShard(plan)
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink, SCHEMA, compression=_compression(data), use_dictionary=["class_name", "defect", "split", "format"],
        write_statistics=False, write_page_checksum=True, store_schema=False,
    ) as writer:  # fmt: skip
        for group in plan.groups:
            rows = [row for entry in group if (row := _checked_row(shard, entry, dataset, data)) is not None]
            if rows:
                writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), row_group_size=len(rows))
                shard.row_groups.append(len(rows))
        record = shard.record()
        writer.add_key_value_metadata({_METADATA_KEY: json.dumps(record.to_dict(), sort_keys=True)})
    content = sink.getvalue()
    storage.write(plan.name, content)
    return _with_file(record, content)


@dataclass
class _OpenShard:
    """What is known of a shard while its rows are being added."""

    plan: ShardPlan
    row_groups: list[int] = field(default_factory=list)
    anomalies: int = 0
    masks: int = 0
    content: int = 0
    skipped: list[Skipped] = field(default_factory=list)

    def add(self, entry: Entry, image: bytes, mask: bytes | None) -> None:
        """Count a row and add it to the content sum."""
        digests = [hashlib.sha256(image).hexdigest(), None if mask is None else hashlib.sha256(mask).hexdigest()]
        labels = [entry.image_id, self.plan.split, entry.class_name, entry.defect, entry.is_anomaly]
        row = hashlib.sha256(json.dumps(labels + digests).encode()).digest()
        self.content = (self.content + int.from_bytes(row, "big")) % 2**256
        self.anomalies += entry.is_anomaly
        self.masks += mask is not None

    def record(self) -> ShardRecord:
        """The record, with the fields of the file itself (``bytes``, ``sha256``) still empty."""
        return ShardRecord(
            name=self.plan.name, split=self.plan.split, rows=sum(self.row_groups), bytes=0, sha256="",
            row_groups=tuple(self.row_groups), anomalies=self.anomalies, masks=self.masks, plan=self.plan.digest,
            content=f"{self.content:064x}", skipped=tuple(self.skipped),
        )  # fmt: skip


def _checked_row(shard: _OpenShard, entry: Entry, dataset: Dataset, data: DataConfig) -> dict[str, Any] | None:
    """The row of an image that could be decoded; None, and a note in the shard, for one that is skipped."""
    try:
        image, mask = dataset.read(entry)
        # what is skipped stands in the manifest, wherever the files lie
        where = getattr(dataset, "source", None) if data.on_bad_image == "error" else None
        row = _row(entry, image, mask, data, "" if where is None else f"{where}: ")
    except DataError as error:
        if data.on_bad_image == "error":
            raise
        shard.skipped.append(Skipped(entry.image_id, str(error)))
        return None
    shard.add(entry, image, mask)
    return {**row, "split": shard.plan.split}


def _row(entry: Entry, image: bytes, mask: bytes | None, data: DataConfig, where: str) -> dict[str, Any]:
    spec = ImageSpec.of(data)
    decoded = decode_file(image, spec, f"{where}{entry.image_id}")
    pixels = None if mask is None else decode_mask(mask, spec, f"{where}mask of {entry.image_id}", image=decoded)
    row = {"image_id": entry.image_id, "class_name": entry.class_name, "defect": entry.defect,
           "is_anomaly": entry.is_anomaly}  # fmt: skip
    if data.shard_format == "raw":
        height, width, channels = decoded.pixels.shape
        stored_mask = None if pixels is None else pixels.astype(np.uint8).tobytes()
        return {**row, "image": decoded.pixels.tobytes(), "mask": stored_mask, "format": "raw",
                "height": height, "width": width, "channels": channels}  # fmt: skip
    return {**row, "image": image, "mask": mask, "format": decoded.format,
            "height": decoded.size[0], "width": decoded.size[1], "channels": decoded.channels}  # fmt: skip


def _compression(data: DataConfig) -> dict[str, str]:
    """Image files are compressed already; raw pixels are there for speed. Masks and labels shrink a lot."""
    codecs = dict.fromkeys(SCHEMA.names, "zstd")
    codecs["image"] = "none"
    codecs["mask"] = "zstd" if data.shard_format == "raw" else "none"
    return codecs


def _with_file(record: ShardRecord, content: pa.Buffer | bytes) -> ShardRecord:
    return replace(record, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def _kept_record(storage: Storage, plan: ShardPlan) -> ShardRecord | None:
    """The record of a shard that is already there, complete, and of this plan.

    All of it is read: each page has a checksum, so that a garbled one is not kept.
    """
    if plan.name not in storage.sizes():
        return None
    try:
        content = storage.read(plan.name)
        file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
        record = ShardRecord.from_dict(json.loads((file.metadata.metadata or {})[_METADATA_KEY]))
        for group in range(file.num_row_groups):
            file.read_row_group(group, use_threads=False)
    except (DataError, OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None
    return _with_file(record, content) if record.plan == plan.digest else None


def _finished_set(storage: Storage, plans: list[ShardPlan], data: DataConfig) -> ShardSet | None:
    """The set that lies there, if it is complete, of these plans, and every byte as it was written."""
    if MANIFEST not in storage.sizes():
        return None
    try:
        shards = ShardSet.open(storage.uri)
        shards.verify()
    except DataError:
        return None
    same = [record.plan for record in shards.records] == [plan.digest for plan in plans]
    return shards if same and (data.on_bad_image == "skip" or not shards.skipped) else None


def _finish(storage: Storage, plans: list[ShardPlan], records: list[ShardRecord], data: DataConfig) -> None:
    """Check what is left after skipping, remove what is stale, and write the manifest."""
    for split in ("train", "calibration") if data.calibration_fraction else ("train",):
        if not sum(record.rows for record in records if record.split == split):
            count = sum(len(record.skipped) for record in records)
            raise DataError(
                f"{storage.label}: no {split} image is left after {count} were skipped; replace the bad files"
            )
    there = storage.sizes()
    if away := [record.name for record in records if record.name not in there]:
        raise StorageError(
            f"{storage.label}: {len(away)} of {len(records)} shards lie on the nodes that wrote them and not here,"
            f" {away[0]} for one; give a folder that all nodes share, or s3://bucket/path"
        )
    current = {record.name for record in records}
    for name in there:
        if PARTIAL in name or (_SHARD_NAME.fullmatch(name) and name not in current):
            storage.delete(name)
    entries = [entry for plan in plans for entry in plan.entries]
    normal = sorted({entry.class_name for entry in entries if entry.split == "train"})
    other = sorted({entry.class_name for entry in entries} - set(normal))
    total = sum(int(record.content, 16) for record in records) % 2**256
    manifest = {
        "kind": "raydiff-shards",
        "format_version": FORMAT_VERSION,
        "digest": hashlib.sha256(f"{total:064x} {sum(record.rows for record in records)}".encode()).hexdigest(),
        "data": recorded_fields(data),
        "normal_classes": normal,
        "classes": normal + other,
        "shards": [record.to_dict() for record in records],
    }
    storage.write(MANIFEST, json.dumps(manifest, indent=1, sort_keys=True).encode())
