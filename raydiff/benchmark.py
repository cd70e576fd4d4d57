"""A benchmark's cells, run: each once, in any order, on any number of workers, with the rows of a finished one kept.

::

    OUT/shards/<key>/                one set per data section
    OUT/spaces/                      spaces that are trained, for all networks (:mod:`raydiff.fitted_spaces`)
    OUT/trainings/<key>/             a run folder per network; taken up from its checkpoints
    OUT/cells/<cell>/artifact/       the calibrated detector
    OUT/results.jsonl  predictions/  the rows, appended by the driver alone
    OUT/robustness.jsonl             rows of changed test images
    OUT/failures.jsonl               what went wrong, with tracebacks; tried again the next time

A cell is finished when ``results.jsonl`` has its row and its artefact exists. Work is cut into tasks (shards, spaces
that several trainings need, trainings, cells, robustness), which :mod:`raydiff.tasks` runs in this process and
:mod:`raydiff.distributed.benchmark` on Ray.

Where OUT is in a store (``s3://bucket/path``), it looks the same there. Tasks then work in scratch folders of their
nodes, and have put what they made into the store before they are done (:func:`raydiff.mirror.on_node`); the driver
works on a copy of the records (:func:`raydiff.mirror.mirrored`), and a row is in the store before it is told.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from raydiff.cells import (
    artifact_place,
    is_robust,
    is_trained,
    run_cell,
    run_robustness,
    run_space,
    run_training,
    shards_place,
    training_place,
)
from raydiff.config import DataConfig
from raydiff.crossfit import remove_checkpoints
from raydiff.errors import ConfigError, DataError
from raydiff.experiment import ARTIFACT
from raydiff.fitted_spaces import SPACES
from raydiff.journal import alone_in, append_lines, read_lines
from raydiff.mirror import Mirror, on_node
from raydiff.plan import Cell, Plan, Training, plan
from raydiff.preflight import check
from raydiff.results import append_robustness, save_evaluations
from raydiff.shards import ShardSet, write_shards
from raydiff.storage import Storage
from raydiff.suite import Resources, RobustnessPlan
from raydiff.tasks import Failure, Kind, Progress, SerialWorkers, Task, Workers, drive

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
    return {cell for cell in found if (artifact_place(out, cell) / "manifest.json").exists()}


def run_benchmark(
    plan: Plan,
    out: Path,
    workers: Callable[[Sequence[Task]], Workers] = SerialWorkers,
    *,
    command: str | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    mirror: Mirror | None = None,
) -> Benchmark:
    """Run what is not finished. Rows are written as cells end, whole lines, so that nothing finished is ever lost.

    Args:
        plan: of the whole suite, or a part.
        out: a folder that every worker can reach; or, with a ``mirror``, its folder, that nobody else need reach.
        workers: given what is to be done, who does it; called when all has been checked, and not when nothing is left.
        command: the command line, for the record.
        on_progress: called after each task.
        mirror: of the benchmark's place in a store, from :func:`raydiff.mirror.mirrored`.

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
        store = None if mirror is None else mirror.uri
        tasks = tasks_of(plan, out, done, command=command, store=store)
        result = Benchmark(sum(cell.cell_id in done for cell in plan.cells))
        if not tasks:
            return result
        check_unfinished(plan, out, tasks, store=store)
        try:
            able = workers(tasks)
        except ConfigError as error:
            raise ConfigError(f"{plan.path}: {error}") from error
        if is_new:  # what is refused leaves nothing behind
            stack.enter_context(alone_in(out))
        _run(plan, out, drive(tasks, able), result, on_progress, mirror)
    return result


def _run(
    plan: Plan, out: Path, steps: Iterator[Progress], result: Benchmark, on_progress: Callable[[Progress], None],
    mirror: Mirror | None,
) -> None:  # fmt: skip
    """Write down what each task gave as it ends."""
    keep = _nothing if mirror is None else mirror.put
    cells = {cell.cell_id: cell for cell in plan.cells}
    for progress in steps:
        task, outcome = progress.task, progress.outcome
        if outcome.failure is not None:
            result.failed[task.name] = outcome.failure
            _record_failure(out, task, outcome.failure)
        elif task.kind == "robustness":
            append_robustness(out / ROBUSTNESS, outcome.value.rows)
            keep()  # the rows before what says that they are there
            outcome.value.mark(out)
        elif task.key in cells:
            save_evaluations(out / RESULTS, [outcome.value])
            result.finished.append(cells[task.key])
            if mirror is not None:  # its manifest, for the report
                mirror.fetch(f"cells/{task.key}", records=True)
        keep()
        on_progress(progress)


def check_unfinished(plan: Plan, out: Path, tasks: Sequence[Task] | None = None, *, store: str | None = None) -> None:
    """:func:`raydiff.preflight.check` of the cells that tasks are about, by default all that are not finished."""
    if tasks is None:
        tasks = tasks_of(plan, out, finished_cells(out), store=store)
    unfinished = {task.key for task in tasks}
    wanted = [cell for cell in plan.cells if {cell.cell_id, _robustness_key(cell)} & unfinished]
    check(plan.of(wanted), _Place(out, store).shards)


@dataclass(frozen=True)
class _Place:
    """Where tasks work: a folder that all of them reach; or, with a store, each in a scratch folder of its node."""

    out: Path
    store: str | None = None

    def shards(self, key: str) -> str:
        """Where a data section's shards lie: read and written there by every node."""
        return str(shards_place(self.out, key)) if self.store is None else _shards_uri(self.store, key)

    @property
    def spaces(self) -> str:
        """Where fitted spaces are kept."""
        return str(self.out / SPACES) if self.store is None else Storage.of(self.store).child(SPACES).uri

    def call(self, work: Callable[..., Any], shards: str, *names: str) -> Callable[[], Any]:
        """``work(out)``; with a store on a node, with what lies there under these names."""
        if self.store is None:
            return partial(work, self.out)
        return partial(_on_a_node, self.store, names, partial(work, shards=_shards_uri(self.store, shards)))


def _on_a_node(store: str, names: Sequence[str], work: Callable[..., Any]) -> Any:
    with on_node(store, *names) as mirror:
        return work(mirror.folder)


def _train_on_a_node(store: str, training: Training) -> None:
    """As it goes checkpoints are put into the store, for whoever goes on where this node is lost."""
    teacher = [] if training.teacher is None else [f"trainings/{training.teacher}"]
    with on_node(store, f"trainings/{training.key}", *teacher) as mirror:
        shards = _shards_uri(store, training.shards)
        spaces = _Place(mirror.folder, store).spaces
        run_training(training, mirror.folder, shards=shards, spaces=spaces, keep=mirror.put_now_and_then)
        remove_checkpoints(training_place(mirror.folder, training.key))


def tasks_of(
    plan: Plan, out: Path, done: set[str], *, command: str | None = None, store: str | None = None
) -> list[Task]:
    """What is left to do, every task behind those it needs.

    With a ``store`` the tasks leave what they make there, and ``out`` has its records.
    """
    tasks: dict[str, Task] = {}
    place = _Place(out, store)
    for cell in plan.cells:
        if cell.cell_id not in done:
            tasks |= {task.key: task for task in _cell_tasks(plan, cell, place, command) if task.key not in tasks}
        asked = _robustness_of(plan, cell)
        if asked is not None and (cell.cell_id not in done or not is_robust(cell, out, asked)):
            tasks |= {task.key: task for task in _shards_task(plan, cell, place) if task.key not in tasks}
            key, work = _robustness_key(cell), partial(run_robustness, cell, asked=asked)
            call = place.call(work, cell.shards, f"cells/{cell.cell_id}/{ARTIFACT}")
            needs = (_shards_key(cell), cell.cell_id)
            tasks[key] = Task(key, "robustness", f"{cell.name} changed", needs, cell.resources, call)
    return list(tasks.values())


def _shards_task(plan: Plan, cell: Cell, place: _Place) -> Iterator[Task]:
    """The writing of its shards, where they are not finished."""
    shards = place.shards(cell.shards)
    if not ShardSet.is_finished(shards):
        name = f"shards of {cell.dataset}" + (f"/{cell.category}" if cell.category else "")
        write = partial(_write, plan.shards[cell.shards], shards)
        yield Task(_shards_key(cell), "shards", name, (), Resources(), write)


def _cell_tasks(plan: Plan, cell: Cell, place: _Place, command: str | None) -> Iterator[Task]:
    """Its shards and its training where they are not finished, and itself."""
    yield from _shards_task(plan, cell, place)
    shards = _shards_key(cell)
    needs, fetched = [shards], list[str]()
    if cell.training is not None:
        training = plan.trainings[cell.training]
        needs.append(_training_key(training))
        fetched = [f"trainings/{training.key}"]
        yield from _training_tasks(plan, training, place)
    work = partial(run_cell, cell, cost=plan.suite.cost, command=command)
    kind: Kind = "baseline" if cell.baseline is not None else "diffusion"
    run = place.call(work, cell.shards, *fetched)
    yield Task(cell.cell_id, kind, cell.name, tuple(needs), cell.resources, run)


def _training_tasks(plan: Plan, training: Training, place: _Place) -> Iterator[Task]:
    """Where it is not finished: its teacher's, if it is a student, and itself."""
    if is_trained(training, place.out):
        return
    needs = [f"shards-{training.shards}"]
    sharing = [other for other in plan.trainings.values() if training.space and other.space == training.space]
    if len(sharing) > 1:
        name = f"space {training.config.space.name} of {len(sharing)} trainings, {sharing[0].name}"
        work = partial(run_space, training, place.out, shards=place.shards(training.shards), spaces=place.spaces)
        needs.append(key := f"space-{training.space}")
        yield Task(key, "space", name, (needs[0],), training.resources, work)
    if training.teacher is not None:
        teacher = plan.trainings[training.teacher]
        yield from _training_tasks(plan, teacher, place)
        needs.append(_training_key(teacher))
    fit = (
        partial(run_training, training, place.out) if place.store is None
        else partial(_train_on_a_node, place.store, training)
    )  # fmt: skip
    key, name = _training_key(training), f"training {training.name}"
    yield Task(key, "training", name, tuple(needs), training.resources, fit)


def _robustness_of(plan: Plan, cell: Cell) -> RobustnessPlan | None:
    asked = plan.suite.robustness
    if asked is None or (asked.methods is not None and cell.method not in asked.methods):
        return None
    return None if asked.datasets is not None and cell.dataset not in asked.datasets else asked


def _shards_key(cell: Cell) -> str:
    return f"shards-{cell.shards}"


def _training_key(training: Training) -> str:
    return f"training-{training.key}"


def _robustness_key(cell: Cell) -> str:
    return f"robustness-{cell.cell_id}"


def _write(data: DataConfig, place: str) -> None:
    """Write the shards unless they are finished: then their source is not looked at, and may be gone."""
    if not ShardSet.is_finished(place):
        write_shards(data, place)


def _record_failure(out: Path, task: Task, failure: Failure) -> None:
    line = {
        "cell": task.key, "name": task.name, "type": failure.type, "message": failure.message,
        "traceback": failure.traceback, "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    append_lines(out / FAILURES, [json.dumps(line)])


def _shards_uri(store: str, key: str) -> str:
    return Storage.of(store).child(f"shards/{key}").uri


def _nothing() -> None:
    """Local rows are kept when they are written."""
