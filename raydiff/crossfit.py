"""Networks beside a run's own, each trained without a fold of its training images: what they say of the images they
never saw is what the run's network would say of new ones.

Two things rest on that. Where no image can be spared for calibration (``data.calibration_fraction`` 0) the threshold
comes from the left-out images' scores: cross-conformal prediction (Vovk 2015, doi:10.1007/s10472-013-9368-4) and CV+
(Barber et al. 2021, doi:10.1214/20-AOS1965), with several augmented views of each image. And where the training images
may hold anomalies (``contamination.max_share``) those that score far above the others are suspects, and count less when
the run's own network is trained: Yoon et al. 2022 (Self-supervise, Refine, Repeat, arXiv:2106.06115) refine training
data by detectors of disjoint parts of it, and Qiu et al. 2022 (arXiv:2202.08088) weigh down an assumed share.

A fold is a run of its own below the run's ``folds/``: shared images, its own ``weights.json``.
"""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from raydiff.augmentation import Augmentation
from raydiff.config import ContaminationConfig, ExperimentConfig
from raydiff.core.diffusion import keyed_seed
from raydiff.detector import Detector
from raydiff.errors import ConfigError, DataError
from raydiff.images import to_tensor
from raydiff.runtime import CHECKPOINTS
from raydiff.shards import ShardSet
from raydiff.splits import image_ids, labelled_batches
from raydiff.storage import Place
from raydiff.weighting import WEIGHTS, read_weights, write_weights

__all__ = [
    "FOLDS",
    "Fold",
    "FoldRun",
    "Suspicion",
    "begin_folds",
    "calibrated_across",
    "fold_runs",
    "having_removed",
    "parts_of",
    "remove_checkpoints",
    "suspects_csv",
    "suspicions",
    "training_scores",
    "trusted_calibration",
]

FOLDS = "folds"
"""The run folder's subfolder for the folds' runs."""


class FoldRun(NamedTuple):
    """A network to train: where, with which config, without which images."""

    place: Place
    config: ExperimentConfig
    left_out: frozenset[str]


class Fold(NamedTuple):
    """A detector, not calibrated, and the ids of the training images that it never saw."""

    left_out: frozenset[str]
    detector: Detector


@dataclass(frozen=True)
class Suspicion:
    """What was thought of an image: ``deviation`` is its score's, in robust deviations above the median."""

    image_id: str
    split: str
    score: float
    deviation: float
    weight: float


def fold_runs(config: ExperimentConfig, run_dir: Place, shards: ShardSet) -> list[FoldRun]:
    """The folds that a config asks for; none for most.

    Which image is in which fold is keyed by (seed, image id), and stays as it was when the folds were begun, whatever
    images were lost or found since. One image alone cannot be left out: no fold.

    Raises:
        ConfigError: contamination is to be found among fewer than two images.
    """
    if not config.needs_folds:
        return []
    parts = _begun_parts(config, run_dir, shards) or parts_of(config, shards)
    if len(parts) < 2:
        if config.contamination.max_share:
            raise ConfigError("contamination.max_share is set and there is one training image; set it to 0")
        return []
    own = config.override(
        {
            "training.num_steps": config.cross_fitting.num_steps or config.training.num_steps,
            "contamination.max_share": 0,
        }
    )
    there = frozenset(image_ids(shards, "train"))
    return [
        FoldRun(run_dir / FOLDS / f"{number}", own, part)
        for number, part in enumerate(parts)
        if not part.isdisjoint(there)  # else it has nobody to judge
    ]


def begin_folds(folds: Sequence[FoldRun]) -> None:
    """Write down what each leaves out, before any of them is trained; the first fold's last, so that it means all."""
    for fold in reversed(folds):
        write_weights(fold.place, dict.fromkeys(sorted(fold.left_out), 0.0))


def _begun_parts(config: ExperimentConfig, run_dir: Place, shards: ShardSet) -> list[frozenset[str]]:
    """What the folds of a run that was begun leave out; empty where it was not, or with other images altogether."""
    parts = list[frozenset[str]]()
    for number in range(config.cross_fitting.folds):
        place = run_dir / FOLDS / f"{number}"
        if not (place / WEIGHTS).exists():
            break
        parts.append(read_weights(place, shards.count("train")).left_out)
    ids = frozenset[str]().union(*parts)
    whole = len(parts) == min(config.cross_fitting.folds, len(ids))
    return parts if whole and not ids.isdisjoint(image_ids(shards, "train")) else []


def remove_checkpoints(run_dir: Path) -> None:
    """Those of a run on this machine that is finished, and of its folds; nothing needs them any more."""
    for folder in (run_dir / CHECKPOINTS, *run_dir.glob(f"{FOLDS}/*/{CHECKPOINTS}")):
        shutil.rmtree(folder, ignore_errors=True)


def parts_of(config: ExperimentConfig, shards: ShardSet) -> list[frozenset[str]]:
    """The training images' ids in folds whose sizes differ by one at most."""
    ids = sorted(image_ids(shards, "train"), key=lambda image_id: keyed_seed("fold", config.seed, image_id))
    count = min(config.cross_fitting.folds, len(ids))
    return [frozenset(ids[number::count]) for number in range(count)]


def calibrated_across(
    detector: Detector, folds: Sequence[Fold], shards: ShardSet, *, without: Collection[str] = ()
) -> Detector:
    """The detector with statistics and a threshold from training images, each seen by the fold that left it out.

    Without folds its own network looks at views of them that it was not trained on, and the threshold says so.

    Args:
        detector: of the same config as the folds' detectors, trained on all the images.
        folds: at least two, or none.
        shards: the images.
        without: ids of images that are not to be trusted.
    """
    config, augmentation = detector.config, Augmentation.of(detector.config)
    count = config.cross_fitting.views if augmentation else 1
    numbers = list(range(count)) if folds else [-1 - number for number in range(count)]
    observed, groups, images, removed = list[Tensor](), list[int](), 0, 0
    limit = config.calibration.max_images
    itself = Fold(frozenset(image_ids(shards, "train")), detector)
    for ids, pixels, judge in _judged_by(folds or [itself], config, shards):
        for image_id, image in zip(ids, pixels, strict=True):
            if limit is not None and images >= limit:
                continue
            if image_id in without:
                removed += 1
                continue
            views = image[None] if augmentation is None else augmentation.apply(
                image[None].repeat(count, axis=0), [image_id] * count, numbers
            )  # fmt: skip
            observed.append(judge.observe(to_tensor(views)))
            groups += [images] * len(views)
            images += 1
    if not observed:
        raise DataError(f"{shards.label}: no training image is left to calibrate on; raise data.calibration_fraction")
    found = detector.calibrate_observed(
        torch.cat(observed), data_digest=shards.normal_digest, groups=torch.tensor(groups),
        origin="left_out" if folds else "trained_on",
    )  # fmt: skip
    return having_removed(found, removed)


def training_scores(folds: Sequence[Fold], config: ExperimentConfig, shards: ShardSet) -> dict[str, float]:
    """The score of each training image, by id, from a detector and from statistics that never saw it.

    What the detectors observe of all images is held in memory, as in calibration.
    """
    names, observed = list[str](), list[Tensor]()
    for ids, pixels, judge in _judged_by(folds, config, shards):
        names += ids
        observed.append(judge.observe(to_tensor(pixels)))
    scores = folds[0].detector.cross_fitted(torch.cat(observed)).image.double().tolist()
    return dict(zip(names, scores, strict=True))


def trusted_calibration(
    detector: Detector, shards: ShardSet, *, data_digest: str | None = None
) -> tuple[Detector, list[Suspicion]]:
    """The detector calibrated on the calibration images that are not suspect, and what was thought of each."""
    limit = detector.config.calibration.max_images
    ids, observed = list[str](), list[Tensor]()
    for part in labelled_batches(shards, "calibration", detector.config):
        ids += part.ids
        observed.append(detector.observe(to_tensor(part.images)))
        if limit is not None and len(ids) >= limit:
            break
    together = torch.cat(observed)[:limit]
    scores = detector.cross_fitted(together).image.double().tolist()
    found = suspicions(dict(zip(ids[:limit], scores, strict=True)), detector.config.contamination, "calibration")
    bad = {one.image_id for one in found if one.weight < 1}
    kept = torch.tensor([image_id not in bad for image_id in ids[:limit]])
    return having_removed(detector.calibrate_observed(together[kept], data_digest=data_digest), len(bad)), found


def having_removed(detector: Detector, count: int) -> Detector:
    """The detector, whose calibration says that so many images were taken for anomalies."""
    assert detector.calibration is not None  # noqa: S101
    return replace(detector, calibration=detector.calibration.less(count)) if count else detector


def suspicions(scores: Mapping[str, float], config: ContaminationConfig, split: str) -> list[Suspicion]:
    """What to think of images by their scores, the most suspect first.

    Those more than ``config.cutoff`` robust deviations above the median are suspects, at most ``config.max_share``.
    """
    values = np.array(list(scores.values()), dtype=np.float64)
    if not len(values):
        return []
    middle = float(np.median(values))
    spread = max(1.4826 * float(np.median(np.abs(values - middle))), 1e-12)
    ordered = sorted(scores, key=lambda image_id: (-scores[image_id], image_id))
    most = int(config.max_share * len(ordered) + 1e-9)
    found = []
    for rank, image_id in enumerate(ordered):
        deviation = (scores[image_id] - middle) / spread
        suspect = rank < most and deviation > config.cutoff
        found.append(Suspicion(image_id, split, scores[image_id], deviation, config.weight if suspect else 1.0))
    return found


def suspects_csv(found: Sequence[Suspicion]) -> bytes:
    """``suspects.csv``: every image that was looked at, the most suspect first, with what it counts."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image_id", "split", "score", "robust_deviation", "suspect", "weight"])
    for one in sorted(found, key=lambda one: (-one.deviation, one.image_id)):
        writer.writerow(
            [one.image_id, one.split, f"{one.score:.6g}", f"{one.deviation:.3f}", int(one.weight < 1), one.weight]
        )
    return text.getvalue().encode()


def _judged_by(
    folds: Sequence[Fold], config: ExperimentConfig, shards: ShardSet
) -> Iterator[tuple[list[str], np.ndarray, Detector]]:
    """Training images in stored order, a few at a time, with the detector that did not see them."""
    for part in labelled_batches(shards, "train", config):
        for fold in folds:
            rows = [i for i, image_id in enumerate(part.ids) if image_id in fold.left_out]
            if rows:
                yield [part.ids[i] for i in rows], part.images[rows], fold.detector
