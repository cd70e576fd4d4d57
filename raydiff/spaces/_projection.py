"""Principal axes of what a network makes of normal images, divided more or less by their deviations."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["principal_axes"]

_TINY = 1e-3
"""Axes of less variance than this share of the first one's are divided as if they had that much."""


def principal_axes(centred: Tensor, num_components: int, whitening: float) -> Tensor:
    """(D, K): the axes of most variance first, scaled so that what is projected has a mean square of 1.

    Args:
        centred: float64 (n, D), of mean 0.
        num_components: K, at most D.
        whitening: power to which each axis is divided by its deviation: 0 is the plain projection, 1 makes all axes
            alike, and noise as loud as structure.
    """
    variance, axes = torch.linalg.eigh(centred.T @ centred / len(centred))  # ascending
    kept = slice(-num_components, None)
    variance, axes = variance[kept].flip(0), axes[:, kept].flip(1)  # (K,), (D, K)
    divided = axes / (variance.clamp(min=0) + _TINY * variance[0] + 1e-12) ** (whitening / 2)
    scaled: Tensor = divided / (centred @ divided).square().mean().sqrt().clamp(min=1e-12)
    return scaled
