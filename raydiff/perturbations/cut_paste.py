"""``cut_paste``: a synthetic anomaly, a piece of the image pasted elsewhere in it.

Li et al. 2021 (arXiv:2104.04015): a patch (2 to 15 % of the image, aspect ratio within 0.3 and 3.3), or a scar (a thin
strip, 2 to 16 by 10 to 25 pixels of 256, turned by up to 45 degrees), with brightness and contrast jittered by 10 %.
Those are the sizes of severity 3.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import ndimage

from raydiff.perturbations._one_by_one import Defect, Pixels, SeededOptions
from raydiff.perturbations._regions import AREAS

__all__ = ["CutPaste", "Options", "build"]

Floats = NDArray[np.float64]

_SCAR_SCALES = (0.5, 0.7, 1.0, 1.4, 2.0)
_JITTER = 0.1


class Options(SeededOptions):
    """Which of the two variants."""

    name: Literal["cut_paste"] = "cut_paste"
    shape: Literal["patch", "scar", "either"] = Field("either", description="either: drawn per image, half and half")


class CutPaste(Defect):
    """See the module."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.options = options

    def _draw(self, image: Pixels, severity: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
        scar = self.options.shape == "scar" or (self.options.shape == "either" and rng.random() < 0.5)
        size = _scar_size(image, severity, rng) if scar else _patch_size(image, severity, rng)
        piece = _jittered(_cut(image, size, rng), rng)
        opacity = np.ones(size)
        if scar:
            angle = rng.uniform(-45, 45)
            opacity = np.clip(ndimage.rotate(opacity, angle, order=1, mode="grid-constant"), 0, 1)
            piece = ndimage.rotate(piece, angle, order=1, mode="nearest")
        return _placed(image, piece, opacity, rng)


def _patch_size(image: Pixels, severity: int, rng: np.random.Generator) -> tuple[int, int]:
    area = rng.uniform(*AREAS[severity - 1]) * image.shape[0] * image.shape[1]
    aspect = np.exp(rng.uniform(np.log(0.3), np.log(3.3)))
    return _within(image, np.sqrt(area * aspect), np.sqrt(area / aspect))


def _scar_size(image: Pixels, severity: int, rng: np.random.Generator) -> tuple[int, int]:
    scale = _SCAR_SCALES[severity - 1] * min(image.shape[:2]) / 256
    length = max(scale * rng.uniform(10, 25), severity)  # on images of a few pixels a scar still grows
    return _within(image, length, scale * rng.uniform(2, 16))


def _within(image: Pixels, height: float, width: float) -> tuple[int, int]:
    """Whole pixels, at least one and at most three quarters of each side."""
    most_rows, most_columns = (max(1, 3 * side // 4) for side in image.shape[:2])
    return min(most_rows, max(1, round(height))), min(most_columns, max(1, round(width)))


def _cut(image: Pixels, size: tuple[int, int], rng: np.random.Generator) -> Floats:
    top, left = (int(rng.integers(side - part + 1)) for side, part in zip(image.shape[:2], size, strict=True))
    return image[top : top + size[0], left : left + size[1]].astype(np.float64)


def _jittered(piece: Floats, rng: np.random.Generator) -> Floats:
    brightness, contrast = rng.uniform(1 - _JITTER, 1 + _JITTER, 2)
    mean = piece.mean()
    return np.asarray(np.clip(brightness * (mean + contrast * (piece - mean)), 0, 255))


def _placed(image: Pixels, piece: Floats, opacity: Floats, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """The piece and its opacity on canvases of the image's size, wherever it fits; cut where it does not."""
    rows, columns = (min(side, part) for side, part in zip(image.shape[:2], opacity.shape, strict=True))
    top, left = int(rng.integers(image.shape[0] - rows + 1)), int(rng.integers(image.shape[1] - columns + 1))
    content, where = image.astype(np.float64), np.zeros(image.shape[:2])
    content[top : top + rows, left : left + columns] = piece[:rows, :columns]
    where[top : top + rows, left : left + columns] = opacity[:rows, :columns]
    return content, where


def build(options: Options) -> CutPaste:
    """The synthetic anomaly."""
    return CutPaste(options)
