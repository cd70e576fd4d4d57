"""From shards to a calibrated detector, without Ray: the steps that ``raydiff fit`` and the benchmarks share.

A run is a folder, on this machine or in an object store::

    config.yaml     the resolved config, every default written out
    shards/         the data, when the config names no other place
    checkpoints/    states to resume from
    space/          what a space that learns has learnt
    grids/          what it made of the training images, until the network is trained, with ``data.grids: run``
    heads/          what a scorer's own network has learnt, where it has one
    folds/          networks that each left some training images out, where the config asks for them
    suspects.csv    training and calibration images by how anomalous they look, with ``contamination.max_share``
    metrics.jsonl   and tensorboard/
    artifact/       the calibrated detector
    teacher/        of a student (``raydiff distill``): a copy of its teacher's artefact
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from raydiff.artifact import encode_json, encode_tensors, read_folder, write_folder
from raydiff.config import ExperimentConfig, load_config
from raydiff.detector import MIN_CALIBRATION, Detector, DiffusionDetector, build_space, load_detector, too_few
from raydiff.distillation import TEACHER, student_config, teacher_in
from raydiff.errors import ArtifactError, ConfigError, RaydiffError, StorageError
from raydiff.fitted_spaces import FittedSpace, fitted_space, takes_long
from raydiff.fitting import (
    ARTIFACT,
    CONFIG,
    calibrated,
    finish,
    fit_baseline,
    fit_baselines,
    fit_in_parts,
    of_fold,
    provenance_of,
    write_config,
)
from raydiff.grids import Grids
from raydiff.images import ImageSpec
from raydiff.runtime import CHECKPOINTS, LocalRuntime
from raydiff.shards import ShardSet, TrainingBatch, TrainingOrder, cached_stream, fits_in_memory
from raydiff.shards.order import Share
from raydiff.shards.windows import cut, stored_chunks
from raydiff.splits import held_out_images, image_ids, split_batches, weights_of
from raydiff.storage import MANIFEST, Place, Storage, as_place, uri_of
from raydiff.tracking import MetricsLog
from raydiff.training import Stream, train
from raydiff.weighting import write_weights

__all__ = [
    "ARTIFACT",
    "CONFIG",
    "artifact_of",
    "artifact_place",
    "begin_distillation",
    "begin_run",
    "cached",
    "calibrated",
    "finish",
    "fit_baseline",
    "fit_baselines",
    "fit_in_parts",
    "fit_locally",
    "fit_space",
    "held_out_images",
    "of_fold",
    "open_run",
    "provenance_of",
    "space_state",
    "split_batches",
    "streamed",
]

SPACE = "space"


def open_run(run_dir: Place, config: ExperimentConfig | None, *, resume: bool) -> ExperimentConfig:
    """The config that a new run in this folder begins with, its local paths absolute, or that of the run to resume.

    Nothing is written but the folder, and a small file to see that it can be, which is removed again:
    :func:`begin_run` does it when all has been checked.

    Raises:
        ConfigError: a new run's folder already holds a run, or a run to resume is not there.
        StorageError: the place cannot be reached, made or written.
    """
    storage = Storage.of(uri_of(run_dir), field="--resume" if resume else "--out").soon
    there = storage.exists(CONFIG) and bool(storage.sizes()[CONFIG])
    if resume:
        if not there:
            raise ConfigError(f"{run_dir}: holds no run to resume ({CONFIG} is missing); give the folder of a run")
        storage.prepare()
        return _stored_config(run_dir)
    if storage.exists(CONFIG):
        raise ConfigError(f"{run_dir}: already holds a run; add --resume to go on with it, or choose another --out")
    storage.prepare()
    return _with_absolute_paths(config or ExperimentConfig())


def _stored_config(run_dir: Place) -> ExperimentConfig:
    if isinstance(run_dir, Path):
        return load_config(run_dir / CONFIG)
    with tempfile.TemporaryDirectory() as temporary:
        try:
            return load_config(run_dir.fetch(Path(temporary), [CONFIG]) / CONFIG)
        except ConfigError as error:
            raise ConfigError(str(error).replace(temporary, str(run_dir))) from error


def begin_distillation(
    run_dir: Place, teacher: str | os.PathLike[str] | Storage, overrides: Sequence[str] = ()
) -> ExperimentConfig:
    """A new run for a student of the artefact at ``teacher``, which is copied there; gives the student's config.

    The data are the teacher's: where its config names no shards and they lie beside it, as in a run, they are named.
    Then :func:`fit_locally` or Ray Train does it as any other run, and resumes it.

    Raises:
        ArtifactError: there is no artefact, or it is damaged.
        ConfigError: the folder already holds a run, or the teacher cannot be distilled, or an override is not the
            student's to make.
        StorageError: the place cannot be written.
    """
    place = artifact_place(teacher)
    folder = read_folder(place)
    loaded = load_detector(folder.path)
    beside = uri_of(place.parent / "shards")
    if loaded.config.data.shards is None and ShardSet.is_finished(beside):
        overrides = [f"data.shards={beside}", *overrides]
    config = open_run(run_dir, student_config(loaded, overrides), resume=False)
    files = {name: (folder.path / name).read_bytes() for name in folder.files}  # byte for byte, so the digest stays
    write_folder(run_dir / TEACHER, "artifact", files, overwrite=True)
    return config


def begin_run(run_dir: Place, config: ExperimentConfig, shards: ShardSet) -> None:
    """Check that the config, the shards and the components fit together, and write ``config.yaml``.

    Raises:
        ConfigError, DataError: they do not.
        StorageError: the folder cannot be written.
    """
    shards.check(config.data)
    if config.data.calibration_fraction and (count := shards.count("calibration")) < MIN_CALIBRATION:
        raise too_few(count)
    fresh = DiffusionDetector.create(config, num_classes=len(shards.normal_classes))
    fresh.space.check()
    fresh.scorer.state()  # the weights that it needs are there
    teacher = teacher_in(run_dir, config)
    if teacher is not None and teacher.suspects:
        there = set(image_ids(shards, "train"))
        write_weights(run_dir, {name: weight for name, weight in teacher.suspects.items() if name in there})
    write_config(run_dir, config)


def fit_space(
    config: ExperimentConfig, run_dir: Place, shards: ShardSet, *, device: str = "cpu",
    on_metrics: Callable[[Mapping[str, Any]], None] | None = None, spaces: str | None = None,
) -> None:  # fmt: skip
    """Fit the config's space on training images and keep what it learnt in ``run_dir/space``, once per run.

    Where the same space was fitted before, and left in ``data.spaces`` or, of one that is trained, in ``spaces``, that
    is taken. One that is trained (:class:`raydiff.contracts.TrainedSpace`) tells ``on_metrics`` how far it is, and
    keeps these lines beside what it learnt, in ``progress.json``. One that is interrupted begins anew.

    Raises:
        ConfigError: it needs pretrained weights that are not there.
        TrainingError: its loss is not a number.
        StorageError: the folder cannot be written.
    """
    space = build_space(config)
    origin = {"digest": config.digest(), "data_digest": shards.normal_digest}
    if not space.num_fit_images or _space_folder(run_dir, origin) is not None:
        return
    if (teacher := teacher_in(run_dir, config)) is not None:
        fitted = FittedSpace(teacher.detector.space.state())
    else:
        fitted = fitted_space(
            config, shards, without=weights_of(run_dir, shards).left_out, device=device,
            spaces=config.data.spaces or (spaces if takes_long(config) else None),
            report=on_metrics or (lambda _: None),
        )  # fmt: skip
    files = {"origin.json": encode_json(origin), "space.safetensors": encode_tensors(fitted.state)}
    if fitted.lines:
        files["progress.json"] = encode_json(fitted.lines)
    write_folder(run_dir / SPACE, "space", files, overwrite=True)


def space_state(run_dir: Place) -> dict[str, Tensor]:
    """What :func:`fit_space` kept; empty for a space that learns nothing.

    Raises:
        ArtifactError: it is damaged.
        StorageError: the store that holds the run cannot be reached.
    """
    if not (run_dir / SPACE).exists():
        return {}
    return read_folder(run_dir / SPACE).tensors("space.safetensors")


def _space_folder(run_dir: Place, origin: Mapping[str, Any]) -> Path | None:
    """The run's fitted space, where it was fitted for the same config and images."""
    try:
        folder = read_folder(run_dir / SPACE)
    except ArtifactError:
        return None
    return folder.path if folder.json("origin.json") == origin else None


def _with_absolute_paths(config: ExperimentConfig) -> ExperimentConfig:
    """A run can be resumed from another working directory, and its workers have their own."""
    places = {
        "data.shards": config.data.shards,
        "data.dataset.source": getattr(config.data.dataset, "source", None),
        "space.weights": getattr(config.space, "weights", None),
        "scoring.feature_weights": getattr(config.scoring, "feature_weights", None),
    }
    return config.located().override(
        {path: str(Path(place).resolve()) for path, place in places.items() if place and "://" not in place}
    )


def cached(config: ExperimentConfig, shards: ShardSet, *, rank: int = 0, world_size: int = 1) -> Stream:
    """The training stream with all decoded images in memory."""
    order = TrainingOrder.of_run(shards, config)

    def stream(start_step: int) -> Iterator[TrainingBatch]:
        return cached_stream(
            shards, ImageSpec.of(config.data), order,
            batch_size=config.training.batch_size, start_step=start_step, rank=rank, world_size=world_size,
        )  # fmt: skip

    return stream


def streamed(config: ExperimentConfig, shards: ShardSet) -> Stream:
    """The same batches, decoded as they are needed: for images that do not fit in ``data.cache_mb``."""
    order = TrainingOrder.of_run(shards, config)
    size = config.training.batch_size

    def stream(start_step: int) -> Iterator[TrainingBatch]:
        share = Share(size, start_step, rank=0, world_size=1)
        windows = order.windows(share.start)
        chunks = (stored_chunks(shards, order, share, window, rows_per_chunk=size) for window in windows)
        return cut((chunk.decode(ImageSpec.of(config.data)) for part in chunks for chunk in part), size)

    return stream


def fit_locally(
    config: ExperimentConfig,
    run_dir: Place,
    shards: ShardSet,
    *,
    device: str = "cpu",
    on_metrics: Callable[[Mapping[str, Any]], None] | None = None,
    spaces: str | None = None,
) -> Detector:
    """Train in this process, calibrate and save; goes on from the newest checkpoint in ``run_dir`` if there is one.

    ``on_metrics`` gets each line of metrics; those of a fold's network have its number as ``fold``. ``spaces`` is where
    spaces that are trained are kept for other runs, where ``data.spaces`` says nothing.
    """
    begin_run(run_dir, config, shards)

    @contextmanager
    def trained(config: ExperimentConfig, place: Place) -> Iterator[tuple[Path, ShardSet]]:
        heed = on_metrics and of_fold(on_metrics, run_dir, place)
        with _trained_here(config, place, shards, device, heed, spaces) as checkpoint:
            yield checkpoint, shards

    return fit_in_parts(config, run_dir, shards, trained, device=device, on_metrics=on_metrics)


@contextmanager
def _trained_here(
    config: ExperimentConfig, run_dir: Place, shards: ShardSet, device: str,
    on_metrics: Callable[[Mapping[str, Any]], None] | None, spaces: str | None,
) -> Iterator[Path]:  # fmt: skip
    log = MetricsLog(run_dir, batch_size=config.training.batch_size)

    def record(metrics: Mapping[str, Any]) -> None:
        line = log(metrics)
        if line is not None and on_metrics is not None:
            on_metrics(line)

    runtime = LocalRuntime(run_dir, device, config.training.keep_checkpoints, record, before_save=log.flush)
    weights = weights_of(run_dir, shards, balance=config.training.balance_classes)
    provenance = provenance_of(shards, weights, config)
    fit_space(config, run_dir, shards, device=device, on_metrics=on_metrics, spaces=spaces)
    fitting = fits_in_memory(shards, ImageSpec.of(config.data), config.data.cache_mb)
    try:
        train(
            config, (cached if fitting else streamed)(config, shards),
            held_out_images(config, shards, weights.left_out), runtime, num_classes=provenance["num_classes"],
            provenance=provenance, space_state=space_state(run_dir),
            teacher=teacher_in(run_dir, config, device=device), weights=weights,
            grids=Grids.of(config, run_dir, shards),
        )  # fmt: skip
    except BaseException:
        with suppress(RaydiffError):  # the first error is the one to tell
            log.flush()
        raise
    with runtime.latest() as checkpoint:
        if checkpoint is None:
            raise StorageError(f"{run_dir / CHECKPOINTS}: the last checkpoint has gone; train again")
        yield checkpoint


def artifact_of(path: str | os.PathLike[str] | Storage) -> Path:
    """The artefact folder meant by ``path``: itself, or the one inside a run folder; verified.

    Of one that lies in a store it is this machine's copy (:func:`raydiff.artifact.read_folder`).

    Raises:
        ArtifactError: there is none, or it is damaged.
        StorageError: the store cannot be reached.
    """
    return read_folder(artifact_place(path)).path


def artifact_place(path: str | os.PathLike[str] | Storage) -> Place:
    """Where the artefact meant by ``path`` lies: there, or in its folder ``artifact``; nothing is read yet.

    Raises:
        StorageError: the store cannot be reached.
    """
    place = as_place(path, field="the artefact")
    inside = place / ARTIFACT
    return inside if not (place / MANIFEST).exists() and inside.exists() else place
