"""``brightness``: lighter by a fixed amount of HSV's value, hue and saturation kept (ImageNet-C).

Hendrycks and Dietterich 2019 (arXiv:1903.12261). The value of a pixel is its largest channel, so a colour is scaled and
black becomes grey; a grey image is shifted.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from raydiff.config import Options as BaseOptions
from raydiff.perturbations._one_by_one import Corruption, Pixels, to_pixels

__all__ = ["Brightness", "Options", "build"]

_SHIFTS = (0.1, 0.2, 0.3, 0.4, 0.5)
"""What is added to the value at severities 1 to 5, as a share of the range 0 to 255; ImageNet-C's."""


class Options(BaseOptions):
    """Nothing to set."""

    name: Literal["brightness"] = "brightness"


class Brightness(Corruption):
    """See the module."""

    def __init__(self, options: Options) -> None:
        self.name = options.name

    def _change(self, image: Pixels, severity: int, image_id: str) -> Pixels:  # noqa: ARG002
        colour = image.astype(np.float64)
        value = colour.max(-1, keepdims=True)  # (H, W, 1)
        lighter = np.minimum(value + 255 * _SHIFTS[severity - 1], 255)
        hue = np.divide(colour, value, out=np.ones_like(colour), where=value > 0)
        return to_pixels(hue * lighter)


def build(options: Options) -> Brightness:
    """The corruption."""
    return Brightness(options)
