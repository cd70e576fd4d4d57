"""``knn``: how far an image lies from the nearest training images."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from raydiff.baselines._rows import RowBaseline, RowOptions, Rows

__all__ = ["NearestNeighbors", "Options", "build"]


class Options(RowOptions):
    """Euclidean distance to training images (Ramaswamy et al. 2000, doi:10.1145/342009.335437), through PyOD.

    PyOD's default ``method`` is largest (the distance to the k-th neighbour).
    """

    name: Literal["knn"] = "knn"
    n_neighbors: int = Field(5, ge=1, description="k")
    method: Literal["mean", "largest", "median"] = Field("mean", description="of the k distances, which is the score")


class NearestNeighbors(RowBaseline):
    """PyOD's ``KNN`` on rows; nothing in it is random."""

    def __init__(self, options: Options, *, seed: int) -> None:
        super().__init__(options, seed=seed)
        self.options = options
        self._model: Any = None

    @property
    def min_images(self) -> int:
        """One more than k: a training image is not its own neighbour."""
        return self.options.n_neighbors + 1

    def _learn(self, rows: Rows) -> None:
        from pyod.models.knn import KNN  # here: importing pyod takes seconds

        self._model = KNN(n_neighbors=self.options.n_neighbors, method=self.options.method).fit(rows)

    def _score(self, rows: Rows) -> NDArray[np.float64]:
        # One image a call: distances come from a matrix product, whose kernel and rounding may follow the batch size.
        return np.concatenate([self._model.decision_function(row[None]) for row in rows])

    def surrogate(self, images: Tensor) -> Tensor:
        """The score with gradients to ``images`` (B, C, H, W), float32 (B,), for attacks; last bits differ."""
        distances = torch.cdist(self._rows(images), self._sample.to(images.device))  # (B, n)
        nearest = distances.topk(self.options.n_neighbors, dim=1, largest=False).values  # (B, k), ascending
        if self.options.method == "mean":
            return nearest.mean(1)
        return nearest[:, -1] if self.options.method == "largest" else nearest.quantile(0.5, dim=1)


def build(options: Options, *, seed: int) -> NearestNeighbors:
    """A nearest-neighbour baseline that has not been fitted; ``seed`` only picks which of very many images are kept."""
    return NearestNeighbors(options, seed=seed)
