"""The content of a search space file, and what a sweep asks of it."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from raydiff import registry
from raydiff.config import ExperimentConfig, Section
from raydiff.config.overrides import assign
from raydiff.errors import ConfigError
from raydiff.search_space.distributions import Parameter, Suggester, same, stored
from raydiff.search_space.paths import COMPONENTS, LEVELS, Level, in_order, level_of

__all__ = ["OBJECTIVES", "Around", "Direction", "Objective", "Pruning", "SearchSpace", "at_fault"]

Direction = Literal["maximize", "minimize"]

OBJECTIVES: dict[str, Direction] = {
    "selection_auroc": "maximize",  # AUROC on calibration normals and synthetic anomalies made of them
    "selection_average_precision": "maximize",
    "detection_rate": "maximize",  # of synthetic anomalies at the calibrated threshold
    "fpr_gap": "minimize",  # |realised - target| false-positive rate on normals that the threshold was not taken from
    "ms_per_image": "minimize",  # at batch size 1, the whole way from pixels to verdict
    "nfe": "minimize",  # network evaluations per image
    "training_seconds": "minimize",
    "loss": "minimize",  # held-out denoising loss
}
"""What can be optimised, and in which direction. None of it looks at the test split."""

_YAML_1_2_FLOAT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


class Objective(Section):
    """What to optimise. With several, the first leads where one has to be chosen."""

    name: str
    direction: Direction | None = Field(None, description="by default the one that makes sense")


class Pruning(Section):
    """Asynchronous successive halving (Li et al. 2020, arXiv:1810.05934) on the held-out denoising loss."""

    grace_steps: int = Field(100, ge=1, description="optimiser steps before a training may be stopped")
    reduction_factor: int = Field(3, ge=2, description="one in so many goes on at each rung")


class Around(Section):
    """One-at-a-time curves around the best point."""

    values: int = Field(5, ge=2, description="values per parameter; all of a categorical's")
    seeds: tuple[int, ...] | None = Field(
        None, min_length=1, description="trainings per value; by default three that the search has not used"
    )


class SearchSpace(Section):
    """A sweep: what is varied and how it is judged."""

    title: str = "raydiff sweep"
    base: dict[str, Any] = Field(default_factory=dict, description="dotted config path: value, over the config")
    parameters: dict[str, Parameter] = Field(min_length=1)
    objectives: tuple[Objective, ...] = Field((Objective(name="selection_auroc"),), min_length=1)
    anomalies: tuple[str, ...] = Field(
        (), description="kinds of synthetic anomalies that settings are judged by; empty: every kind there is"
    )
    trials: int = Field(40, ge=1, description="combinations of the parameters that change weights")
    settings_per_training: int = Field(100, ge=1, description="of the other parameters, tried on each training")
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="of the trainings of one combination")
    sampler: Literal["tpe", "nsga2", "random"] | None = Field(
        None, description="by default tpe for one objective, nsga2 for several"
    )
    sampler_seed: int = Field(0, ge=0)
    pruning: Pruning | None = None
    points: tuple[dict[str, Any], ...] = Field((), description="combinations tried first; parameters left out are free")
    around: Around | None = Around()
    refit_seeds: tuple[int, ...] = Field((100, 101, 102), description="fresh seeds of the winner; none: no refit")
    num_cpus: float = Field(1.0, gt=0, description="of one trial; with several workers, of each")
    num_gpus: float = Field(0.0, ge=0, description="of one trial; with several workers, of each")
    num_workers: int = Field(1, ge=1, description="Ray Train workers of one trial")

    @model_validator(mode="before")
    @classmethod
    def _prepare(cls, data: Any) -> Any:
        """1e-4 is a number, though YAML 1.1 reads text; bare text is an objective."""
        if not isinstance(data, Mapping):
            return data
        data = {key: _numbers(value) if key in ("base", "parameters", "points") else value
                for key, value in data.items()}  # fmt: skip
        if isinstance(data.get("objectives"), list | tuple):
            data["objectives"] = [{"name": one} if isinstance(one, str) else one for one in data["objectives"]]
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_workers > 1 and self.num_gpus not in (0, 1):
            raise ValueError(
                f"num_gpus is {self.num_gpus:g} and num_workers {self.num_workers}; give each worker 0 or 1"
            )
        if self.num_gpus > 1 and not self.num_gpus.is_integer():
            raise ValueError(f"num_gpus is {self.num_gpus:g}; above 1 it must be a whole number")
        lists = {"seeds": self.seeds, "refit_seeds": self.refit_seeds}
        if self.around is not None and self.around.seeds is not None:
            lists["around.seeds"] = self.around.seeds
        for key, seeds in lists.items():
            if bad := [seed for seed in seeds if not 0 <= seed < 2**31]:
                raise ValueError(f"{key} has {bad[0]}; a seed lies between 0 and 2147483647")
            if repeated := [seed for seed in seeds if seeds.count(seed) > 1]:
                raise ValueError(f"{key} has {repeated[0]} twice; leave one out")
            if key == "around.seeds" and (shared := sorted(set(seeds) & set(self.seeds))):
                raise ValueError(
                    f"around.seeds has {shared[0]}, which seeds has too; the best point was chosen with that one, so it"
                    " would look too good: give others"
                )
            if key != "refit_seeds" and (shared := sorted(set(seeds) & set(self.refit_seeds))):
                raise ValueError(
                    f"refit_seeds has {shared[0]}, which {key} has too; a refit shows what survives on fresh seeds,"
                    " so give others"
                )
        return self

    @property
    def around_seeds(self) -> tuple[int, ...]:
        """Seeds of the curves: those given, or three that neither search nor refit use."""
        if self.around is not None and self.around.seeds is not None:
            return self.around.seeds
        used = {*self.seeds, *self.refit_seeds}
        return tuple(itertools.islice((seed for seed in itertools.count() if seed not in used), 3))

    @property
    def workers(self) -> dict[str, Any]:
        """Config fields of what one training holds."""
        return {
            "execution.num_workers": self.num_workers,
            "execution.cpus_per_worker": self.num_cpus,
            "execution.use_gpu": self.num_gpus > 0,
        }

    def level(self, path: str) -> Level:
        """Which kind of work a parameter costs.

        Raises:
            ConfigError: such a field may not be varied.
        """
        return level_of(path)

    def paths(self, levels: Collection[Level] = LEVELS) -> tuple[str, ...]:
        """The parameters of these levels, parents before those that depend on them.

        Raises:
            ConfigError: conditions go in a circle.
        """
        ordered: dict[str, None] = {}
        for path in self.parameters:
            self._visit(path, (), ordered)
        return tuple(path for path in ordered if level_of(path) in levels)

    def directions(self) -> tuple[Direction, ...]:
        """Of the objectives, in order.

        Raises:
            ConfigError: there is no such objective; names the nearest.
        """
        for objective in self.objectives:
            if objective.name not in OBJECTIVES:
                hint = registry.nearest(objective.name, list(OBJECTIVES))
                raise ConfigError(f"objectives: no objective is called {objective.name!r}; {hint}")
        return tuple(objective.direction or OBJECTIVES[objective.name] for objective in self.objectives)

    def applies(self, path: str, values: Mapping[str, Any]) -> bool:
        """Whether a parameter's conditions hold among the other parameters' values."""
        return all(
            parent in values and any(same(values[parent], one) for one in allowed)
            for parent, allowed in self.parameters[path].when.items()
        )

    def suggest(
        self, trial: Suggester, levels: Collection[Level] = LEVELS, given: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Ask a trial for the parameters of these levels whose conditions hold.

        ``given`` has the values of those of other levels. Values are as the config has them; what Optuna stores for a
        list or mapping is its JSON.
        """
        values: dict[str, Any] = {}
        for path in self.paths(levels):
            if self.applies(path, {**(given or {}), **values}):
                values[path] = self.parameters[path].suggest(trial, path)
        return values

    def apply(self, config: ExperimentConfig, params: Mapping[str, Any]) -> ExperimentConfig:
        """The config with ``base`` and then the parameters' values set; names of components before their options.

        Raises:
            ConfigError: the combination is not a valid config; says which values are at fault.
        """
        try:
            return self._assigned(config, params)
        except ConfigError as error:
            blamed = at_fault(self, params, lambda some: self._assigned(config, some))
            shown = ", ".join(f"{path}={stored(value)}" for path, value in blamed.items())
            raise ConfigError(f"{shown or 'base'}: {error}") from error

    def check(self, config: ExperimentConfig, where: str) -> None:
        """See that the space fits the config it will vary; errors begin with ``where``.

        Besides the single values, 200 random combinations are built, untrained.

        Raises:
            ConfigError: a path is not in the config (names the nearest) or may not be varied, a distribution is empty
                or of the wrong type for its field, a condition names a missing parameter or a value that it never has,
                an objective is not produced, a point has an unknown parameter or a value out of range, or a
                combination is no valid config.
        """
        from raydiff.search_space.structure import check_structure  # here: they import this module
        from raydiff.search_space.trying import try_values

        try:
            check_structure(self, config)
            try_values(self, config)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error

    def digest(self) -> str:
        """SHA-256 (hex) of what trials depend on: parameters, base, objectives, anomalies, seeds; not budgets."""
        named = {"anomalies"} if self.anomalies else set[str]()
        kept = self.model_dump(mode="json", include={"base", "parameters", "objectives", "seeds", *named})
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    def parents(self, path: str) -> tuple[str, ...]:
        """The parameters that are set before this one: those of its conditions, and the component it belongs to."""
        section = path.partition(".")[0]
        owners = (section, f"{section}.name") if section in COMPONENTS else ()
        before = {*self.parameters[path].when, *(owner for owner in owners if owner != path)}
        if path == section:
            before.discard(f"{section}.name")
        return tuple(other for other in self.parameters if other in before)

    def _visit(self, path: str, trail: tuple[str, ...], ordered: dict[str, None]) -> None:
        if path in trail:
            circle = " -> ".join((*trail[trail.index(path) :], path))
            raise ConfigError(f"parameters: conditions go in a circle, {circle}; leave one `when` out")
        if path in ordered:
            return
        for parent in self.parents(path):
            self._visit(parent, (*trail, path), ordered)
        ordered[path] = None

    def _assigned(self, config: ExperimentConfig, params: Mapping[str, Any]) -> ExperimentConfig:
        data = config.to_dict()
        try:
            for values in (self.base, params):
                for path in in_order(values):
                    assign(data, path, copy.deepcopy(values[path]))  # what is set inside it stays out of the space
            return ExperimentConfig.from_dict(data, "config")
        except ConfigError as error:
            raise ConfigError(str(error).removeprefix("config: ").removeprefix("--set ")) from error


def at_fault(space: SearchSpace, params: Mapping[str, Any], attempt: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """Those of the values that ``attempt`` fails with of which another one would do, in the order they are set.

    Where no single change helps, the fewest that still fail, left out one by one, children before parents.
    """
    known = [path for path in space.paths() if path in params]
    blamed = {}
    for path in known:
        others = [value for value in space.parameters[path].probes() if not same(value, params[path])]
        if any(_passes(attempt, {**params, path: value}) for value in others):
            blamed[path] = params[path]
    if blamed:
        return blamed
    blamed = dict(params)
    for path in reversed(known):
        fewer = {other: value for other, value in blamed.items() if other != path}
        needed = any(path in space.parents(other) for other in fewer if other in space.parameters)
        if not needed and not _passes(attempt, fewer):
            blamed = fewer
    return blamed


def _passes(attempt: Callable[[dict[str, Any]], Any], params: dict[str, Any]) -> bool:
    try:
        attempt(params)
    except ConfigError:
        return False
    return True


def _numbers(value: Any) -> Any:
    """The same with text such as 1e-4 turned into the number, at any depth."""
    if isinstance(value, Mapping):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_numbers(item) for item in value]
    return float(value) if isinstance(value, str) and _YAML_1_2_FLOAT.fullmatch(value) else value
