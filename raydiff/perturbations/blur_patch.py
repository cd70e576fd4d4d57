"""``blur_patch``: a synthetic anomaly, one spot out of focus.

A Gaussian blur in a soft-edged ellipse or rectangle: wear, grease, a missing texture. It shows where there is something
to blur, so of a few places the first that shows is taken.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from raydiff.perturbations._one_by_one import Defect, Pixels, SeededOptions
from raydiff.perturbations._regions import AREAS, soft_spot

__all__ = ["BlurPatch", "Options", "build"]

_SIGMAS = (0.01, 0.016, 0.024, 0.034, 0.05)
"""Standard deviation of the blur at severities 1 to 5, as a share of the shorter side; no less than a pixel or so."""
_AT_LEAST = (0.7, 0.8, 0.9, 1.0, 1.2)


class Options(SeededOptions):
    """The draws' seed."""

    name: Literal["blur_patch"] = "blur_patch"


class BlurPatch(Defect):
    """See the module."""

    def _draw(
        self, image: Pixels, severity: int, rng: np.random.Generator
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        opacity = soft_spot((image.shape[0], image.shape[1]), rng.uniform(*AREAS[severity - 1]), rng)
        sigma = max(_SIGMAS[severity - 1] * min(image.shape[:2]), _AT_LEAST[severity - 1])
        return ndimage.gaussian_filter(image.astype(np.float64), (sigma, sigma, 0), mode="nearest"), opacity


def build(options: Options) -> BlurPatch:
    """The synthetic anomaly."""
    return BlurPatch(options)
