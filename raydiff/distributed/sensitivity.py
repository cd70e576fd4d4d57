"""How much each parameter of a sweep matters, with intervals.

Two of Optuna's evaluators, on an in-memory study that is built of the rows of ``settings.jsonl``:

* ``fanova`` (Hutter, Hoos and Leyton-Brown 2014): a forest is fitted to the objective; the share of its variance over
  the whole space that one parameter explains alone. What interactions explain belongs to none.
* ``mean_decrease_impurity`` (Breiman 2001): the share of the variance among the settings that were tried which the
  forest's splits on a parameter take away, interactions included.

The first speaks of the space evenly, the second of where the sampler went. PED-ANOVA, Optuna's third, was tried and
left out: with 35 trainings its intervals could not tell a parameter with nine tenths of the variance from chance.

Settings of one training are not independent, so trainings are drawn with replacement, each with its settings. No
importance can be negative, so zero is no yardstick: beside each parameter stands a copy of it with its values shuffled
(among trainings if it changes weights, else among settings), and a parameter is told from chance where it beats its
copy in 97.5 % of the draws (as Boruta does: Kursa and Rudnicki 2010).

With fewer than six trainings, as of a sweep of scoring alone, there is nothing to draw from. Then settings are drawn,
the parameters that change weights are left out, and each training's mean is taken off: what is measured is what scoring
does on these trainings, not on others.

A conditional parameter is measured where it exists: on the settings that have it, with the parameters that all of
these have. Numbers on a log scale are given to the evaluators as logarithms, so that they weigh the space as the search
does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.random import Generator

from raydiff.report.sweep_data import Importance, bounds_of, sign_of
from raydiff.search_space import Parameter, SearchSpace
from raydiff.search_space.distributions import stored
from raydiff.sweep_records import Setting

if TYPE_CHECKING:
    import optuna

__all__ = ["EVALUATORS", "importances", "study_of"]

EVALUATORS = ("fanova", "mean_decrease_impurity")

_COPY = " (shuffled)"
_NUM_TREES, _MAX_DEPTH = 16, 8
_MIN_TRAININGS, _MIN_SETTINGS = 6, 20
_SAME = 1e-12

Values = dict[str, Any]
Shares = dict[str, float]


@dataclass(frozen=True)
class _Row:
    """One setting: the parameters as the study has them, and the objective, turned so that more is better.

    ``training`` is what is drawn together: a training, or the setting alone.
    """

    training: str
    params: Values
    worth: float


def importances(
    space: SearchSpace,
    settings: Sequence[Setting],
    objective: str,
    *,
    num_draws: int = 30,
    max_settings: int = 300,
    seed: int = 0,
) -> list[Importance]:
    """Every parameter by every evaluator, the most important first; parameters that were hardly seen are left out.

    Args:
        space: what was searched.
        settings: rows of a sweep; only those that the sampler proposed (phase ``search``) are used.
        objective: a name in ``Setting.values``.
        num_draws: bootstrap draws of trainings.
        max_settings: of more rows, as many of each training, evenly spaced in the order they were measured.
        seed: of the draws, the shuffling and the forests; the same seed gives the same figures.

    Returns:
        Of :data:`EVALUATORS` in turn. Empty with too few settings (20 on fewer than six trainings) or an objective that
        never varies.
    """
    rows = _thinned(_rows(space, settings, objective), max_settings)
    trainings = [row.training for row in rows]
    few = len(set(trainings)) < _MIN_TRAININGS
    if few:
        rows = _within(space, rows)
    if len(rows) < (_MIN_SETTINGS if few else 1) or float(np.ptp([row.worth for row in rows])) < _SAME:
        return []
    rng = np.random.default_rng(seed)
    whole = _measured(space, _with_copies(space, rows, rng), rng)
    draws = [_measured(space, _drawn(_with_copies(space, rows, rng), rng), rng) for _ in range(num_draws)]
    found = []
    for evaluator in EVALUATORS:
        parts = [
            _importance(path, evaluator, whole[evaluator], [draw[evaluator] for draw in draws], rows, trainings)
            for path in space.parameters if path in whole[evaluator]
        ]  # fmt: skip
        found += sorted(parts, key=lambda each: -each.value)
    return found


def study_of(space: SearchSpace, settings: Sequence[Setting], objective: str) -> optuna.Study:
    """An in-memory study with a trial per setting of the search, for Optuna's own evaluators and plots.

    Its direction is always to maximise: of an objective that should be small it holds the negative. Lists are their
    JSON, and numbers on a log scale their natural logarithms.
    """
    rows = _rows(space, settings, objective)
    return _study({path: _distribution(parameter) for path, parameter in space.parameters.items()}, rows)


def _rows(space: SearchSpace, settings: Sequence[Setting], objective: str) -> list[_Row]:
    sign, rows = sign_of(space, objective), []
    for setting in settings:
        value = setting.values.get(objective, math.nan)
        if setting.phase == "search" and math.isfinite(value):
            params = {
                path: _encoded(space.parameters[path], value)
                for path, value in setting.params.items()
                if path in space.parameters and space.parameters[path].admits(value)
            }
            rows.append(_Row(setting.training, params, sign * value))
    return rows


def _encoded(parameter: Parameter, value: Any) -> Any:
    if parameter.choices is not None:
        return stored(value)
    return math.log(value) if parameter.log else float(value)


def _distribution(parameter: Parameter) -> optuna.distributions.BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if parameter.choices is not None:
        return CategoricalDistribution(tuple(_encoded(parameter, choice) for choice in parameter.choices))
    low, high = bounds_of(parameter) or (0.0, 1.0)
    return FloatDistribution(_encoded(parameter, low), _encoded(parameter, high))


def _thinned(rows: Sequence[_Row], limit: int) -> list[_Row]:
    """At most about ``limit`` rows, as many of each training."""
    by_training: dict[str, list[_Row]] = {}
    for row in rows:
        by_training.setdefault(row.training, []).append(row)
    each = max(1, limit // max(1, len(by_training)))
    kept = []
    for members in by_training.values():
        chosen = np.unique(np.linspace(0, len(members) - 1, min(each, len(members))).round().astype(int))
        kept += [members[i] for i in chosen]
    return kept


def _within(space: SearchSpace, rows: Sequence[_Row]) -> list[_Row]:
    """Settings one by one, without what differs between their trainings."""
    worths: dict[str, list[float]] = {}
    for row in rows:
        worths.setdefault(row.training, []).append(row.worth)
    means = {key: fmean(values) for key, values in worths.items()}
    kept = [path for path in space.parameters if space.level(path) != "training"]
    return [
        _Row(f"{i}", {path: row.params[path] for path in kept if path in row.params}, row.worth - means[row.training])
        for i, row in enumerate(rows)
    ]


def _drawn(rows: Sequence[_Row], rng: Generator) -> list[_Row]:
    """As many trainings with replacement, each with its settings."""
    by_training: dict[str, list[_Row]] = {}
    for row in rows:
        by_training.setdefault(row.training, []).append(row)
    keys = list(by_training)
    return [row for i in rng.integers(len(keys), size=len(keys)) for row in by_training[keys[i]]]


def _measured(space: SearchSpace, rows: Sequence[_Row], rng: Generator) -> dict[str, Shares]:
    """By evaluator the importance of each parameter and of its shuffled copy, which the rows have.

    Each parameter is measured on the rows that have it, with the parameters that all of these have.
    """
    distributions = {path: _distribution(parameter) for path, parameter in space.parameters.items()}
    distributions |= {path + _COPY: distribution for path, distribution in distributions.items()}
    seed = int(rng.integers(2**31))
    shares: dict[str, Shares] = {evaluator: {} for evaluator in EVALUATORS}
    having = {p: frozenset(i for i, row in enumerate(rows) if p in row.params) for p in space.parameters}
    for group in dict.fromkeys(having.values()):
        members = [rows[i] for i in sorted(group)]
        if len({row.training for row in members}) < _MIN_TRAININGS / 2 or len({row.worth for row in members}) < 3:
            continue
        common = sorted(p for p in distributions if all(p in row.params for row in members))
        study = _study(distributions, [replace(row, params={p: row.params[p] for p in common}) for row in members])
        here = [path for path, where in having.items() if where == group]
        for evaluator, found in _evaluated(study, common, seed).items():
            shares[evaluator] |= {p: float(found[p]) for path in here for p in (path, path + _COPY)}
    return shares


def _evaluated(study: optuna.Study, paths: list[str], seed: int) -> dict[str, Shares]:
    """``paths`` must be sorted: Optuna 5.0 names the second evaluator's figures in their order, but has sorted them."""
    from optuna.importance import FanovaImportanceEvaluator, MeanDecreaseImpurityImportanceEvaluator

    fanova = FanovaImportanceEvaluator(n_trees=_NUM_TREES, max_depth=_MAX_DEPTH, seed=seed)
    impurity = MeanDecreaseImpurityImportanceEvaluator(n_trees=_NUM_TREES, max_depth=_MAX_DEPTH, seed=seed)
    return {"fanova": fanova.evaluate(study, paths), "mean_decrease_impurity": impurity.evaluate(study, paths)}


def _with_copies(space: SearchSpace, rows: Sequence[_Row], rng: Generator) -> list[_Row]:
    """Each row with shuffled values beside its own.

    It comes before trainings are drawn: one that is drawn twice has the same copies twice, as it has the same values.
    """
    params = [dict(row.params) for row in rows]
    for path in space.parameters:
        having = [i for i, row in enumerate(rows) if path in row.params]
        if space.level(path) == "training":
            values = {rows[i].training: rows[i].params[path] for i in having}
            keys, mixed = list(values), rng.permutation(len(values))
            copies = {key: values[keys[j]] for key, j in zip(keys, mixed, strict=True)}
            for i in having:
                params[i][path + _COPY] = copies[rows[i].training]
        else:
            for i, j in zip(having, rng.permutation(len(having)), strict=True):
                params[i][path + _COPY] = rows[having[j]].params[path]
    return [replace(row, params=values) for row, values in zip(rows, params, strict=True)]


def _study(distributions: Mapping[str, optuna.distributions.BaseDistribution], rows: Sequence[_Row]) -> optuna.Study:
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # else it announces each study
    try:
        study = optuna.create_study(direction="maximize")
    finally:
        optuna.logging.set_verbosity(verbosity)
    study.add_trials([
        optuna.trial.create_trial(
            params=row.params, distributions={path: distributions[path] for path in row.params}, value=row.worth
        )
        for row in rows
    ])  # fmt: skip
    return study


def _importance(
    path: str, evaluator: str, whole: Shares, draws: Sequence[Shares], rows: Sequence[_Row], trainings: Sequence[str]
) -> Importance:
    """``trainings`` are the keys of the rows' trainings."""
    having = [key for row, key in zip(rows, trainings, strict=True) if path in row.params]
    known = [draw for draw in draws if path in draw]
    values = np.array([draw[path] for draw in known] or [whole[path]])
    copies = np.array([draw[path + _COPY] for draw in known] or [whole[path + _COPY]])
    low, high = np.percentile(values, [2.5, 97.5])
    return Importance(
        path, evaluator, whole[path], float(min(low, whole[path])), float(max(high, whole[path])),
        float(np.percentile(copies, 97.5)), bool(np.percentile(values - copies, 2.5) > 0), len(having),
        len(set(having)),
    )  # fmt: skip
