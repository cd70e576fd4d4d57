"""A Gaussian of its own for each cell of a grid: what normal images look like at this place.

A part that lies the same way in every image has its edge, its hole and its print each in its own cells, and what is
normal in one is odd in another. PaDiM (Defard et al. 2020, arXiv:2011.08785, section III-A) therefore keeps a mean and
a covariance of the features per cell. Few images say little of many directions, so a covariance is shrunk towards one
of the same size in all of them (Ledoit and Wolf 2004, with a share that is set instead of estimated).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from raydiff.errors import DataError

__all__ = ["CellGaussians", "Moments"]

_CELLS = 64
"""Cells whose covariance is taken apart at a time."""


@dataclass(frozen=True)
class CellGaussians:
    """``mean`` (K, h, w) and ``whitening`` (h w, K, K), the inverse symmetric root of each cell's covariance."""

    mean: Tensor
    whitening: Tensor

    def whitened(self, grids: Tensor) -> Tensor:
        """Grids (B, K, h, w) of which each cell has mean 0 and covariance near the identity over normal images.

        The square of a cell's length is its squared Mahalanobis distance, where it was not :meth:`scaled`.
        """
        cells = (grids - self.mean).flatten(2).permute(2, 0, 1)  # (h w, B, K)
        return torch.bmm(cells, self.whitening).permute(1, 2, 0).reshape(grids.shape)

    def scaled(self, factor: float) -> Self:
        """The same, giving ``factor`` times as much."""
        return type(self)(self.mean, self.whitening * factor)

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        return type(self)(self.mean.to(device), self.whitening.to(device))


class Moments:
    """Sums over grids that are shown a few at a time; only they are kept, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self._size = (0, 0)
        self._sum, self._products = torch.empty(0), torch.empty(0)  # (h w, K), (h w, K, K)
        self._origin = torch.empty(0)  # the first grids' mean, so that squares of large means do not cancel

    def add(self, grids: Tensor) -> None:
        """Take grids (B, K, h, w) into account."""
        if not len(grids):
            return
        cells = grids.cpu().flatten(2).permute(2, 0, 1).double()  # (h w, B, K)
        if not self.count:
            self._size = (grids.shape[2], grids.shape[3])
            self._origin = cells.mean(1, keepdim=True)
            self._sum = torch.zeros_like(self._origin[:, 0])
            self._products = cells.new_zeros(cells.shape[0], cells.shape[2], cells.shape[2])
        cells = cells - self._origin
        self.count += len(grids)
        self._sum += cells.sum(1)
        self._products += torch.bmm(cells.mT, cells)

    def gaussians(self, shrinkage: float) -> CellGaussians:
        """Float32; covariances (1 - s) S + s tr(S) / K I, with no direction below a millionth of the mean variance.

        From n images S has rank n - 1 at most: with K near n or above, what is whitened of new images is larger than of
        those it was learnt from, the more so the smaller s is.

        Args:
            shrinkage: s, in (0, 1].

        Raises:
            DataError: nothing moved in any cell: all images are the same, or there is one.
        """
        mean = self._sum / self.count  # (h w, K)
        variances = self._products.diagonal(dim1=1, dim2=2) / self.count - mean.square()
        size = variances.mean(1, keepdim=True)  # tr(S) / K, (h w, 1)
        if not float(size.mean()) > 0:
            raise DataError(f"the {self.count} training images that cells are learnt from are all the same; add others")
        # A cell that never moved on normal images has no scale of its own; it gets a thousandth of the others'.
        floor = 1e-6 * size.mean()
        whitening = torch.empty_like(self._products, dtype=torch.float32)
        for some in torch.split(torch.arange(len(mean)), _CELLS):
            covariance = self._products[some] / self.count - mean[some, :, None] * mean[some, None, :]
            variance, axes = torch.linalg.eigh(covariance)  # (cells, K), (cells, K, K)
            shrunk = ((1 - shrinkage) * variance.clamp(min=0) + shrinkage * size[some]).clamp(min=floor)
            whitening[some] = ((axes * shrunk.rsqrt()[:, None, :]) @ axes.mT).float()
        centre = (self._origin[:, 0] + mean).T.reshape(-1, *self._size)
        return CellGaussians(centre.float().contiguous(), whitening)
