"""A whole sweep: the search, the curves around its best point, the winner over fresh seeds, the report.

::

    OUT/study.db        the Optuna study, unless --storage names another place
    OUT/trainings/KEY/  see raydiff.sweep.jobs
    OUT/refit/          the winner and the starting point, a run folder per seed
    OUT/winner.yaml     the winner as a config for raydiff fit
    OUT/settings.jsonl  OUT/trainings.jsonl  OUT/final.json   see raydiff.sweep_records
    OUT/report.html     OUT/tables/

Each phase keeps what it has finished, so the same command goes on after an interruption. Only the last one reads the
test split.

OUT may be in a store (``s3://bucket/path``): see :mod:`raydiff.mirror`. The study is then a file there all the same,
put there as a trial begins and ends.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.trial import TrialState

from raydiff.config import ExperimentConfig
from raydiff.distributed.benchmark import RayWorkers
from raydiff.distributed.points import as_trial
from raydiff.distributed.second_level import best_of, values_of
from raydiff.distributed.study import (
    finished_trials,
    open_study,
    settings_study,
)
from raydiff.distributed.sweep import Ended, device_of, fit_of, parallel_of, search
from raydiff.errors import DataError, WorkerError
from raydiff.journal import alone_in, write_whole
from raydiff.mirror import Mirror, on_node
from raydiff.runtime import CHECKPOINTS
from raydiff.search_space import SearchSpace
from raydiff.shards import ShardSet
from raydiff.suite import Resources
from raydiff.sweep.final import Curve, curves, is_drawn, refit, run_curve
from raydiff.sweep.jobs import Job
from raydiff.sweep_records import (
    SETTINGS,
    TRAININGS,
    Final,
    Refit,
    Setting,
    TrainingRow,
    append_settings,
    append_trainings,
    read_final,
    read_settings,
    read_trainings,
    write_final,
)
from raydiff.tasks import Progress, Task, drive

__all__ = ["WINNER", "Sweep", "run_sweep"]

REPORT, WINNER = "report.html", "winner.yaml"


@dataclass(frozen=True)
class Sweep:
    """Where a sweep runs and what it is about.

    ``storage`` is an SQLAlchemy URL, a file in ``out`` by default. With a ``mirror`` ``out`` is its folder.
    """

    space: SearchSpace
    config: ExperimentConfig
    out: Path
    name: str
    storage: str | None = None
    mirror: Mirror | None = None

    @property
    def label(self) -> str:
        """The place, for messages."""
        return str(self.out) if self.mirror is None else self.mirror.label

    def keep(self) -> None:
        """Put what is new in ``out`` into the store, where there is one."""
        if self.mirror is not None:
            self.mirror.put()

    @property
    def url(self) -> str:
        """The study's storage."""
        return self.storage or f"sqlite:///{self.out.resolve() / 'study.db'}"

    def study(self, shards: ShardSet) -> optuna.Study:
        """New, or gone on with; see :func:`raydiff.distributed.sweep.open_study`."""
        identity = self.identity | {"data": shards.normal_digest}
        label = None if self.mirror is None else self.label
        return open_study(self.space, self.out, storage=self.url, name=self.name, identity=identity, label=label)

    @property
    def identity(self) -> dict[str, str]:
        """What a study's trials must share, the data aside."""
        return {"space": self.space.digest(), "config": self.space.apply(self.config, {}).digest()}

    def job(self, shards: ShardSet) -> Job:
        """One without parameters yet."""
        device, store = device_of(self.space), None if self.mirror is None else self.mirror.uri
        return Job(
            self.out.resolve(), shards.uri, self.space, self.config, {}, self.space.seeds, device=device, store=store
        )


def run_sweep(
    sweep: Sweep,
    shards: ShardSet,
    *,
    test: bool = True,
    on_trial: Callable[[Ended], None] = lambda _: None,
    on_task: Callable[[str, Progress], None] = lambda *_: None,
) -> Final | None:
    """Run what is not finished of all phases, and write the report. Ray is connected.

    Args:
        sweep: the space checked against the config.
        shards: the data; ``test`` says whether its test split is read in the end.
        test: False leaves the test split alone.
        on_trial: called as a trial ends.
        on_task: called with the phase, ``around`` or ``refit``, as one of its tasks ends.

    Returns:
        What became of the winner; None where there is none, or the space has no ``refit_seeds``.

    Raises:
        ConfigError: see :func:`raydiff.distributed.sweep.open_study` and ``search``.
        DataError: every trial failed; the message has the first reason.
    """
    with alone_in(sweep.out):
        study = sweep.study(shards)
        sweep.keep()
        search(sweep.space, sweep.config, sweep.out, shards, study, on_ended=on_trial, mirror=sweep.mirror)
        settings = gather(sweep, study)
        if not settings:
            raise DataError(
                f"{sweep.label}: every trial failed; {_first_failure(study)}; mend that, and choose another --out"
            )
        _add_settings(sweep, settings)
        best = best_of(sweep.space, settings)
        write_whole(sweep.out / WINNER, _winner(sweep, best))
        write_report(sweep)
        sweep.keep()
        around = curves(sweep.job(shards), best)
        failed = _run(
            sweep.space, [_curve_task(sweep.space, curve) for curve in around if not is_drawn(curve)],
            partial(_drawn, sweep, partial(on_task, "around")),
        )  # fmt: skip
        gather(sweep, study, around)
        final, unfitted = _refitted(sweep, shards, best, test=test, on_task=partial(on_task, "refit"))
        write_report(sweep)
        sweep.keep()
    if failed or unfitted:
        raise WorkerError(
            f"{sweep.label}: {failed + unfitted} task(s) after the search failed, as said above; the same command tries"
            " them again"
        )
    return final


def _drawn(sweep: Sweep, on_task: Callable[[Progress], None], progress: Progress) -> None:
    """A curve's rows have come."""
    if sweep.mirror is not None:
        sweep.mirror.fetch(f"trainings/{progress.task.key}", records=True)
    on_task(progress)


def write_report(sweep: Sweep) -> Path | None:
    """Draw the report again from the rows; None before there are any."""
    from raydiff.distributed.sensitivity import importances
    from raydiff.report import write_sweep_report

    settings = read_settings(sweep.out)
    if not settings:
        return None
    objective = sweep.space.objectives[0].name
    found = importances(sweep.space, settings, objective)
    return write_sweep_report(sweep.space, sweep.out, sweep.out / REPORT, found)


def gather(sweep: Sweep, study: optuna.Study, around: Sequence[Curve] = ()) -> list[Setting]:
    """Write ``settings.jsonl`` and ``trainings.jsonl`` anew from the folders; the search's settings are given back.

    Of the curves those of an earlier best point, or with other seeds, are left out.
    """
    wall: dict[str, float] = {}
    for trial in finished_trials(study):
        if trial.state == TrialState.COMPLETE:  # of several with the same networks the first one trained them
            wall.setdefault(trial.user_attrs["key"], trial.user_attrs["wall_seconds"] / len(sweep.space.seeds))
    drawn = {
        (curve.job.key, _text([dict(params), varied, sorted(curve.job.seeds)]))
        for curve in around for params, varied in curve.points
    }  # fmt: skip
    wanted = {curve.job.key for curve in around}
    trainings: list[TrainingRow] = []
    settings: list[Setting] = []
    for folder in sorted((sweep.out / "trainings").glob("*")):
        rows = {(row.seed, row.state == "complete"): row for row in read_trainings(folder)}
        done = {seed for seed, complete in rows if complete}
        kept = [row for (seed, complete), row in rows.items() if complete or seed not in done]
        kept = [row for row in kept if row.phase == "search" or row.key in wanted]
        trainings += [replace(row, trial_seconds=wall.get(row.key)) if row.phase == "search" else row for row in kept]
        settings += [
            row for row in read_settings(folder)
            if row.phase == "search"
            or (row.training, _text([dict(row.params), row.varied, sorted(row.by_seed)])) in drawn
        ]  # fmt: skip
    trainings.sort(key=lambda row: (row.phase != "search", row.trial or 0, row.key, row.seed))
    settings.sort(key=lambda row: (row.phase != "search", row.trial or 0, row.training))
    for name in (SETTINGS, TRAININGS):
        (sweep.out / name).unlink(missing_ok=True)
    append_settings(sweep.out, settings)
    append_trainings(sweep.out, trainings)
    return [row for row in settings if row.phase == "search"]


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def _refitted(
    sweep: Sweep, shards: ShardSet, best: Setting, *, test: bool, on_task: Callable[[Progress], None]
) -> tuple[Final | None, int]:
    """The winner and the starting point over fresh seeds, and how many trainings failed."""
    space, job = sweep.space, sweep.job(shards)
    if not space.refit_seeds:
        return None, 0
    names = [objective.name for objective in space.objectives]
    tasks: list[Task] = []
    for which, params in (("winner", best.params), ("start", {})):
        for seed in space.refit_seeds:
            config = job.scored(params, seed)
            name = f"refit/{which}-{config.digest()[:12]}"
            call = partial(_refit, job, name, config, shards, names, test=test)
            tasks.append(Task(f"{which}-{seed}", "training", f"{which}, seed {seed}", (), _resources(space), call))
    found: dict[str, Refit] = {}

    def note(progress: Progress) -> None:
        if progress.outcome.failure is None:
            found[progress.task.key] = progress.outcome.value
        on_task(progress)

    failed = _run(space, tasks, note)
    settings, trainings = read_settings(sweep.out), read_trainings(sweep.out)
    final = Final(
        params=best.params, promised=best.values,
        winner=tuple(found[f"winner-{seed}"] for seed in space.refit_seeds if f"winner-{seed}" in found),
        start=tuple(found[f"start-{seed}"] for seed in space.refit_seeds if f"start-{seed}" in found),
        num_trainings=sum(row.phase == "search" for row in trainings),
        num_settings=sum(row.phase == "search" for row in settings),
        extra={
            "training": best.training, "trial": best.trial,
            "tested": _tested(sweep.out, best.params if test else None),
        },
    )  # fmt: skip
    write_final(sweep.out, final)
    return final, failed


def _refit(
    job: Job, name: str, config: ExperimentConfig, shards: ShardSet, names: Sequence[str], *, test: bool
) -> Refit:
    """In the sweep's folder; with a store on a copy of what lies there, which is put back."""
    if job.store is None:
        return refit(job, config, job.out / name, shards, names, fit=fit_of(job), test=test)
    with on_node(job.store, name) as mirror:
        here = replace(job, out=mirror.folder)
        done = refit(
            here, config, here.out / name, shards, names, fit=fit_of(here), test=test, keep=mirror.put_now_and_then
        )
        shutil.rmtree(mirror.folder / name / CHECKPOINTS, ignore_errors=True)
        return done


def _tested(out: Path, params: Mapping[str, Any] | None) -> list[str]:
    """The winners of this sweep for which the test split has been read, with this one where it is."""
    before = read_final(out)
    known = set(before.extra.get("tested", ())) if before else set[str]()
    return sorted(known if params is None else known | {_text(dict(params))})


def _run(space: SearchSpace, tasks: Sequence[Task], note: Callable[[Progress], None]) -> int:
    """Run tasks, with several workers each no more at a time than find room; how many failed."""
    if not tasks:
        return 0
    failed = 0
    at_a_time = parallel_of(space) if space.num_workers > 1 else None
    for progress in drive(tasks, RayWorkers(tasks, num_workers=at_a_time)):
        failed += progress.outcome.failure is not None
        note(progress)
    return failed


def _curve_task(space: SearchSpace, curve: Curve) -> Task:
    varied = sorted({path for _, path in curve.points if path is not None})
    name = f"{len(curve.points)} points ({', '.join(varied[:3])}{', ...' if len(varied) > 3 else ''})"
    call = partial(run_curve, curve, fit_of)
    return Task(curve.job.key, "training", name, (), _resources(space), call)


def _resources(space: SearchSpace) -> Resources:
    """Ray Train's workers hold their own."""
    if space.num_workers > 1:
        return Resources(num_cpus=0.01, num_gpus=0.0)
    return Resources(num_cpus=space.num_cpus, num_gpus=space.num_gpus)


def _winner(sweep: Sweep, best: Setting) -> str:
    config = sweep.space.apply(sweep.config, best.params)
    head = f"# The winner of {sweep.space.title}: trial {best.trial} of study {sweep.name}.\n"
    return head + yaml.safe_dump(config.to_dict(), sort_keys=False)


def _first_failure(study: optuna.Study) -> str:
    failures = [trial.user_attrs.get("failure", "") for trial in study.get_trials(deepcopy=False)]
    lines = next((text.strip().splitlines() for text in failures if text), ["see the study"])
    return f"the first said: {lines[-1]}"


def _add_settings(sweep: Sweep, settings: Sequence[Setting]) -> None:
    """Every setting as a trial of a second study, NAME/settings, for Optuna's own plots; none twice."""
    space = sweep.space
    study = settings_study(space, storage=sweep.url, name=sweep.name)
    known = len(study.get_trials(deepcopy=False))
    if known >= len(settings):
        return
    held = {_identity(trial.user_attrs["training"], trial.user_attrs["params"]) for trial in study.trials}
    study.add_trials(
        as_trial(
            space, row.params, values_of(space, row),
            {"training": row.training, "trial": row.trial, "params": dict(row.params)},
        )
        for row in settings if _identity(row.training, row.params) not in held
    )  # fmt: skip


def _identity(training: str, params: Mapping[str, Any]) -> tuple[str, str]:
    return training, json.dumps(dict(params), sort_keys=True)
