"""``perlin_texture``: a synthetic anomaly, another texture in the shape of Perlin noise.

DRAEM (Zavrtanik et al. 2021, arXiv:2108.07610): a mask from Perlin noise, in which a texture shows with an opacity of
0.2 to 1 (at severity 3). DRAEM takes textures from a data set of photographs; here it is the image itself, turned and
moved, with three augmentations drawn at random, so no outside data is needed and no other image plays a part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from raydiff.perturbations._one_by_one import Defect, Pixels, SeededOptions
from raydiff.perturbations._regions import AREAS, perlin_region

__all__ = ["Options", "PerlinTexture", "build"]

Floats = NDArray[np.float64]

_OPACITIES = ((0.2, 0.4), (0.2, 0.7), (0.2, 1.0), (0.4, 1.0), (0.6, 1.0))
"""Drawn evenly from the range of the severity, 1 to 5; DRAEM's at 3."""
_NUM_AUGMENTATIONS = 3


class Options(SeededOptions):
    """The draws' seed."""

    name: Literal["perlin_texture"] = "perlin_texture"


class PerlinTexture(Defect):
    """See the module."""

    def _draw(self, image: Pixels, severity: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
        region = perlin_region((image.shape[0], image.shape[1]), rng.uniform(*AREAS[severity - 1]), rng)
        return _texture(image, rng), region * rng.uniform(*_OPACITIES[severity - 1])


def _texture(image: Pixels, rng: np.random.Generator) -> Floats:
    """The image, rolled and mirrored, with three different augmentations; float64 (H, W, C)."""
    shifts = [int(rng.integers(side)) for side in image.shape[:2]]
    moved = np.roll(image, shifts, (0, 1))[:: int(rng.choice([-1, 1])), :: int(rng.choice([-1, 1]))]
    picture = Image.fromarray(np.ascontiguousarray(moved[..., 0] if image.shape[-1] == 1 else moved))
    for index in rng.permutation(len(_AUGMENTATIONS))[:_NUM_AUGMENTATIONS]:
        picture = _AUGMENTATIONS[index](picture, rng)
    return np.asarray(picture, dtype=np.float64).reshape(image.shape)


def _gamma(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    exponent = np.exp(rng.uniform(np.log(0.5), np.log(2)))
    return _mapped(picture, 255 * (np.arange(256) / 255) ** exponent)


def _multiply_and_add(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return _mapped(picture, rng.uniform(0.8, 1.2) * np.arange(256) + rng.uniform(-30, 30))


def _mapped(picture: Image.Image, table: NDArray[np.floating[Any]]) -> Image.Image:
    values = np.clip(np.rint(table), 0, 255).astype(int).tolist()
    return picture.point(values * len(picture.getbands()))


_AUGMENTATIONS: tuple[Callable[[Image.Image, np.random.Generator], Image.Image], ...] = (
    _gamma,
    _multiply_and_add,
    lambda picture, rng: ImageOps.solarize(picture, int(rng.integers(32, 129))),
    lambda picture, rng: ImageOps.posterize(picture, int(rng.integers(2, 5))),
    lambda picture, _: ImageOps.invert(picture),
    lambda picture, _: ImageOps.autocontrast(picture),
    lambda picture, _: ImageOps.equalize(picture),
)


def build(options: Options) -> PerlinTexture:
    """The synthetic anomaly."""
    return PerlinTexture(options)
