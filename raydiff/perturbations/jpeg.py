"""``jpeg``: saved as a JPEG of low quality and read again (ImageNet-C).

Hendrycks and Dietterich 2019 (arXiv:1903.12261). Through Pillow, with its default chroma subsampling; a grey image
stays grey.
"""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
from PIL import Image

from raydiff.config import Options as BaseOptions
from raydiff.perturbations._one_by_one import Corruption, Pixels

__all__ = ["Jpeg", "Options", "build"]

_QUALITIES = (25, 18, 15, 10, 7)
"""JPEG quality at severities 1 to 5; ImageNet-C's."""


class Options(BaseOptions):
    """Nothing to set."""

    name: Literal["jpeg"] = "jpeg"


class Jpeg(Corruption):
    """See the module."""

    def __init__(self, options: Options) -> None:
        self.name = options.name

    def _change(self, image: Pixels, severity: int, image_id: str) -> Pixels:  # noqa: ARG002
        file = io.BytesIO()
        picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        picture.save(file, "JPEG", quality=_QUALITIES[severity - 1])
        with Image.open(file) as saved:
            return np.asarray(saved).reshape(image.shape)


def build(options: Options) -> Jpeg:
    """The corruption."""
    return Jpeg(options)
