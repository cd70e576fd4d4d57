"""The four files of MNIST, as published (``*-ubyte.gz``) or unpacked: images and labels in the IDX format.

IDX: two zero bytes, 8 for uint8, the number of axes, their lengths (big-endian 32 bit), then the values in C order.

LeCun, Cortes, Burges, "The MNIST database of handwritten digits".
"""

from __future__ import annotations

import gzip
import struct
import zlib
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from raydiff.datasets._fingerprint import fingerprint
from raydiff.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Part", "find_mnist", "mnist_version", "read_mnist"]

Part = Literal["train", "test"]
_STEMS: dict[Part, tuple[str, str]] = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_REMEDY = "fetch the four *-ubyte.gz files again"


def find_mnist(source: str, option: str, parts: tuple[Part, ...] = ("train", "test")) -> Path:
    """The folder that holds the files: ``source``, or ``MNIST/raw`` or ``raw`` below it (torchvision's layout).

    Raises:
        DataError: some of the files are missing; they are named, and so is the config field ``option``.
    """
    root = Path(source).expanduser()
    places = [root, root / "MNIST" / "raw", root / "raw"]
    lacks = {place: [stem for part in parts for stem in _STEMS[part] if _file(place, stem) is None] for place in places}
    best = min(places, key=lambda place: len(lacks[place]))
    if lacks[best]:
        missing = ", ".join(f"{stem}.gz" for stem in lacks[best])
        raise DataError(f"{best}: lacks {missing} (packed or not); set {option} to the folder of MNIST's files")
    return best


def read_mnist(folder: Path, part: Part) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images (n, 28, 28) in [0, 255] and digits (n,).

    Raises:
        DataError: a file is truncated, or is not what it should be.
    """
    return _read_version(folder, part, mnist_version(folder, part))


def mnist_version(folder: Path, part: Part) -> str:
    """The fingerprint of a part's two files."""
    return " ".join(fingerprint(_present(folder, stem)) for stem in _STEMS[part])


@lru_cache(maxsize=2)
def _read_version(folder: Path, part: Part, _version: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    paths = [_present(folder, stem) for stem in _STEMS[part]]
    images, labels = _read_idx(paths[0], ndim=3), _read_idx(paths[1], ndim=1)
    if images.shape[1:] != (28, 28):
        raise DataError(f"{paths[0]}: holds images of {images.shape[1]} x {images.shape[2]}; expected 28 x 28")
    if len(images) != len(labels):
        raise DataError(f"{paths[1]}: has {len(labels)} labels for {len(images)} images; {_REMEDY}")
    if len(labels) and labels.max() > 9:
        raise DataError(f"{paths[1]}: has the label {labels.max()}; labels are 0 to 9")
    return images, labels


def _file(folder: Path, stem: str) -> Path | None:
    names = (f"{stem}.gz", stem, stem.replace("-idx", ".idx"))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _present(folder: Path, stem: str) -> Path:
    path = _file(folder, stem)
    if path is None:
        raise DataError(f"{folder / stem}.gz: is gone; restore it and prepare again")
    return path


def _read_idx(path: Path, *, ndim: int) -> NDArray[np.uint8]:
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: is truncated or cannot be read ({error}); {_REMEDY}") from error
    start = 4 + 4 * ndim
    if content[:4] != bytes((0, 0, 8, ndim)) or len(content) < start:
        raise DataError(f"{path}: is not an IDX file of uint8 with {ndim} axes; {_REMEDY}")
    shape = struct.unpack(f">{ndim}I", content[4:start])
    expected = int(np.prod(shape, dtype=np.int64))
    if len(content) - start != expected:
        raise DataError(f"{path}: holds {len(content) - start} values, its header says {expected}; {_REMEDY}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
