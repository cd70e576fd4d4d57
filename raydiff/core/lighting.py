"""One lighting for all images, before a network sees them."""

from __future__ import annotations

from torch import Tensor

__all__ = ["standardised"]

_FAINT = 4 / 255


def standardised(images: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Images (B, C, H, W) in [0, 1], each brought to one mean and one deviation over all its values.

    Both are scalars. Channels are changed alike, so that colours stay. An image of less contrast than ``_FAINT`` is
    enlarged as if it had that, so that noise stays noise; one of a single value becomes the mean.
    """
    centred = images - images.mean((1, 2, 3), keepdim=True)
    variance = centred.square().mean((1, 2, 3), keepdim=True)
    return mean + centred * (deviation / variance.clamp(min=_FAINT**2).sqrt())  # clamped first: no gradient of 0 / 0
