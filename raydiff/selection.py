"""The ``selection`` split: calibration normals and synthetic anomalies made of them, for choosing without test labels.

A scorer whose statistics were fitted on the same calibration normals finds those a little more normal than new ones.
That holds for every model alike, so it does not decide between them; a threshold is never taken from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from raydiff import registry
from raydiff.config import component_options
from raydiff.contracts import Perturbation
from raydiff.core.diffusion import keyed_seed
from raydiff.errors import ShapeError

__all__ = ["SelectionSet", "selection_set"]


class SelectionSet(NamedTuple):
    """``images`` uint8 (2 n, H, W, C), ``labels`` bool (2 n,), ``masks`` bool (2 n, H, W); n normal ones come first."""

    images: NDArray[np.uint8]
    labels: NDArray[np.bool_]
    masks: NDArray[np.bool_]


def selection_set(images: NDArray[np.uint8], ids: Sequence[str], seed: int = 0, *, severity: int = 3) -> SelectionSet:
    """The normal images, and a synthetic anomaly made of each, in equal parts of every kind there is.

    Which image gets which kind depends on the seed and on the set of ids, not on their order.

    Args:
        images: calibration normals, uint8 (n, H, W, C).
        ids: n image ids.
        seed: of the kinds and of what is drawn.
        severity: of the anomalies, 1 to 5.

    Raises:
        ShapeError: there is not one id for each image.
    """
    if len(ids) != len(images):
        raise ShapeError(f"there are {len(images)} images and {len(ids)} ids; give one id per image")
    anomalous, masks = images.copy(), np.zeros(images.shape[:3], dtype=np.bool_)
    order = sorted(range(len(ids)), key=lambda row: keyed_seed("selection", seed, ids[row]))
    kinds = _anomalies(seed)
    for number, perturbation in enumerate(kinds):
        rows = sorted(order[number :: len(kinds)])
        made = perturbation.apply(images[rows], severity=severity, ids=[ids[row] for row in rows])
        anomalous[rows] = made.images
        if made.masks is not None:
            masks[rows] = made.masks
    labels = np.repeat([False, True], len(images))
    return SelectionSet(np.concatenate([images, anomalous]), labels, np.concatenate([np.zeros_like(masks), masks]))


def _anomalies(seed: int) -> list[Perturbation]:
    """Every perturbation that makes an anomaly, sorted by name."""
    built: list[Perturbation] = [
        registry.build("perturbations", component_options("perturbations", _fields(name, seed)))
        for name in registry.names("perturbations")
    ]
    return [perturbation for perturbation in built if perturbation.kind == "anomaly"]


def _fields(name: str, seed: int) -> dict[str, object]:
    seeded = "seed" in registry.component("perturbations", name).Options.model_fields
    return {"name": name, "seed": seed} if seeded else {"name": name}
