"""``blur``: a Gaussian blur in proportion to the image (ImageNet-C's extra corruption ``gaussian_blur``).

Hendrycks and Dietterich 2019 (arXiv:1903.12261) blur by a number of pixels. Here it is that share of the shorter side,
so that severity 3 means as much at 64 px as at 256 px: at 224 px the constants are ImageNet-C's, at 32 px and below
those of CIFAR-10-C, under which a blur would change hardly a pixel.
"""

from __future__ import annotations

from typing import Literal

from scipy import ndimage

from raydiff.config import Options as BaseOptions
from raydiff.perturbations._one_by_one import Corruption, Pixels, to_pixels

__all__ = ["Blur", "Options", "build"]

_AT_224 = (1.0, 2.0, 3.0, 4.0, 6.0)
"""Standard deviation in pixels at severities 1 to 5 where the shorter side has 224; ImageNet-C's."""
_AT_LEAST = (0.4, 0.6, 0.7, 0.8, 1.0)
"""Never less, in pixels; CIFAR-10-C's."""


class Options(BaseOptions):
    """Nothing to set."""

    name: Literal["blur"] = "blur"


class Blur(Corruption):
    """See the module."""

    def __init__(self, options: Options) -> None:
        self.name = options.name

    def _change(self, image: Pixels, severity: int, image_id: str) -> Pixels:  # noqa: ARG002
        sigma = max(_AT_224[severity - 1] * min(image.shape[:2]) / 224, _AT_LEAST[severity - 1])
        return to_pixels(ndimage.gaussian_filter(image.astype(float), (sigma, sigma, 0), mode="nearest"))


def build(options: Options) -> Blur:
    """The corruption."""
    return Blur(options)
