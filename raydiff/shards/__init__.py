"""Shards: a data set as Parquet files that many workers can stream, with a manifest that says what they hold.

One shard holds one split. Each row is an image: its bytes as they came (``encoded``) or uint8 pixels at the size of the
experiment (``raw``), its labels and its mask. Row groups are small, so reading takes little memory and a training order
can pick them one by one. The manifest is written last; a folder without one is not finished.

``layout`` is what they look like, ``writing`` and ``reading`` do that, and ``order`` is the
order in which training sees them. Nothing here needs Ray.
"""

from __future__ import annotations

from raydiff.shards.layout import FORMAT_VERSION, SCHEMA, ShardPlan, ShardRecord, Skipped, plan_shards
from raydiff.shards.order import COPY, TrainingBatch, TrainingOrder, cached_stream, fits_in_memory
from raydiff.shards.reading import LabelledImages, ShardSet
from raydiff.shards.writing import write_shard, write_shards

__all__ = [
    "COPY",
    "FORMAT_VERSION",
    "SCHEMA",
    "LabelledImages",
    "ShardPlan",
    "ShardRecord",
    "ShardSet",
    "Skipped",
    "TrainingBatch",
    "TrainingOrder",
    "cached_stream",
    "fits_in_memory",
    "plan_shards",
    "write_shard",
    "write_shards",
]
