"""The pieces of a benchmark, each one call on its folder: a network trained, a cell measured, its robustness.

Nothing here knows of the others, of workers, or of rows that are written; see :mod:`raydiff.benchmark`.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydiff.config import ExperimentConfig, load_config
from raydiff.cost import measure_cost
from raydiff.crossfit import FOLDS
from raydiff.detector import Detector, DiffusionDetector, load_detector
from raydiff.distillation import TEACHER, student_config
from raydiff.errors import ConfigError, DataError
from raydiff.evaluation import evaluate
from raydiff.experiment import ARTIFACT, CONFIG, calibrated, fit_baseline, fit_locally
from raydiff.fitted_spaces import SPACES, fitted_space, seconds_elsewhere
from raydiff.heads import with_timed_scorer
from raydiff.images import images_per_batch
from raydiff.journal import write_whole
from raydiff.plan import Cell, Training
from raydiff.results import Evaluation, RobustnessRow
from raydiff.robustness import robustness
from raydiff.runtime import CHECKPOINTS
from raydiff.shards import ShardSet
from raydiff.splits import weights_of
from raydiff.suite import CostPlan, Resources, RobustnessPlan
from raydiff.tracking import read_metrics

__all__ = [
    "Changed", "artifact_place", "is_robust", "is_trained", "run_cell", "run_robustness", "run_space", "run_training",
    "shards_place", "training_place",
]  # fmt: skip

_SECONDS, _ROBUST = "training_seconds.json", "robustness.json"


def is_trained(training: Training, out: Path) -> bool:
    """Whether its artefact is there, and how long it took."""
    folder = training_place(out, training.key)
    return _seconds(folder) is not None and (folder / ARTIFACT / "manifest.json").exists()


def _seconds(folder: Path) -> float | None:
    """What a training took; None where that was not written, or not to its end."""
    try:
        return float(json.loads((folder / _SECONDS).read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def run_space(training: Training, out: Path, *, shards: str | None = None, spaces: str | None = None) -> str | None:
    """Fit the space of a training and leave it where all that have the same find it; or say where it was found.

    Args:
        training: of the plan.
        out: the benchmark's folder.
        shards: where its shards lie, if not there.
        spaces: where fitted spaces are kept, if not there.
    """
    config = training.config
    data = ShardSet.open(shards or str(shards_place(out, training.shards)), on_bad_shard=config.data.on_bad_shard)
    place = config.data.spaces or spaces or str(out / SPACES)
    lines = list[Mapping[str, Any]]()
    fitted_space(config, data, device=_device(training.resources), spaces=place, report=lines.append)
    return next((f"found in {line['space_found']}" for line in lines if "space_found" in line), None)


def run_training(
    training: Training, out: Path, *, shards: str | None = None, spaces: str | None = None,
    keep: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Train a network in ``out/trainings/<key>``, from its last checkpoint if there is one; nothing if it is done.

    Args:
        training: of the plan.
        out: the benchmark's folder.
        shards: where its shards lie, if not there.
        spaces: where fitted spaces are kept, if not there.
        keep: called with each line of metrics, when what is finished may be put elsewhere.
    """
    folder = training_place(out, training.key)
    if is_trained(training, out):
        return
    place = shards or str(shards_place(out, training.shards))
    data = ShardSet.open(place, on_bad_shard=training.config.data.on_bad_shard)
    begun = time.monotonic()
    config = training.config if training.teacher is None else _student(training, out, data)
    _forget_another(config, folder)
    before = list(read_metrics(folder))
    elsewhere = 0.0

    def heed(line: Mapping[str, Any]) -> None:
        nonlocal elsewhere
        elsewhere += seconds_elsewhere(line)
        keep()

    device, spaces = _device(training.resources), spaces or str(out / SPACES)
    fit_locally(config, folder, data, device=device, on_metrics=heed, spaces=spaces)
    seconds = time.monotonic() - begun + elsewhere  # whoever fitted the space
    resumed = max((line["step"] for line in read_metrics(folder) if line.get("resumed")), default=0)
    seconds += _seconds_until(resumed, before, config.training.batch_size)
    if training.teacher is not None:  # without which there would be no student
        seconds += _seconds(training_place(out, training.teacher)) or 0.0
    write_whole(folder / _SECONDS, json.dumps({"seconds": seconds}))


def _student(training: Training, out: Path, shards: ShardSet) -> ExperimentConfig:
    """The config of a student, and its teacher calibrated in its folder: the same bytes however often."""
    trained = _trained(training.teacher, out, training.resources)
    teacher = calibrated(
        trained.with_scoring(training.config.scoring), shards, run_dir=training_place(out, training.teacher or "")
    )
    saved = teacher.save(training_place(out, training.key) / TEACHER, overwrite=True)
    return student_config(saved, {f"training.{field}": value for field, value in (training.distil or {}).items()})


def _forget_another(config: ExperimentConfig, folder: Path) -> None:
    """Drop the checkpoints and folds of a run that began with another config: it cannot be gone on with."""
    try:
        same = load_config(folder / CONFIG).digest() == config.digest()
    except ConfigError:
        same = False
    for name in () if same else (CHECKPOINTS, FOLDS):
        if (folder / name).exists():
            shutil.rmtree(folder / name)


def _seconds_until(step: int, lines: Sequence[Mapping[str, Any]], batch_size: int) -> float:
    """What an interrupted run had spent on the steps that were kept, from its own metrics."""
    seconds, last = 0.0, 0
    for line in lines:
        if "images_per_second" in line and last < line["step"] <= step:
            seconds += (line["step"] - last) * batch_size / line["images_per_second"]
            last = line["step"]
    return seconds


def run_cell(
    cell: Cell, out: Path, *, cost: CostPlan | None = None, command: str | None = None, shards: str | None = None
) -> Evaluation:
    """Make the cell's detector, calibrate and save it, and measure it. Writes the artefact, and no row.

    ``shards`` says where they lie, if not in ``out``.
    """
    place = shards or str(shards_place(out, cell.shards))
    data = ShardSet.open(place, on_bad_shard=cell.config.data.on_bad_shard)
    detector, seconds = _detector(cell, out, data)
    run = None if cell.training is None else training_place(out, cell.training)
    detector = calibrated(detector, data, run_dir=run).save(artifact_place(out, cell.cell_id), overwrite=True)
    size = images_per_batch(cell.config)
    cost = cost or CostPlan(batch_sizes=(1, size), num_images=size)
    bad = cell.config.data.on_bad_image
    first = next(iter(data.read("test", detector.image_spec, batch_size=cost.num_images, on_bad_image=bad)))
    costs = measure_cost(detector, first.images, cost.batch_sizes).fields()
    return evaluate(
        detector, data, dataset=cell.dataset, category=cell.category, name=cell.method, batch_size=size,
        command=command,
        extra={"cell": cell.cell_id, "training_seconds": seconds, **costs},
    )  # fmt: skip


def _detector(cell: Cell, out: Path, shards: ShardSet) -> tuple[Detector, float]:
    """Not calibrated, and the seconds its training took."""
    if cell.baseline is not None:
        begun = time.monotonic()
        baseline = fit_baseline(cell.config, shards, cell.baseline)
        return baseline, time.monotonic() - begun
    folder = training_place(out, str(cell.training))
    trained = _trained(cell.training, out, cell.resources)
    seconds = _seconds(folder)
    if seconds is None:
        raise DataError(f"{folder / _SECONDS}: does not say how long the training took; run the benchmark again")
    if trained.config.distillation is not None:  # its scorer is its own: one evaluation for all of the cell's
        return trained, seconds
    without = weights_of(folder, shards).by_id
    bare = trained.with_scoring(cell.config.scoring)
    scored, of_head = with_timed_scorer(bare, shards, without=without, keep_in=folder)
    return scored, seconds + of_head


def _trained(key: str | None, out: Path, resources: Resources) -> DiffusionDetector:
    folder = training_place(out, str(key))
    trained = load_detector(folder / ARTIFACT, device=_device(resources))
    if not isinstance(trained, DiffusionDetector):
        raise ConfigError(f"{folder}: does not hold a diffusion model; remove the folder and run again")
    return trained


@dataclass(frozen=True)
class Changed:
    """A cell's robustness rows, and what had been asked for."""

    cell_id: str
    asked: str
    rows: list[RobustnessRow]

    def mark(self, out: Path) -> None:
        """Note that the rows are written; whoever asks for others gets them anew.

        Raises:
            StorageError: it cannot be written.
        """
        write_whole(out / "cells" / self.cell_id / _ROBUST, self.asked)


def run_robustness(cell: Cell, out: Path, asked: RobustnessPlan, *, shards: str | None = None) -> Changed:
    """The cell's saved detector on changed test images; ``shards`` says where they lie, if not in ``out``."""
    detector = load_detector(artifact_place(out, cell.cell_id), device=_device(cell.resources))
    place = shards or str(shards_place(out, cell.shards))
    data = ShardSet.open(place, on_bad_shard=cell.config.data.on_bad_shard)
    rows = robustness(
        detector, data, cell=cell.cell_id, detector_name=cell.method, dataset=cell.dataset, category=cell.category,
        perturbations={name: {"name": name} for name in asked.perturbations}, severities=asked.severities,
        attacks=asked.attacks, max_images=asked.max_images,
        batch_size=images_per_batch(cell.config),
    )  # fmt: skip
    return Changed(cell.cell_id, _described(asked), list(rows))


def _described(asked: RobustnessPlan) -> str:
    return asked.model_dump_json(exclude={"methods", "datasets"})


def is_robust(cell: Cell, out: Path, asked: RobustnessPlan) -> bool:
    """Whether its rows for what is asked are written."""
    path = out / "cells" / cell.cell_id / _ROBUST
    return path.exists() and path.read_text(encoding="utf-8") == _described(asked)


def _device(resources: Resources) -> str:
    return "cuda" if resources.num_gpus > 0 else "cpu"


def shards_place(out: Path, key: str) -> Path:
    """The shards of a data section."""
    return out / "shards" / key


def artifact_place(out: Path, cell_id: str) -> Path:
    """The calibrated detector of a cell."""
    return out / "cells" / cell_id / ARTIFACT


def training_place(out: Path, key: str) -> Path:
    """The run folder of a network."""
    return out / "trainings" / key
