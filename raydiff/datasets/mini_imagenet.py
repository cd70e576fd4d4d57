"""``mini_imagenet``: 100 classes of ImageNet, 600 images of 84 x 84 each, in either of two distributions.

* Class folders, ``train/<class>/*`` and ``val/<class>/*`` (and ``test/<class>/*`` where it is there).
* ``images/*.jpg`` with ``train.csv``, ``val.csv`` and ``test.csv`` (columns ``filename,label``): the few-shot splits of
  Ravi and Larochelle, whose 64, 16 and 20 classes are disjoint. Every class is one of 100 here, and the last sixth of
  each, in an order keyed by the file's name, is tested.

``normal`` and ``anomalous`` name the classes: one-class and class-disjoint protocols differ in nothing else.

Vinyals et al. 2016 (arXiv:1606.04080); Ravi and Larochelle 2017, "Optimization as a Model for Few-Shot Learning".
"""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path
from typing import Literal

from pydantic import Field

from raydiff.config import NO_EFFECT
from raydiff.datasets._class_folders import (
    ClassDataset,
    ClassOptions,
    Listing,
    Members,
    chosen_classes,
    hold_out,
    list_folders,
)
from raydiff.errors import DataError

__all__ = ["PUBLISHED", "Options", "build"]

PUBLISHED = "Ravi and Larochelle publish the csv splits, and ImageNet (ILSVRC 2012) the images, to registered users"
_SPLITS = {"train.csv": 64, "val.csv": 16, "test.csv": 20}
_PER_CLASS = 600


class Options(ClassOptions):
    """Where the images lie."""

    name: Literal["mini_imagenet"] = "mini_imagenet"
    source: str = Field(description="the folder of train/<class> and val/<class>, or of images/ and the csv files")
    check_counts: bool = Field(
        True, description="refuse csv splits without their 64, 16 and 20 classes of 600", json_schema_extra=NO_EFFECT
    )


def build(options: Options) -> ClassDataset:
    """The data set in ``options.source``.

    Raises:
        DataError: a file is missing, a csv file cannot be read, or the splits have other counts than published.
        ConfigError: no class is normal, or one is not there.
    """
    root = Path.cwd() / Path(options.source).expanduser()
    tables = [name for name in _SPLITS if (root / name).is_file()]
    classes = hold_out(_listed(root, options.check_counts) if tables else list_folders(root))
    return ClassDataset(root, classes, *chosen_classes(options, root, classes))


def _listed(root: Path, check_counts: bool) -> Listing:
    """The files that the csv tables name, by class; none tested yet."""
    missing = [name for name in _SPLITS if not (root / name).is_file()]
    if missing and check_counts:
        raise DataError(f"{root}: lacks {', '.join(missing)}; add it, or {_ON_PURPOSE}")
    members: dict[str, list[str]] = defaultdict(list)
    for name, expected in _SPLITS.items():
        labelled = _read_table(root / name) if name not in missing else {}
        wrong = [label for label, files in labelled.items() if len(files) != _PER_CLASS]
        if check_counts and len(labelled) != expected:
            raise DataError(f"{root / name}: names {len(labelled)} classes, expected {expected}; or {_ON_PURPOSE}")
        if check_counts and wrong:
            raise DataError(f"{root / name}: names {len(labelled[wrong[0]])} images of {wrong[0]}, expected"
                            f" {_PER_CLASS}; or {_ON_PURPOSE}")  # fmt: skip
        for label, files in labelled.items():
            members[label] += [f"images/{file}" for file in files]
    present = {path.name for path in (root / "images").iterdir()} if (root / "images").is_dir() else set()
    lost = [path for paths in members.values() for path in paths if path.removeprefix("images/") not in present]
    if lost:
        total = sum(len(paths) for paths in members.values())
        raise DataError(f"{root / lost[0]}: is missing ({len(lost)} of the {total} images that the csv files name are);"
                        f" extract the images again")  # fmt: skip
    return {label: Members(tuple(sorted(paths)), ()) for label, paths in sorted(members.items())}


_ON_PURPOSE = "set data.dataset.check_counts=false to use a part of it on purpose"


def _read_table(path: Path) -> dict[str, list[str]]:
    """Class to its file names."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        labelled: dict[str, list[str]] = defaultdict(list)
        for row in rows:
            labelled[row["label"]].append(row["filename"])
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise DataError(f"{path}: is no table with the columns filename,label ({error}); fetch it again") from error
    return labelled
