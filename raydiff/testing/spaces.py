"""What every space must do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raydiff.contracts import Space
from raydiff.detector.sharing import OnBackbone
from raydiff.testing._rows import build, check_rows, require, untouched_generators
from raydiff.testing.images import small_images

__all__ = ["check_space"]


def check_space(name: str, *, channels: int = 1, image_size: tuple[int, int] = (8, 8), **fields: Any) -> None:
    """Shapes both ways, images in [-1, 1] on the way back, rows that stand alone."""
    what = f"space {name!r}"
    images = small_images(16, image_size, channels)
    space: Space = build("spaces", name, fields, channels=channels, image_size=image_size)
    with untouched_generators(what):
        if space.num_fit_images:
            space.check()
            if space.pretrained is not None:
                require(bool(space.state()), f"{what}: has no pretrained weights in its state after check")
            space.fit(small_images(32, image_size, channels, seed=1)[: space.num_fit_images])
        latents = space.encode(images)
    require(tuple(latents.shape) == (16, *space.shape), f"{what}: encodes to {tuple(latents.shape)}, not {space.shape}")
    require(bool(latents.isfinite().all()), f"{what}: encodes to numbers that are not finite")
    check_rows(what, lambda x: [space.encode(x)], images)
    if isinstance(space, OnBackbone):
        seen = space.backbone(images, space.head(images))
        require(torch.equal(seen, latents), f"{what}: encodes otherwise than its head sees the backbone's maps")
    decoded = space.decode(latents)
    if decoded is not None:
        require(decoded.shape == images.shape, f"{what}: decodes to {tuple(decoded.shape)}")
        require(bool((decoded.abs() <= 1).all()), f"{what}: decodes to images outside [-1, 1]")
        check_rows(what, lambda x: [torch.as_tensor(space.decode(x))], latents)
    state = space.state()
    require(all(isinstance(value, Tensor) for value in state.values()), f"{what}: its state is not tensors")
    restored: Space = build("spaces", name, fields, channels=channels, image_size=image_size)
    restored.load_state(state)
    require(torch.equal(restored.encode(images), latents), f"{what}: encodes otherwise after state and load_state")
