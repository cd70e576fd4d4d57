"""``cifar10``: 50,000 training and 10,000 test images of 32 x 32 in ten classes, in any of three distributions.

* The official python batches, in the folder ``cifar-10-batches-py``.
* ``cifar-10-python.tar.gz`` as it was fetched: read into memory (about 180 MB).
* Class folders: ``train/<class>/*`` and ``test/<class>/*``. Re-encoded copies often come like this; their images are
  not those of the batches.

One-class protocol: trained on the training images of the normal classes, tested on all test images; the other classes
are the anomalies. Leave-one-class-out is the same with nine normal classes.

The batches are pickles. They are read by an unpickler that builds dictionaries, lists, bytes, numbers and numpy arrays
and refuses everything else, so a hostile file cannot run code.

Krizhevsky 2009, "Learning multiple layers of features from tiny images".
"""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, field_validator

from raydiff.config import NO_EFFECT
from raydiff.config import Options as BaseOptions
from raydiff.contracts import Entry
from raydiff.datasets._class_folders import ClassDataset, list_folders
from raydiff.datasets._class_names import ClassNames, checked_names
from raydiff.datasets._download import fetch
from raydiff.datasets._fingerprint import fingerprint
from raydiff.errors import DataError
from raydiff.images import encode_png

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["CLASSES", "Cifar10Dataset", "Options", "build", "download"]

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
_TEST = "test_batch"
_META = "batches.meta"
_ARCHIVE = "cifar-10-python.tar.gz"
_ENCODED_SIZE = 2300  # bytes of a 32 x 32 RGB PNG, on average


class Options(BaseOptions):
    """Where the images lie and which classes are normal."""

    name: Literal["cifar10"] = "cifar10"
    source: str = Field(description="the folder of the batches or of train/<class> and test/<class>, or the tar.gz")
    normal: ClassNames = Field(("airplane",), min_length=1, description="the classes taken for normal")
    check_counts: bool = Field(
        True, description="refuse class folders that hold another number of images", json_schema_extra=NO_EFFECT
    )

    @field_validator("normal", mode="after")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return checked_names(value, CLASSES, f"is no class of CIFAR-10; there are: {', '.join(CLASSES)}", "class")


@dataclass(frozen=True)
class Cifar10Dataset:
    """The batches; ``image_id`` is ``<batch>/<index>``. ``place`` is their folder, or the archive."""

    place: Path
    normal: frozenset[str]

    def entries(self) -> list[Entry]:
        """The normal classes' training images, then all test images, in the order of the batches."""
        train = [entry for batch in _TRAIN for entry in self._batch_entries(batch) if not entry.is_anomaly]
        return train + self._batch_entries(_TEST)

    def read(self, entry: Entry) -> tuple[bytes, bytes | None]:
        """A PNG file; there are no masks."""
        batch, index = entry.image_id.split("/")
        images, _ = _read_batch(self.place, batch)
        return encode_png(images[int(index)].reshape(3, 32, 32).transpose(1, 2, 0)), None

    def _batch_entries(self, batch: str) -> list[Entry]:
        version = _fingerprint(self.place if self.place.is_file() else self.place / batch)
        _, labels = _read_batch(self.place, batch)
        return [self._entry(f"{batch}/{index:05d}", CLASSES[label], version) for index, label in enumerate(labels)]

    def _entry(self, image_id: str, class_name: str, version: str) -> Entry:
        is_anomaly = class_name not in self.normal
        return Entry(
            image_id=image_id,
            split="test" if image_id.startswith(_TEST) else "train",
            class_name=class_name,
            defect=class_name if is_anomaly else "good",
            is_anomaly=is_anomaly,
            size=_ENCODED_SIZE,
            fingerprint=version,
        )


def build(options: Options) -> Cifar10Dataset | ClassDataset:
    """The data set in ``options.source``, with its files and counts checked.

    Raises:
        DataError: a file is missing, is not what it should be, or holds another number of images than it should.
    """
    source = Path.cwd() / Path(options.source).expanduser()
    if (source / "train").is_dir() or (source / "test").is_dir():
        return _class_folders(source, options)
    places = (source / "cifar-10-batches-py", source / _ARCHIVE)
    place = source if source.is_file() else next((place for place in places if place.exists()), source)
    if not place.is_file():
        _check_files(place)
    _check_meta(place, _read_meta(place))
    return Cifar10Dataset(place, frozenset(options.normal))


def download(folder: Path) -> Path:
    """Fetch the batches into ``folder``; gives the ``source`` to use. Raises DataError where the network fails."""
    return fetch("CIFAR10", folder)


def _class_folders(root: Path, options: Options) -> ClassDataset:
    classes = list_folders(root, test=("test",))
    if set(classes) != set(CLASSES):
        odd = sorted(set(classes) ^ set(CLASSES))
        raise DataError(f"{root}: has {len(classes)} classes, of which {', '.join(odd[:5])} should not be or are"
                        f" missing; expected {', '.join(CLASSES)}")  # fmt: skip
    for name, members in classes.items():
        for part, found, expected in (("train", len(members.train), 5000), ("test", len(members.test), 1000)):
            if options.check_counts and found != expected:
                raise DataError(
                    f"{root / part / name}: holds {found} images, expected {expected}; extract the data set again, or"
                    f" set data.dataset.check_counts=false to use a part of it on purpose"
                )
    others = tuple(name for name in CLASSES if name not in options.normal)
    return ClassDataset(root, classes, options.normal, others)


def _check_files(folder: Path) -> None:
    missing = [name for name in (*_TRAIN, _TEST, _META) if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"{folder}: lacks {', '.join(missing)}; unpack {_ARCHIVE} and set data.dataset.source to "
            f"cifar-10-batches-py"
        )


def _check_meta(place: Path, meta: dict[Any, Any]) -> None:
    """The classes and the number of images per batch are those that the batches' own description says."""
    path = place / _META
    names = tuple(name.decode(errors="replace") if isinstance(name, bytes) else str(name)
                  for name in _field(path, meta, "label_names"))  # fmt: skip
    if names != CLASSES:
        raise DataError(f"{path}: names the classes {', '.join(names)}; expected {', '.join(CLASSES)}")
    expected = _field(path, meta, "num_cases_per_batch")
    for batch in (*_TRAIN, _TEST):
        count = len(_read_batch(place, batch)[1])
        if count != expected:
            raise DataError(f"{place / batch}: holds {count} images, expected {expected}; unpack the archive again")


def _read_batch(place: Path, batch: str) -> tuple[NDArray[np.uint8], tuple[int, ...]]:
    """Pixels (n, 3072), all red, then green, then blue values, row by row; and labels (n,)."""
    if place.is_file():
        return _read_archive(place, _fingerprint(place))[0][batch]
    return _read_version(place / batch, _fingerprint(place / batch))


def _read_meta(place: Path) -> dict[Any, Any]:
    if place.is_file():
        return _read_archive(place, _fingerprint(place))[1]
    return _unpickle(place / _META, _read_file(place / _META))


@lru_cache(maxsize=1)
def _read_archive(
    archive: Path, _version: str
) -> tuple[dict[str, tuple[NDArray[np.uint8], tuple[int, ...]]], dict[Any, Any]]:
    """Every batch by its name, and the description."""
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(archive) as file:
            for member in file:
                content = file.extractfile(member) if member.isreg() else None
                if content is not None and Path(member.name).name in (*_TRAIN, _TEST, _META):
                    contents[Path(member.name).name] = content.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{archive}: is truncated or no tar archive ({error}); fetch {_ARCHIVE} again") from error
    missing = [name for name in (*_TRAIN, _TEST, _META) if name not in contents]
    if missing:
        raise DataError(f"{archive}: lacks {', '.join(missing)}; fetch {_ARCHIVE} again")
    batches = {name: _pixels_and_labels(archive / name, contents[name]) for name in (*_TRAIN, _TEST)}
    return batches, _unpickle(archive / _META, contents[_META])


@lru_cache(maxsize=6)
def _read_version(path: Path, _version: str) -> tuple[NDArray[np.uint8], tuple[int, ...]]:
    """What :func:`_read_batch` gives, kept for this version of the file."""
    return _pixels_and_labels(path, _read_file(path))


def _pixels_and_labels(path: Path, pickled: bytes) -> tuple[NDArray[np.uint8], tuple[int, ...]]:
    content = _unpickle(path, pickled)
    images, labels = _field(path, content, "data"), _field(path, content, "labels")
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3072:
        raise DataError(f"{path}: data is not a uint8 array of n x 3072; unpack the archive again")
    if not isinstance(labels, list) or len(labels) != len(images):
        raise DataError(f"{path}: has {len(images)} images but another number of labels; unpack the archive again")
    for label in labels:
        if not isinstance(label, int) or not 0 <= label < len(CLASSES):
            raise DataError(f"{path}: has the label {label!r}; labels are 0 to 9")
    return images, tuple(labels)


def _fingerprint(path: Path) -> str:
    try:
        return fingerprint(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); unpack cifar-10-python.tar.gz again") from error


def _field(path: Path, content: dict[Any, Any], name: str) -> Any:
    """An entry of a batch, whose keys are bytes (written by Python 2) or text."""
    for key in (name.encode(), name):
        if key in content:
            return content[key]
    raise DataError(f"{path}: has no {name!r}; unpack cifar-10-python.tar.gz again")


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); unpack {_ARCHIVE} again") from error


def _unpickle(path: Path, pickled: bytes) -> dict[Any, Any]:
    try:
        content = _PlainUnpickler(io.BytesIO(pickled), encoding="bytes").load()
    except Exception as error:  # the pickle machine raises whatever a garbled file makes it trip over
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: is truncated or not a CIFAR-10 batch ({reason}); unpack the archive again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: is not a CIFAR-10 batch; unpack cifar-10-python.tar.gz again")
    return content


def _empty_array(*_: object) -> NDArray[np.int8]:
    """What pickle makes before it sets an array's shape, type and content."""
    return np.empty(0, np.int8)


def _latin1(text: str, encoding: str) -> bytes:
    """How protocol 2 writes bytes; no other codec is used."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the codec {encoding!r} is not allowed")
    return text.encode("latin1")


_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,
    ("numpy._core.multiarray", "_reconstruct"): _empty_array,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,
}


class _PlainUnpickler(pickle.Unpickler):
    """Arrays, bytes and containers only."""

    def find_class(self, module: str, name: str) -> Any:
        """The few names above; any other is refused."""
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not allowed")
        return _ALLOWED[module, name]
