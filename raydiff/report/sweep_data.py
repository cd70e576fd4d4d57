"""A sweep as its report reads it: what was searched, the trainings, the settings, and how values are placed and named.

The value of a training is that of its best setting, as the search itself judges it; rows of several seeds are one
training. Pruned and failed trainings have no value.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from raydiff.errors import ConfigError
from raydiff.search_space import OBJECTIVES, Level, Parameter, SearchSpace
from raydiff.sweep_records import Final, Setting, TrainingRow, read_final, read_settings, read_trainings

__all__ = [
    "LABELS",
    "Axis",
    "Importance",
    "Sweep",
    "Trial",
    "bounds_of",
    "label_of",
    "read_sweep",
    "sign_of",
    "value_name",
]

LABELS = {
    "selection_auroc": "AUROC on selection",
    "selection_average_precision": "AP on selection",
    "detection_rate": "Detection rate on selection",
    "fpr_gap": "Gap to the target FPR",
    "ms_per_image": "Milliseconds per image",
    "nfe": "Network evaluations per image",
    "training_seconds": "Seconds of training",
    "loss": "Held-out denoising loss",
    "realised_fpr": "FPR on selection",
}
"""Objectives as axes and headings name them."""

_NUM_BINS = 5


def label_of(objective: str) -> str:
    """As a heading; an unknown objective is named as it is."""
    return LABELS.get(objective, objective)


def sign_of(space: SearchSpace, objective: str) -> int:
    """1 where more of it is better, -1 where less is; as the space says, or else what makes sense."""
    asked = {each.name: each.direction for each in space.objectives}
    return 1 if (asked.get(objective) or OBJECTIVES.get(objective, "maximize")) == "maximize" else -1


def value_name(value: Any) -> str:
    """A parameter's value in words: four figures, lists and mappings as JSON."""
    if isinstance(value, bool) or value is None or isinstance(value, (list, tuple, dict)):
        return json.dumps(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Importance:
    """How much one parameter moves the objective, by one way to measure it.

    ``value`` is a share in [0, 1]: for ``fanova`` of the variance over the whole space that this parameter explains
    alone, for ``mean_decrease_impurity`` of the variance among the settings that were tried (see
    :mod:`raydiff.distributed.sensitivity`). ``low`` and ``high`` are the 2.5th and 97.5th percentile over bootstrap
    draws of trainings, ``chance`` the 97.5th percentile of what the same parameter gets with its values shuffled, and
    ``is_clear`` whether it lies above its shuffled copy in 97.5 % of the draws.
    """

    path: str
    evaluator: str
    value: float
    low: float
    high: float
    chance: float
    is_clear: bool
    num_settings: int
    num_trainings: int


@dataclass(frozen=True)
class Axis:
    """One parameter as an axis: numbers on a linear or log scale, or choices side by side."""

    path: str
    level: Level
    choices: tuple[str, ...] = ()
    bounds: tuple[float, float] = (0.0, 1.0)
    log: bool = False

    def place(self, value: Any) -> float:
        """Where a value lies: a choice at its number, from 0; a number at itself, or its logarithm to base 10."""
        if self.choices:
            name = value_name(value)
            return float(self.choices.index(name)) if name in self.choices else float(len(self.choices))
        return math.log10(float(value)) if self.log else float(value)

    @property
    def ticks(self) -> tuple[float, ...]:
        """Numbers to write along a log scale: 1, 2 and 5 times a power of ten, or fewer where these are many."""
        low, high = self.bounds
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) if self.log else range(0)
        found: list[float] = []
        for factors in ((1, 2, 5), (1, 3), (1,)):
            found = [f * 10.0**power for power in powers for f in factors]
            found = [tick for tick in found if 0.99 * low <= tick <= 1.01 * high]
            if len(found) <= _NUM_BINS:
                break
        return tuple(found[:: 1 + len(found) // (_NUM_BINS + 1)])

    @property
    def ends(self) -> tuple[float, float]:
        """The lowest and the highest place."""
        if self.choices:
            return 0.0, float(max(1, len(self.choices) - 1))
        low, high = (self.place(bound) for bound in self.bounds)
        return (low, high) if high > low else (low - 0.5, high + 0.5)

    def share(self, value: Any) -> float:
        """The place from 0, the lowest, to 1, the highest."""
        low, high = self.ends
        return (self.place(value) - low) / (high - low)

    @property
    def bins(self) -> tuple[str, ...]:
        """Names of the parts that values are grouped in: each choice, or the range cut in equal parts of its scale."""
        if self.choices:
            return self.choices
        low, high = self.ends
        cuts = [low + (high - low) * i / _NUM_BINS for i in range(_NUM_BINS + 1)]
        names = [_short(10**cut if self.log else cut) for cut in cuts]
        return tuple(f"{a} – {b}" for a, b in pairwise(names))

    def bin_of(self, value: Any) -> int:
        """Which of :attr:`bins`."""
        if self.choices:
            return min(int(self.place(value)), len(self.choices) - 1)
        return min(_NUM_BINS - 1, max(0, int(_NUM_BINS * self.share(value))))


def _short(value: float) -> str:
    return f"{value:.0f}" if 1000 <= abs(value) < 100000 else f"{value:.3g}"


@dataclass(frozen=True)
class Trial:
    """One combination of the parameters that change weights: its trainings, one per seed, and its settings."""

    key: str
    number: int | None
    params: Mapping[str, Any]
    rows: tuple[TrainingRow, ...]
    best: Setting | None

    @property
    def state(self) -> str:
        """``complete`` if all its trainings are; else the worst of theirs."""
        states = {row.state for row in self.rows}
        return next((state for state in ("failed", "pruned") if state in states), "complete")


@dataclass(frozen=True)
class Sweep:
    """What a folder of a sweep holds, grouped."""

    space: SearchSpace
    settings: tuple[Setting, ...]
    trainings: tuple[TrainingRow, ...]
    final: Final | None

    @cached_property
    def lead(self) -> str:
        """The objective that decides where one has to be chosen: the first."""
        return self.space.objectives[0].name

    @cached_property
    def sign(self) -> int:
        """Of the lead objective."""
        return sign_of(self.space, self.lead)

    @cached_property
    def search(self) -> tuple[Setting, ...]:
        """Settings that the sampler proposed, of trainings that are complete, with a finite lead objective."""
        incomplete = {row.key for row in self.trainings if row.state != "complete" and row.phase == "search"}
        return tuple(row for row in self.settings if row.phase == "search" and row.training not in incomplete
                     and math.isfinite(row.values.get(self.lead, math.nan)))  # fmt: skip

    @cached_property
    def around(self) -> tuple[Setting, ...]:
        """Settings around the best point, with a finite lead objective."""
        return tuple(row for row in self.settings if row.phase == "around"
                     and math.isfinite(row.values.get(self.lead, math.nan)))  # fmt: skip

    @cached_property
    def best(self) -> Setting | None:
        """The best setting of the search."""
        return max(self.search, key=self._rank, default=None)

    def _rank(self, row: Setting) -> list[float]:
        """All objectives, turned so that more is better: of equals in the first one the next decides."""
        return [sign_of(self.space, each.name) * row.values.get(each.name, math.nan) for each in self.space.objectives]

    def worth(self, row: Setting) -> float:
        """The lead objective, turned so that more is better."""
        return self.sign * row.values[self.lead]

    @cached_property
    def trials(self) -> tuple[Trial, ...]:
        """Of the search, in the order they were proposed; trainings without one come last."""
        rows: dict[str, list[TrainingRow]] = {}
        for row in self.trainings:
            if row.phase == "search":
                rows.setdefault(row.key, []).append(row)
        best: dict[str, Setting] = {}
        for setting in self.search:
            rows.setdefault(setting.training, [])
            known = best.get(setting.training)
            if known is None or self.worth(setting) > self.worth(known):
                best[setting.training] = setting
        trials = []
        for key, members in rows.items():
            number = members[0].trial if members else best[key].trial
            params = members[0].params if members else self._weights(best[key].params)
            trials.append(Trial(key, number, params, tuple(members), best.get(key)))
        return tuple(sorted(trials, key=lambda trial: math.inf if trial.number is None else trial.number))

    @cached_property
    def valued(self) -> tuple[Trial, ...]:
        """Trials with a value: complete, and with a setting that was measured."""
        return tuple(trial for trial in self.trials if trial.best is not None)

    @cached_property
    def units(self) -> tuple[Setting, ...]:
        """What stands for a training: its best setting; where there is only one training, its settings."""
        if len(self.valued) < 2:
            return self.search
        return tuple(trial.best for trial in self.valued if trial.best is not None)

    def value(self, trial: Trial) -> float:
        """The lead objective of its best setting; only for trials with one."""
        if trial.best is None:
            raise ConfigError(f"training {trial.key} has no measured setting; ask only those that have")
        return trial.best.values[self.lead]

    def _weights(self, params: Mapping[str, Any]) -> dict[str, Any]:
        return {path: value for path, value in params.items() if self.axis(path).level == "training"}

    @cached_property
    def axes(self) -> dict[str, Axis]:
        """Every parameter, those that change weights first."""
        ordered = sorted(self.space.parameters, key=lambda path: _ORDER[self.space.level(path)])
        return {path: _axis(path, self.space.level(path), self.space.parameters[path]) for path in ordered}

    def axis(self, path: str) -> Axis:
        """Of one parameter."""
        return self.axes[path]

    @cached_property
    def states(self) -> Counter[str]:
        """Trials of the search by state."""
        return Counter(trial.state for trial in self.trials)

    def ranked(self, importances: Sequence[Importance]) -> list[str]:
        """Parameters by the first evaluator's importance; without any, by the spread of their means over trainings."""
        if importances:
            lead = [each for each in importances if each.evaluator == importances[0].evaluator]
            return [each.path for each in sorted(lead, key=lambda each: -each.value)]
        return list(self.axes)


_ORDER = {"training": 0, "evidence": 1, "judgement": 2}


def bounds_of(parameter: Parameter) -> tuple[float, float] | None:
    """The least and the largest number it can be; None of a choice."""
    return None if parameter.range is None else (float(parameter.range[0]), float(parameter.range[1]))


def _axis(path: str, level: Level, parameter: Parameter) -> Axis:
    bounds = bounds_of(parameter)
    if bounds is not None:
        return Axis(path, level, bounds=bounds, log=parameter.log)
    return Axis(path, level, choices=tuple(value_name(choice) for choice in parameter.choices or ()))


def read_sweep(space: SearchSpace, out: Path) -> Sweep:
    """Read the records of a sweep.

    Raises:
        ConfigError: there is no training and no setting yet.
        DataError: a record cannot be read.
    """
    last = {(row.phase, row.key, row.seed): row for row in read_trainings(out)}  # one that failed may have a later one
    sweep = Sweep(space, tuple(read_settings(out)), tuple(last.values()), read_final(out))
    if not sweep.settings and not sweep.trainings:
        raise ConfigError(f"{out}: holds no training and no setting; run raydiff sweep first, or name its --out")
    return sweep
