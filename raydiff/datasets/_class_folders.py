"""Data sets of classes: a part to learn from and a part to test on, some classes normal and some anomalous.

Layout: ``train/<class>/*.jpg``, and the tested images in ``val/<class>/`` or ``test/<class>/`` (or both). A class that
lies in one part only (class-disjoint splits) is used all the same: of one that is only in ``train`` a sixth is held
out to test on, the last in an order keyed by the file's name.

One-class and class-disjoint protocols are the same thing here: ``normal`` and ``anomalous`` name the classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pydantic import Field, model_validator

from raydiff import registry
from raydiff.config import Options as BaseOptions
from raydiff.contracts import Entry, Split
from raydiff.core.diffusion import keyed_seed
from raydiff.datasets._class_names import ClassNames
from raydiff.datasets._fingerprint import fingerprint
from raydiff.errors import ConfigError, DataError
from raydiff.images import SUFFIXES, images_in

__all__ = ["ClassDataset", "ClassOptions", "Listing", "Members", "chosen_classes", "hold_out", "list_folders"]


class ClassOptions(BaseOptions):
    """Which classes are normal and which anomalous."""

    normal: ClassNames = Field((), description="the classes taken for normal; at least one")
    anomalous: ClassNames = Field((), description="the classes taken for anomalous; empty: all the others")

    @model_validator(mode="after")
    def _distinct(self) -> ClassOptions:
        both = [*self.normal, *self.anomalous]
        twice = next((name for name in both if both.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"normal and anomalous name the class {twice!r} twice; name each once")
        return self


class Members(NamedTuple):
    """The files of a class, as paths below the source, sorted."""

    train: tuple[str, ...]
    test: tuple[str, ...]


Listing = Mapping[str, Members]
"""Class to its files."""


@dataclass(frozen=True)
class ClassDataset:
    """Files on disk. ``image_id`` is a file's path below ``root``, with slashes."""

    root: Path
    classes: Listing
    normal: tuple[str, ...]
    anomalous: tuple[str, ...]

    def entries(self) -> list[Entry]:
        """Training images of the normal classes, then the test images of these and of the anomalous ones."""
        train = [entry for name in self.normal for entry in self._entries(name, "train")]
        return train + [e for name in (*self.normal, *self.anomalous) for e in self._entries(name, "test")]

    def read(self, entry: Entry) -> tuple[bytes, bytes | None]:
        """The image's file; there are no masks."""
        path = self.root / entry.image_id
        try:
            return path.read_bytes(), None
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); restore the file and prepare again") from error

    def _entries(self, class_name: str, split: Split) -> list[Entry]:
        is_anomaly = class_name not in self.normal
        paths = self.classes[class_name].train if split == "train" else self.classes[class_name].test
        return [
            Entry(path, split, class_name, class_name if is_anomaly else "good", is_anomaly, *_size_and_version(file))
            for path in paths
            for file in (self.root / path,)
        ]


def list_folders(root: Path, *, train: str = "train", test: Sequence[str] = ("val", "test")) -> Listing:
    """The files of every class below ``root``.

    Raises:
        DataError: there is no ``train`` folder, a class folder is empty, or a class that is in ``train`` is not tested.
    """
    parts = {part: _class_folders(root / part) for part in (train, *test)}
    if not parts[train]:
        raise DataError(
            f"{root}: has no {train}/<class> folder; set data.dataset.source to the folder that holds {train}/<class>"
            f" and {' or '.join(f'{part}/<class>' for part in test)}"
        )
    tested = {name for part in test for name in parts[part]}
    lacking = sorted(set(parts[train]) - tested)
    if lacking and tested & set(parts[train]):  # some classes are in both parts, so all should be
        where = " or ".join(part for part in test if parts[part])
        raise DataError(f"{root}: {len(lacking)} classes of {train} are not in {where}, the first {lacking[0]}; extract"
                        f" the data set again")  # fmt: skip
    return {
        name: Members(_paths(root, [parts[train].get(name)]), _paths(root, [parts[part].get(name) for part in test]))
        for name in sorted(set(parts[train]) | tested)
    }


def hold_out(classes: Listing) -> Listing:
    """Of each class without test images, a sixth (at least one) for the test: the last in a keyed order."""
    return {name: members if members.test else _sixth(members.train) for name, members in classes.items()}


def chosen_classes(options: ClassOptions, where: Path, classes: Listing) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the normal and of the anomalous classes.

    Raises:
        ConfigError: no class is normal, or one is not there.
        DataError: a normal class has nothing to learn from, or a class nothing to test on.
    """
    known = sorted(classes)
    if not options.normal:
        shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
        raise ConfigError(f"data.dataset.normal is empty; name at least one of the {len(known)} classes: {shown}")
    for name in (*options.normal, *options.anomalous):
        if name not in classes:
            close = registry.nearest(name, known) if len(known) < 40 else f"it has {known[0]} to {known[-1]}"
            raise ConfigError(f"data.dataset: {where} has no class {name!r}; {close}")
    anomalous = options.anomalous or tuple(name for name in known if name not in options.normal and classes[name].test)
    for names, part in ((options.normal, 0), ((*options.normal, *anomalous), 1)):
        empty = next((name for name in names if not classes[name][part]), None)
        if empty is not None:
            raise DataError(
                f"{where}: the class {empty} has no {('training', 'test')[part]} image; choose others in"
                f" data.dataset.normal and data.dataset.anomalous"
            )
    return options.normal, anomalous


def _class_folders(part: Path) -> dict[str, Path]:
    folders = sorted(part.iterdir()) if part.is_dir() else []
    return {folder.name: folder for folder in folders if folder.is_dir() and not folder.name.startswith(".")}


def _paths(root: Path, folders: Sequence[Path | None]) -> tuple[str, ...]:
    found: list[str] = []
    for folder in folders:
        images = images_in(folder) if folder is not None else []
        if folder is not None and not images:
            raise DataError(f"{folder}: holds no image ({', '.join(SUFFIXES)}); extract the data set again, or remove"
                            f" the folder")  # fmt: skip
        found += [path.relative_to(root).as_posix() for path in images]
    return tuple(found)


def _sixth(paths: tuple[str, ...]) -> Members:
    order = sorted(paths, key=lambda path: keyed_seed("hold_out", Path(path).name))
    count = max(1, len(paths) // 6)
    return Members(tuple(sorted(order[:-count])), tuple(sorted(order[-count:])))


def _size_and_version(path: Path) -> tuple[int, str]:
    try:
        return path.stat().st_size, fingerprint(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); restore the file and prepare again") from error
