"""The ways in which training sees an image: a view of augmentation, a crop, a flip, quarter turns.

Which of them is drawn for an image in an epoch follows from (seed, epoch, image), so any part of a run, on any worker,
draws the same. Where there is a finite number of ways they can be counted, and what a space makes of each kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from raydiff.augmentation import Augmentation, viewed
from raydiff.config import ExperimentConfig
from raydiff.core.diffusion import keyed_seed
from raydiff.detector import NUM_ROTATIONS, Crops

__all__ = ["Key", "View", "Views"]

Key = tuple[int, int, str]
"""(seed, epoch, image id): what all that is random about an image in training follows from."""


class View(NamedTuple):
    """View ``number`` of augmentation, its part at ``place`` (upper left corner; None: all of it), then the others."""

    number: int
    place: tuple[int, int] | None
    flip: bool
    turns: int

    def name(self, image_id: str) -> str:
        """What to call the picture that is flipped and turned."""
        name = viewed(image_id, self.number)
        return name if self.place is None else f"{name} at {self.place[0]}, {self.place[1]}"


@dataclass(frozen=True)
class Views:
    """Those of a config. ``rotates``: images are turned, and the denoiser told by how much."""

    augmentation: Augmentation | None
    crops: Crops | None
    flips: bool
    rotates: bool

    @classmethod
    def of(cls, config: ExperimentConfig, *, rotates: bool) -> Views:
        """Those of a config."""
        return cls(Augmentation.of(config), Crops.of(config), config.training.horizontal_flip, rotates)

    @property
    def endless(self) -> bool:
        """Whether there is no end to them: another view in each epoch, or crops anywhere."""
        anywhere = self.crops is not None and self.crops.anywhere
        return anywhere or (self.augmentation is not None and self.augmentation.endless)

    @cached_property
    def all(self) -> tuple[View, ...]:
        """Every one of them, which have an end; those of the same picture beside each other."""
        numbers = range(1 if self.augmentation is None else self.augmentation.config.views)
        places = [None] if self.crops is None else self.crops.tiling.places
        flips = [False, True] if self.flips else [False]
        turns = range(NUM_ROTATIONS if self.rotates else 1)
        return tuple(View(*ways) for ways in product(numbers, places, flips, turns))

    @cached_property
    def index(self) -> dict[View, int]:
        """Where each stands in :attr:`all`."""
        return {view: i for i, view in enumerate(self.all)}

    def drawn(self, keys: Sequence[Key]) -> list[View]:
        """How training sees each image."""
        return [self._drawn(key) for key in keys]

    def _drawn(self, key: Key) -> View:
        number = 0 if self.augmentation is None else self.augmentation.number(*key)
        place = None if self.crops is None else self.crops.place(*key)
        flip = self.flips and keyed_seed("flip", *key) % 2 == 1
        return View(number, place, flip, keyed_seed("rotation", *key) % NUM_ROTATIONS if self.rotates else 0)

    def pictures(self, images: NDArray[np.uint8], ids: Sequence[str], views: Sequence[View]) -> NDArray[np.uint8]:
        """Images (B, H, W, C) as their views have them, not yet flipped and turned, (B, h, w, C)."""
        if self.augmentation is not None:
            images = self.augmentation.apply(images, ids, [view.number for view in views])
        if self.crops is not None:
            images = self.crops.cut(images, [view.place for view in views if view.place is not None])
        return images

    def every(self, image: NDArray[np.uint8], image_id: str) -> Iterator[tuple[View, NDArray[np.uint8]]]:
        """:attr:`all` of one image (H, W, C), each picture made once, (h, w, C)."""
        number, whole = 0, image
        for view in self.all:
            if self.augmentation is not None and view.number != number:
                number = view.number
                whole = self.augmentation.apply(image[None], [image_id], [number])[0]
            crops = self.crops if view.place is not None else None
            yield view, whole if crops is None else crops.cut(whole[None], [view.place or (0, 0)])[0]

    def describe(self, config: ExperimentConfig) -> dict[str, Any]:
        """What the pictures depend on beside the image, as plain JSON; the seed only where they do."""
        described: dict[str, Any] = {"horizontal_flip": self.flips, "quarter_turns": self.rotates}
        if self.augmentation is not None:
            described["augmentation"] = {**config.augmentation.model_dump(mode="json"), "seed": self.augmentation.seed}
        if self.crops is not None:
            described["crops"] = {"size": self.crops.tiling.tile_size, "places": self.crops.tiling.places}
        return described
