"""Scorers with a network of their own (:class:`raydiff.planting.TrainedScorer`), trained for a detector.

That happens once the denoiser is trained and before anything is calibrated: in ``raydiff fit`` for the run's own
scorer; in a benchmark for each method, methods with the same head sharing it; in a sweep for each choice of options
that can change it; and for each fold (:mod:`raydiff.crossfit`), without the images that it leaves out. Training images
alone are looked at. Heads are kept in the denoiser's run, ``RUN/heads``, where a resumed run finds them.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from raydiff.artifact import encode_json, encode_tensors, read_folder, write_folder
from raydiff.config import component_options
from raydiff.detector import Detector, DiffusionDetector, build_scorer
from raydiff.errors import ArtifactError, StorageError
from raydiff.images import to_tensor, to_uint8
from raydiff.planting import Plants, TrainedScorer, planted
from raydiff.shards import ShardSet
from raydiff.splits import training_images
from raydiff.storage import Place

__all__ = ["HEADS", "PlantedExamples", "planted_examples", "planted_in", "with_timed_scorer", "with_trained_scorer"]

HEADS = "heads"
"""The run folder's subfolder for what scorers' own networks have learnt, each in a folder of its own."""


@dataclass(frozen=True)
class PlantedExamples:
    """:class:`raydiff.planting.Examples` of images, encoded when they are asked for."""

    images: NDArray[np.uint8]
    """(n, H, W, C), what the model sees: whole images, or tiles."""
    masks: NDArray[np.bool_]
    """(n, H, W)."""
    num_normal: int
    encode: Callable[[Tensor], Tensor]
    cells: tuple[int, int]
    """Height and width of what is diffused."""

    def __len__(self) -> int:
        return len(self.images)

    def latents(self, rows: Sequence[int]) -> Tensor:
        """What is diffused, (len(rows), C, H, W)."""
        return self.encode(to_tensor(self.images[list(rows)]))

    def shares(self, rows: Sequence[int]) -> Tensor:
        """The share of each cell's pixels that is anomalous, (len(rows), 1, H, W)."""
        masks = torch.from_numpy(self.masks[list(rows)]).float()[:, None]
        return functional.adaptive_avg_pool2d(masks, self.cells)


def planted_examples(
    detector: DiffusionDetector, plants: Plants, shards: ShardSet, *, without: Collection[str] = ()
) -> PlantedExamples:
    """Training images (with tiles: tiles of them), and the anomalies that a scorer wants made of them.

    Args:
        detector: whose space encodes them.
        plants: which anomalies.
        shards: the images.
        without: ids of training images that are left out.
    """
    images = training_images(detector.config, shards, plants.num_images, without=without)
    return planted_in(detector, plants, to_uint8(images))


def planted_in(detector: DiffusionDetector, plants: Plants, images: NDArray[np.uint8]) -> PlantedExamples:
    """The same of images (n, H, W, C) that are given, as the model sees them."""
    made, masks = planted(images, plants, detector.config.seed)
    normal = np.zeros(images.shape[:3], dtype=np.bool_)
    return PlantedExamples(
        np.concatenate([images, made]), np.concatenate([normal, masks]), len(images), detector.encode,
        (detector.space.shape[1], detector.space.shape[2]),
    )  # fmt: skip


def with_trained_scorer(
    detector: Detector,
    shards: ShardSet,
    *,
    without: Collection[str] = (),
    keep_in: Place | None = None,
    report: Callable[[Mapping[str, Any]], None] | None = None,
) -> Detector:
    """The detector, its scorer's own network trained; the same detector where there is none, or it is trained.

    Args:
        detector: not calibrated, if it has something to train.
        shards: of which the training images are looked at.
        without: ids of training images that are left out.
        keep_in: the run folder of the denoiser; a head of the same options that is there is not trained again.
        report: gets a line now and then (see :class:`raydiff.planting.TrainedScorer`).

    Raises:
        ConfigError: the anomalies are too small for the grid to learn from.
        TrainingError: the loss is not a number.
        StorageError: the run folder cannot be written.
    """
    if not isinstance(detector, DiffusionDetector) or not isinstance(detector.scorer, TrainedScorer):
        return detector
    if detector.scorer.is_trained:
        return detector
    return _with_head(detector, shards, without, keep_in, report)[0]


def with_timed_scorer(
    detector: DiffusionDetector, shards: ShardSet, *, without: Collection[str] = (), keep_in: Place
) -> tuple[DiffusionDetector, float]:
    """As :func:`with_trained_scorer`, and the seconds that the training takes or took, whoever did it; 0 without one.

    Raises:
        ConfigError: the anomalies are too small for the grid to learn from.
        TrainingError: the loss is not a number.
        StorageError: the run folder cannot be written.
    """
    if not isinstance(detector.scorer, TrainedScorer):
        return detector, 0.0
    return _with_head(detector, shards, without, keep_in, None)


class _Kept(NamedTuple):
    """What a training came to."""

    state: dict[str, Tensor]
    seconds: float


def _with_head(
    detector: DiffusionDetector,
    shards: ShardSet,
    without: Collection[str],
    keep_in: Place | None,
    report: Callable[[Mapping[str, Any]], None] | None,
) -> tuple[DiffusionDetector, float]:
    """With the head that is kept, or else one trained now; and the seconds of its training."""
    scorer = build_scorer(detector.config, int(detector.provenance["num_classes"]))
    assert isinstance(scorer, TrainedScorer)  # noqa: S101
    place = _place(keep_in, scorer)
    origin = {} if place is None else _origin(detector, scorer, shards, without)
    found = None if place is None else _kept(place, origin)
    if found is None:
        lines, begun = list[Mapping[str, Any]](), time.monotonic()

        def heed(line: Mapping[str, Any]) -> None:
            lines.append(line)
            if report is not None:
                report(line)

        scorer.train(detector.model, planted_examples(detector, scorer.plants, shards, without=without), heed)
        found = _Kept(scorer.state(), time.monotonic() - begun)
        if place is not None:
            found = _keep(place, origin, found, lines)
    scorer.load_state(found.state)
    return replace(detector, scorer=scorer), found.seconds


def _keep(place: Place, origin: Mapping[str, Any], head: _Kept, lines: list[Mapping[str, Any]]) -> _Kept:
    """Write a head; where somebody was faster, theirs stays, since others may be reading it, and is given back.

    Raises:
        StorageError: it cannot be written.
    """
    if (theirs := _kept(place, origin)) is not None:
        return theirs
    files = {
        "origin.json": encode_json(origin), "head.safetensors": encode_tensors(head.state),
        "progress.json": encode_json({"seconds": head.seconds, "lines": lines}),
    }  # fmt: skip
    try:
        write_folder(place, "head", files, overwrite=place.exists())  # of another origin
    except StorageError:
        if (theirs := _kept(place, origin)) is None:
            raise
        return theirs
    return head


def _place(run_dir: Place | None, scorer: TrainedScorer) -> Place | None:
    """Where a run keeps a head of these options."""
    name = hashlib.sha256(scorer.training_key().encode()).hexdigest()[:12]
    return None if run_dir is None else run_dir / HEADS / name


def _origin(
    detector: DiffusionDetector, scorer: TrainedScorer, shards: ShardSet, without: Collection[str]
) -> dict[str, Any]:
    """All that a head follows from."""
    config = detector.config.model_copy(update={"scoring": component_options("scorers", "denoising_error")})
    network = encode_tensors(detector.network.state_dict())
    return {
        "config": config.digest(), "network": hashlib.sha256(network).hexdigest(),
        "head": scorer.training_key(), "data_digest": shards.normal_digest, "without": sorted(without),
    }  # fmt: skip


def _kept(place: Place, origin: Mapping[str, Any]) -> _Kept | None:
    """A head that lies there whole, if it is of this origin."""
    if not place.exists():
        return None
    try:
        folder = read_folder(place)
        if folder.json("origin.json") != origin:
            return None
        return _Kept(folder.tensors("head.safetensors"), float(folder.json("progress.json")["seconds"]))
    except (ArtifactError, OSError):  # not finished, or one of another origin that is being replaced
        return None
