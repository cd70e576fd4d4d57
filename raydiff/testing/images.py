"""Small real images, and defects planted in them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["planted_defect", "small_images"]


def small_images(n: int, size: tuple[int, int] = (8, 8), channels: int = 1, seed: int = 0) -> Tensor:
    """Real images, float32 (n, channels, *size) in [-1, 1]: handwritten digits of scikit-learn, drawn by ``seed``.

    With three channels each is another brightness of the same digit. There are 1797; beyond that they repeat.
    """
    from sklearn.datasets import load_digits

    digits = torch.from_numpy(load_digits().images / 8 - 1).float()[:, None]  # (1797, 1, 8, 8)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
    images = digits[order[torch.arange(n) % len(digits)]]
    if size != (8, 8):
        images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
    return torch.cat([(images + 1) * (1 - 0.25 * channel) - 1 for channel in range(channels)], dim=1).clamp(-1, 1)


def planted_defect(images: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Copies of the images with a patch of about a third of each side thrown to the other end of the grey scale.

    Returns:
        The images, (B, C, H, W): every number in the patch has moved by 1 or more. And the patches, bool (B, 1, H, W).
    """
    height, width = images.shape[-2:]
    sides = max(1, height // 3), max(1, width // 3)
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(len(images), 1, height, width, dtype=torch.bool)
    for mask in masks:
        top = int(torch.randint(height - sides[0] + 1, (), generator=generator))
        left = int(torch.randint(width - sides[1] + 1, (), generator=generator))
        mask[:, top : top + sides[0], left : left + sides[1]] = True
    return torch.where(masks, torch.where(images > 0, -1.0, 1.0), images), masks
