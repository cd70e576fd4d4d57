"""``feature``: a grid of a frozen network's features is diffused instead of pixels.

Each cell of the grid is a vector: several levels of the network joined, each channel z-scored and each level given the
same weight, projected on the principal axes of normal training images. Dividing every axis by its deviation would make
noise as loud as structure; ``whitening`` softens that, in between the plain projection (0) and equal axes (1).

With ``statistics: per_cell`` each cell is then centred and whitened by what training images look like at its place
(:mod:`raydiff.core.cell_gaussians`): for parts that lie the same way in every image. The squared length of a cell is
then its squared Mahalanobis distance but for a factor, as in PaDiM, and the diffusion learns what a Gaussian per cell
cannot say. Of few images, fewer than two for each component, new ones come out longer than those it was learnt from.

Diffusing features instead of pixels is what the best diffusion models for industrial images do (InvAD, Sakai et al.
2025, arXiv:2504.05662); PCA on joined levels goes back to PaDiM (Defard et al. 2020, arXiv:2011.08785). There is no way
back to images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from functools import partial
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from raydiff.backbone import Backbone, BackboneOptions, FeatureMaps, Grid, Head, averaged, grid_size, joined
from raydiff.config import Options as BaseOptions
from raydiff.core.cell_gaussians import CellGaussians, Moments
from raydiff.core.diffusion import full_precision, keyed_seed
from raydiff.errors import ArtifactError, ConfigError, RaydiffError
from raydiff.spaces._projection import principal_axes

__all__ = ["FeatureSpace", "Options", "build"]

_PART = 32
"""Grids that are worked on at a time while fitting."""

_KEPT_BYTES = 2**30
"""Grids that a fit keeps between its passes; larger ones are made anew, so that memory does not grow with them."""


class Options(BackboneOptions, BaseOptions):
    """Which network, on which grid, projected how."""

    name: Literal["feature"] = "feature"
    backbone: str = Field("tf_efficientnet_lite2", description="a timm model that has intermediate feature maps")
    grid: Grid = Field(
        16, description="image pixels per cell (each side rounded, at least one cell), or the grid's height and width"
    )
    neighbourhood: int = Field(
        1, ge=1, description="each level is averaged over so many of its own cells per side first, odd; PatchCore has 3"
    )
    num_components: int = Field(96, ge=1, description="principal axes kept: the channels of what is diffused")
    whitening: float = Field(
        0.5, ge=0, le=1, description="power to which each axis is divided by its deviation; of little effect per cell"
    )
    statistics: Literal["shared", "per_cell"] = Field(
        "shared",
        description="per_cell: each cell of the grid is centred and whitened by a mean and a covariance of its own; for"
        " parts that lie the same way in every image, some hundred of them",
    )
    shrinkage: float = Field(
        0.01,
        gt=0,
        le=1,
        description="share of a cell's covariance that is alike in all directions: more for few images",
    )
    num_fit_images: int | None = Field(
        None, ge=1, description="training images that it is learnt from, at most; by default 200, or 1,000 per cell"
    )
    num_fit_cells: int = Field(20_000, ge=2, description="cells of their grids that it is learnt from, at most")

    @property
    def images_to_fit(self) -> int:
        """``num_fit_images`` or its default: a cell sees one vector an image, so one of its own wants all of them."""
        return self.num_fit_images or (1000 if self.statistics == "per_cell" else 200)

    @model_validator(mode="after")
    def _check_shrinkage(self) -> Self:
        if self.statistics == "shared" and self.shrinkage != type(self).model_fields["shrinkage"].default:
            raise ValueError(
                f"shrinkage is {self.shrinkage} and statistics shared; leave it out, or set statistics to per_cell"
            )
        return self

    @model_validator(mode="after")
    def _check_neighbourhood(self) -> Self:
        if self.neighbourhood % 2 == 0:
            raise ValueError(f"neighbourhood is {self.neighbourhood}; it must be odd, so that it has a middle")
        return self


class FeatureSpace:
    """See the module. Nothing changes after ``fit`` or ``load_state``; ``encode`` may then run in several threads."""

    costly = True

    def __init__(self, options: Options, image_size: tuple[int, int]) -> None:
        self.options = options
        self.num_fit_images = options.images_to_fit
        self.shape = (options.num_components, *grid_size(options.grid, image_size))
        self._backbone = Backbone(options)
        self._mean, self._projection = torch.empty(0), torch.empty(0)
        self._gaussians: CellGaussians | None = None

    @property
    def pretrained(self) -> str | None:
        """The backbone's name."""
        return self._backbone.name

    def check(self) -> None:
        """See that the backbone's weights are there and it has enough channels.

        Raises:
            ConfigError: they are not, or it has not.
        """
        channels = sum(self._backbone.load().num_channels)
        if channels < self.options.num_components:
            raise ConfigError(
                f"space.num_components is {self.options.num_components}; levels {self.options.levels} of"
                f" {self.options.backbone} have {channels} channels together, so set it to {channels} or less"
            )

    def fit(self, images: Tensor) -> None:
        """Learn the projection from images (n, C, H, W) in [-1, 1]; the cells are sampled by a fixed seed.

        Raises:
            ConfigError: the backbone's weights are missing, or ``statistics`` is ``per_cell`` and n is 1.
        """
        self.check()
        grids = self._grids(images.detach())
        cells = self._sampled(grids)
        scale = self._level_scale(cells)  # (D,)
        mean = cells.mean(0)
        centred = (cells - mean) * scale
        axes = principal_axes(centred, self.options.num_components, self.options.whitening)
        self._mean = mean.float()
        self._projection = (scale[:, None] * axes).T.float().contiguous()  # (K, D)
        self._gaussians = self._fitted_gaussians(grids) if self.options.statistics == "per_cell" else None

    def fit_bytes(self, num_images: int) -> int:
        """Memory that :meth:`fit` takes for so many images, beside the images."""
        components, height, width = self.shape
        grids = self._grid_bytes(num_images)
        held = grids if grids <= _KEPT_BYTES else self._grid_bytes(min(num_images, _PART))
        own = height * width * components**2 if self.options.statistics == "per_cell" else 0
        return held + own * (8 + 4)  # sums in float64, what comes of them in float32

    def encode(self, images: Tensor) -> Tensor:
        """(B, C, H, W) images in [-1, 1] to (B, K, h, w), of mean 0 and variance 1 over the cells of fitted images."""
        return self._backbone(images, self.head(images))

    @property
    def backbone(self) -> Backbone:
        """The frozen network."""
        return self._backbone

    def head(self, images: Tensor) -> Head:
        """The projection of maps, on the device of ``images``: :meth:`encode` is the backbone's call with it."""
        if not len(self._mean):
            raise RaydiffError("space 'feature' has learnt nothing yet; call fit or load_state first")
        if self._gaussians is not None and self._gaussians.mean.device != images.device:
            self._gaussians = self._gaussians.to(images.device)  # once: they may be many megabytes
        mean, projection = self._mean.to(images.device), self._projection.to(images.device)
        return partial(self._project, mean, projection, self._gaussians)

    def decode(self, latents: Tensor) -> Tensor | None:  # noqa: ARG002
        """None: features have no way back to images."""
        return None

    def state(self) -> dict[str, Tensor]:
        """``mean`` (D,), ``projection`` (K, D), the backbone's weights, ``cells.mean``, ``cells.whitening``."""
        weights = {f"backbone.{key}": value for key, value in self._backbone.state().items()}
        if self._gaussians is not None:
            own = self._gaussians.to(torch.device("cpu"))
            weights |= {"cells.mean": own.mean, "cells.whitening": own.whitening}
        return weights | {"mean": self._mean, "projection": self._projection}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state` gave.

        Raises:
            ArtifactError: a part is missing, or of another shape.
        """
        weights = {key.removeprefix("backbone."): v for key, v in state.items() if key.startswith("backbone.")}
        if {"mean", "projection"} - set(state) or len(state["projection"]) != self.options.num_components:
            raise ArtifactError("the state of space 'feature' does not fit its options; fit it again")
        own = [state[key] for key in ("cells.mean", "cells.whitening") if key in state]
        if len(own) != (2 if self.options.statistics == "per_cell" else 0):
            raise ArtifactError("the state of space 'feature' does not fit its statistics; fit it again")
        self._backbone.load_state(weights)
        self._mean, self._projection = state["mean"], state["projection"]
        self._gaussians = CellGaussians(*own) if own else None

    def compiled(self, quick: Callable[[nn.Module], nn.Module]) -> Self:
        """A copy whose backbone is ``quick`` of it."""
        other = copy(self)
        other._backbone = self._backbone.compiled(quick)
        return other

    def _project(self, mean: Tensor, projection: Tensor, cells: CellGaussians | None, maps: FeatureMaps) -> Tensor:
        projected = _projected(self._joined(maps), mean, projection)  # (B, K, h, w)
        return projected if cells is None else cells.whitened(projected)

    def _grid_bytes(self, num_images: int) -> int:
        """Of joined grids, float32."""
        _, height, width = self.shape
        return 4 * num_images * sum(self._backbone.num_channels) * height * width

    def _grids(self, images: Tensor) -> _Parts:
        """Joined grids of images (n, C, H, W)."""
        make = partial(self._backbone, head=self._joined)
        return _Parts(images, make, keep=self._grid_bytes(len(images)) <= _KEPT_BYTES)

    def _fitted_gaussians(self, grids: _Parts) -> CellGaussians:
        """Of the projected joined grids, scaled so that what is whitened has a mean square of 1."""
        if len(grids) < 2:
            raise ConfigError(
                "space.statistics is per_cell and it is fitted on 1 image, which has no covariance; raise"
                " space.num_fit_images, add images, or leave statistics shared"
            )
        mean, projection = self._mean.to(grids.device), self._projection.to(grids.device)
        moments, total = Moments(), 0.0
        with full_precision(grids.device):
            for part in grids:
                moments.add(_projected(part, mean, projection))
            gaussians = moments.gaussians(self.options.shrinkage).to(grids.device)
            for part in grids:
                white = gaussians.whitened(_projected(part, mean, projection))
                total += float(white.square().mean((1, 2, 3)).sum())
        return gaussians.scaled(1 / math.sqrt(total / len(grids)))

    def _joined(self, maps: FeatureMaps) -> Tensor:
        """(B, D, h, w): all levels on the grid."""
        return joined(averaged(maps, self.options.neighbourhood), (self.shape[1], self.shape[2]))

    def _sampled(self, grids: _Parts) -> Tensor:
        """Some cells of the joined grids, float64 (cells, D)."""
        count, (_, height, width) = len(grids), self.shape
        generator = torch.Generator().manual_seed(keyed_seed("feature", count * height * width))
        kept = torch.randperm(count * height * width, generator=generator)[: self.options.num_fit_cells].sort().values
        image, row, column = torch.unravel_index(kept, (count, height, width))
        cells, first = list[Tensor](), 0
        for part in grids:
            here = (first <= image) & (image < first + len(part))
            place = ((image[here] - first).to(part.device), row[here].to(part.device), column[here].to(part.device))
            cells.append(part[place[0], :, place[1], place[2]].cpu().double())
            first += len(part)
        return torch.cat(cells)

    def _level_scale(self, cells: Tensor) -> Tensor:
        """What each channel is multiplied by, (D,): its z-score, and one over the root of its level's channels."""
        deviation = cells.std(0, correction=0)
        weights = [torch.full((count,), 1 / math.sqrt(count)) for count in self._backbone.num_channels]
        return torch.cat(weights).double() / deviation.clamp(min=1e-3 * float(deviation.max()) + 1e-12)


class _Parts:
    """Joined grids (n, D, h, w) of images, some at a time and as often as wanted: the same bits each time on a CPU."""

    def __init__(self, images: Tensor, make: Callable[[Tensor], Tensor], *, keep: bool) -> None:
        self.device = images.device
        self._images, self._make = images, make
        self._kept = list(self._made()) if keep else None

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[Tensor]:
        return self._made() if self._kept is None else iter(self._kept)

    def _made(self) -> Iterator[Tensor]:
        return (self._make(part) for part in torch.split(self._images, _PART))


def _projected(grids: Tensor, mean: Tensor, projection: Tensor) -> Tensor:
    """(B, D, h, w) to (B, K, h, w)."""
    return F.conv2d(grids - mean[:, None, None], projection[:, :, None, None])


def build(options: Options, *, channels: int, image_size: tuple[int, int]) -> FeatureSpace:  # noqa: ARG001
    """A feature space that has learnt nothing yet; grey images are repeated to three channels."""
    return FeatureSpace(options, image_size)
