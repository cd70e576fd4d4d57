"""What every data set must do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raydiff.contracts import Dataset, Entry
from raydiff.images import ImageSpec, decode, decode_mask
from raydiff.testing._rows import build, require

__all__ = ["check_dataset"]


def check_dataset(name: str, **fields: Any) -> None:
    """The same entries each time, unique ids, training images all normal, files that are there.

    Give the option that says where the files lie, for data sets that need one: ``check_dataset("folder", root=...)``.
    """
    what = f"dataset {name!r}"
    dataset, again = (build("datasets", name, fields) for _ in range(2))
    entries = dataset.entries()
    require(entries == dataset.entries() == again.entries(), f"{what}: lists other entries, or in another order, twice")
    ids = [entry.image_id for entry in entries]
    require(len(set(ids)) == len(ids), f"{what}: an image_id appears more than once")
    require({entry.split for entry in entries} <= {"train", "test"}, f"{what}: has splits besides train and test")
    for split in ("train", "test"):
        require(any(entry.split == split for entry in entries), f"{what}: has no {split} images")
    for entry in entries:
        require(entry.split == "test" or not entry.is_anomaly, f"{what}: {entry.image_id} is anomalous and in train")
        require(
            entry.is_anomaly == (entry.defect != "good"),
            f"{what}: {entry.image_id} has defect {entry.defect!r} and is_anomaly {entry.is_anomaly}",
        )
        require(entry.size > 0, f"{what}: {entry.image_id} has size {entry.size}")
    _check_files(what, dataset, again, entries)


def _check_files(what: str, dataset: Dataset, again: Dataset, entries: Sequence[Entry]) -> None:
    """A few files of each split and class: images that decode, and the same through another instance."""
    spec = ImageSpec((16, 16), channels=3)
    first = {(entry.split, entry.class_name, entry.defect): entry for entry in reversed(entries)}
    for entry in [*list(first.values())[:20], entries[-1]]:
        image, mask = dataset.read(entry)
        require(len(image) > 0, f"{what}: {entry.image_id} is an empty file")
        require((image, mask) == again.read(entry), f"{what}: {entry.image_id} reads differently twice")
        require(mask is None or entry.is_anomaly, f"{what}: {entry.image_id} is normal and has a mask")
        pixels = decode(image, spec, entry.image_id)
        require(pixels.shape == (16, 16, 3), f"{what}: {entry.image_id} decodes to {pixels.shape}")
        if mask is not None:
            marked = decode_mask(mask, spec, entry.image_id)
            require(bool(marked.any()), f"{what}: the mask of {entry.image_id} is empty")
