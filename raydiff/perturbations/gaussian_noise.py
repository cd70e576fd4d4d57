"""``gaussian_noise``: white noise on every pixel, as a sensor in low light has it (ImageNet-C).

Hendrycks and Dietterich 2019 (arXiv:1903.12261). The noise of an image is the same draw at every severity, scaled.
"""

from __future__ import annotations

from typing import Literal

from raydiff.perturbations._one_by_one import Corruption, Pixels, SeededOptions, to_pixels

__all__ = ["GaussianNoise", "Options", "build"]

_DEVIATIONS = (0.08, 0.12, 0.18, 0.26, 0.38)
"""Standard deviation at severities 1 to 5, as a share of the range 0 to 255; ImageNet-C's."""


class Options(SeededOptions):
    """The draws' seed."""

    name: Literal["gaussian_noise"] = "gaussian_noise"


class GaussianNoise(Corruption):
    """See the module."""

    def __init__(self, options: Options) -> None:
        self.name, self.seed = options.name, options.seed

    def _change(self, image: Pixels, severity: int, image_id: str) -> Pixels:
        noise = self._generator(image_id).standard_normal(image.shape)
        return to_pixels(image + 255 * _DEVIATIONS[severity - 1] * noise)


def build(options: Options) -> GaussianNoise:
    """The corruption."""
    return GaussianNoise(options)
