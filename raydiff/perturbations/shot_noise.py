"""``shot_noise``: Poisson noise, from the grain of light itself (ImageNet-C).

Hendrycks and Dietterich 2019 (arXiv:1903.12261).
"""

from __future__ import annotations

from typing import Literal

from raydiff.perturbations._one_by_one import Corruption, Pixels, SeededOptions, to_pixels

__all__ = ["Options", "ShotNoise", "build"]

_PHOTONS = (60, 25, 12, 5, 3)
"""Photons that a white pixel counts on average at severities 1 to 5; ImageNet-C's."""


class Options(SeededOptions):
    """The draws' seed."""

    name: Literal["shot_noise"] = "shot_noise"


class ShotNoise(Corruption):
    """See the module."""

    def __init__(self, options: Options) -> None:
        self.name, self.seed = options.name, options.seed

    def _change(self, image: Pixels, severity: int, image_id: str) -> Pixels:
        white = _PHOTONS[severity - 1]
        return to_pixels(self._generator(image_id).poisson(image / 255 * white) * (255 / white))


def build(options: Options) -> ShotNoise:
    """The corruption."""
    return ShotNoise(options)
