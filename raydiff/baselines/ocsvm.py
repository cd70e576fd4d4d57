"""``ocsvm``: the distance to a surface that encloses most training images in a Gaussian kernel's space."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from raydiff.baselines._rows import RowBaseline, RowOptions, Rows

__all__ = ["OneClassSVM", "Options", "build"]


class Options(RowOptions):
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


class OneClassSVM(RowBaseline):
    """PyOD's ``OCSVM`` on rows; nothing in it is random.

    Its state is the support vectors and their coefficients: fitting again would take most of a minute on CIFAR-10. They
    are evaluated here, without a matrix product, whose rounding may follow the batch size or the number of threads.
    """

    def __init__(self, options: Options, *, seed: int) -> None:
        super().__init__(options, seed=seed)
        self.options = options

    def state(self) -> dict[str, Tensor]:
        """``support`` float32 (M, D), training rows; ``coefficients`` (M,), ``shift`` and ``scale`` (D,), ``constants``
        (gamma, intercept), float64; how images become rows.
        """
        return self._rows_state() | {
            "support": torch.from_numpy(self._support).float(),
            "coefficients": torch.from_numpy(self._coefficients),
            "shift": torch.from_numpy(self._centre),
            "scale": torch.from_numpy(self._width),
            "constants": torch.tensor([self._gamma, self._intercept], dtype=torch.float64),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` gave; nothing is fitted.

        Raises:
            ArtifactError: a part is missing.
        """
        self._check_parts(state, {"support", "coefficients", "shift", "scale", "constants"})
        self._load_rows_state(state)
        self._support = state["support"].double().numpy()
        self._coefficients, self._centre, self._width = (
            state[name].numpy() for name in ("coefficients", "shift", "scale")
        )
        self._gamma, self._intercept = state["constants"].tolist()

    def _learn(self, rows: Rows) -> None:
        from pyod.models.ocsvm import OCSVM  # here: importing pyod takes seconds

        deviation = rows.std(axis=0)
        if self.options.standardize:
            self._centre, self._width = rows.mean(axis=0), np.where(deviation > 0, deviation, 1.0)  # (D,)
        else:
            self._centre, self._width = np.zeros_like(deviation), np.ones_like(deviation)
        z = (rows - self._centre) / self._width
        self._gamma = self._kernel_gamma(z)
        with _kept_generator():
            model = OCSVM(nu=self.options.nu, gamma=self._gamma).fit(z)
        self._support = rows[model.support_]  # (M, D)
        self._coefficients = np.ascontiguousarray(model.dual_coef_[0])  # (M,)
        self._intercept = float(model.intercept_[0])

    def _score(self, rows: Rows) -> NDArray[np.float64]:
        support = (self._support - self._centre) / self._width  # (M, D)
        return np.array([self._score_one(row, support) for row in (rows - self._centre) / self._width])

    def _score_one(self, row: NDArray[np.float64], support: Rows) -> float:
        difference = support - row
        kernel = np.exp(-self._gamma * np.einsum("md,md->m", difference, difference))  # (M,)
        return -float((self._coefficients * kernel).sum() + self._intercept)

    def surrogate(self, images: Tensor) -> Tensor:
        """The score with gradients to ``images`` (B, C, H, W), float64 (B,), for attacks; last bits differ."""
        support, centre, width, coefficients = (
            torch.as_tensor(part, dtype=torch.float64, device=images.device)
            for part in (self._support, self._centre, self._width, self._coefficients)
        )
        rows, support = (self._rows(images).double() - centre) / width, (support - centre) / width
        kernel = torch.exp(-self._gamma * torch.cdist(rows, support).square())  # (B, M)
        inside: Tensor = kernel @ coefficients + self._intercept
        return -inside

    def _kernel_gamma(self, z: Rows) -> float:
        if not isinstance(self.options.gamma, str):
            return self.options.gamma
        variance = float(z.var()) if self.options.gamma == "scale" else 1.0
        return 1 / (z.shape[1] * variance) if variance > 0 else 1.0


@contextmanager
def _kept_generator() -> Iterator[None]:
    """scikit-learn draws a seed for libsvm from numpy's global generator; a one-class fit does not use it."""
    state = np.random.get_state()
    try:
        yield
    finally:
        np.random.set_state(state)


def build(options: Options, *, seed: int) -> OneClassSVM:
    """A support vector machine that has not been fitted; ``seed`` only picks which of very many images are kept."""
    return OneClassSVM(options, seed=seed)
