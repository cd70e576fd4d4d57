"""Scorers with a network of their own (:class:`raydiff.planting.TrainedScorer`), trained for a detector.

That happens once the denoiser is trained and before anything is calibrated: in ``raydiff fit`` for the run's own
scorer, whose head is kept in ``RUN/head`` so that a resumed run finds it; in a benchmark for each method; in a sweep
for each choice of options that can change it; and for each fold (:mod:`raydiff.crossfit`), without the images that it
leaves out. Training images alone are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from raydiff.artifact import encode_json, encode_tensors, read_folder, write_folder
from raydiff.config import ExperimentConfig
from raydiff.detector import Detector, DiffusionDetector, build_scorer
from raydiff.errors import ArtifactError
from raydiff.images import to_tensor, to_uint8
from raydiff.planting import Plants, TrainedScorer, planted
from raydiff.shards import ShardSet
from raydiff.splits import training_images
from raydiff.storage import Place

__all__ = ["HEAD", "PlantedExamples", "planted_examples", "with_trained_scorer"]

HEAD = "head"
"""The run folder's subfolder for what its own scorer's network has learnt."""


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
    config = detector.config
    images = to_uint8(training_images(config, shards, plants.num_images, without=without))
    made, masks = planted(images, plants, config.seed)
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
        keep_in: a run folder; a head that is there, of the same config and images, is not trained again.
        report: gets a line now and then (see :class:`raydiff.planting.TrainedScorer`).

    Raises:
        TrainingError: the loss is not a number.
        StorageError: the run folder cannot be written.
    """
    if not isinstance(detector, DiffusionDetector) or not isinstance(detector.scorer, TrainedScorer):
        return detector
    if detector.scorer.is_trained:
        return detector
    origin = _origin(detector.config, shards, without)
    scorer = build_scorer(detector.config, int(detector.provenance["num_classes"]))
    assert isinstance(scorer, TrainedScorer)  # noqa: S101
    known = None if keep_in is None else _kept(keep_in, origin)
    if known is not None:
        scorer.load_state(known)
        return replace(detector, scorer=scorer)
    lines: list[Mapping[str, Any]] = []

    def heed(line: Mapping[str, Any]) -> None:
        lines.append(line)
        if report is not None:
            report(line)

    scorer.train(detector.model, planted_examples(detector, scorer.plants, shards, without=without), heed)
    if keep_in is not None:
        files = {"origin.json": encode_json(origin), "head.safetensors": encode_tensors(scorer.state())}
        write_folder(keep_in / HEAD, "head", {**files, "progress.json": encode_json(lines)}, overwrite=True)
    return replace(detector, scorer=scorer)


def _origin(config: ExperimentConfig, shards: ShardSet, without: Collection[str]) -> dict[str, Any]:
    return {"digest": config.digest(), "data_digest": shards.normal_digest, "without": sorted(without)}


def _kept(run_dir: Place, origin: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The head of a run, where it was trained with the same config and images."""
    if not (run_dir / HEAD).exists():
        return None
    try:
        folder = read_folder(run_dir / HEAD)
    except ArtifactError:
        return None
    return folder.tensors("head.safetensors") if folder.json("origin.json") == origin else None
