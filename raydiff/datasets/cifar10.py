"""``cifar10``: the official python batches, ``cifar-10-batches-py``: 50,000 training and 10,000 test images of 32 x 32.

One-class protocol: trained on the training images of the normal classes, tested on all test images; the other classes
are the anomalies. Leave-one-class-out is the same with nine normal classes.

The files are pickles. They are read by an unpickler that builds dictionaries, lists, bytes, numbers and numpy arrays
and refuses everything else, so a hostile file cannot run code.

Krizhevsky 2009, "Learning multiple layers of features from tiny images".
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, field_validator

from raydiff.config import Options as BaseOptions
from raydiff.contracts import Entry
from raydiff.datasets._class_names import ClassNames
from raydiff.datasets._fingerprint import fingerprint
from raydiff.errors import DataError
from raydiff.images import encode_png

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["CLASSES", "Cifar10Dataset", "Options", "build"]

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
_TEST = "test_batch"
_META = "batches.meta"
_ENCODED_SIZE = 2300  # bytes of a 32 x 32 RGB PNG, on average


class Options(BaseOptions):
    """Where the batches lie and which classes are normal."""

    name: Literal["cifar10"] = "cifar10"
    source: str = Field(description="the folder cifar-10-batches-py, or the one it lies in")
    normal: ClassNames = Field(("airplane",), min_length=1, description="the classes taken for normal")

    @field_validator("normal", mode="after")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in CLASSES:
                raise ValueError(f"{name!r} is no class of CIFAR-10; there are: {', '.join(CLASSES)}")
        if len(set(value)) != len(value):
            raise ValueError(f"{', '.join(value)} names a class twice; name each once")
        return value


@dataclass(frozen=True)
class Cifar10Dataset:
    """See the module. ``image_id`` is ``<batch>/<index>``."""

    folder: Path
    normal: frozenset[str]

    def entries(self) -> list[Entry]:
        """The normal classes' training images, then all test images, in the order of the batches."""
        train = [entry for batch in _TRAIN for entry in self._batch_entries(batch) if not entry.is_anomaly]
        return train + self._batch_entries(_TEST)

    def read(self, entry: Entry) -> tuple[bytes, bytes | None]:
        """A PNG file; there are no masks."""
        batch, index = entry.image_id.split("/")
        images, _ = _read_batch(self.folder / batch)
        return encode_png(images[int(index)].reshape(3, 32, 32).transpose(1, 2, 0)), None

    def _batch_entries(self, batch: str) -> list[Entry]:
        version = _fingerprint(self.folder / batch)
        _, labels = _read_batch(self.folder / batch)
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


def build(options: Options) -> Cifar10Dataset:
    """The data set in ``options.source``, with its files and counts checked.

    Raises:
        DataError: a file is missing, is not what it should be, or holds another number of images than it should.
    """
    source = Path(options.source).expanduser()
    folder = source / "cifar-10-batches-py" if (source / "cifar-10-batches-py").is_dir() else source
    missing = [name for name in (*_TRAIN, _TEST, _META) if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"{folder}: lacks {', '.join(missing)}; unpack cifar-10-python.tar.gz and set data.dataset.source to "
            f"cifar-10-batches-py"
        )
    meta = _unpickle(folder / _META)
    names = tuple(name.decode(errors="replace") if isinstance(name, bytes) else str(name)
                  for name in _field(folder / _META, meta, "label_names"))  # fmt: skip
    if names != CLASSES:
        raise DataError(f"{folder / _META}: names the classes {', '.join(names)}; expected {', '.join(CLASSES)}")
    expected = _field(folder / _META, meta, "num_cases_per_batch")
    for batch in (*_TRAIN, _TEST):
        count = len(_read_batch(folder / batch)[1])
        if count != expected:
            raise DataError(f"{folder / batch}: holds {count} images, expected {expected}; unpack the archive again")
    return Cifar10Dataset(folder, frozenset(options.normal))


def _read_batch(path: Path) -> tuple[NDArray[np.uint8], tuple[int, ...]]:
    """Pixels (n, 3072), all red, then green, then blue values, row by row; and labels (n,)."""
    return _read_version(path, _fingerprint(path))


@lru_cache(maxsize=6)
def _read_version(path: Path, _version: str) -> tuple[NDArray[np.uint8], tuple[int, ...]]:
    """What :func:`_read_batch` gives, kept for this version of the file."""
    content = _unpickle(path)
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


def _unpickle(path: Path) -> dict[Any, Any]:
    try:
        with path.open("rb") as file:
            content = _PlainUnpickler(file, encoding="bytes").load()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); unpack cifar-10-python.tar.gz again") from error
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
