"""``mnist_c``: MNIST and fifteen corruptions of its test images; ``mnist_c.zip`` or its folders.

Layout: ``mnist_c/<corruption>/{train,test}_{images,labels}.npy``, images uint8 (n, 28, 28, 1); ``identity`` holds the
clean ones. Trained on clean digits (all ten), tested on the clean test images (normal) and on each corruption of the
same images (anomalous); the corruption is the ``defect`` and the digit the class, so an evaluation gives a row for
each corruption.

Mu and Gilmer 2019, "MNIST-C: A Robustness Benchmark for Computer Vision" (arXiv:1906.02337).
"""

from __future__ import annotations

import io
import zipfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, field_validator

from raydiff.config import Options as BaseOptions
from raydiff.contracts import Entry, Split
from raydiff.datasets._class_names import ClassNames
from raydiff.datasets._fingerprint import fingerprint
from raydiff.datasets._mnist_files import find_mnist, mnist_version, read_mnist
from raydiff.errors import ConfigError, DataError
from raydiff.images import encode_png

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["CORRUPTIONS", "PUBLISHED", "MnistCDataset", "Options", "build"]

CORRUPTIONS = (
    "shot_noise", "impulse_noise", "glass_blur", "motion_blur", "shear", "scale", "rotate", "brightness", "translate",
    "stripe", "fog", "spatter", "dotted_line", "zigzag", "canny_edges",
)  # fmt: skip
PUBLISHED = "Mu and Gilmer publish mnist_c.zip on Zenodo as 'MNIST-C'"
_CLEAN = "identity"
_ENCODED_SIZE = 400  # bytes of a 28 x 28 grey PNG, on average


class Options(BaseOptions):
    """Where the arrays lie, and which corruptions are tested."""

    name: Literal["mnist_c"] = "mnist_c"
    source: str = Field(description="mnist_c.zip, the folder mnist_c, or the folder that one of them lies in")
    mnist: str | None = Field(
        None, description="the folder of MNIST's own files: the training images where identity/train_images.npy is not"
    )
    corruptions: ClassNames = Field(CORRUPTIONS, min_length=1, description="the corruptions that are tested")

    @field_validator("corruptions", mode="after")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError(f"{', '.join(value)} names a corruption twice; name each once")
        if _CLEAN in value:
            raise ValueError(f"{_CLEAN} is the clean images, which are tested as the normal ones; leave it out")
        return value


@dataclass(frozen=True)
class MnistCDataset:
    """See the module. ``image_id`` is ``train/<index>`` or ``<corruption or identity>/<index>``.

    ``place`` is the zip file or the folder; ``mnist`` the folder of the training images, None where ``place`` has them.
    """

    place: Path
    corruptions: tuple[str, ...]
    mnist: Path | None

    def entries(self) -> list[Entry]:
        """Training images, clean test images, then each corruption's, in the order of the arrays."""
        tested = [entry for name in (_CLEAN, *self.corruptions) for entry in self._entries(name, "test")]
        return self._entries("train", "train") + tested

    def read(self, entry: Entry) -> tuple[bytes, bytes | None]:
        """A PNG file; there are no masks."""
        group, _, index = entry.image_id.partition("/")
        return encode_png(self._arrays(group)[0][int(index)]), None

    def check(self) -> None:
        """Every corruption is there and has the clean images' labels.

        Raises:
            DataError: names what is missing or differs.
        """
        needed = ("test_images.npy", "test_labels.npy")
        missing = [
            n for n in (_CLEAN, *self.corruptions) if not all(_has(self.place, f"{n}/{file}") for file in needed)
        ]
        if missing:
            raise DataError(
                f"{self.place}: lacks test_images.npy or test_labels.npy of {', '.join(missing)}; unpack mnist_c.zip"
                f" again, or name the corruptions that there are in data.dataset.corruptions"
            )
        _, clean = self._arrays(_CLEAN)
        for name in self.corruptions:
            _, labels = self._arrays(name)
            if len(labels) != len(clean):
                raise DataError(
                    f"{self.place}: {name} has {len(labels)} test images and {_CLEAN} {len(clean)}; they are the same"
                    f" images, so unpack mnist_c.zip again"
                )
            if not np.array_equal(labels, clean):
                raise DataError(
                    f"{self.place}: the labels of {name} are not those of {_CLEAN}, so its images are others; unpack"
                    f" mnist_c.zip again"
                )
        self._arrays("train")

    def _arrays(self, group: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Images (n, 28, 28) and digits (n,)."""
        if group != "train":
            return _read_pair(self.place, f"{group}/test", _version(self.place, f"{group}/test_images.npy"))
        if self.mnist is not None:
            return read_mnist(self.mnist, "train")
        return _read_pair(self.place, f"{_CLEAN}/train", _version(self.place, f"{_CLEAN}/train_images.npy"))

    def _entries(self, group: str, split: Split) -> list[Entry]:
        if group == "train" and self.mnist is not None:
            version = mnist_version(self.mnist, "train")
        else:
            version = _version(self.place, f"{_CLEAN if group == 'train' else group}/{split}_images.npy")
        corrupt = group not in ("train", _CLEAN)
        defect, digits = group if corrupt else "good", self._arrays(group)[1].tolist()
        return [
            Entry(f"{group}/{index:05d}", split, str(digit), defect, corrupt, _ENCODED_SIZE, version)
            for index, digit in enumerate(digits)
        ]


def build(options: Options) -> MnistCDataset:
    """The data set in ``options.source``, with its arrays checked.

    Raises:
        DataError: a corruption is missing, truncated, or not made of the clean test images.
        ConfigError: there are no training images, and ``mnist`` does not say where they are.
    """
    place = _place(Path(options.source).expanduser())
    mnist = None
    if not _has(place, f"{_CLEAN}/train_images.npy"):
        if options.mnist is None:
            raise ConfigError(
                f"data.dataset.mnist is not set and {place} has no {_CLEAN}/train_images.npy to learn from; set"
                f" data.dataset.mnist to the folder of MNIST's *-ubyte.gz files"
            )
        mnist = find_mnist(options.mnist, "data.dataset.mnist", ("train",))
    dataset = MnistCDataset(place, options.corruptions, mnist)
    dataset.check()
    return dataset


def _place(source: Path) -> Path:
    """The zip file, or the folder that has one folder per corruption."""
    if source.is_file():
        return source
    for folder in (source, source / "mnist_c"):
        if any(folder.glob("*/test_images.npy")):
            return folder
    if (source / "mnist_c.zip").is_file():
        return source / "mnist_c.zip"
    raise DataError(
        f"{source}: holds neither mnist_c.zip nor mnist_c/<corruption>/test_images.npy; {PUBLISHED}; set"
        f" data.dataset.source to the zip file or to what was unpacked"
    )


def _version(place: Path, name: str) -> str:
    try:
        return fingerprint(place if place.is_file() else place / name)
    except OSError as error:
        raise DataError(f"{place / name}: cannot be read ({error.strerror}); unpack mnist_c.zip again") from error


def _has(place: Path, name: str) -> bool:
    return name in _members(place, _version(place, "")) if place.is_file() else (place / name).is_file()


@lru_cache(maxsize=2)
def _members(place: Path, _version: str) -> dict[str, str]:
    """What is in the zip file: name below ``mnist_c/`` to the member's own name."""
    try:
        with zipfile.ZipFile(place) as file:
            return {name.removeprefix("./").removeprefix("mnist_c/"): name for name in file.namelist()}
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{place}: is truncated or no zip file ({error}); fetch mnist_c.zip again") from error


@lru_cache(maxsize=4)
def _read_pair(place: Path, stem: str, _version: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    images, labels = _read_array(place, f"{stem}_images.npy"), _read_array(place, f"{stem}_labels.npy")
    if images.dtype != np.uint8 or images.ndim < 3 or images.shape[1:] not in ((28, 28), (28, 28, 1)):
        raise DataError(f"{place}: {stem}_images.npy is {images.dtype} {images.shape}; expected uint8 (n, 28, 28, 1)")
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu" or not np.isin(labels, np.arange(10)).all():
        raise DataError(f"{place}: {stem}_labels.npy is not one digit, 0 to 9, for each of {len(images)} images")
    pixels: NDArray[np.uint8] = images.reshape(len(images), 28, 28)
    return pixels, labels.astype(np.uint8)


def _read_array(place: Path, name: str) -> NDArray[Any]:
    try:
        if place.is_file():
            with zipfile.ZipFile(place) as file:
                content = file.read(_members(place, fingerprint(place))[name])
        else:
            content = (place / name).read_bytes()
        array: NDArray[Any] = np.load(io.BytesIO(content), allow_pickle=False)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{place}: {name} is truncated or unreadable ({reason}); unpack mnist_c.zip again") from error
    return array
