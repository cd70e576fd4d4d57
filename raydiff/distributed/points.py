"""Settings as Optuna stores them: which distribution each parameter had, and what was drawn."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from raydiff.config import ExperimentConfig
from raydiff.search_space import Level, SearchSpace

__all__ = ["as_trial", "own_point", "stored_point"]

_EVERY: tuple[Level, ...] = ("training", "evidence", "judgement")


def as_trial(
    space: SearchSpace, params: Mapping[str, Any], values: list[float], attributes: Mapping[str, Any]
) -> FrozenTrial:
    """A complete trial of a setting of all parameters."""
    replay = _Replay(space, params)
    space.suggest(replay, _EVERY)
    return create_trial(
        state=TrialState.COMPLETE, values=values, params=replay.values, distributions=replay.distributions,
        user_attrs=dict(attributes),
    )  # fmt: skip


def own_point(
    space: SearchSpace, config: ExperimentConfig, levels: Collection[Level], given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What the config itself has for the parameters of these levels, as far as the space holds it, as stored."""
    plain = space.apply(config, {}).to_dict()
    return stored_point(space, {path: _at(plain, path) for path in space.parameters}, levels, given)


def stored_point(
    space: SearchSpace, params: Mapping[str, Any], levels: Collection[Level], given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Parameters of these levels as stored; those that are missing or lie outside the space are left out.

    ``given`` has the values of other levels, for the conditions.
    """
    replay = _Replay(space, params)
    space.suggest(replay, levels, given)
    return {path: value for path, value in replay.values.items() if path not in replay.outside}


class _Replay:
    """A :class:`raydiff.search_space.Suggester` that gives what it is told, and notes how it was asked."""

    def __init__(self, space: SearchSpace, params: Mapping[str, Any]) -> None:
        self._space, self._params = space, params
        self.values: dict[str, Any] = {}
        self.distributions: dict[str, BaseDistribution] = {}
        self.outside: set[str] = set()

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """The stored form of the parameter's value."""
        written = [_text(choice) for choice in self._space.parameters[name].choices or ()]
        wanted = _text(self._params.get(name))
        inside = wanted in written
        value = list(choices)[written.index(wanted) if inside else 0]
        return self._note(name, value, CategoricalDistribution(list(choices)), inside=inside)

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """The parameter's value."""
        return int(self._number(name, IntDistribution(low, high, step=step, log=log)))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """The parameter's value."""
        return float(self._number(name, FloatDistribution(low, high, step=step, log=log)))

    def _number(self, name: str, distribution: Any) -> Any:
        value = self._params.get(name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        inside = number and distribution.low <= value <= distribution.high and distribution._contains(value)
        return self._note(name, value if inside else distribution.low, distribution, inside=inside)

    def _note(self, name: str, value: Any, distribution: BaseDistribution, *, inside: bool) -> Any:
        self.values[name], self.distributions[name] = value, distribution
        if not inside:
            self.outside.add(name)
        return value


def _at(data: Any, path: str) -> Any:
    """The value at a dotted path of a plain config; None where there is none."""
    for part in path.split("."):
        if not isinstance(data, Mapping) or part not in data:
            return None
        data = data[part]
    return data


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=list)
