"""What the denoisers here share: the embedding of step and label, positions, and adaLN's scale and shift.

Notation: B images, D the width of the embedding, (h, w) a grid of cells.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from raydiff.errors import ShapeError

__all__ = ["Conditioning", "modulate", "sine_cosine_positions", "sine_cosine_steps"]

_MAX_PERIOD = 10_000.0


class Conditioning(nn.Module):
    """Step ``t`` and label to one vector, (B,) and (B,) to (B, D): layers on sines and cosines, plus a table.

    The sum of both embeddings is what adaLN's layers read (Peebles and Xie 2023, arXiv:2212.09748, section 3.2).

    Args:
        dim: D.
        num_classes: labels are 0 to num_classes - 1, and num_classes is "no label"; None without labels.
        num_frequencies: sines and cosines of ``t`` that the first layer sees, together; even.
    """

    def __init__(self, dim: int, num_classes: int | None, *, num_frequencies: int = 256) -> None:
        super().__init__()
        self.num_classes, self.num_frequencies = num_classes, num_frequencies
        self.step = nn.Sequential(nn.Linear(num_frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = None if num_classes is None else nn.Embedding(num_classes + 1, dim)
        for parameter in self.step.parameters():  # not the paper's 0.02: short training would hardly see the step
            nn.init.kaiming_normal_(parameter) if parameter.ndim > 1 else nn.init.zeros_(parameter)

    def forward(self, t: Tensor, condition: Tensor | None) -> Tensor:
        """Embed steps (B,) and labels (B,); ``condition`` None is "no label". Returns (B, D).

        Raises:
            ShapeError: there are labels and the network was built without.
        """
        weight = next(self.step.parameters())
        embedded: Tensor = self.step(sine_cosine_steps(t, self.num_frequencies).to(weight))
        if self.label is not None and self.num_classes is not None:
            labels = torch.full_like(t, self.num_classes) if condition is None else condition
            embedded = embedded + self.label(labels)
        elif condition is not None:
            raise ShapeError("labels were given to a denoiser without; leave them out or set objective.condition")
        return embedded


def sine_cosine_steps(t: Tensor, dim: int) -> Tensor:
    """(B,) steps to (B, dim) cosines and sines of t x 10000^(-i / (dim / 2)), float32; Ho et al. 2020, app. B."""
    return _waves(t.float(), _frequencies(dim // 2, t.device))


def sine_cosine_positions(dim: int, grid: tuple[int, int]) -> Tensor:
    """Fixed positions of a grid's cells, (h, w, dim): half of the numbers tell the row, half the column.

    Vaswani et al. 2017 (arXiv:1706.03762), section 3.5, per axis. Cells count from 0, so neighbours are one apart
    whatever the shape. ``dim`` must be a multiple of 4.
    """
    height, width = grid
    frequencies = _frequencies(dim // 4)
    rows = _waves(torch.arange(height).float(), frequencies)  # (h, dim / 2)
    columns = _waves(torch.arange(width).float(), frequencies)  # (w, dim / 2)
    return torch.cat(
        [rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], dim=-1
    ).contiguous()  # (h, w, dim)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Give x (1 + scale) + shift, for shapes that broadcast: the adaptive part of a layer normalisation."""
    return torch.addcmul(x + shift, x, scale)


def _frequencies(count: int, device: torch.device | None = None) -> Tensor:
    return torch.exp(torch.arange(count, device=device).float() * (-math.log(_MAX_PERIOD) / count))


def _waves(values: Tensor, frequencies: Tensor) -> Tensor:
    """(N,) and (F,) to (N, 2F)."""
    angles = values[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
