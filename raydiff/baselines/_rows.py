"""What the baselines on rows share: images as rows of numbers, and a training sample that is kept to refit from.

A row is a small image's pixels, or the means of a frozen network's feature maps (``features: backbone``), each z-scored
over the training images: the network's channels differ in scale by orders of magnitude, which would decide for kNN and
the OCSVM which of them count. Isolation Forest and COPOD do not see a column's scale.

A library model that cannot be written as tensors through a public interface is fitted again by ``load_state``, from the
training rows in the artefact. They are rounded to float32 before the first fit too, so both fits see the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from raydiff.backbone import Backbone, BackboneOptions, bounded, pooled
from raydiff.config import Options
from raydiff.contracts import Scores
from raydiff.errors import ArtifactError, DataError, RaydiffError, ShapeError

__all__ = ["RowBaseline", "RowOptions", "Rows"]

Rows = NDArray[np.float64]
"""(n, D): one image a row, pixels in [-1, 1] or z-scored features."""


class RowOptions(BackboneOptions, Options):
    """How images become rows; the network's own options matter with ``features: backbone`` alone."""

    features: Literal["pixels", "backbone"] = Field(
        "pixels", description="a row: the image's pixels, or the mean of each channel of a frozen network's levels"
    )
    max_side: int = Field(
        32, ge=1, description="pixels: larger images are averaged down until no side is longer; the network sees all"
    )
    max_train_images: int = Field(10_000, ge=2, description="of more training images a random sample is kept")


class RowBaseline(ABC):
    """A :class:`raydiff.contracts.Baseline` on rows; a subclass says how rows are learnt and scored.

    After ``fit`` or ``load_state``, ``score`` changes nothing and may be called from several threads.
    """

    def __init__(self, options: RowOptions, *, seed: int) -> None:
        self.seed = seed
        self._options = options
        self._sample = torch.empty(0)
        self._image_shape: tuple[int, ...] = ()
        self._backbone = Backbone(options) if options.features == "backbone" else None
        self._shift, self._scale = torch.zeros(()), torch.ones(())

    @property
    def pretrained(self) -> str | None:
        """The backbone's name; None on pixels."""
        return None if self._backbone is None else self._backbone.name

    def check(self) -> None:
        """See that the backbone's weights are there, where one is used.

        Raises:
            ConfigError: they are not, or there is no such network or level.
        """
        if self._backbone is not None:
            self._backbone.check()

    def fit(self, images: Tensor) -> None:
        """Learn from normal images (n, C, H, W) in [-1, 1].

        Raises:
            ShapeError: ``images`` is not (n, C, H, W).
            DataError: there are fewer images than the method needs.
            ConfigError: the backbone's weights are missing.
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
        if self._backbone is not None:
            rows = self._backbone.load()(images[kept], pooled)
            self._shift, self._scale = rows.mean(0), bounded(rows.std(0, correction=0))
        self._sample = self._rows(images[kept]).cpu()
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
        return Scores(torch.from_numpy(self._score(self._rows(images.detach()).double().cpu().numpy())))

    def state(self) -> dict[str, Tensor]:
        """``sample`` float32 (n, D), the training rows, and :meth:`_rows_state`."""
        return {"sample": self._sample} | self._rows_state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Refit from the training rows; takes as long as :meth:`fit`.

        Raises:
            ArtifactError: a part is missing.
        """
        self._check_parts(state, {"sample"})
        self._load_rows_state(state)
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

    def _rows_state(self) -> dict[str, Tensor]:
        """``image_shape`` int64 (3,); with a backbone its weights, ``row_shift`` and ``row_scale`` (D,)."""
        self._check_fitted()
        state = {"image_shape": torch.tensor(self._image_shape)}
        if self._backbone is None:
            return state
        weights = {f"backbone.{key}": value for key, value in self._backbone.state().items()}
        return state | {"row_shift": self._shift, "row_scale": self._scale} | weights

    def _load_rows_state(self, state: Mapping[str, Any]) -> None:
        self._check_parts(state, {"image_shape"} | ({"row_shift", "row_scale"} if self._backbone else set()))
        if self._backbone is not None:
            prefix = "backbone."
            self._backbone.load_state({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
            self._shift, self._scale = state["row_shift"], state["row_scale"]
        self._image_shape = tuple(state["image_shape"].tolist())

    def _rows(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to float32 (B, D); gradients flow back to images that ask for them."""
        if self._backbone is None:
            return self._small(images).flatten(1)
        return (self._backbone(images, pooled) - self._shift.to(images)) / self._scale.to(images)

    def _small(self, images: Tensor) -> Tensor:
        """Averaged down where a side is longer than ``max_side``."""
        height, width = images.shape[-2:]
        scale = self._options.max_side / max(height, width)
        if scale < 1:
            size = (max(1, round(height * scale)), max(1, round(width * scale)))
            images = F.interpolate(images, size=size, mode="area")
        return images.float()
