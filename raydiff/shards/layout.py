"""What a shard looks like, and the plan that says which image goes into which.

The plan is a function of the data set's entries and of the config alone, and so is the list of row groups: how large a
shard is, and whether it holds encoded or raw images, changes neither the splits nor the order in which training sees
the images.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from raydiff.config import NO_EFFECT, DataConfig
from raydiff.contracts import Entry, Split
from raydiff.core.diffusion import keyed_seed
from raydiff.errors import ConfigError, DataError

__all__ = [
    "CHOICES",
    "FORMAT_VERSION",
    "MANIFEST",
    "SCHEMA",
    "SPLITS",
    "ShardPlan",
    "ShardRecord",
    "Skipped",
    "plan_shards",
    "recorded_fields",
]

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SPLITS: tuple[Split, ...] = ("train", "calibration", "test")
CHOICES: dict[str, Any] = {"max_train_images": None, "max_test_images": None, "test_balance": "proportional"}
"""Config fields that choose among a data set's images, recorded only where they are not this default."""

SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),  # the file, or uint8 (height, width, channels)
        pa.field("format", pa.string(), nullable=False),  # png, jpeg, webp, bmp, tiff or raw
        pa.field("height", pa.int32(), nullable=False),  # upright
        pa.field("width", pa.int32(), nullable=False),
        pa.field("channels", pa.int32(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("class_name", pa.string(), nullable=False),
        pa.field("defect", pa.string(), nullable=False),
        pa.field("is_anomaly", pa.bool_(), nullable=False),
        pa.field("mask", pa.binary()),  # the file, or uint8 0 and 1 (height, width)
    ]
)

_MAX_GROUP_ROWS = 64
_MAX_GROUP_BYTES = 4 * 2**20  # of encoded images, whatever the shard's format


@dataclass(frozen=True)
class Skipped:
    """An image that was left out, and why."""

    image_id: str
    reason: str


@dataclass(frozen=True)
class ShardPlan:
    """The images of one shard, one tuple per row group. Equal digests make equal shards."""

    name: str
    split: Split
    groups: tuple[tuple[Entry, ...], ...]
    digest: str

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All images, in order."""
        return tuple(entry for group in self.groups for entry in group)


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard, as the manifest describes it.

    ``content`` is the sum, modulo 2^256, of a SHA-256 per row over the id, the split, the labels and the SHA-256 of the
    data set's image and mask files: the sum over all shards does not depend on how rows are spread or stored.
    """

    name: str
    split: Split
    rows: int
    bytes: int
    sha256: str
    row_groups: tuple[int, ...]
    anomalies: int
    masks: int
    plan: str
    content: str
    skipped: tuple[Skipped, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ShardRecord:
        """The inverse of :meth:`to_dict`; raises KeyError or TypeError for anything else."""
        skipped = tuple(Skipped(**item) for item in fields["skipped"])
        return cls(**{**fields, "row_groups": tuple(fields["row_groups"]), "skipped": skipped})


def recorded_fields(data: DataConfig) -> dict[str, Any]:
    """The config fields that shards depend on, as plain JSON types; the pixel fields only where they matter.

    Options of the data set that cannot change a score (:data:`raydiff.config.NO_EFFECT`) are left out.
    """
    dumped = data.model_dump(mode="json")
    names = ["dataset", "calibration_fraction", "split_seed", "shard_format"]
    names += [name for name, default in CHOICES.items() if dumped[name] != default]
    if data.shard_format == "raw" or data.resize == "strict":
        names += ["image_size", "channels", "resize"]
        names += ["align", "aligned_width"] if data.align != "none" else []
    for option, field in type(data.dataset).model_fields.items():
        if field.json_schema_extra == NO_EFFECT:
            del dumped["dataset"][option]
    return {name: dumped[name] for name in names}


def plan_shards(entries: Sequence[Entry], data: DataConfig) -> list[ShardPlan]:
    """Spread a data set over shards, cutting the calibration split from the training images.

    ``data.max_train_images`` and ``data.max_test_images`` choose first: see :func:`_limited_train` and
    :func:`_limited_test`. Per class, exactly ``round(calibration_fraction * n)`` of the n training images (at least
    one) are set aside: those that come first in an order keyed by (split_seed, image_id). Training and calibration
    images are stored in keyed order too, so that every row group is a fair sample; test images stay in the data set's
    order.

    Raises:
        DataError: no training images, too few of a class, an anomalous one among them, or two images with one id.
        ConfigError: a limit is too small for every class (and defect) to be there.
    """
    _check(entries)
    train = _limited_train([entry for entry in entries if entry.split == "train"], data)
    calibration = _calibration_ids(train, data)
    members: dict[Split, list[Entry]] = {
        "train": _keyed_order((entry for entry in train if entry.image_id not in calibration), data),
        "calibration": _keyed_order((entry for entry in train if entry.image_id in calibration), data),
        "test": _limited_test([entry for entry in entries if entry.split == "test"], data),
    }
    return [plan for split in SPLITS for plan in _plan_split(split, members[split], data)]


def _check(entries: Sequence[Entry]) -> None:
    repeated = [image_id for image_id, count in Counter(entry.image_id for entry in entries).items() if count > 1]
    if repeated:
        raise DataError(f"{repeated[0]}: {len(repeated)} image id(s) occur more than once; every image needs its own")
    train = [entry for entry in entries if entry.split == "train"]
    if not train:
        raise DataError("the data set has no normal training image; check data.dataset")
    tainted = next((entry.image_id for entry in train if entry.is_anomaly), None)
    if tainted is not None:
        raise DataError(f"{tainted}: is anomalous but in the training split; only normal images may be learnt from")


def _limited_train(train: list[Entry], data: DataConfig) -> list[Entry]:
    """At most ``data.max_train_images``, the same number of each class; what a small class lacks goes to the others.

    Which ones is keyed by (split_seed, image_id), so that a larger limit keeps what a smaller one chose.
    """
    limit = data.max_train_images
    if limit is None or limit >= len(train):
        return train
    groups = _grouped(train, lambda entry: (entry.class_name,))
    least = (2 if data.calibration_fraction else 1) * len(groups)
    if limit < least:
        raise ConfigError(
            f"data.max_train_images is {limit}; {len(groups)} classes need at least {least}, one of each to"
            f" learn from{' and one to calibrate on' if data.calibration_fraction else ''}"
        )
    quotas: dict[tuple[str, ...], int] = {}
    for done, key in enumerate(sorted(groups, key=lambda key: (len(groups[key]), key))):  # the smallest class first
        quotas[key] = min(len(groups[key]), (limit - sum(quotas.values())) // (len(groups) - done))
    return _chosen(train, groups, quotas, data)


def _limited_test(test: list[Entry], data: DataConfig) -> list[Entry]:
    """At most ``data.max_test_images``: one of each (class, defect), the others in proportion (largest remainders).

    With ``data.test_balance: balanced`` half of them are normal where there are enough: of many classes of which one is
    normal, that one is a small part.
    """
    limit = data.max_test_images
    if limit is None or limit >= len(test):
        return test
    groups = _grouped(test, lambda entry: (entry.class_name, entry.defect))
    if limit < len(groups):
        raise ConfigError(
            f"data.max_test_images is {limit}; there are {len(groups)} kinds of test images (class and defect), so it"
            f" must be at least {len(groups)}"
        )
    if data.test_balance == "proportional":
        return _chosen(test, groups, _in_proportion(groups, limit), data)
    anomalous = {key: members for key, members in groups.items() if members[0].is_anomaly}
    normal = {key: members for key, members in groups.items() if key not in anomalous}
    there, others = sum(map(len, normal.values())), sum(map(len, anomalous.values()))
    num_normal = min(max(min(there, limit // 2), len(normal), limit - others), limit - len(anomalous))
    quotas = _in_proportion(normal, num_normal) | _in_proportion(anomalous, limit - num_normal)
    return _chosen(test, groups, quotas, data)


def _in_proportion(groups: Mapping[tuple[str, ...], list[Entry]], limit: int) -> dict[tuple[str, ...], int]:
    """How many of each group, at least one; ``limit`` lies between the number of groups and that of entries."""
    total = sum(map(len, groups.values()))
    quotas = {key: max(1, limit * len(members) // total) for key, members in groups.items()}
    while (rest := limit - sum(quotas.values())) != 0:
        lack = {key: len(members) * limit / total - quotas[key] for key, members in groups.items()}
        if rest > 0:
            quotas[max(sorted(lack), key=lambda key: lack[key])] += 1
        else:  # one of each was more than some had a right to
            quotas[min(sorted(key for key in lack if quotas[key] > 1), key=lambda key: lack[key])] -= 1
    return quotas


def _grouped(entries: list[Entry], key: Callable[[Entry], tuple[str, ...]]) -> dict[tuple[str, ...], list[Entry]]:
    groups: dict[tuple[str, ...], list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[key(entry)].append(entry)
    return groups


def _chosen(
    entries: list[Entry],
    groups: Mapping[tuple[str, ...], list[Entry]],
    quotas: Mapping[tuple[str, ...], int],
    data: DataConfig,
) -> list[Entry]:
    """Per group the first of a keyed order, as many as its quota; all in the order of ``entries``."""
    kept: set[str] = set()
    for key, members in groups.items():
        order = sorted(members, key=lambda entry: keyed_seed("limit", data.split_seed, entry.image_id))
        kept.update(entry.image_id for entry in order[: quotas[key]])
    return [entry for entry in entries if entry.image_id in kept]


def _calibration_ids(train: Sequence[Entry], data: DataConfig) -> frozenset[str]:
    if not data.calibration_fraction:
        return frozenset()
    by_class: dict[str, list[str]] = defaultdict(list)
    for entry in train:
        by_class[entry.class_name].append(entry.image_id)
    chosen: set[str] = set()
    for class_name, ids in sorted(by_class.items()):
        count = max(1, round(data.calibration_fraction * len(ids)))
        if count >= len(ids):
            raise DataError(
                f"class {class_name!r} has {len(ids)} normal training image(s), of which data.calibration_fraction "
                f"({data.calibration_fraction}) sets {count} aside; add normal images or lower the fraction (0 sets"
                " none aside)"
            )
        order = sorted(ids, key=lambda image_id: keyed_seed("calibration", data.split_seed, image_id))
        chosen.update(order[:count])
    return frozenset(chosen)


def _keyed_order(entries: Iterator[Entry], data: DataConfig) -> list[Entry]:
    return sorted(entries, key=lambda entry: keyed_seed("stored", data.split_seed, entry.image_id))


def _plan_split(split: Split, entries: list[Entry], data: DataConfig) -> Iterator[ShardPlan]:
    """Row groups of a fixed number of images, gathered into shards of about ``shard_mb``."""
    if not entries:
        return
    mean_bytes = sum(entry.size for entry in entries) / len(entries)
    rows = int(min(_MAX_GROUP_ROWS, max(1, _MAX_GROUP_BYTES // max(1.0, mean_bytes))))
    groups = [tuple(entries[start : start + rows]) for start in range(0, len(entries), rows)]
    for number, shard in enumerate(_gather(groups, data)):
        name = f"{split}-{number:05d}.parquet"
        described = [
            FORMAT_VERSION,
            name,
            [[asdict(entry) for entry in group] for group in shard],
            recorded_fields(data),
        ]
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
        yield ShardPlan(name, split, tuple(shard), digest)


def _gather(groups: list[tuple[Entry, ...]], data: DataConfig) -> Iterator[list[tuple[Entry, ...]]]:
    """Consecutive groups whose bytes stay within the target, at least one at a time."""
    pixels = data.image_size[0] * data.image_size[1] * data.channels
    target = data.shard_mb * 2**20
    gathered: list[tuple[Entry, ...]] = []
    total = 0
    for group in groups:
        size = len(group) * pixels if data.shard_format == "raw" else sum(entry.size for entry in group)
        if gathered and total + size > target:
            yield gathered
            gathered, total = [], 0
        gathered.append(group)
        total += size
    yield gathered
