"""Tiles of a detector's images: where they lie, training crops, and evidence of a whole image from that of its tiles.

With ``tiles.size`` a model sees tiles, and all else sees whole images: files are brought to ``data.image_size`` as
ever, and what the scorer measures in each tile is joined to the evidence of the image (:mod:`raydiff.core.tiling`)
before anything is judged. So:

- statistics per position are of places in the image, never of places in a tile: the deviation of a screw's tip is
  learnt at the tip. (What a model itself learns of position, such as a denoiser's table, is of the place in the tile;
  regular crops lie where tiles do, so that it fits.)
- the score pools the joined map, in which every place counts once however many tiles cover it, and the threshold is
  the quantile of whole calibration images: a false-positive rate of images, not of tiles.

Memory: tiles pass ``tiles.per_call`` at a time; what stays of an image is its evidence, 4 bytes a map and cell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from raydiff.config import ExperimentConfig
from raydiff.core.diffusion import keyed_seed
from raydiff.core.tiling import Pair, Tiling, averaged, kept_cells
from raydiff.detector.building import build_space
from raydiff.errors import ConfigError, ShapeError

__all__ = ["Crops", "Tiles"]


@dataclass(frozen=True)
class Tiles:
    """How a detector's images are tiled: ``cells`` (h, w) are those that are kept of a tile's evidence."""

    tiling: Tiling
    cells: Pair
    per_call: int

    @classmethod
    def of(cls, config: ExperimentConfig, own: Pair = (1, 1)) -> Tiles | None:
        """Those of a config whose evidence has ``own`` cells per tile at most; None for one without tiles.

        Raises:
            ConfigError: a tile cannot be cut into such cells.
        """
        tile = config.tiles.size
        if tile is None:
            return None
        try:
            cells = kept_cells(tile, config.tiles.cell, own)
        except ShapeError as error:
            raise ConfigError(f"tiles.size is {tile}: {error}; change it, tiles.cell or space.grid") from error
        return cls(_tiling(config.data.image_size, tile, config.tiles.overlap, cells), cells, config.tiles.per_call)

    def evidence(self, function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """Evidence (B, K, H', W') of whole images from a function that measures tiles: (b, C, h, w) to (b, K, ., .).

        An image's evidence depends on that image alone, bit for bit where each row of ``function`` does.
        """
        return self.evidence_of_each(lambda tiles: [function(tiles)], images)[0]

    def evidence_of_each(self, function: Callable[[Tensor], Sequence[Tensor]], images: Tensor) -> list[Tensor]:
        """:meth:`evidence` of a function that measures tiles in several ways, each (b, K_i, ., .), of one type."""
        if not len(images):
            return [part[None][:0] for part in self._joined(function, torch.zeros(images.shape[1:]))]
        rows = [self._joined(function, image) for image in images]
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    def rebuilt(self, function: Callable[[Tensor], Tensor | None], images: Tensor) -> Tensor | None:
        """Images (B, C, H, W) from a function that rebuilds tiles; None where it gives None."""
        whole: list[Tensor] = []
        for image in images:
            parts: list[Tensor] = []
            for batch in self.tiling.batches(image, self.per_call):
                made = function(batch)
                if made is None:
                    return None
                parts += made
            whole.append(self.tiling.cropped(self.tiling.joined(parts)))
        return torch.stack(whole)

    def enlarged(self, maps: Tensor) -> Tensor:
        """Maps of cells (B, 1, H', W') at the images' size, (B, 1, H, W), by bilinear interpolation."""
        sides = [count * step for count, step in zip(maps.shape[-2:], self.tiling.step, strict=True)]
        whole = maps.new_empty(*maps.shape[:2], *self.tiling.image_size)
        for row, cells in zip(whole, maps, strict=True):
            large = cells[None]
            if self.tiling.step != (1, 1):
                large = functional.interpolate(large, sides, mode="bilinear", align_corners=False)
            row.copy_(self.tiling.cropped(large)[0])
        return whole

    def _joined(self, function: Callable[[Tensor], Sequence[Tensor]], image: Tensor) -> list[Tensor]:
        counts: list[int] = []

        def measured() -> Iterator[Tensor]:
            for batch in self.tiling.batches(image, self.per_call):
                found = function(batch)
                counts[:] = [part.shape[1] for part in found]
                for row in zip(*found, strict=True):
                    yield torch.cat([averaged(values, self.cells) for values in row])

        height, width = (-(-side // step) for side, step in zip(self.tiling.image_size, self.tiling.step, strict=True))
        whole = self.tiling.joined(measured())[:, :height, :width]  # what lies in the filled part alone is no evidence
        return list(torch.split(whole, counts))


@lru_cache(maxsize=16)
def _tiling(image_size: Pair, tile: Pair, overlap: float, cells: Pair) -> Tiling:
    """The same one each time: it keeps its places."""
    return Tiling(image_size, tile, overlap, (tile[0] // cells[0], tile[1] // cells[1]))


@dataclass(frozen=True)
class Crops:
    """Parts of training and calibration images, of the size of a tile; keyed, so that no order of work changes them."""

    tiling: Tiling
    anywhere: bool

    @classmethod
    def of(cls, config: ExperimentConfig) -> Crops | None:
        """Those of a config; None for one without tiles."""
        if config.tiles.size is None:
            return None
        _, height, width = build_space(config).shape
        tiles = Tiles.of(config, (height, width))
        return None if tiles is None else cls(tiles.tiling, config.tiles.crops == "random")

    def place(self, *key: int | str) -> Pair:
        """Where the crop for a key lies: the upper left corner."""
        seed = keyed_seed("crop", *key)
        if not self.anywhere:
            return self.tiling.places[seed % len(self.tiling)]
        rows, columns = (side - tile + 1 for side, tile in zip(self.tiling.canvas, self.tiling.tile_size, strict=True))
        return seed // columns % rows, seed % columns

    def several(self, count: int, *key: int | str) -> list[Pair]:
        """Different tiles of one image, in random order: ``count`` of them, or all."""
        order = sorted(range(len(self.tiling)), key=lambda i: keyed_seed("crop", *key, i))
        return [self.tiling.places[i] for i in order[:count]]

    def of_batch(
        self, images: NDArray[np.uint8], ids: Sequence[str], keys: Sequence[tuple[int | str, ...]]
    ) -> tuple[NDArray[np.uint8], list[str]]:
        """A crop of each image by its key, (B, h, w, C), and what to call it: the image's id, and where it lies."""
        places = [self.place(*key) for key in keys]
        return self.cut(images, places), [f"{i} at {top}, {left}" for i, (top, left) in zip(ids, places, strict=True)]

    def cut(self, images: NDArray[np.uint8], places: Sequence[Pair]) -> NDArray[np.uint8]:
        """The part of each image (B, H, W, C) at its place, (B, h, w, C)."""
        moved = torch.from_numpy(np.ascontiguousarray(images)).movedim(-1, 1)  # (B, C, H, W), not copied
        parts = [self.tiling.cut(image, place) for image, place in zip(moved, places, strict=True)]
        cut: NDArray[np.uint8] = torch.stack(parts).movedim(1, -1).contiguous().numpy()
        return cut
