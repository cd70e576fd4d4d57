"""``noise_patch``: a synthetic anomaly, noise in one spot.

White or blotchy noise, grey or in colour, in a soft-edged ellipse or rectangle: grain, dirt, corrosion.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from raydiff.perturbations._one_by_one import Defect, Pixels, SeededOptions
from raydiff.perturbations._regions import AREAS, soft_spot

__all__ = ["NoisePatch", "Options", "build"]

_DEVIATIONS = (0.1, 0.15, 0.2, 0.25, 0.3)
"""Standard deviation of the noise at severities 1 to 5, as a share of the range 0 to 255."""
_GRAINS = (0.0, 1 / 128, 1 / 48)
"""Standard deviations of the blur that makes noise blotchy, as shares of the shorter side; one is drawn."""


class Options(SeededOptions):
    """The draws' seed."""

    name: Literal["noise_patch"] = "noise_patch"


class NoisePatch(Defect):
    """See the module."""

    def _draw(
        self, image: Pixels, severity: int, rng: np.random.Generator
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        opacity = soft_spot((image.shape[0], image.shape[1]), rng.uniform(*AREAS[severity - 1]), rng)
        grain = float(rng.choice(_GRAINS)) * min(image.shape[:2])
        channels = 1 if rng.random() < 0.5 else image.shape[-1]
        noise = rng.standard_normal((*image.shape[:2], channels))
        noise = ndimage.gaussian_filter(noise, (grain, grain, 0), mode="wrap")
        return image + 255 * _DEVIATIONS[severity - 1] * noise / noise.std(), opacity


def build(options: Options) -> NoisePatch:
    """The synthetic anomaly."""
    return NoisePatch(options)
