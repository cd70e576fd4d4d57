"""A benchmark's cells, run: each once, in any order, on any number of workers, with the rows of a finished one kept.

::

    OUT/shards/<key>/                one set per data section
    OUT/trainings/<key>/             a run folder per network; taken up from its checkpoints
    OUT/cells/<cell>/artifact/       the calibrated detector
    OUT/results.jsonl  predictions/  the rows, appended by the driver alone
    OUT/robustness.jsonl             rows of changed test images
    OUT/failures.jsonl               what went wrong, with tracebacks; tried again the next time

A cell is finished when ``results.jsonl`` has its row and its artefact exists. Work is cut into tasks (shards,
trainings, cells, robustness), which :mod:`raydiff.tasks` runs in this process and
:mod:`raydiff.distributed.benchmark` on Ray.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from raydiff.config import DataConfig, ExperimentConfig, load_config
from raydiff.cost import measure_cost
from raydiff.detector import Detector, DiffusionDetector, load_detector
from raydiff.errors import ConfigError, DataError
from raydiff.evaluation import evaluate
from raydiff.experiment import ARTIFACT, CONFIG, calibrated, fit_baseline, fit_locally
from raydiff.journal import alone_in, append_lines, read_lines, write_whole
from raydiff.plan import Cell, Plan, Training, plan
from raydiff.preflight import check
from raydiff.results import (
    Evaluation,
    RobustnessRow,
    append_robustness,
    save_evaluations,
)
from raydiff.robustness import robustness
from raydiff.runtime import CHECKPOINTS
from raydiff.shards import ShardSet, write_shards
from raydiff.suite import CostPlan, Resources, RobustnessPlan
from raydiff.tasks import Failure, Kind, Progress, SerialWorkers, Task, Workers, drive
from raydiff.tracking import read_metrics

__all__ = [
    "Benchmark",
    "Cell",
    "Plan",
    "check_unfinished",
    "finished_cells",
    "is_trained",
    "plan",
    "run_benchmark",
    "run_cell",
    "run_robustness",
    "run_training",
    "tasks_of",
]

RESULTS, ROBUSTNESS, FAILURES = "results.jsonl", "robustness.jsonl", "failures.jsonl"
_SECONDS, _ROBUST = "training_seconds.json", "robustness.json"


@dataclass
class Benchmark:
    """What a call has done: cells that were finished before, finished now, and failed, with the reason."""

    num_before: int
    finished: list[Cell] = field(default_factory=list)
    failed: dict[str, Failure] = field(default_factory=dict)


def finished_cells(out: Path) -> set[str]:
    """Ids of the cells that have their rows and their artefact."""
    path = out / RESULTS
    if not path.exists():
        return set()
    found: set[str] = set()
    for number, line in read_lines(path, "restore it, or choose another --out"):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path} line {number}: is no result row ({error}); remove the line") from error
        if row.get("subset_kind") == "all" and row.get("cell"):
            found.add(row["cell"])
    return {cell for cell in found if (_artifact(out, cell) / "manifest.json").exists()}


def run_benchmark(
    plan: Plan,
    out: Path,
    workers: Callable[[Sequence[Task]], Workers] = SerialWorkers,
    *,
    command: str | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Benchmark:
    """Run what is not finished. Rows are written as cells end, whole lines, so that nothing finished is ever lost.

    Args:
        plan: of the whole suite, or a part.
        out: a folder that every worker can reach.
        workers: given what is to be done, who does it; called when all has been checked, and not when nothing is left.
        command: the command line, for the record.
        on_progress: called after each task.

    Raises:
        ConfigError, DataError: see :func:`raydiff.preflight.check`; before anything runs. So does what ``workers``
            raises. ConfigError too where another benchmark runs in ``out``.
        StorageError: the rows cannot be written.
    """
    out = out.resolve()
    with ExitStack() as stack:
        is_new = not out.is_dir()
        if not is_new:
            stack.enter_context(alone_in(out))
        done = finished_cells(out)
        tasks = tasks_of(plan, out, done, command=command)
        result = Benchmark(sum(cell.cell_id in done for cell in plan.cells))
        if not tasks:
            return result
        check_unfinished(plan, out, tasks)
        try:
            able = workers(tasks)
        except ConfigError as error:
            raise ConfigError(f"{plan.path}: {error}") from error
        if is_new:  # what is refused leaves nothing behind
            stack.enter_context(alone_in(out))
        _run(plan, out, drive(tasks, able), result, on_progress)
    return result


def _run(
    plan: Plan, out: Path, steps: Iterator[Progress], result: Benchmark, on_progress: Callable[[Progress], None]
) -> None:
    """Write down what each task gave as it ends."""
    cells = {cell.cell_id: cell for cell in plan.cells}
    for progress in steps:
        task, outcome = progress.task, progress.outcome
        if outcome.failure is not None:
            result.failed[task.name] = outcome.failure
            _record_failure(out, task, outcome.failure)
        elif task.kind == "robustness":
            append_robustness(out / ROBUSTNESS, outcome.value.rows)
            outcome.value.mark(out)
        elif task.key in cells:
            save_evaluations(out / RESULTS, [outcome.value])
            result.finished.append(cells[task.key])
        on_progress(progress)


def check_unfinished(plan: Plan, out: Path, tasks: Sequence[Task] | None = None) -> None:
    """:func:`raydiff.preflight.check` of the cells that tasks are about, by default all that are not finished."""
    if tasks is None:
        tasks = tasks_of(plan, out, finished_cells(out))
    unfinished = {task.key for task in tasks}
    wanted = [cell for cell in plan.cells if {cell.cell_id, _robustness_key(cell)} & unfinished]
    check(plan.of(wanted), partial(_shards_place, out))


def tasks_of(plan: Plan, out: Path, done: set[str], *, command: str | None = None) -> list[Task]:
    """What is left to do, every task behind those it needs."""
    tasks: dict[str, Task] = {}
    for cell in plan.cells:
        if cell.cell_id not in done:
            tasks |= {task.key: task for task in _cell_tasks(plan, cell, out, command) if task.key not in tasks}
        asked = _robustness_of(plan, cell)
        if asked is not None and (cell.cell_id not in done or not _is_robust(cell, out, asked)):
            tasks |= {task.key: task for task in _shards_task(plan, cell, out) if task.key not in tasks}
            key, call = _robustness_key(cell), partial(run_robustness, cell, out, asked)
            needs = (_shards_key(cell), cell.cell_id)
            tasks[key] = Task(key, "robustness", f"{cell.name} changed", needs, cell.resources, call)
    return list(tasks.values())


def _shards_task(plan: Plan, cell: Cell, out: Path) -> Iterator[Task]:
    """The writing of its shards, where they are not finished."""
    place = _shards_place(out, cell.shards)
    if not ShardSet.is_finished(str(place)):
        name = f"shards of {cell.dataset}" + (f"/{cell.category}" if cell.category else "")
        write = partial(_write, plan.shards[cell.shards], place)
        yield Task(_shards_key(cell), "shards", name, (), Resources(), write)


def _cell_tasks(plan: Plan, cell: Cell, out: Path, command: str | None) -> Iterator[Task]:
    """Its shards and its training where they are not finished, and itself."""
    yield from _shards_task(plan, cell, out)
    shards = _shards_key(cell)
    needs = [shards]
    if cell.training is not None:
        training = plan.trainings[cell.training]
        needs.append(f"training-{training.key}")
        if not is_trained(training, out):
            fit = partial(run_training, training, out)
            yield Task(needs[1], "training", f"training {training.name}", (shards,), training.resources, fit)
    run = partial(run_cell, cell, out, cost=plan.suite.cost, command=command)
    kind: Kind = "baseline" if cell.baseline is not None else "diffusion"
    yield Task(cell.cell_id, kind, cell.name, tuple(needs), cell.resources, run)


def is_trained(training: Training, out: Path) -> bool:
    """Whether its artefact is there, and how long it took."""
    folder = out / "trainings" / training.key
    return _seconds(folder) is not None and (folder / ARTIFACT / "manifest.json").exists()


def _seconds(folder: Path) -> float | None:
    """What a training took; None where that was not written, or not to its end."""
    try:
        return float(json.loads((folder / _SECONDS).read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def run_training(training: Training, out: Path) -> None:
    """Train a network in ``out/trainings/<key>``, from its last checkpoint if there is one; nothing if it is done."""
    folder = out / "trainings" / training.key
    if is_trained(training, out):
        return
    _forget_another(training.config, folder)
    before = list(read_metrics(folder))
    begun = time.monotonic()
    shards = ShardSet.open(str(_shards_place(out, training.shards)))
    fit_locally(training.config, folder, shards, device=_device(training.resources))
    seconds = time.monotonic() - begun
    resumed = max((line["step"] for line in read_metrics(folder) if line.get("resumed")), default=0)
    seconds += _seconds_until(resumed, before, training.config.training.batch_size)
    write_whole(folder / _SECONDS, json.dumps({"seconds": seconds}))


def _forget_another(config: ExperimentConfig, folder: Path) -> None:
    """Drop the checkpoints of a run that began with another config: it cannot be gone on with."""
    try:
        same = load_config(folder / CONFIG).digest() == config.digest()
    except ConfigError:
        same = False
    if not same and (folder / CHECKPOINTS).exists():
        shutil.rmtree(folder / CHECKPOINTS)


def _seconds_until(step: int, lines: Sequence[Mapping[str, Any]], batch_size: int) -> float:
    """What an interrupted run had spent on the steps that were kept, from its own metrics."""
    seconds, last = 0.0, 0
    for line in lines:
        if "images_per_second" in line and last < line["step"] <= step:
            seconds += (line["step"] - last) * batch_size / line["images_per_second"]
            last = line["step"]
    return seconds


def run_cell(cell: Cell, out: Path, *, cost: CostPlan | None = None, command: str | None = None) -> Evaluation:
    """Make the cell's detector, calibrate and save it, and measure it. Writes the artefact, and no row."""
    shards = ShardSet.open(str(_shards_place(out, cell.shards)))
    detector, seconds = _detector(cell, out, shards)
    detector = calibrated(detector, shards).save(_artifact(out, cell.cell_id), overwrite=True)
    size = cell.config.execution.scoring_batch_size
    cost = cost or CostPlan(batch_sizes=(1, size), num_images=size)
    bad = cell.config.data.on_bad_image
    first = next(iter(shards.read("test", detector.image_spec, batch_size=cost.num_images, on_bad_image=bad)))
    costs = measure_cost(detector, first.images, cost.batch_sizes).fields()
    return evaluate(
        detector, shards, dataset=cell.dataset, category=cell.category, name=cell.method, batch_size=size,
        command=command,
        extra={"cell": cell.cell_id, "training_seconds": seconds, **costs},
    )  # fmt: skip


def _detector(cell: Cell, out: Path, shards: ShardSet) -> tuple[Detector, float]:
    """Not calibrated, and the seconds its training took."""
    if cell.baseline is not None:
        begun = time.monotonic()
        baseline = fit_baseline(cell.config, shards, cell.baseline)
        return baseline, time.monotonic() - begun
    folder = out / "trainings" / str(cell.training)
    trained = load_detector(folder / ARTIFACT, device=_device(cell.resources))
    if not isinstance(trained, DiffusionDetector):
        raise ConfigError(f"{folder}: does not hold a diffusion model; remove the folder and run again")
    seconds = _seconds(folder)
    if seconds is None:
        raise DataError(f"{folder / _SECONDS}: does not say how long the training took; run the benchmark again")
    return trained.with_scoring(cell.config.scoring), seconds


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


def run_robustness(cell: Cell, out: Path, asked: RobustnessPlan) -> Changed:
    """The cell's saved detector on changed test images."""
    detector = load_detector(_artifact(out, cell.cell_id), device=_device(cell.resources))
    shards = ShardSet.open(str(_shards_place(out, cell.shards)))
    rows = robustness(
        detector, shards, cell=cell.cell_id, detector_name=cell.method, dataset=cell.dataset, category=cell.category,
        perturbations={name: {"name": name} for name in asked.perturbations}, severities=asked.severities,
        attacks=asked.attacks, max_images=asked.max_images,
        batch_size=cell.config.execution.scoring_batch_size,
    )  # fmt: skip
    return Changed(cell.cell_id, _described(asked), list(rows))


def _described(asked: RobustnessPlan) -> str:
    return asked.model_dump_json(exclude={"methods", "datasets"})


def _is_robust(cell: Cell, out: Path, asked: RobustnessPlan) -> bool:
    path = out / "cells" / cell.cell_id / _ROBUST
    return path.exists() and path.read_text(encoding="utf-8") == _described(asked)


def _robustness_of(plan: Plan, cell: Cell) -> RobustnessPlan | None:
    asked = plan.suite.robustness
    if asked is None or (asked.methods is not None and cell.method not in asked.methods):
        return None
    return None if asked.datasets is not None and cell.dataset not in asked.datasets else asked


def _shards_key(cell: Cell) -> str:
    return f"shards-{cell.shards}"


def _robustness_key(cell: Cell) -> str:
    return f"robustness-{cell.cell_id}"


def _write(data: DataConfig, place: Path) -> None:
    """Write the shards unless they are finished: then their source is not looked at, and may be gone."""
    if not ShardSet.is_finished(str(place)):
        write_shards(data, str(place))


def _record_failure(out: Path, task: Task, failure: Failure) -> None:
    line = {
        "cell": task.key, "name": task.name, "type": failure.type, "message": failure.message,
        "traceback": failure.traceback, "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    append_lines(out / FAILURES, [json.dumps(line)])


def _device(resources: Resources) -> str:
    return "cuda" if resources.num_gpus > 0 else "cpu"


def _shards_place(out: Path, key: str) -> Path:
    return out / "shards" / key


def _artifact(out: Path, cell_id: str) -> Path:
    return out / "cells" / cell_id / ARTIFACT
