"""``mnist``: 60,000 training and 10,000 test images of handwritten digits, 28 x 28, grey.

One-class protocol: trained on the training images of the normal digits, tested on all test images; the other digits are
the anomalies. With all ten normal there are none, which is fine for training.

LeCun, Cortes, Burges, "The MNIST database of handwritten digits".
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from raydiff.config import NO_EFFECT
from raydiff.config import Options as BaseOptions
from raydiff.contracts import Entry
from raydiff.datasets._class_names import DigitNames
from raydiff.datasets._download import fetch
from raydiff.datasets._mnist_files import Part, find_mnist, mnist_version, read_mnist
from raydiff.errors import DataError
from raydiff.images import encode_png

__all__ = ["MnistDataset", "Options", "build", "download"]

_COUNTS: dict[Part, int] = {"train": 60_000, "test": 10_000}
_ENCODED_SIZE = 300  # bytes of a 28 x 28 grey PNG, on average


class Options(BaseOptions):
    """Where the four files lie and which digits are normal."""

    name: Literal["mnist"] = "mnist"
    source: str = Field(description="the folder of the four *-ubyte.gz files, or torchvision's folder above it")
    normal: DigitNames = Field(("0",), min_length=1, description='the digits taken for normal, "0" to "9"')
    check_counts: bool = Field(
        True, description="refuse files that hold another number of images", json_schema_extra=NO_EFFECT
    )


@dataclass(frozen=True)
class MnistDataset:
    """See the module. ``image_id`` is ``train/<index>`` or ``test/<index>``."""

    folder: Path
    normal: frozenset[str]

    def entries(self) -> list[Entry]:
        """Training images of the normal digits, then all test images, in the order of the files."""
        return [entry for entry in self._part("train") if not entry.is_anomaly] + self._part("test")

    def read(self, entry: Entry) -> tuple[bytes, bytes | None]:
        """A PNG file; there are no masks."""
        images, _ = read_mnist(self.folder, "train" if entry.split == "train" else "test")
        return encode_png(images[int(entry.image_id.rpartition("/")[2])]), None

    def _part(self, part: Part) -> list[Entry]:
        version = mnist_version(self.folder, part)
        _, labels = read_mnist(self.folder, part)
        return [self._entry(part, index, str(digit), version) for index, digit in enumerate(labels.tolist())]

    def _entry(self, part: Part, index: int, digit: str, version: str) -> Entry:
        is_anomaly = digit not in self.normal
        defect = digit if is_anomaly else "good"
        return Entry(f"{part}/{index:05d}", part, digit, defect, is_anomaly, _ENCODED_SIZE, version)


def build(options: Options) -> MnistDataset:
    """The data set in ``options.source``, with its files and counts checked.

    Raises:
        DataError: a file is missing, truncated, or holds another number of images than it should.
    """
    folder = find_mnist(options.source, "data.dataset.source")
    for part, expected in _COUNTS.items():
        found = len(read_mnist(folder, part)[1])
        if options.check_counts and found != expected:
            raise DataError(
                f"{folder}: holds {found} {part} images, expected {expected}; fetch MNIST's files again, or set"
                f" data.dataset.check_counts=false to use others on purpose"
            )
    return MnistDataset(folder, frozenset(options.normal))


def download(folder: Path) -> Path:
    """Fetch the files into ``folder``; gives the ``source`` to use. Raises DataError where the network fails."""
    return fetch("MNIST", folder)
