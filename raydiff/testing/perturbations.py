"""What every perturbation must do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from raydiff import registry
from raydiff.contracts import Perturbation, Perturbed
from raydiff.errors import ConfigError
from raydiff.images import to_uint8
from raydiff.testing._rows import build, require, untouched_generators
from raydiff.testing.images import small_images

__all__ = ["check_perturbation"]


def check_perturbation(name: str, **fields: Any) -> None:
    """Images of the same shape that depend on image and id alone, and change more as it grows severe; honest masks."""
    what = f"perturbation {name!r}"
    for channels, size in ((1, (8, 8)), (3, (48, 24)), (1, (7, 33))):
        images = to_uint8(small_images(12, size, channels, seed=1))
        ids = [f"image-{i}" for i in range(len(images))]
        changes = []
        for severity in (1, 2, 3, 4, 5):
            changed = _check_perturbed(what, name, fields, images, ids, severity)
            changes.append(float(np.abs(changed.images.astype(float) - images).mean()))
        require(
            changes[4] > changes[0] > 0,
            f"{what}: changes images of {size} by {changes[0]:.3g} at severity 1 and by {changes[4]:.3g} at 5",
        )
        for severity in (0, 6):
            try:
                build("perturbations", name, fields).apply(images, severity=severity, ids=ids)
            except ConfigError:
                continue
            require(False, f"{what}: takes severity {severity}")


def _check_perturbed(
    what: str, name: str, fields: dict[str, Any], images: Any, ids: Sequence[str], severity: int
) -> Perturbed:
    perturbation: Perturbation = build("perturbations", name, fields)

    def apply(rows: Sequence[int], by: Perturbation = perturbation) -> Perturbed:
        return by.apply(images[list(rows)], severity=severity, ids=[ids[row] for row in rows])

    count, before = len(images), images.copy()
    with untouched_generators(what):
        whole = perturbation.apply(images, severity=severity, ids=ids)
    require(np.array_equal(images, before), f"{what}: writes into the images it is given")
    same = whole.images.shape == images.shape and whole.images.dtype == np.uint8
    require(same, f"{what}: turns uint8 {images.shape} into {whole.images.dtype} {whole.images.shape}")
    again = build("perturbations", name, fields)
    for order in (range(count), range(count - 1, -1, -1), [count // 2], range(0, count, 3)):
        part = apply(order, again)
        require(np.array_equal(part.images, whole.images[list(order)]), f"{what}: depends on order or batch-mates")
        if whole.masks is not None and part.masks is not None:
            require(np.array_equal(part.masks, whole.masks[list(order)]), f"{what}: its masks depend on batch-mates")
    others = perturbation.apply(images, severity=severity, ids=[f"other-{image_id}" for image_id in ids])
    if "seed" in registry.component("perturbations", name).Options.model_fields:
        require(not np.array_equal(others.images, whole.images), f"{what}: draws the same for every id")
    else:
        require(np.array_equal(others.images, whole.images), f"{what}: has no seed, and depends on the id")
    changed = (whole.images != images).any(-1)
    if perturbation.kind == "corruption":
        require(whole.masks is None, f"{what}: is a corruption and gives masks")
        return whole
    masks = whole.masks
    if masks is None or masks.dtype != np.bool_ or masks.shape != images.shape[:3]:
        raise AssertionError(f"{what}: makes anomalies, and its masks are not bool (B, H, W)")
    require(bool(masks.any((1, 2)).all()), f"{what}: marks no pixel of an image")
    require(bool((changed & masks).any((1, 2)).all()), f"{what}: leaves an image as it is")
    require(not (changed & ~masks).any(), f"{what}: changes pixels that it does not mark")
    return whole
