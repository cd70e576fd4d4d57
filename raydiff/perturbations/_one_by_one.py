"""Image by image: what all perturbations share, so that a changed image depends on the image, its id and a seed alone.

Defects cut, paint or blur a region. The first draws may land where nothing can be seen (on an even background), so a
few are tried, in a fixed order that depends on the seed and the id, and the first that shows is taken.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import ndimage

from raydiff.config import Options
from raydiff.contracts import Perturbed
from raydiff.core.diffusion import keyed_seed
from raydiff.errors import ConfigError, ShapeError

__all__ = ["Corruption", "Defect", "Pixels", "SeededOptions", "to_pixels"]

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]

_SEVERITIES = (1, 2, 3, 4, 5)
_NUM_ATTEMPTS = 12
_VISIBLE = 12.0  # levels of 256, the mean over the defect of its most changed channel
_FALLBACK = 64.0
_NEIGHBOURS = np.ones((3, 3), dtype=np.bool_)


class SeededOptions(Options):
    """Of perturbations that draw."""

    seed: int = Field(0, ge=0, description="of the draws, together with the image's id")


def to_pixels(values: NDArray[np.floating[Any]]) -> Pixels:
    """Round to uint8, clipped to 0 and 255."""
    return np.asarray(np.clip(np.rint(values), 0, 255), dtype=np.uint8)


class Corruption(ABC):
    """A change that normal and anomalous images may suffer alike; no masks."""

    kind: ClassVar[Literal["corruption"]] = "corruption"
    name: str
    seed: int = 0

    def apply(self, images: Pixels, *, severity: int, ids: Sequence[str]) -> Perturbed:
        """See :class:`raydiff.contracts.Perturbation`."""
        _check(images, severity, ids)
        changed = [self._change(image, severity, image_id) for image, image_id in zip(images, ids, strict=True)]
        return Perturbed(np.stack(changed) if changed else images.copy())

    @abstractmethod
    def _change(self, image: Pixels, severity: int, image_id: str) -> Pixels:
        """The changed image, uint8 (H, W, C); ``image`` is not to be written to."""

    def _generator(self, image_id: str) -> np.random.Generator:
        return np.random.default_rng(keyed_seed("perturbation", self.name, self.seed, image_id))


class Defect(ABC):
    """A synthetic anomaly with its mask: the pixels it changed, soft edges included, and single ones between them."""

    kind: ClassVar[Literal["anomaly"]] = "anomaly"

    def __init__(self, options: SeededOptions) -> None:
        self._name, self._seed = options.name, options.seed

    def apply(self, images: Pixels, *, severity: int, ids: Sequence[str]) -> Perturbed:
        """See :class:`raydiff.contracts.Perturbation`."""
        _check(images, severity, ids)
        changed = [self._defective(image, severity, image_id) for image, image_id in zip(images, ids, strict=True)]
        result = np.stack(changed) if changed else images.copy()
        masks = np.zeros(images.shape[:3], dtype=np.bool_)
        for mask, differs in zip(masks, (result != images).any(-1), strict=True):
            mask[:] = differs | ndimage.binary_closing(differs, _NEIGHBOURS)
        return Perturbed(result, masks)

    @abstractmethod
    def _draw(self, image: Pixels, severity: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
        """What is painted, float64 (H, W, C) on the scale 0 to 255, and how opaque it is, (H, W) in [0, 1]."""

    def _defective(self, image: Pixels, severity: int, image_id: str) -> Pixels:
        best, most, covered = image, 0.0, np.zeros(image.shape[:2])
        for attempt in range(_NUM_ATTEMPTS):
            rng = np.random.default_rng(keyed_seed("perturbation", self._name, self._seed, image_id, attempt))
            content, opacity = self._draw(image, severity, rng)
            painted = to_pixels(image + opacity[..., None] * (content - image))
            shift = np.abs(painted.astype(np.float64) - image).max(-1)[opacity > 0].mean()
            covered = covered if covered.any() else opacity
            if shift > most:
                best, most = painted, float(shift)
            if most >= _VISIBLE:
                return best
        return best if most else _shifted(image, covered)


def _shifted(image: Pixels, opacity: Floats) -> Pixels:
    """For an even image, on which nothing shows that is made of the image itself: another brightness there."""
    away = np.where(image < 128, _FALLBACK, -_FALLBACK)
    return to_pixels(image + opacity[..., None] * away)


def _check(images: Pixels, severity: int, ids: Sequence[str]) -> None:
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[-1] not in (1, 3):
        raise ShapeError(f"images are {images.dtype} {images.shape}; a perturbation takes uint8 (B, H, W, 1 or 3)")
    if len(ids) != len(images):
        raise ShapeError(f"there are {len(images)} images and {len(ids)} ids; give one id per image")
    if severity not in _SEVERITIES:
        raise ConfigError(f"severity is {severity}; it must be a whole number from 1 to 5")
