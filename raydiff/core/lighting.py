"""One lighting for all images, before a network sees them."""

from __future__ import annotations

from torch import Tensor

__all__ = ["standardised"]


def standardised(images: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Images (B, C, H, W) in [0, 1], each brought to one mean and one deviation over all its values.

    Both are scalars. Channels are changed alike, so that colours stay. An image of one value becomes the mean.
    """
    centred = images - images.mean((1, 2, 3), keepdim=True)
    spread = centred.square().mean((1, 2, 3), keepdim=True).sqrt()
    return mean + centred * (deviation / spread.clamp(min=1 / 255))
