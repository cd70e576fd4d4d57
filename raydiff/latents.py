"""What a space makes of training images, remembered while there is room: a costly space encodes each view once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from raydiff.contracts import Space
from raydiff.core.moving import to_device

__all__ = ["Latents"]


class Latents:
    """Flipped, turned and encoded images; those of a costly space are remembered while they fit in ``max_bytes``.

    They are kept in the machine's memory, not the GPU's, and beside the decoded images, which may take as much again.
    """

    def __init__(self, space: Space, device: str, max_bytes: int) -> None:
        self._space, self._device = space, device
        self._room = max_bytes // (4 * math.prod(space.shape)) if space.costly else 0
        self._known: dict[tuple[str, bool, int], Tensor] = {}

    def know(self, ids: Sequence[str], flips: Sequence[bool], turns: Sequence[int]) -> list[bool]:
        """Which of these images' pixels :meth:`of` would not look at."""
        return [key in self._known for key in zip(ids, flips, turns, strict=True)]

    def of(
        self, images: Tensor, ids: Sequence[str], *, flips: Sequence[bool] | None = None, turns: Sequence[int]
    ) -> Tensor:
        """(B, *space.shape) on the device; image i is flipped left to right, then turned by ``turns[i]`` quarters."""
        flips = flips or [False] * len(ids)
        keys = list(zip(ids, flips, turns, strict=True))
        missing = [i for i, key in enumerate(keys) if key not in self._known]
        if missing:
            changed = [_turned(images[i], flips[i], turns[i]) for i in missing]
            encoded = self._space.encode(to_device(torch.stack(changed), self._device))
            if not self._room:
                return encoded.contiguous()  # as below: noise is drawn in the order in which values lie
        fresh = dict(zip(missing, encoded.cpu(), strict=True)) if missing else {}
        for i, latent in fresh.items():
            if len(self._known) < self._room:
                self._known[keys[i]] = latent
        found = torch.stack([fresh[i] if i in fresh else self._known[key] for i, key in enumerate(keys)])
        return to_device(found, self._device)


def _turned(image: Tensor, flip: bool, turns: int) -> Tensor:
    return torch.rot90(image.flip(-1) if flip else image, turns, (-2, -1))
