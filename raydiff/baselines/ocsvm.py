"""``ocsvm``: the distance to a surface that encloses most training images in a Gaussian kernel's space."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from raydiff.baselines._pixels import PixelBaseline, PixelOptions, Rows

__all__ = ["OneClassSVM", "Options", "build"]


class Options(PixelOptions):
    """Schölkopf et al. 2001 (doi:10.1162/089976601750264965), through PyOD, Gaussian kernel.

    PyOD's defaults are ``nu`` 0.5 and ``gamma`` auto, on whatever it is given. Here ``gamma`` is scale, which makes the
    kernel's width follow the data, so that dark and low-contrast images are not all alike to it.
    """

    name: Literal["ocsvm"] = "ocsvm"
    nu: float = Field(0.5, gt=0, le=1, description="upper bound on the share of training images outside the surface")
    gamma: Literal["scale", "auto"] | Annotated[float, Field(gt=0)] = Field(
        "scale", description="1 / (2 width^2); scale: 1 / (D variance of all pixels), auto: 1 / D, D numbers per image"
    )
    standardize: bool = Field(
        False, description="scale each pixel to mean 0 and deviation 1 over the training images (constant ones stay)"
    )


class OneClassSVM(PixelBaseline):
    """PyOD's ``OCSVM`` on pixels; nothing in it is random."""

    def __init__(self, options: Options, *, seed: int) -> None:
        super().__init__(options, seed=seed)
        self.options = options
        self._model: Any = None
        self._shift: Any = 0.0
        self._scale: Any = 1.0

    def _learn(self, rows: Rows) -> None:
        from pyod.models.ocsvm import OCSVM  # here: importing pyod takes seconds

        if self.options.standardize:
            deviation = rows.std(axis=0)
            self._shift = rows.mean(axis=0)  # (D,)
            self._scale = np.where(deviation > 0, deviation, 1.0)  # (D,)
        self._model = OCSVM(nu=self.options.nu, gamma=self.options.gamma).fit((rows - self._shift) / self._scale)

    def _score(self, rows: Rows) -> NDArray[np.float64]:
        scores: NDArray[np.float64] = self._model.decision_function((rows - self._shift) / self._scale)
        return scores.ravel()


def build(options: Options, *, seed: int) -> OneClassSVM:
    """A support vector machine that has not been fitted; ``seed`` only picks which of very many images are kept."""
    return OneClassSVM(options, seed=seed)
