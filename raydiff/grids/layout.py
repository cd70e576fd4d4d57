"""Which files a set of grids has, what stands where in them, and what the set depends on.

A file, or part, holds all views of a few consecutive images of one shard: image by image in stored order, and of each
the views in the order of :attr:`raydiff.views.Views.all`. Where a row lies follows by arithmetic, so nothing need be
searched. A row group is the least that can be read at a time, and small, since training reads rows at random.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from torch import Tensor

from raydiff.config import ExperimentConfig
from raydiff.contracts import Space
from raydiff.images import ImageSpec
from raydiff.shards import ShardSet
from raydiff.views import Views

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["FORMAT_VERSION", "METADATA", "GridSet", "Part", "origin_of", "schema_of"]

FORMAT_VERSION = 1
METADATA = b"raydiff"
"""Key of a file's own description, JSON, in its Parquet metadata."""

_PART_BYTES = 32 * 2**20
_GROUP_BYTES = 128 * 2**10


@dataclass(frozen=True)
class Part:
    """Images ``start`` to ``start + count`` of the training split in stored order, all of shard ``shard``."""

    name: str
    shard: str
    start: int
    count: int


@dataclass(frozen=True)
class GridSet:
    """A set: ``digest`` is of what it depends on, ``shape`` (C, h, w) of a grid, ``parts`` in stored order."""

    digest: str
    num_views: int
    shape: tuple[int, int, int]
    dtype: Literal["float32", "float16"]
    parts: tuple[Part, ...]

    @classmethod
    def of(
        cls,
        shards: ShardSet,
        shape: tuple[int, int, int],
        num_views: int,
        dtype: Literal["float32", "float16"],
        origin: Mapping[str, Any],
    ) -> GridSet:
        """The set of a shard set's training split. ``origin`` is what it depends on, beside the shards."""
        digest = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()
        row = math.prod(shape) * np.dtype(dtype).itemsize * num_views
        most = max(1, _PART_BYTES // row)
        parts, first = list[Part](), 0
        for record in shards.records:
            if record.split != "train":
                continue
            for start in range(0, record.rows, most):
                count = min(most, record.rows - start)
                name = f"{record.sha256[:24]}-{start:06d}-{count}.parquet"
                parts.append(Part(name, record.name, first + start, count))
            first += record.rows
        return cls(digest, num_views, shape, dtype, tuple(parts))

    @property
    def row_bytes(self) -> int:
        """Of one grid as it is stored."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def bytes(self) -> int:
        """Of all grids as they are stored."""
        return self.row_bytes * self.num_views * sum(part.count for part in self.parts)

    @property
    def group_rows(self) -> int:
        """Rows in a row group."""
        return max(1, _GROUP_BYTES // self.row_bytes)

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return np.array([part.start for part in self.parts], dtype=np.int64)

    def locate(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Number of the part, and of the image in it, of row numbers (k,) of the split: two arrays (k,)."""
        parts = np.searchsorted(self._starts, rows, side="right").astype(np.int64) - 1
        return parts, rows - self._starts[parts]

    def describe(self, part: Part) -> dict[str, Any]:
        """What the file of a part says of itself, beside its images."""
        return {
            "kind": "raydiff-grids",
            "format_version": FORMAT_VERSION,
            "set": self.digest,
            "part": part.name,
            "num_images": part.count,
            "num_views": self.num_views,
            "shape": list(self.shape),
            "dtype": self.dtype,
        }


def schema_of(grids: GridSet, description: Mapping[str, Any]) -> pa.Schema:
    """Columns of a part: the image, which of its views, and the grid's bytes, C x h x w, little-endian."""
    return pa.schema(
        [
            pa.field("image_id", pa.string(), nullable=False),
            pa.field("view", pa.int32(), nullable=False),
            pa.field("grid", pa.binary(grids.row_bytes), nullable=False),
        ],
        metadata={METADATA: json.dumps(description)},
    )


def origin_of(config: ExperimentConfig, space: Space, views: Views, machine: str) -> dict[str, Any]:
    """All that a grid depends on but the image, as plain JSON."""
    return {
        "format_version": FORMAT_VERSION,
        "space": config.space.model_dump(mode="json"),
        "space_state": _state_digest(space.state()),
        "images": asdict(ImageSpec.of(config.data)),
        "views": views.describe(config),
        "dtype": config.data.grids_dtype,
        "machine": machine,
    }


def _state_digest(state: Mapping[str, Tensor]) -> str:
    sha256 = hashlib.sha256()
    for name, value in sorted(state.items()):
        sha256.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        sha256.update(value.detach().cpu().contiguous().numpy().tobytes())
    return sha256.hexdigest()
