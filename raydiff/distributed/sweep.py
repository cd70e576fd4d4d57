"""A sweep on Ray Tune with Optuna: trials, their study, what is done with trials that are stopped or fail.

Optuna proposes combinations of the parameters that change weights; a trial trains its networks and searches the other
parameters on them (:mod:`raydiff.distributed.second_level`). The study is an ordinary Optuna study, the trial's value
that of its best setting. Small trials are plain functions in actors that are used again; only trials of several workers
start Ray Train inside.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import ray
from optuna.trial import TrialState
from ray import tune
from ray.tune.search.optuna import OptunaSearch

from raydiff.config import ExperimentConfig
from raydiff.distributed.points import own_point, stored_point
from raydiff.distributed.room import wait_for_room
from raydiff.distributed.second_level import best_of, search_settings, values_of
from raydiff.distributed.study import EXHAUSTED, num_tried
from raydiff.distributed.train import in_a_thread
from raydiff.errors import ConfigError, RaydiffError, StorageError
from raydiff.journal import alone_in, write_whole
from raydiff.mirror import Mirror
from raydiff.runtime import CHECKPOINTS
from raydiff.search_space import SearchSpace
from raydiff.shards import ShardSet
from raydiff.storage import Storage
from raydiff.sweep.jobs import TRAINING, Fit, Job, placed, stopped, train_networks
from raydiff.sweep_records import append_trainings

__all__ = ["Ended", "device_of", "fit_of", "parallel_of", "search"]

_FAILURE = "failure.json"
_MAX_RETRIES = 2
_MAX_DRY = 3
_TUNE = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the rows and the study are the record
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a report on the way has a loss, the last one the objectives
    "RAY_AIR_NEW_OUTPUT": "0",  # what there is to say is said by the command
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


@dataclass(frozen=True)
class Ended:
    """A trial that has ended, for who watches: ``value`` of the first objective, None unless it is complete."""

    number: int
    state: str
    value: float | None
    seconds: float
    num_done: int
    num_trials: int
    best: float | None
    failure: str = ""


def search(
    space: SearchSpace,
    config: ExperimentConfig,
    out: Path,
    shards: ShardSet,
    study: optuna.Study,
    *,
    on_ended: Callable[[Ended], None] = lambda _: None,
    mirror: Mirror | None = None,
) -> None:
    """Run the trials that are left. Trials that a killed driver left running are taken up, none is run twice.

    Args:
        space: checked against ``config``.
        config: what the sweep begins with.
        out: a folder that every node can reach; or, with a ``mirror``, its folder, that nobody else need reach.
        shards: what to train on; the test split is not opened.
        study: from :func:`open_study`.
        on_ended: called as each trial ends.
        mirror: of the sweep's place in a store.

    Raises:
        ConfigError: no node has room for a trial.
    """
    store = None if mirror is None else mirror.uri
    job = Job(out.resolve(), shards.uri, space, config, {}, space.seeds, device=device_of(space), store=store)
    total = space.trials if space.paths(TRAINING) else 1
    parallel, dry = parallel_of(space), 0
    while num_tried(study) < total and not study.user_attrs.get(EXHAUSTED):
        done = num_tried(study)
        _run(job, study, total, min(parallel, total - done), on_ended, mirror)
        dry = dry + 1 if num_tried(study) == done else 0  # what is proposed again costs nothing, and does not count
        if dry == _MAX_DRY:
            study.set_user_attr(EXHAUSTED, True)


def _run(
    job: Job, study: optuna.Study, total: int, parallel: int, on_ended: Callable[[Ended], None], mirror: Mirror | None
) -> None:
    """As many trials as there are left to do. Tune's own folder is the driver's alone: no checkpoint comes there."""
    stop, place = _Stop(), job.out / (".tune" if mirror else "tune")
    shutil.rmtree(place, ignore_errors=True)
    os.environ |= _TUNE
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_trial, job=job), _held(job.space)),
        tune_config=tune.TuneConfig(
            search_alg=_Searcher(study, job, total, stop, on_ended, mirror), scheduler=_scheduler(job.space, job),
            num_samples=total - num_tried(study), max_concurrent_trials=parallel,
            reuse_actors=job.space.num_workers == 1,
        ),
        run_config=tune.RunConfig(
            name="trials", storage_path=str(place), verbose=0, callbacks=[stop],
            failure_config=tune.FailureConfig(max_failures=_MAX_RETRIES),
        ),
    )  # fmt: skip
    in_a_thread(tuner.fit, stop.now)
    shutil.rmtree(place, ignore_errors=True)


def _trial(config: Mapping[str, Any], *, job: Job) -> None:
    """One trial, in a worker."""
    import torch

    torch.set_num_threads(_threads(job.space))
    job = replace(job, params=json.loads(config["params"]), trial=config["trial"])
    with placed(job) as (here, mirror):
        told = _worked_off(here, mirror)
    tune.report(told)


def _worked_off(job: Job, mirror: Mirror | None) -> dict[str, Any]:
    """What to tell of a trial. An error of ours would come again, so it is reported and not tried again."""
    from threadpoolctl import threadpool_limits

    begun = time.monotonic()
    (job.folder / _FAILURE).unlink(missing_ok=True)
    keep = mirror.put_now_and_then if mirror else lambda: None

    def report(step: int, loss: float) -> None:
        if job.space.pruning is not None:
            if mirror is not None:
                mirror.put()  # it may be stopped here, and who stops it looks there
            tune.report({"training_step": step, "loss": loss})

    try:
        with threadpool_limits(_threads(job.space)), alone_in(job.folder, wait=True):
            networks = train_networks(job, fit_of(job), report, keep=keep)
            rows = search_settings(networks, job.space.settings_per_training, lambda _: keep())
    except StorageError as error:  # a full disk, a network file system that hiccups: worth another try
        _note_failure(job, error)
        raise
    except RaydiffError as error:
        _note_failure(job, error)
        return {"ended": "failed"}
    except Exception as error:
        _note_failure(job, error)
        raise
    best = best_of(job.space, rows)
    told = {
        "key": job.key, "values": values_of(job.space, best), "params": best.params, "num_settings": len(rows),
        "training_seconds": sum(row.seconds for row in networks.rows.values()), "seconds": time.monotonic() - begun,
    }  # fmt: skip
    return {"ended": "complete", "told": json.dumps(told)}


def _threads(space: SearchSpace) -> int:
    return max(1, math.ceil(space.num_cpus))


class _Searcher(OptunaSearch):  # type: ignore[misc]  # Ray has no types
    """Ray's, with a study of ours: trials that end early are told as pruned, failures with their reason."""

    def __init__(
        self, study: optuna.Study, job: Job, num_trials: int, stop: _Stop, on_ended: Callable[[Ended], None],
        mirror: Mirror | None,
    ) -> None:  # fmt: skip
        names = [objective.name for objective in job.space.objectives]
        super().__init__(metric=names, mode=["max"] * len(names))  # unused: values are told in on_trial_complete
        self._space, self._ot_study = job.space.suggest, study
        self._job, self._num_trials, self._on_ended, self._stop = job, num_trials, on_ended, stop
        self._stale = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        self._begun: dict[str, float] = {}
        self._mirror = mirror
        self._keys: dict[str, str] = {}
        self._held_back: optuna.Trial | None = None
        for point in _first_points(job):
            study.enqueue_trial(point, skip_if_exists=True)

    def __getstate__(self) -> dict[str, Any]:
        """For Tune, which writes down what it never reads here: all but what belongs to this process."""
        return {name: value for name, value in self.__dict__.items() if name != "_mirror"}

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The next combination, as text; first those that were running when a driver was killed.

        In a store, where no trial can wait for another, the same networks are proposed when that has ended.
        """
        trial = self._held_back or self._next()
        params = self._job.space.suggest(trial, TRAINING)
        if self._mirror is not None:
            key = replace(self._job, params=params).key
            self._held_back = trial if key in self._keys.values() else None
            if self._held_back is not None:
                return None
            self._keys[trial_id] = key
            self._mirror.put()
        self._ot_trials[trial_id] = trial
        self._begun[trial_id] = time.monotonic()
        return {"params": json.dumps(params), "trial": trial.number}

    def _next(self) -> optuna.Trial:
        if self._stale:
            return optuna.trial.Trial(self._ot_study, self._stale.pop(0)._trial_id)
        return self._ot_study.ask()

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Keep the loss on the way, for Optuna's plots, where there is one objective."""
        if "training_step" in result and "ended" not in result and len(self._job.space.objectives) == 1:
            self._ot_trials[trial_id].report(result["loss"], result["training_step"])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the study how it ended."""
        trial = self._ot_trials.pop(trial_id, None)
        if trial is None or self._stop.wanted:  # after Ctrl-C it stays running, and is taken up the next time
            return
        seconds = time.monotonic() - self._begun.pop(trial_id)
        ended = (result or {}).get("ended")
        params = self._job.space.suggest(trial, TRAINING)
        job = replace(self._job, params=params, trial=trial.number)
        if self._mirror is not None:
            self._keys.pop(trial_id, None)
            self._mirror.fetch(job.name, records=True)
        trial.set_user_attr("key", job.key)
        trial.set_user_attr("wall_seconds", seconds)
        failure, value = "", None
        if error or ended == "failed":
            state, failure = TrialState.FAIL, _failure(job)
            trial.set_user_attr("failure", failure)
            append_trainings(job.folder, stopped(job, "failed", failure))
            self._ot_study.tell(trial, state=state)
        elif ended == "complete":
            state, told = TrialState.COMPLETE, json.loads(result["told"]) if result else {}
            for name in ("training_seconds", "seconds", "num_settings"):
                trial.set_user_attr(name, told[name])
            trial.set_user_attr("best_params", {path: _plain(value) for path, value in told["params"].items()})
            value = told["values"][0]
            self._ot_study.tell(trial, told["values"])
        else:
            state = TrialState.PRUNED
            append_trainings(job.folder, stopped(job, "pruned"))
            self._ot_study.tell(trial, state=state)
        if self._mirror is not None:
            self._mirror.put()
        self._on_ended(
            Ended(
                trial.number, state.name.lower(), value, seconds, num_tried(self._ot_study), self._num_trials,
                _best_value(self._ot_study), failure,
            )
        )  # fmt: skip

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the study is the state."""


class _Stop(tune.Callback):  # type: ignore[misc]  # Ray has no types
    """Ends Tune's loop from within when it is wanted."""

    def __init__(self) -> None:
        self.wanted = False

    def now(self) -> None:
        """At the next step."""
        self.wanted = True

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:  # noqa: ARG002
        """See the class."""
        if self.wanted:
            raise InterruptedError("stopped by Ctrl-C")


def _first_points(job: Job) -> list[dict[str, Any]]:
    """What the config itself has, as far as it lies in the space, then the points of the space; each once."""
    own = own_point(job.space, job.config, TRAINING)
    points = [own, *(stored_point(job.space, point, TRAINING) for point in job.space.points)]
    return [point for i, point in enumerate(points) if point and point not in points[:i]]


def _best_value(study: optuna.Study) -> float | None:
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    values = [float(trial.values[0]) for trial in done if trial.values]
    if not values:
        return None
    return max(values) if study.directions[0].name == "MAXIMIZE" else min(values)


def fit_of(job: Job) -> Fit | None:
    """Ray Train where a trial has several workers; None, this process, otherwise.

    With a store the workers' checkpoints go there; ``job.out`` is this node's copy, and gets what they leave.
    """
    if job.space.num_workers == 1:
        return None
    from raydiff.distributed.train import fit

    if job.store is None:
        return lambda config, place, shards, heed: fit(config, place, shards, on_metrics=heed, spaces=job.spaces)
    storage = Storage.of(job.store)

    def fit_there(
        config: ExperimentConfig, place: Path, shards: ShardSet, heed: Callable[[Mapping[str, Any]], None]
    ) -> None:
        name = place.relative_to(job.out).as_posix()
        fit(config, storage / name, shards, on_metrics=heed, spaces=job.spaces)
        (storage / name / CHECKPOINTS).delete_tree()
        shutil.rmtree(place / CHECKPOINTS, ignore_errors=True)
        Mirror(storage, job.out).fetch(name)

    return fit_there


def device_of(space: SearchSpace) -> str:
    """Where settings are measured; the GPUs of a trial of several workers are held by those, not by itself."""
    return "cuda" if space.num_gpus and space.num_workers == 1 else "cpu"


def _held(space: SearchSpace) -> dict[str, float]:
    """What the trial itself holds; the workers of Ray Train hold their own."""
    if space.num_workers > 1:
        return {"cpu": 0.01}
    return {"cpu": space.num_cpus} | ({"gpu": space.num_gpus} if space.num_gpus else {})


def parallel_of(space: SearchSpace) -> int:
    """How many trials fit at a time; with Ray Train inside so few that their workers always find room.

    Raises:
        ConfigError: not one does.
    """
    room, num_nodes = wait_for_room({"CPU": space.num_cpus, "GPU": space.num_gpus}, space.num_workers)
    if room < space.num_workers:
        raise ConfigError(
            f"a trial has {space.num_workers} worker(s) with {space.num_cpus:g} CPU and {space.num_gpus:g} GPU each"
            f" (num_workers, num_cpus, num_gpus); the cluster's {num_nodes} node(s) have room for {room}; ask for less"
        )
    if space.num_workers == 1:
        return room
    spare = ray.cluster_resources().get("CPU", 0) - 1  # Ray Data's tasks want one
    wanted = space.num_workers * space.num_cpus + 0.01
    if spare < wanted:
        raise ConfigError(
            f"a trial has {space.num_workers} workers with {space.num_cpus:g} CPU each (num_workers, num_cpus), and the"
            f" cluster has {spare:g} for them, one more being Ray Data's; lower num_cpus, or add a node"
        )
    return min(room // space.num_workers, int(spare // wanted))


def _scheduler(space: SearchSpace, job: Job) -> Any:
    """Asynchronous successive halving on the held-out loss, or first in first out."""
    if space.pruning is None:
        return None
    from ray.tune.schedulers import ASHAScheduler

    steps = job.fitted.training.num_steps
    return ASHAScheduler(
        time_attr="training_step", metric="loss", mode="min", max_t=steps + 1, stop_last_trials=False,
        grace_period=min(space.pruning.grace_steps, steps), reduction_factor=space.pruning.reduction_factor,
    )  # fmt: skip


def _note_failure(job: Job, error: BaseException) -> None:
    record = {"message": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    job.folder.mkdir(parents=True, exist_ok=True)
    write_whole(job.folder / _FAILURE, json.dumps(record))


def _failure(job: Job) -> str:
    try:
        return str(json.loads((job.folder / _FAILURE).read_text(encoding="utf-8"))["traceback"])
    except (OSError, ValueError, KeyError):
        return f"its worker was lost {_MAX_RETRIES + 1} times, the last time without a word: killed, or out of memory"


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | type(None)) else json.dumps(value)
