"""``copod``: how far in the tail of the training images each pixel lies, summed as negative log probabilities.

PyOD's ``decision_function`` pools the images it is given with the training images, so its scores depend on the batch,
which contract 1 forbids. Here each image is pooled alone. PyOD sorts the whole training set again for every call, about
a second per image on CIFAR-10; looking up the one image's ranks and third moment gives the same numbers, those of
``COPOD().fit(train).decision_function(image[None])`` (tests/baselines/test_scores.py), without it.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from raydiff.baselines._rows import RowBaseline, RowOptions, Rows

__all__ = ["Copod", "Options", "build"]


class Options(RowOptions):
    """Li et al. 2020 (arXiv:2009.09463); the method has no parameters."""

    name: Literal["copod"] = "copod"


class Copod(RowBaseline):
    """COPOD on rows, each image pooled with the training images alone; nothing in it is random."""

    def _learn(self, rows: Rows) -> None:
        self._columns = torch.from_numpy(rows.T.copy()).sort(dim=1).values  # (D, n), each pixel's training values
        size = len(rows) + 1  # the scored image itself counts
        self._surprise = -np.log(np.arange(1, size + 1) / size)  # -log P of ranks 1 to n + 1
        self._mean = rows.mean(axis=0)  # (D,)
        centred = rows - self._mean
        self._second = (centred * centred).sum(axis=0)  # (D,)
        self._third = (centred * centred * centred).sum(axis=0)  # (D,)

    def _score(self, rows: Rows) -> NDArray[np.float64]:
        values = torch.from_numpy(rows.T.copy())  # (D, B)
        not_above = torch.searchsorted(self._columns, values, right=True).T.numpy()  # (B, D)
        not_below = self._columns.shape[1] - torch.searchsorted(self._columns, values).T.numpy()  # (B, D)
        left, right = self._surprise[not_above], self._surprise[not_below]  # -log P(X <= x), -log P(X >= x)
        skewness = self._skewness_sign(rows)
        by_skewness = left * -np.sign(skewness - 1) + right * np.sign(skewness + 1)
        tails = np.maximum(by_skewness, (left + right) / 2)  # (B, D)
        return np.array([row.sum() for row in tails])  # row by row: the order of summation may follow the batch's shape

    def _skewness_sign(self, rows: Rows) -> NDArray[np.float64]:
        """Sign of each pixel's skewness with the image among the training images, (B, D); 0 if constant or symmetric.

        PyOD takes the sign of the rounding error where the skewness is 0: two grey levels, equally often.
        """
        n = self._columns.shape[1]
        delta = rows - self._mean
        mean = self._mean + delta / (n + 1)
        second = (self._second + delta * delta * (n / (n + 1))) / (n + 1)
        third = self._third + delta * (delta * delta * (n * (n - 1) / (n + 1) ** 2) - 3 / (n + 1) * self._second)
        constant = second <= np.square(np.finfo(np.float64).eps * mean)  # scipy.stats.skew's test
        symmetric = np.abs(third / (n + 1)) <= 1e-12 * second * np.sqrt(second)
        return np.where(constant | symmetric, 0.0, np.sign(third))


def build(options: Options, *, seed: int) -> Copod:
    """A COPOD that has not been fitted; ``seed`` only picks which of very many images are kept."""
    return Copod(options, seed=seed)
