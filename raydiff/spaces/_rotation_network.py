"""The network of the space ``rotnet``: a small residual network that says by how many turns an image was rotated."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["RotationNetwork"]


class RotationNetwork(nn.Module):
    """``features``, and ``head`` on their mean.

    Args:
        channels: of the images.
        factor: sides of an image over those of its features, a power of two, at least 2.
        width: channels at half the image's resolution; doubled at each coarser one.
        num_blocks: residual blocks per resolution.
        num_turns: what is told apart.
    """

    def __init__(self, *, channels: int, factor: int, width: int, num_blocks: int, num_turns: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv(channels, width, stride=2), nn.BatchNorm2d(width), nn.ReLU()]
        inside = width
        for level in range(int(math.log2(factor))):
            outside = width * 2**level
            layers.append(Block(inside, outside, stride=1 if level == 0 else 2))
            layers += [Block(outside, outside, stride=1) for _ in range(num_blocks - 1)]
            inside = outside
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(inside, num_turns)
        self.num_features = inside

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to logits (B, num_turns)."""
        logits: Tensor = self.head(self.features(images).float().mean((2, 3)))
        return logits


class Block(nn.Module):
    """Two convolutions beside a shortcut (He et al. 2016, arXiv:1512.03385)."""

    def __init__(self, inside: int, outside: int, *, stride: int) -> None:
        super().__init__()
        self.first, self.first_norm = _conv(inside, outside, stride=stride), nn.BatchNorm2d(outside)
        self.second, self.second_norm = _conv(outside, outside), nn.BatchNorm2d(outside)
        shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))
        self.shortcut = nn.Identity() if stride == 1 and inside == outside else shortcut

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) to (B, D', H / stride, W / stride)."""
        hidden = F.relu(self.first_norm(self.first(x)))
        return torch.relu(self.second_norm(self.second(hidden)) + self.shortcut(x))


def _conv(inside: int, outside: int, *, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
