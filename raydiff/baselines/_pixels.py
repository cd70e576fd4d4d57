"""What the pixel baselines share: small images as rows of numbers, and a training sample that is kept to refit from.

A library model that cannot be written as tensors through a public interface is fitted again by ``load_state``, from the
training rows in the artefact. They are rounded to float32 before the first fit too, so both fits see the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from raydiff.config import Options
from raydiff.contracts import Scores
from raydiff.errors import ArtifactError, DataError, RaydiffError, ShapeError

__all__ = ["PixelBaseline", "PixelOptions", "Rows"]

Rows = NDArray[np.float64]
"""(n, D): one image a row, pixels in [-1, 1]."""


class PixelOptions(Options):
    """How images become rows, for every baseline on pixels."""

    max_side: int = Field(32, ge=1, description="larger images are averaged down until no side is longer (pixels)")
    max_train_images: int = Field(10_000, ge=2, description="of more training images a random sample is kept")


class PixelBaseline(ABC):
    """A :class:`raydiff.contracts.Baseline` on pixels; a subclass says how rows are learnt and scored.

    After ``fit`` or ``load_state``, ``score`` changes nothing and may be called from several threads.
    """

    pretrained: str | None = None

    def __init__(self, options: PixelOptions, *, seed: int) -> None:
        self.seed = seed
        self._options = options
        self._sample = torch.empty(0)
        self._image_shape: tuple[int, ...] = ()

    def fit(self, images: Tensor) -> None:
        """Learn from normal images (n, C, H, W) in [-1, 1].

        Raises:
            ShapeError: ``images`` is not (n, C, H, W).
            DataError: there are fewer images than the method needs.
        """
        if images.ndim != 4:
            raise ShapeError(f"images are {tuple(images.shape)}; they must be (n, C, H, W)")
        if len(images) < self.min_images:
            raise DataError(
                f"{self._options.name} got {len(images)} training images and needs at least {self.min_images}; add more"
            )
        generator = torch.Generator().manual_seed(self.seed)
        kept = torch.randperm(len(images), generator=generator)[: self._options.max_train_images].sort().values
        self._image_shape = tuple(images.shape[1:])
        self._sample = self._flatten(images[kept])
        self._learn(self._sample.double().numpy())

    def score(self, images: Tensor) -> Scores:
        """Float64 scores (B,), no map; images are (B, C, H, W) of the training images' size, in [-1, 1].

        Raises:
            ShapeError: the images have another size or channel count than the training images.
        """
        self._check_fitted()
        if images.ndim != 4 or tuple(images.shape[1:]) != self._image_shape:
            raise ShapeError(
                f"images are {tuple(images.shape)}; they must be (B, {', '.join(map(str, self._image_shape))})"
            )
        if not len(images):
            return Scores(torch.empty(0, dtype=torch.float64))
        return Scores(torch.from_numpy(self._score(self._flatten(images).double().numpy())))

    def state(self) -> dict[str, Tensor]:
        """``sample`` float32 (n, D), the training rows, and ``image_shape`` int64 (3,)."""
        self._check_fitted()
        return {"sample": self._sample, "image_shape": torch.tensor(self._image_shape)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Refit from the training rows; takes as long as :meth:`fit`.

        Raises:
            ArtifactError: a part is missing.
        """
        self._check_parts(state, {"sample", "image_shape"})
        self._image_shape = tuple(state["image_shape"].tolist())
        self._sample = state["sample"].float()
        self._learn(self._sample.double().numpy())

    @property
    def min_images(self) -> int:
        """The smallest training set the method is defined for."""
        return 2

    @abstractmethod
    def _learn(self, rows: Rows) -> None:
        """Fit to (n, D)."""

    @abstractmethod
    def _score(self, rows: Rows) -> NDArray[np.float64]:
        """(B, D) to (B,), row by row independent, higher is more anomalous."""

    def _check_fitted(self) -> None:
        if not self._image_shape:
            raise RaydiffError(f"{self._options.name} has learnt nothing yet; call fit or load_state first")

    def _check_parts(self, state: Mapping[str, Any], names: set[str]) -> None:
        if missing := names - set(state):
            raise ArtifactError(f"the state of {self._options.name} has no {sorted(missing)[0]!r}; fit it again")

    def _flatten(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to float32 (B, C h w), averaged down where a side is longer than ``max_side``."""
        height, width = images.shape[-2:]
        scale = self._options.max_side / max(height, width)
        if scale < 1:
            size = (max(1, round(height * scale)), max(1, round(width * scale)))
            images = F.interpolate(images, size=size, mode="area")
        return images.detach().cpu().float().flatten(1)
