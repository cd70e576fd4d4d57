"""Whether a search space's values work: each of them, and random combinations, as a config that is built untrained."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping
from typing import Any

from raydiff.config import ExperimentConfig
from raydiff.errors import ConfigError, RaydiffError
from raydiff.search_space.distributions import stored
from raydiff.search_space.space import SearchSpace, at_fault

__all__ = ["try_values"]

_COMBINATIONS, _COMPANIONS, _ANCESTRIES = 200, 20, 16


def try_values(space: SearchSpace, config: ExperimentConfig) -> None:
    """See that every choice, the ends and the inside of every range, the points, and random combinations are valid.

    Raises:
        ConfigError: names the parameter or the combination, and the remedy.
    """
    trials = _Trials(space, config)
    for path, parameter in space.parameters.items():
        for value in parameter.probes():
            trials.one(path, value)
    for number, point in enumerate(space.points):
        trials.point(number, point)
    for _ in range(_COMBINATIONS):
        trials.combination(space.suggest(trials.draw({})))


class _Trials:
    """Builds configs of one space; what was built once is not built again."""

    def __init__(self, space: SearchSpace, config: ExperimentConfig) -> None:
        self.space, self.config = space, config
        self.random = random.Random(0)
        self.networks: set[str] = set()
        self.vary_network = any(path.split(".")[0] in ("denoiser", "space") for path in space.parameters)

    def draw(self, fixed: Mapping[str, Any]) -> _Draw:
        """A random stand-in for an Optuna trial, with some values given."""
        return _Draw(self.random, {path: stored(value) for path, value in fixed.items()})

    def one(self, path: str, value: Any) -> None:
        """A value works alone with what it depends on, or in some random combination: other parameters may need it."""
        reached = False
        for ancestors in itertools.islice(_ancestries(self.space, path, {}), _ANCESTRIES):
            reached = True
            fixed = {**ancestors, path: value}
            try:
                self.build(fixed)
                continue
            except ConfigError as error:
                problem = error
            if not any(self._works(self.space.suggest(self.draw(fixed))) for _ in range(_COMPANIONS)):
                given = "".join(f", with {p} {stored(v)!r}" for p, v in ancestors.items())
                raise ConfigError(f"parameters.{path}: {stored(value)!r} cannot be used{given}: {_bare(problem)}")
        if not reached:
            raise ConfigError(
                f"parameters.{path}: its conditions contradict those of what it depends on; change `when`"
            )

    def point(self, number: int, point: Mapping[str, Any]) -> None:
        """A point can be completed."""
        try:
            self.combination(self.space.suggest(self.draw(point)))
        except ConfigError as error:
            raise ConfigError(f"points[{number}]: {error}") from error

    def combination(self, params: Mapping[str, Any]) -> None:
        """All parameters at once."""
        try:
            self.build(params)
        except ConfigError as error:
            blamed = at_fault(self.space, params, self.build)
            shown = ", ".join(f"{path}={stored(value)}" for path, value in blamed.items())
            remedy = "add a `when`, or narrow a range" if len(blamed) > 1 else "narrow its range, or give it a step"
            raise ConfigError(f"the combination {shown} is not valid: {_bare(error)}; {remedy}") from error

    def build(self, params: Mapping[str, Any]) -> None:
        """The config, its schedule and scorer, and, where it varies, its network without numbers in it."""
        import torch

        from raydiff.detector.building import build_denoiser, build_scorer, build_space

        config = self.space.apply(self.config, params)
        if self.space.num_workers > 1:
            config = self._shared(config)
        build_scorer(config, num_classes=2)
        network = json.dumps([config.to_dict()[key] for key in ("space", "denoiser")] + [config.objective.condition])
        if self.vary_network and network not in self.networks:
            try:
                with torch.device("meta"):
                    build_denoiser(config, build_space(config), num_classes=2)
            except RaydiffError:
                raise
            except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:  # of its library
                raise ConfigError(
                    f"denoiser {config.denoiser.name} cannot be built ({' '.join(str(error).split())})"
                ) from error
            self.networks.add(network)

    def _shared(self, config: ExperimentConfig) -> ExperimentConfig:
        """The config with the trial's workers, among which a batch is divided."""
        try:
            return config.override({"execution.num_workers": self.space.num_workers})
        except ConfigError as error:
            raise ConfigError(
                f"num_workers is {self.space.num_workers}: {str(error).removeprefix('--set: ')}"
            ) from None

    def _works(self, params: Mapping[str, Any]) -> bool:
        try:
            self.build(params)
        except ConfigError:
            return False
        return True


class _Draw:
    """A :class:`raydiff.search_space.Suggester` that draws at random, but for given values (as Optuna stores them)."""

    def __init__(self, source: random.Random, fixed: Mapping[str, Any]) -> None:
        self.source, self.fixed = source, fixed

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """One of the choices."""
        return self.fixed[name] if name in self.fixed else self.source.choice(choices)

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:  # noqa: ARG002
        """A whole number on the grid; evenly, also where ``log`` is set, since validity is all that is asked."""
        return int(self.fixed[name]) if name in self.fixed else self.source.randrange(low, high + 1, step)

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """A number in the range, on the grid or, with ``log``, on a logarithmic scale."""
        if name in self.fixed:
            return float(self.fixed[name])
        if step is not None:
            return low + step * self.source.randint(0, round((high - low) / step))
        return low * (high / low) ** self.source.random() if log else self.source.uniform(low, high)


def _ancestries(space: SearchSpace, path: str, chosen: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every way to give the parameters that this one depends on values with which it applies."""
    open_parents = [parent for parent in space.parameters[path].when if parent not in chosen]
    if not open_parents:
        if space.applies(path, chosen):
            yield chosen
        return
    parent = open_parents[0]
    for value in space.parameters[path].when[parent]:
        for before in _ancestries(space, parent, chosen):
            if parent not in before:
                yield from _ancestries(space, path, {**before, parent: value})


def _bare(error: ConfigError) -> str:
    """Without the values that ``apply`` names once more."""
    return str(error.__cause__ if isinstance(error.__cause__, ConfigError) else error)
