"""``patch_knn``: how far each patch of an image lies from the nearest of a well-spread set of normal patches.

PatchCore (Roth et al. 2022, arXiv:2106.08265): patch features are levels of a frozen network, each averaged over 3 x 3
cells and joined on one grid; the memory bank is a greedy k-centre coreset of the training patches, chosen under a
random projection; an image scores as its farthest patch does (section 3.3), optionally reweighted by how crowded the
bank is there (eq. 7). Other than in the paper each channel is z-scored on training patches, because levels of other
networks than its ResNets differ in scale; the greedy choice is among a random sample of the patches; and patches are by
default those of levels 3 and 4 on the space ``feature``'s grid: shallower levels of the small EfficientNets see too
little (magnetic tile, 150 training images, AUROC: .78 on levels 2 and 3, .85 on 3 and 4; screw .75 and .83).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from raydiff.backbone import Backbone, BackboneOptions, FeatureMaps, Grid, Head, averaged, bounded, grid_size, joined
from raydiff.config import Options as BaseOptions
from raydiff.contracts import Scores
from raydiff.core.diffusion import keyed_seed
from raydiff.errors import ArtifactError, DataError, RaydiffError, ShapeError

__all__ = ["Options", "PatchKNN", "build", "greedy_coreset"]

_FIT_BATCH = 16
_MIN_BANK = 1000
"""Of so few patches a share would leave only the odd ones, and save no time."""


class Options(BackboneOptions, BaseOptions):
    """Which patches, how many are kept, and how distances become a score."""

    name: Literal["patch_knn"] = "patch_knn"
    levels: tuple[int, ...] = Field(
        (3, 4), description="feature maps joined; level l has stride 2^(l+1) in most models"
    )
    grid: Grid = Field(
        16, description="image pixels per patch (each side rounded, at least one patch), or the grid's height and width"
    )
    coreset_share: float = Field(
        0.1, gt=0, le=1, description="share of the training patches kept in the bank (1,000 at least, or all)"
    )
    max_bank: int = Field(10_000, ge=1, description="patches in the bank, at most")
    max_candidates: int = Field(40_000, ge=1, description="training patches, drawn at random, the bank is chosen from")
    max_train_images: int = Field(1_000, ge=1, description="of more training images a random sample is used")
    projected_dim: int = Field(64, ge=1, description="dimension of the random projection the bank is chosen under")
    reweight: bool = Field(False, description="weigh the farthest patch by the bank's density around it (eq. 7)")
    num_reweight: int = Field(9, ge=2, description="neighbours in the bank that the weight looks at, itself included")
    blur: float = Field(4.0, ge=0, description="standard deviation in image pixels of the Gaussian blur of the map")


class PatchKNN:
    """See the module. Nothing changes after ``fit`` or ``load_state``; ``score`` may then run in several threads."""

    def __init__(self, options: Options, *, seed: int) -> None:
        self.seed = seed
        self.options = options
        self._backbone = Backbone(options)
        self._bank = torch.empty(0)
        self._shift, self._scale = torch.empty(0), torch.empty(0)
        self._image_shape: tuple[int, ...] = ()

    @property
    def pretrained(self) -> str | None:
        """The backbone's name."""
        return self._backbone.name

    def check(self) -> None:
        """See that the backbone's weights are there.

        Raises:
            ConfigError: they are not, or there is no such network or level.
        """
        self._backbone.check()

    def fit(self, images: Tensor) -> None:
        """Choose the bank from normal images (n, C, H, W) in [-1, 1]; random choices follow from the seed.

        Raises:
            ShapeError: ``images`` is not (n, C, H, W).
            DataError: there are none.
            ConfigError: the backbone's weights are missing.
        """
        if images.ndim != 4:
            raise ShapeError(f"images are {tuple(images.shape)}; they must be (n, C, H, W)")
        if not len(images):
            raise DataError("patch_knn got 0 training images and needs at least 1; add more")
        self._backbone.load()
        generator = torch.Generator().manual_seed(keyed_seed("patch_knn", self.seed))
        chosen = torch.randperm(len(images), generator=generator)[: self.options.max_train_images].sort().values
        candidates, total = self._candidates(images[chosen], generator)
        self._shift, self._scale = candidates.mean(0), bounded(candidates.std(0, correction=0))  # (D,)
        candidates = (candidates - self._shift) / self._scale
        count = min(self.options.max_bank, len(candidates), max(_MIN_BANK, round(self.options.coreset_share * total)))
        kept = greedy_coreset(candidates, count, generator=generator, projected_dim=self.options.projected_dim)
        self._bank = candidates[kept]
        self._image_shape = tuple(images.shape[1:])

    def score(self, images: Tensor) -> Scores:
        """Scores (B,) and maps (B, 1, H, W), float32; images are (B, C, H, W) as in training.

        Raises:
            ShapeError: the images have another size or channel count than the training images.
        """
        self._check_images(images)
        images = images.detach()
        return self.scored(self._backbone(images, self.head(images)))

    @property
    def backbone(self) -> Backbone:
        """The frozen network."""
        return self._backbone

    def head(self, images: Tensor) -> Head:
        """Patches of maps, (B, h, w, D)."""
        return partial(_patch_features, self._grid(images))

    def scored(self, seen: Tensor) -> Scores:
        """:meth:`score` of images from what the backbone's call with :meth:`head` gave."""
        if not len(seen):
            return Scores(torch.empty(0), torch.empty(0, 1, *self._image_shape[1:]))
        rows = [self._score_one(patches) for patches in self._scaled(seen)]
        return Scores(torch.stack([score for score, _ in rows]), torch.stack([heat for _, heat in rows]))

    def surrogate(self, images: Tensor) -> Tensor:
        """The largest patch distance with gradients to ``images`` (B, C, H, W), float32 (B,), not reweighted."""
        self._check_images(images)
        return torch.stack([self._distances(patches.flatten(0, 1))[0].max() for patches in self._patches(images)])

    def state(self) -> dict[str, Tensor]:
        """``bank`` (M, D), ``shift`` and ``scale`` (D,), ``image_shape`` int64 (3,), and the backbone's weights."""
        self._check_fitted()
        weights = {f"backbone.{key}": value for key, value in self._backbone.state().items()}
        own = {"bank": self._bank, "shift": self._shift, "scale": self._scale}
        return weights | own | {"image_shape": torch.tensor(self._image_shape)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` gave; nothing is fitted.

        Raises:
            ArtifactError: a part is missing.
        """
        if missing := {"bank", "shift", "scale", "image_shape"} - set(state):
            raise ArtifactError(f"the state of patch_knn has no {sorted(missing)[0]!r}; fit it again")
        self._backbone.load_state({k.removeprefix("backbone."): v for k, v in state.items() if "backbone." in k})
        self._bank, self._shift, self._scale = state["bank"], state["shift"], state["scale"]
        self._image_shape = tuple(state["image_shape"].tolist())

    def _candidates(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, int]:
        """Patches drawn from all of the images', (n, D), in order, and how many there were."""
        size = self._grid(images)
        per_image = size[0] * size[1]
        total = per_image * len(images)
        drawn = torch.randperm(total, generator=generator)[: self.options.max_candidates].sort().values
        parts = []
        for start in range(0, len(images), _FIT_BATCH):
            cells = self._backbone(images[start : start + _FIT_BATCH].detach(), partial(_patch_features, size))
            flat = cells.flatten(0, 2).cpu()  # (b h w, D)
            first = start * per_image
            parts.append(flat[drawn[(drawn >= first) & (drawn < first + len(flat))] - first])
        return torch.cat(parts), total

    def _grid(self, images: Tensor) -> tuple[int, int]:
        return grid_size(self.options.grid, (images.shape[2], images.shape[3]))

    def _patches(self, images: Tensor) -> Tensor:
        """(B, h, w, D), z-scored."""
        return self._scaled(self._backbone(images, self.head(images)))

    def _scaled(self, patches: Tensor) -> Tensor:
        """Z-scored."""
        return (patches - self._shift.to(patches)) / self._scale.to(patches)

    def _distances(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Distance to the nearest in the bank (P,), and which one it is (P,), from one image's patches (P, D).

        A matrix product finds the neighbour; the distance itself is measured without one, exactly.
        """
        bank = self._bank.to(patches.device)
        with torch.no_grad():
            nearest = (bank.square().sum(1) - 2 * patches @ bank.T).argmin(1)  # (P,)
        return (patches - bank[nearest]).square().sum(1).clamp(min=1e-24).sqrt(), nearest

    def _score_one(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Score () and map (1, H, W) of one image, from (h, w, D)."""
        height, width, _ = patches.shape
        flat = patches.flatten(0, 1)
        distances, nearest = self._distances(flat)
        farthest = int(distances.argmax())
        score = distances[farthest]
        if self.options.reweight:
            score = score * self._weight(flat[farthest], int(nearest[farthest]))
        size = (self._image_shape[1], self._image_shape[2])
        grid = distances.reshape(1, 1, height, width).cpu()
        heat = F.interpolate(grid, size, mode="bilinear", align_corners=False)[0].numpy()  # (1, H, W)
        blurred = ndimage.gaussian_filter(heat, (0, self.options.blur, self.options.blur), mode="nearest")
        return score.cpu(), torch.from_numpy(np.ascontiguousarray(blurred))

    def _weight(self, patch: Tensor, nearest: int) -> Tensor:
        """Eq. 7: 1 - exp d(patch, m*) / sum of exp d(patch, m) over the neighbours m of m* in the bank, itself too."""
        bank = self._bank.to(patch.device)
        count = min(self.options.num_reweight, len(bank))
        around = (bank - bank[nearest]).square().sum(1).topk(count, largest=False).indices
        distances = (bank[around] - patch).square().sum(1).sqrt()
        own = (bank[nearest] - patch).square().sum().sqrt()
        return 1 - (own - torch.logsumexp(distances, 0)).exp()

    def _check_fitted(self) -> None:
        if not self._image_shape:
            raise RaydiffError("patch_knn has learnt nothing yet; call fit or load_state first")

    def _check_images(self, images: Tensor) -> None:
        self._check_fitted()
        if images.ndim != 4 or tuple(images.shape[1:]) != self._image_shape:
            wanted = ", ".join(map(str, self._image_shape))
            raise ShapeError(f"images are {tuple(images.shape)}; they must be (B, {wanted})")


def greedy_coreset(points: Tensor, count: int, *, generator: torch.Generator, projected_dim: int) -> Tensor:
    """Indices (count,) of points (n, D) that leave no point far from a chosen one, ascending.

    Greedy k-centre (Roth et al. 2022, algorithm 1): each time the point farthest from those chosen so far, under a
    random projection where D is larger than ``projected_dim`` (Johnson-Lindenstrauss). The first is drawn.
    """
    if count >= len(points):
        return torch.arange(len(points))
    if points.shape[1] > projected_dim:
        points = points @ torch.randn(points.shape[1], projected_dim, generator=generator) / projected_dim**0.5
    chosen = int(torch.randint(len(points), (), generator=generator))
    squares = points.square().sum(1)
    closest = torch.full((len(points),), torch.inf)
    kept = torch.empty(count, dtype=torch.int64)
    for i in range(count):
        kept[i] = chosen
        distance = squares - 2 * (points @ points[chosen]) + squares[chosen]
        closest = torch.minimum(closest, distance)
        closest[chosen] = -torch.inf  # never twice
        chosen = int(closest.argmax())
    return kept.sort().values


def _patch_features(size: tuple[int, int], maps: FeatureMaps) -> Tensor:
    """(B, h, w, D): each level averaged over 3 x 3 of its cells (fewer at the border), joined on the grid ``size``."""
    return joined(averaged(maps, 3), size).movedim(1, -1).contiguous()


def build(options: Options, *, seed: int) -> PatchKNN:
    """A patch-kNN that has not been fitted; ``seed`` fixes its random choices."""
    return PatchKNN(options, seed=seed)
