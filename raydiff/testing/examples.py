"""Examples for a scorer's own network, made of what is diffused instead of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["LatentExamples"]


@dataclass(frozen=True)
class LatentExamples:
    """:class:`raydiff.planting.Examples` of latents.

    ``x`` is (n, C, H, W), what is diffused, and bool ``masks`` (n, 1, H, W) which of its cells are anomalous.
    """

    x: Tensor
    masks: Tensor
    num_normal: int

    def __len__(self) -> int:
        return len(self.x)

    def latents(self, rows: Sequence[int]) -> Tensor:
        """(len(rows), C, H, W)."""
        return self.x[list(rows)]

    def shares(self, rows: Sequence[int]) -> Tensor:
        """(len(rows), 1, H, W), 0 or 1."""
        return self.masks[list(rows)].float()
