"""What it takes to learn a space, or a scorer's own network, from a little of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from raydiff.config import ExperimentConfig
from raydiff.contracts import TrainedSpace
from raydiff.detector import Crops, DiffusionDetector, build_scorer, build_space
from raydiff.heads import planted_in
from raydiff.images import to_tensor
from raydiff.planting import Plants, TrainedScorer

__all__ = ["Fit", "as_seen", "fitted_space", "with_measured_head"]

_FIT_IMAGES, _FIT_STEPS = 4, 8

_IMAGES, _ANOMALIES, _STEPS = 8, 16, 8


@runtime_checkable
class _Weighed(Protocol):
    """A space that knows what memory its fit takes."""

    def fit_bytes(self, num_images: int) -> int:
        """Beside the images."""
        ...


@dataclass(frozen=True)
class Fit:
    """A space fitted on a few images: ``state``, and what a whole fit takes.

    ``seconds`` where that is a training, from some of its steps; ``measured_seconds`` otherwise, of this one on
    ``measured_images``. ``bytes`` for as many images as the space asks for, beside them.
    """

    state: dict[str, Tensor]
    seconds: float = 0.0
    measured_seconds: float = 0.0
    measured_images: int = 0
    bytes: int = 0


def fitted_space(config: ExperimentConfig, pixels: NDArray[np.uint8], device: str) -> Fit:
    """The config's space, fitted on a few of the images; an empty state for one that learns nothing."""
    space = build_space(config)
    if not space.num_fit_images:
        return Fit({})
    images = as_seen(config, pixels[:_FIT_IMAGES]).to(device)
    if not isinstance(space, TrainedSpace):
        space.check()  # loads what is pretrained, which is not what is timed
        begun = time.perf_counter()
        space.fit(images)
        taken = time.perf_counter() - begun
        weight = space.fit_bytes(space.num_fit_images) if isinstance(space, _Weighed) else 0
        return Fit(dict(space.state()), 0.0, taken, len(images), weight)
    whole = getattr(config.space, "num_steps", _FIT_STEPS)
    short = cast(TrainedSpace, build_space(config.override({"space.num_steps": min(whole, _FIT_STEPS)})))
    lines: list[Mapping[str, Any]] = []
    short.fit_with_progress(images, lines.append)
    first, last = lines[len(lines) // 2], lines[-1]  # the first steps warm up
    steps = max(1, last["space_step"] - first["space_step"])
    each = (last["space_seconds"] - first["space_seconds"]) / steps if len(lines) > 1 else last["space_seconds"]
    return Fit(dict(short.state()), whole * each)


def as_seen(config: ExperimentConfig, pixels: NDArray[np.uint8]) -> Tensor:
    """What the model sees of images (n, H, W, C) in training: all of each, or a crop."""
    crops, ids = Crops.of(config), [str(i) for i in range(len(pixels))]
    return to_tensor(pixels if crops is None else crops.of_batch(pixels, ids, [(i,) for i in ids])[0])


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
