"""``pixel``: the image itself is diffused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from raydiff.config import Options as BaseOptions

__all__ = ["Options", "PixelSpace", "build"]


class Options(BaseOptions):
    """Nothing to set."""

    name: Literal["pixel"] = "pixel"


class PixelSpace:
    """The identity."""

    num_fit_images = 0
    costly = False
    pretrained = None

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape

    def check(self) -> None:
        """Nothing is needed."""

    def fit(self, images: Tensor) -> None:
        """Nothing to learn."""

    def encode(self, images: Tensor) -> Tensor:
        """The images, as they are."""
        return images

    def decode(self, latents: Tensor) -> Tensor | None:
        """The images, clipped to [-1, 1]."""
        return latents.clamp(-1, 1)

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Nothing."""


def build(options: Options, *, channels: int, image_size: tuple[int, int]) -> PixelSpace:  # noqa: ARG001
    """The pixel space of images (channels, *image_size)."""
    return PixelSpace((channels, *image_size))
