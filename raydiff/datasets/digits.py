"""``digits``: the 1,797 hand-written digits that come with scikit-learn, 8 x 8 pixels, grey. Nothing is downloaded.

One-class protocol: per digit, in an order keyed by the index alone, the first two thirds are training material and the
last third is tested. Only the normal digits are trained on; all ten are tested.

UCI "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998), its test part; values 0 to 16 become
0 to 255.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from raydiff.config import Options as BaseOptions
from raydiff.contracts import Entry
from raydiff.core.diffusion import keyed_seed
from raydiff.datasets._class_names import DigitNames
from raydiff.images import encode_png

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["DigitsDataset", "Options", "build"]


class Options(BaseOptions):
    """Which digits are normal."""

    name: Literal["digits"] = "digits"
    normal: DigitNames = Field(("0",), min_length=1, description='the digits taken for normal, "0" to "9"')


@dataclass(frozen=True)
class DigitsDataset:
    """See the module."""

    normal: frozenset[str]

    def entries(self) -> list[Entry]:
        """Training images of the normal digits, then test images of all; ``image_id`` is the four-digit index."""
        _, targets = _digits()
        training = _training_indices()
        everything = [self._entry(index, str(targets[index]), index in training) for index in range(len(targets))]
        kept = [entry for entry in everything if entry.split == "test" or not entry.is_anomaly]
        return sorted(kept, key=lambda entry: (entry.split == "test", entry.image_id))

    def read(self, entry: Entry) -> tuple[bytes, bytes | None]:
        """A PNG file; there are no masks."""
        images, _ = _digits()
        return encode_png(images[int(entry.image_id)]), None

    def _entry(self, index: int, digit: str, trained: bool) -> Entry:
        is_anomaly = digit not in self.normal
        return Entry(
            image_id=f"{index:04d}",
            split="train" if trained else "test",
            class_name=digit,
            defect=digit if is_anomaly else "good",
            is_anomaly=is_anomaly,
            size=130,
        )


def build(options: Options) -> DigitsDataset:
    """The data set with the digits ``options.normal`` taken for normal."""
    return DigitsDataset(frozenset(options.normal))


@cache
def _digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (1797, 8, 8) in [0, 255] and their digits (1797,)."""
    from sklearn.datasets import load_digits

    images, targets = load_digits(return_X_y=True)
    scaled = np.rint(images.reshape(-1, 8, 8) * (255.0 / 16.0)).astype(np.uint8)
    return scaled, targets.astype(np.int64)


@cache
def _training_indices() -> frozenset[int]:
    """The first two thirds of each digit, in an order that depends on the index alone."""
    _, targets = _digits()
    chosen: set[int] = set()
    for digit in range(10):
        members = sorted(np.flatnonzero(targets == digit).tolist(), key=lambda index: keyed_seed("digits", index))
        chosen.update(members[: 2 * len(members) // 3])
    return frozenset(chosen)
