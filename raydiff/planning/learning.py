"""What the training of a scorer's own network takes (:class:`raydiff.planting.TrainedScorer`), from a little of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raydiff.detector import DiffusionDetector, build_scorer
from raydiff.heads import planted_in
from raydiff.planting import Plants, TrainedScorer

__all__ = ["with_measured_head"]

_IMAGES, _ANOMALIES, _STEPS = 8, 16, 8


def with_measured_head(
    detector: DiffusionDetector, images: NDArray[np.uint8], num_train: int | None
) -> tuple[DiffusionDetector, float]:
    """The detector with a head of a few steps on a few planted examples, so that it can score, and what a whole takes.

    A whole training takes all of its steps, and what is shown to it is planted and encoded once.

    Args:
        detector: of the config that is planned.
        images: (n, H, W, C), as the model sees them.
        num_train: training images there are; None where that is not known, then as many as the scorer wants at most.

    Returns:
        The detector, and the seconds; the same one and 0 where the scorer has no network of its own.

    Raises:
        TrainingError: the head's loss is not a number.
    """
    if not isinstance(detector.scorer, TrainedScorer):
        return detector, 0.0
    whole = getattr(detector.config.scoring, "num_steps", _STEPS)
    options = {"scoring.num_steps": min(whole, _STEPS)} if hasattr(detector.config.scoring, "num_steps") else {}
    scorer = build_scorer(detector.config.override(options), int(detector.provenance["num_classes"]))
    assert isinstance(scorer, TrainedScorer)  # noqa: S101
    lines, begun = list[Mapping[str, Any]](), time.perf_counter()
    examples = planted_in(detector, scorer.plants._replace(num_anomalies=_ANOMALIES), images[:_IMAGES])
    masks = examples.masks.copy()
    masks[examples.num_normal :] = True  # the time does not depend on where they are, and so few may be too small
    scorer.train(detector.model, replace(examples, masks=masks), lines.append)
    making = max(0.0, time.perf_counter() - begun - lines[-1]["head_seconds"]) / len(examples)
    config = detector.config
    if config.tiles.size is not None or config.augmentation.changes:
        num_train = None  # of an image it is shown tiles, or views
    seconds = whole * _step_seconds(lines) + _num_examples(scorer.plants, num_train) * making
    return replace(detector, scorer=scorer), seconds


def _step_seconds(lines: list[Mapping[str, Any]]) -> float:
    """Of a step; the first ones warm up."""
    first, last = lines[(len(lines) - 1) // 2], lines[-1]
    if first is last:
        return float(last["head_seconds"] / last["head_step"])
    return float((last["head_seconds"] - first["head_seconds"]) / (last["head_step"] - first["head_step"]))


def _num_examples(plants: Plants, num_train: int | None) -> int:
    """Normal images and anomalies of a whole training."""
    normal = min(plants.num_images, num_train or plants.num_images)
    return normal + max(normal, plants.num_anomalies)
