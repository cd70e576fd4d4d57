"""The second level of a sweep: settings that need no training, proposed by Optuna and measured on trained networks."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.trial import TrialState

from raydiff.distributed.points import own_point, stored_point
from raydiff.errors import ConfigError, ScoreError, ShapeError
from raydiff.search_space import SearchSpace
from raydiff.sweep.jobs import SCORING, Networks
from raydiff.sweep_records import Setting

__all__ = ["best_of", "name_objectives", "sampler_of", "search_settings"]

_KEEP_EVERY = 20
_STARTUP = 10


def search_settings(networks: Networks, count: int, on_kept: Callable[[int], None] = lambda _: None) -> list[Setting]:
    """Try so many settings of the parameters that change no weights; each has one row, which is kept as it goes.

    A setting that is proposed again is not measured again, so in a small space there are fewer rows. The first is the
    config's own. What an interrupted search had measured counts, and is told to the sampler.

    Raises:
        ConfigError: not one of them can be measured.
    """
    space, given = networks.job.space, networks.job.params
    if not space.paths(SCORING):
        return _only(networks)
    rows = [row for row in networks.measured if row.phase == "search" and row.varied is None]
    study = _study(space, len(rows), networks.job.key)
    _tell_again(study, space, given, rows)
    if not rows:
        for point in _first_points(networks):
            study.enqueue_trial(point, skip_if_exists=True)
    unkept: list[Setting] = []
    refused = ""
    for _ in range(len(rows), count):
        trial = study.ask()
        params = {**given, **space.suggest(trial, SCORING, given)}
        known = len(networks.measured)
        try:
            row = networks.measure(params)
        except (ConfigError, ScoreError, ShapeError) as error:  # as more steps than this schedule has
            study.tell(trial, state=TrialState.FAIL)
            refused = str(error)
            continue
        study.tell(trial, values_of(space, row))
        if len(networks.measured) > known:  # not proposed before
            unkept.append(row)
        if len(unkept) >= _KEEP_EVERY:
            networks.keep(unkept)
            rows += unkept
            unkept = []
            on_kept(len(rows))
    networks.keep(unkept)
    rows += unkept
    if not rows:
        raise ConfigError(f"no setting can be measured with {dict(given)}: {refused}")
    return rows


def best_of(space: SearchSpace, rows: list[Setting]) -> Setting:
    """The best by the first objective, of equals by the next ones, so that no other is better in every respect."""
    signs = [1 if direction == "maximize" else -1 for direction in space.directions()]
    return max(rows, key=lambda row: [sign * value for sign, value in zip(signs, values_of(space, row), strict=True)])


def values_of(space: SearchSpace, row: Setting) -> list[float]:
    """The objectives' values, in order."""
    return [row.values[objective.name] for objective in space.objectives]


def sampler_of(space: SearchSpace, seed: int) -> optuna.samplers.BaseSampler:
    """What proposes: TPE over all parameters together, with a constant liar for what is running; NSGA-II; or random."""
    chosen = space.sampler or ("tpe" if len(space.objectives) == 1 else "nsga2")
    if chosen == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if chosen == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=max(8, min(50, space.trials // 4)))
    with _experimental():  # group: conditional parameters are modelled with those they appear with
        return optuna.samplers.TPESampler(
            seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=_STARTUP
        )


def name_objectives(study: optuna.Study, space: SearchSpace) -> None:
    """For Optuna's own plots."""
    with _experimental():
        study.set_metric_names([objective.name for objective in space.objectives])


@contextmanager
def _experimental() -> Iterator[None]:
    """What Optuna calls experimental is pinned in constraints.txt."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


def _only(networks: Networks) -> list[Setting]:
    """The config's own scoring, where the space leaves it alone."""
    known = len(networks.measured)
    row = networks.measure(dict(networks.job.params))
    if len(networks.measured) > known:
        networks.keep([row])
    return [row]


def _study(space: SearchSpace, num_known: int, key: str) -> optuna.Study:
    optuna.logging.set_verbosity(logging.ERROR)
    seed = (int(key[:7], 16) + 1000 * num_known + space.sampler_seed) % 2**31
    return optuna.create_study(directions=list(space.directions()), sampler=sampler_of(space, seed))


def _tell_again(study: optuna.Study, space: SearchSpace, given: Mapping[str, Any], rows: list[Setting]) -> None:
    for row in rows:
        study.enqueue_trial(stored_point(space, row.params, SCORING, given))
        trial = study.ask()
        space.suggest(trial, SCORING, given)
        study.tell(trial, values_of(space, row))


def _first_points(networks: Networks) -> list[dict[str, Any]]:
    """What the config itself has, as far as it lies in the space, then the points of the space."""
    job = networks.job
    own = own_point(job.space, job.config, SCORING, job.params)
    return [own, *(stored_point(job.space, point, SCORING, job.params) for point in job.space.points)]
