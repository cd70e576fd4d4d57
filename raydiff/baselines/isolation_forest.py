"""``isolation_forest``: how few random cuts separate an image from the training images'."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from raydiff.baselines._rows import RowBaseline, RowOptions, Rows

__all__ = ["IsolationForest", "Options", "build"]


class Options(RowOptions):
    """Liu, Ting and Zhou 2008 (doi:10.1109/ICDM.2008.17), through PyOD; the defaults are PyOD's."""

    name: Literal["isolation_forest"] = "isolation_forest"
    n_estimators: int = Field(100, ge=1, description="trees")
    max_samples: int = Field(256, ge=2, description="training images per tree, or all where there are fewer")
    max_features: float = Field(1.0, gt=0, le=1, description="share of the pixels a tree may cut on")


class IsolationForest(RowBaseline):
    """PyOD's ``IForest`` on rows, grown from ``seed``."""

    def __init__(self, options: Options, *, seed: int) -> None:
        super().__init__(options, seed=seed)
        self.options = options
        self._model: Any = None

    def _learn(self, rows: Rows) -> None:
        from pyod.models.iforest import IForest  # here: importing pyod takes seconds

        self._model = IForest(
            n_estimators=self.options.n_estimators,
            max_samples=min(self.options.max_samples, len(rows)),
            max_features=self.options.max_features,
            random_state=self.seed % 2**32,
        ).fit(rows)

    def _score(self, rows: Rows) -> NDArray[np.float64]:
        scores: NDArray[np.float64] = self._model.decision_function(rows)
        return scores


def build(options: Options, *, seed: int) -> IsolationForest:
    """A forest that has not grown yet; ``seed`` fixes its cuts."""
    return IsolationForest(options, seed=seed)
