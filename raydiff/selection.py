"""The ``selection`` split: calibration normals and synthetic anomalies made of them, for choosing without test labels.

A scorer finds the normals that its statistics were fitted on more normal than new ones, and how much more depends on
the scorer: with a kernel density it tells the two apart without an error. So the set is scored with :func:`judged`, an
image and its anomalous twin with statistics of other images; an artefact's own scores of it say nothing. A threshold is
never taken from here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raydiff.contracts import Scorer
from raydiff.core.diffusion import keyed_seed
from raydiff.errors import ShapeError
from raydiff.planting import anomalies

__all__ = ["SelectionSet", "fold_statistics", "judged", "selection_set"]


class SelectionSet(NamedTuple):
    """``images`` uint8 (2 n, H, W, C), ``labels`` bool (2 n,), ``masks`` bool (2 n, H, W); n normal ones come first."""

    images: NDArray[np.uint8]
    labels: NDArray[np.bool_]
    masks: NDArray[np.bool_]


def selection_set(
    images: NDArray[np.uint8], ids: Sequence[str], seed: int = 0, *, severity: int = 3, kinds: Sequence[str] = ()
) -> SelectionSet:
    """The normal images, and a synthetic anomaly made of each, in equal parts of every kind there is.

    A network that was trained on synthetic anomalies (scoring ``discriminative``) looks better on the same kinds than
    it is: give ``kinds`` that it was not trained on.

    Which image gets which kind depends on the seed and on the set of ids, not on their order.

    Args:
        images: calibration normals, uint8 (n, H, W, C).
        ids: n image ids.
        seed: of the kinds and of what is drawn.
        severity: of the anomalies, 1 to 5.
        kinds: names of the kinds; empty for every one.

    Raises:
        ShapeError: there is not one id for each image.
        ConfigError: there is no such kind.
    """
    if len(ids) != len(images):
        raise ShapeError(f"there are {len(images)} images and {len(ids)} ids; give one id per image")
    anomalous, masks = images.copy(), np.zeros(images.shape[:3], dtype=np.bool_)
    order = sorted(range(len(ids)), key=lambda row: keyed_seed("selection", seed, ids[row]))
    chosen = anomalies(seed, kinds)
    for number, perturbation in enumerate(chosen.values()):
        rows = sorted(order[number :: len(chosen)])
        made = perturbation.apply(images[rows], severity=severity, ids=[ids[row] for row in rows])
        anomalous[rows] = made.images
        if made.masks is not None:
            masks[rows] = made.masks
    labels = np.repeat([False, True], len(images))
    return SelectionSet(np.concatenate([images, anomalous]), labels, np.concatenate([np.zeros_like(masks), masks]))


def judged(
    scorer: Scorer,
    normals: Tensor,
    twins: Tensor,
    image_size: tuple[int, int],
    *,
    num_folds: int = 5,
    num_fitted: int | None = None,
    statistics: Sequence[Mapping[str, Tensor]] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Image scores of the normal half and of the anomalous half, (n,) each, in order; no network is evaluated.

    Row i of both is scored with statistics of the folds that image i is not in; folds go by position.

    Args:
        scorer: whose ``fit`` and ``judge`` to use.
        normals: the normal images' evidence, (n, K, H, W), as the scorer measured it.
        twins: that of the anomalies made of them, in the same order.
        image_size: height and width of the images.
        num_folds: at least 2, and no more than statistics may be fitted on.
        num_fitted: only the first so many normals are fitted on; all of them by default.
        statistics: what :func:`fold_statistics` gives for the same; fitted anew by default.

    Raises:
        ShapeError: there is not one twin for each normal image, or fewer images than folds.
    """
    if normals.shape != twins.shape:
        raise ShapeError(f"evidence is {tuple(normals.shape)} and its twins' {tuple(twins.shape)}; give one twin each")
    if statistics is None:
        statistics = fold_statistics(scorer, normals[:num_fitted], num_folds)
    low, high = np.empty(len(normals)), np.empty(len(normals))
    for fold, fitted in enumerate(statistics):
        inside = slice(fold, None, len(statistics))
        both = torch.cat([normals[inside], twins[inside]])
        scores = scorer.judge(both, fitted, image_size).image.double().numpy()
        low[inside], high[inside] = np.split(scores, 2)
    return low, high


def fold_statistics(scorer: Scorer, normals: Tensor, num_folds: int) -> list[dict[str, Tensor]]:
    """For each fold the scorer's statistics of the images outside it; image i is in fold i modulo their number.

    Raises:
        ShapeError: there are fewer images than folds, or fewer than two folds.
    """
    if not 2 <= num_folds <= len(normals):
        raise ShapeError(f"there are {len(normals)} images and {num_folds} folds; give 2 or more, not above the images")
    fold_of = torch.arange(len(normals)) % num_folds
    return [scorer.fit(normals[fold_of != fold]) for fold in range(num_folds)]
