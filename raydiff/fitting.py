"""From a trained network to a saved, calibrated detector: the folds beside it, suspects, the threshold; baselines too.

What :mod:`raydiff.experiment` and Ray Train share. Mostly the calibration split gives the threshold, and nothing else
is trained; see :mod:`raydiff.crossfit` for when it is otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import yaml

from raydiff.artifact import read_folder
from raydiff.config import ExperimentConfig, Options, component_options
from raydiff.crossfit import (
    Fold,
    FoldRun,
    Suspicion,
    begin_folds,
    calibrated_across,
    fold_runs,
    having_removed,
    parts_of,
    suspects_csv,
    suspicions,
    training_scores,
    trusted_calibration,
)
from raydiff.detector import BaselineDetector, Detector, DiffusionDetector, load_detector
from raydiff.distillation import teacher_in
from raydiff.errors import ConfigError
from raydiff.heads import with_trained_scorer
from raydiff.images import ImageSpec, decode_file
from raydiff.provenance import versions
from raydiff.shards import ShardSet
from raydiff.shards.groups import GroupReader
from raydiff.splits import image_ids, split_batches, training_images, weights_of
from raydiff.storage import MANIFEST, Place, Storage, uri_of
from raydiff.weighting import Weights, write_weights

__all__ = [
    "ARTIFACT",
    "CONFIG",
    "SUSPECTS",
    "TrainPart",
    "calibrated",
    "finish",
    "fit_baseline",
    "fit_baselines",
    "fit_in_parts",
    "of_fold",
    "placement_notes",
    "provenance_of",
    "statistics_notes",
    "write_config",
]

ARTIFACT, CONFIG, SUSPECTS = "artifact", "config.yaml", "suspects.csv"
_MAX_BASELINE_IMAGES, _MAX_BASELINE_TILES = 10_000, 2_000
_IMAGES_PER_COMPONENT = 1.5
"""Of Gaussian cells new images are then 2.5 times as long, squared, as those that the covariances were learnt from."""

_LOOKED_AT = 64

Report = Callable[[Mapping[str, Any]], None]
"""Gets lines of metrics."""

TrainPart = Callable[[ExperimentConfig, Place], AbstractContextManager[tuple[Path, ShardSet]]]
"""Trains a network in a place, and gives its last checkpoint's folder and the shards it was trained on."""


def provenance_of(
    shards: ShardSet, weights: Weights | None = None, config: ExperimentConfig | None = None
) -> dict[str, Any]:
    """What an artefact says about its origin: classes, data digest, versions. No time, so that bytes repeat.

    It looks at the training and calibration splits alone: no test label can change a byte of an artefact. Shards that
    were left out (``data.on_bad_shard``) are named and their images counted. ``weights`` that contamination brought
    about are named too, as ``suspects``.
    """
    suspects = weights.by_id if weights is not None and config is not None and config.contamination.max_share else {}
    left_out = shards.left_out_normals()
    return {
        "num_classes": len(shards.normal_classes),
        "normal_classes": list(shards.normal_classes),
        "data_digest": shards.normal_digest,
        "num_train_images": shards.count("train"),
        "versions": versions(),
        **({"left_out": left_out} if left_out else {}),
        **({"suspects": dict(suspects)} if suspects else {}),
    }


def write_config(run_dir: Place, config: ExperimentConfig) -> None:
    """Every field of it, as ``config.yaml``, by which workers also see that they share the place.

    Raises:
        StorageError: the place cannot be written.
    """
    text = yaml.safe_dump(config.to_dict(), sort_keys=False)
    Storage.of(uri_of(run_dir), field="--out").write(CONFIG, text.encode())


def of_fold(on_metrics: Report, run_dir: Place, place: Place) -> Report:
    """The same for the run itself; lines of a network that is trained in another ``place`` say of which ``fold``."""
    if place is run_dir:
        return on_metrics
    fold = uri_of(place).rstrip("/").rpartition("/")[2]
    return lambda line: on_metrics({**line, "fold": fold})


def fit_in_parts(
    config: ExperimentConfig, run_dir: Place, shards: ShardSet, train_part: TrainPart, *, device: str = "cpu",
    on_metrics: Report | None = None,
) -> Detector:  # fmt: skip
    """The folds that the config asks for, then the run's own network; calibrated, and saved as ``run_dir/artifact``.

    A fold that is finished is not trained again. What was suspected follows from the folds, so that a resumed run comes
    to the same. ``on_metrics`` gets what a scorer's own network says of its training, which follows the denoiser's.
    """
    begin_folds(runs := fold_runs(config, run_dir, shards))
    for fold in runs:
        if _is_finished(fold, shards):
            continue
        write_config(fold.place, fold.config)
        with train_part(fold.config, fold.place) as (checkpoint, shards):
            report = on_metrics and of_fold(on_metrics, run_dir, fold.place)
            network = load_detector(checkpoint, device=device)
            scored = with_trained_scorer(network, shards, without=fold.left_out, keep_in=fold.place, report=report)
            scored.save(fold.place / ARTIFACT, overwrite=True)
    if config.contamination.max_share:
        folds = _trained_folds(config, run_dir, shards, device)
        found = suspicions(training_scores(folds, config, shards), config.contamination, "train")
        write_weights(run_dir, {one.image_id: one.weight for one in found if one.weight < 1})
        _write_suspects(run_dir, found)
    with train_part(config, run_dir) as (checkpoint, trained_on):
        return finish(run_dir, checkpoint, trained_on, device=device, on_metrics=on_metrics)


def _is_finished(fold: FoldRun, shards: ShardSet) -> bool:
    """Whether its detector is there, of this config and these images, be it without some that were left out."""
    if not (fold.place / ARTIFACT / MANIFEST).exists():
        return False
    content = read_folder(fold.place / ARTIFACT).json("config.json")
    same = ExperimentConfig.from_dict(content["experiment"], f"{fold.place}").digest() == fold.config.digest()
    origin = content["provenance"]
    known = origin.get("left_out", {}).get("whole_data_digest", origin.get("data_digest"))
    return same and known == shards.whole_normal_digest


def finish(
    run_dir: Place, checkpoint: Path, shards: ShardSet, *, device: str = "cpu", on_metrics: Report | None = None
) -> Detector:
    """Train what the last checkpoint's scorer has to train, calibrate its detector, save it as ``run_dir/artifact``."""
    network = load_detector(checkpoint, device=device)
    without = weights_of(run_dir, shards).by_id
    scored = with_trained_scorer(network, shards, without=without, keep_in=run_dir, report=on_metrics)
    detector, found = _calibrated(scored, shards, run_dir)
    if found:
        _write_suspects(run_dir, found, add=True)
    return detector.save(run_dir / ARTIFACT, overwrite=True)


def calibrated(detector: Detector, shards: ShardSet, *, run_dir: Place | None = None) -> Detector:
    """The detector with a threshold from the calibration split, which holds normal images alone.

    A scorer's own network is trained first, where it is not.

    With ``contamination.max_share`` suspects among them do not count. Where none were set aside, the threshold comes
    from the training images, each judged by the fold that left it out. Folds lie in ``run_dir``, the run that the
    detector's network was trained in, or are fitted anew for a baseline.

    Raises:
        ConfigError: there is no calibration split, and ``run_dir`` is not given.
        StorageError: a fold's head cannot be written to ``run_dir``.
    """
    return _calibrated(detector, shards, run_dir)[0]


def placement_notes(config: ExperimentConfig, shards: ShardSet) -> Iterator[str]:
    """What is wrong with the canvas of aligned parts, by the first 64 training images, in words with a remedy."""
    spec = ImageSpec.of(config.data)
    if spec.aligned_width is None or shards.data["shard_format"] == "raw":  # of raw pixels nothing is known any more
        return
    with GroupReader(shards, "train") as reader:
        rows = islice(chain.from_iterable(map(reader.rows, reader.groups_of(None))), _LOOKED_AT)
        images = [decode_file(row["image"], spec, row["image_id"]).placement for row in rows]
    lost = sum(image.pose is None or image.pose.extent is None for image in images)
    cut = sum(not image.is_whole for image in images)
    if lost:
        yield (
            f"in {lost} of {len(images)} training images no part stands out of the background, so they are shown as"
            " they lie; leave them out, or set data.align to none"
        )
    if cut:
        yield (
            f"in {cut} of {len(images)} training images the part is larger than the canvas, and what lies beyond it is"
            " not judged; raise data.aligned_width, or give data.image_size more height"
        )


def statistics_notes(config: ExperimentConfig, shards: ShardSet) -> Iterator[str]:
    """Whether cells with statistics of their own have too few images for them, in words with a remedy."""
    components, count = getattr(config.space, "num_components", 0), shards.count("train")
    if getattr(config.space, "statistics", "shared") == "per_cell" and count < _IMAGES_PER_COMPONENT * components:
        yield (
            f"space.statistics is per_cell, and {count} training images say little of {components} x {components}"
            " covariances in each cell; raise space.shrinkage, lower space.num_components, or leave statistics shared"
        )
    moved = [name for name in ("rotation", "shift", "scale") if getattr(config.augmentation, name)]
    if getattr(config.space, "statistics", "shared") == "per_cell" and moved:
        yield (
            f"space.statistics is per_cell, where each place has its own, and augmentation.{moved[0]} moves parts to"
            " other places; keep it below a cell's size, or leave it out"
        )


def fit_baselines(config: ExperimentConfig, shards: ShardSet, names: Sequence[str]) -> Iterator[Detector]:
    """Each named baseline, as :func:`fit_baseline` fits it, calibrated."""
    for name in names:
        yield calibrated(fit_baseline(config, shards, component_options("baselines", name)), shards)


def fit_baseline(config: ExperimentConfig, shards: ShardSet, options: Options) -> Detector:
    """A baseline fitted on the training split, not calibrated: its first 10,000 images, or 2,000 tiles of them.

    Of few images on views of them too, where augmentation makes any. With ``contamination.max_share`` without those
    that baselines of its kind, fitted on the other folds, find suspect.
    """
    bad: dict[str, float] = {}
    if config.contamination.max_share:
        folds = _baseline_folds(config, shards, options)
        found = suspicions(training_scores(folds, config, shards), config.contamination, "train")
        bad = {one.image_id: 0.0 for one in found if one.weight < 1}
    return _fitted(config, shards, options, bad, Weights(bad, shards.count("train")))


def _fitted(
    config: ExperimentConfig, shards: ShardSet, options: Options, without: Collection[str], weights: Weights | None
) -> BaselineDetector:
    limit = _MAX_BASELINE_IMAGES if config.tiles.size is None else _MAX_BASELINE_TILES
    images = training_images(config, shards, limit, without=without)
    provenance = provenance_of(shards, weights, config)
    if config.tiles.size is None:  # views of an image are no images
        provenance |= {"num_train_images": min(len(images), shards.count("train") - len(without))}
    return BaselineDetector.fit(config, options, images, provenance=provenance)


def _calibrated(detector: Detector, shards: ShardSet, run_dir: Place | None) -> tuple[Detector, list[Suspicion]]:
    """The detector, and what was thought of the calibration images where they are not trusted."""
    config = detector.config
    detector = _as_taught(detector, run_dir)
    detector = with_trained_scorer(detector, shards, without=detector.provenance.get("suspects", {}))
    if not config.data.calibration_fraction:
        bad = detector.provenance.get("suspects", {})
        return calibrated_across(detector, _folds_of(detector, shards, run_dir), shards, without=bad), []
    if not config.contamination.max_share:
        bad = detector.provenance.get("suspects", {})
        batches = split_batches(shards, "calibration", config, without=bad)
        detector = detector.calibrate(batches, data_digest=shards.normal_digest)
        return having_removed(detector, len(set(bad) & set(image_ids(shards, "calibration"))) if bad else 0), []
    detector, found = trusted_calibration(detector, shards, data_digest=shards.normal_digest)
    suspects = {one.image_id: 0.0 for one in found if one.weight < 1}
    known = dict(detector.provenance.get("suspects", {}))
    return replace(detector, provenance={**detector.provenance, "suspects": known | suspects}), found


def _as_taught(detector: Detector, run_dir: Place | None) -> Detector:
    """The detector, which knows what its teacher took for anomalies; itself where it is no student or knows already."""
    teacher = None if run_dir is None else teacher_in(run_dir, detector.config)
    if teacher is None or not teacher.suspects:
        return detector
    return replace(detector, provenance={**detector.provenance, "suspects": teacher.suspects})


def _folds_of(detector: Detector, shards: ShardSet, run_dir: Place | None) -> list[Fold]:
    """Detectors of its kind, each of which never saw some training images; none where there is one image."""
    config = detector.config
    if isinstance(detector, BaselineDetector):
        return _baseline_folds(config, shards, detector.options)
    if run_dir is None:
        raise ConfigError(
            f"{detector.name}: data.calibration_fraction is 0, so its threshold needs the folds of the run it was"
            " trained in; give that run, or set calibration images aside"
        )
    found = _trained_folds(config, run_dir, shards, getattr(detector, "device", "cpu"))
    places = [run.place for run in fold_runs(config, run_dir, shards)]
    return [_scored(fold, place, config, shards) for fold, place in zip(found, places, strict=True)]


def _scored(fold: Fold, place: Place, config: ExperimentConfig, shards: ShardSet) -> Fold:
    """The fold with the config's scorer, whose own network has not seen what it left out and is kept in its place."""
    if not isinstance(fold.detector, DiffusionDetector) or fold.detector.config.scoring == config.scoring:
        return fold
    detector = fold.detector.with_scoring(config.scoring)
    return Fold(fold.left_out, with_trained_scorer(detector, shards, without=fold.left_out, keep_in=place))


def _trained_folds(config: ExperimentConfig, run_dir: Place, shards: ShardSet, device: str) -> list[Fold]:
    return [
        Fold(run.left_out, load_detector(run.place / ARTIFACT, device=device))
        for run in fold_runs(config, run_dir, shards)
    ]


def _baseline_folds(config: ExperimentConfig, shards: ShardSet, options: Options) -> list[Fold]:
    parts = parts_of(config, shards) if config.needs_folds else []
    return [Fold(part, _fitted(config, shards, options, part, None)) for part in parts] if len(parts) > 1 else []


def _write_suspects(run_dir: Place, found: Sequence[Suspicion], *, add: bool = False) -> None:
    """``suspects.csv`` of the training images, or rows of the calibration images added to it."""
    storage = Storage.of(uri_of(run_dir), field="--out")
    rows = suspects_csv(found)
    if add and storage.exists(SUSPECTS):
        rows = storage.read(SUSPECTS) + rows.split(b"\n", 1)[1]
    storage.write(SUSPECTS, rows)
