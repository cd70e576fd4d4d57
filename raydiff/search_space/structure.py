"""Whether a search space makes sense: its paths, conditions, objectives, pruning and points. Builds nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from raydiff import registry
from raydiff.config import ExperimentConfig
from raydiff.errors import ConfigError
from raydiff.planting import check_kinds
from raydiff.search_space.distributions import Parameter, stored
from raydiff.search_space.paths import COMPONENTS, LEVELS, check_path, level_of, name_of, options_of
from raydiff.search_space.space import SearchSpace

__all__ = ["check_structure"]

_SET_BY_THE_SWEEP = {
    "seed": "list seeds under seeds",
    "execution.num_workers": "set num_workers, beside parameters",
    "execution.use_gpu": "set num_gpus, beside parameters",
    "execution.cpus_per_worker": "set num_cpus, beside parameters",
}
"""Config fields that the space has keys of its own for."""

_LOSS_DEPENDS_ON = ("schedule", "objective", "space")
"""Sections that change what the denoising loss measures, so that it cannot be compared."""


def check_structure(space: SearchSpace, config: ExperimentConfig) -> None:
    """See that all names exist and fit together.

    Raises:
        ConfigError: names the key, the value and the remedy.
    """
    start = _with_base(space, config)
    _check_start(start)
    names = _names(space, start)
    for path in space.parameters:
        try:
            check_path(path, names)
        except ConfigError as error:
            raise ConfigError(f"parameters: {error}") from error
    for path, parameter in space.parameters.items():
        _check_conditions(space, path, parameter)
    space.paths()  # refuses circles
    for path in space.parameters:
        _check_component(space, path, names)
    _check_objectives(space)
    _check_pruning(space, start)
    check_kinds(space.anomalies, "anomalies")
    for number, point in enumerate(space.points):
        _check_point(space, f"points[{number}]", point)


def _with_base(space: SearchSpace, config: ExperimentConfig) -> ExperimentConfig:
    for path in space.base:
        if path in _SET_BY_THE_SWEEP:
            raise ConfigError(f"base: {path} is set by the sweep; {_SET_BY_THE_SWEEP[path]}")
        if path.partition(".")[0] == "data":
            raise ConfigError(f"base: {path} says which images there are; set it in the config, or with --set")
    return space.apply(config, {})


def _check_start(start: ExperimentConfig) -> None:
    """Settings are compared on calibration images that are normal, and on nothing else."""
    if not start.data.calibration_fraction:
        raise ConfigError(
            "data.calibration_fraction is 0, and a sweep compares settings on calibration images; set it above 0"
        )
    if start.contamination.max_share:
        raise ConfigError(
            f"contamination.max_share is {start.contamination.max_share:g}, and a sweep counts every calibration image"
            " as normal; set it to 0, and sift with raydiff fit, with the winner's settings"
        )


def _names(space: SearchSpace, start: ExperimentConfig) -> dict[str, tuple[str, ...]]:
    """What each component may be called in this sweep: as in the config, unless it is varied."""
    names: dict[str, tuple[str, ...]] = {}
    for section in COMPONENTS:
        own = getattr(start, section).name
        owner = _owner(space, section)
        if owner is None:
            names[section] = (own,)
            continue
        parameter = space.parameters[owner]
        varied = [name_of(choice) for choice in parameter.choices or ()]
        names[section] = tuple(dict.fromkeys([*varied, *([own] if parameter.when else [])]))
    return names


def _owner(space: SearchSpace, section: str) -> str | None:
    """The parameter that says which component it is: the section as a whole, or its name."""
    both = [path for path in (section, f"{section}.name") if path in space.parameters]
    if len(both) == 2:
        raise ConfigError(f"parameters has {both[0]} and {both[1]}, which say the same; leave one out")
    if both and space.parameters[both[0]].choices is None:
        raise ConfigError(f"parameters.{both[0]} is a range; give it choices")
    return both[0] if both else None


def _check_conditions(space: SearchSpace, path: str, parameter: Parameter) -> None:
    for parent, allowed in parameter.when.items():
        key = f"parameters.{path}.when"
        if parent == path or parent not in space.parameters:
            others = [other for other in space.parameters if other != path]
            hint = registry.nearest(parent, others) if others else "there is no other, so leave when out"
            raise ConfigError(f"{key}: {parent} is not another parameter of this space; {hint}")
        above = space.parameters[parent]
        if above.float is not None and above.step is None:
            raise ConfigError(
                f"{key}: {parent} is a range of real numbers, which hits no single value; give it choices"
            )
        for value in allowed:
            if not above.admits(value):
                raise ConfigError(f"{key}: {parent} never is {stored(value)!r}; {_has(above)}")
        mine, theirs = level_of(path), level_of(parent)
        if LEVELS.index(theirs) > LEVELS.index(mine):
            raise ConfigError(
                f"{key}: {path} changes {mine} and {parent} only {theirs}, which is chosen after it; leave the"
                " condition out, or turn it around"
            )


def _has(parameter: Parameter) -> str:
    if parameter.choices is not None:
        return f"it has {', '.join(repr(stored(choice)) for choice in parameter.choices)}"
    low, high = parameter.range or (0, 0)
    return f"it lies between {low:g} and {high:g}" + (f" in steps of {parameter.step:g}" if parameter.step else "")


def _check_component(space: SearchSpace, path: str, names: Mapping[str, tuple[str, ...]]) -> None:
    """An option that only some components have needs a condition on the name."""
    section, _, key = path.partition(".")
    owner = _owner(space, section) if section in COMPONENTS else None
    if owner is None or path == owner:
        return
    allowed = set(names[section])
    for other in _with_ancestors(space, path):
        if (condition := space.parameters[other].when.get(owner)) is not None:
            allowed &= {name_of(value) for value in condition}
    lacking = [name for name in names[section] if name in allowed and key not in options_of(section, name)]
    if lacking:
        having = [stored(choice) for choice in space.parameters[owner].choices or ()
                  if key in options_of(section, name_of(choice))]  # fmt: skip
        raise ConfigError(
            f"parameters.{path}: {section} may be {lacking[0]}, which has no {key}; add"
            f" when: {{{owner}: [{', '.join(map(str, having))}]}}"
        )


def _with_ancestors(space: SearchSpace, path: str) -> Iterator[str]:
    yield path
    for parent in space.parameters[path].when:
        yield from _with_ancestors(space, parent)


def _check_objectives(space: SearchSpace) -> None:
    space.directions()  # refuses unknown ones
    asked = [objective.name for objective in space.objectives]
    for name in asked:
        if asked.count(name) > 1:
            raise ConfigError(f"objectives: {name} is given twice; leave one out")
        if not any(_moves(path, name) for path in space.parameters):
            raise ConfigError(f"objectives: {name} is the same whatever these parameters are; leave it out")
    if "loss" in asked and (different := _loss_differs(space)):
        raise ConfigError(
            f"objectives: loss cannot be compared, since {different} changes what it measures; take selection_auroc"
        )


def _moves(path: str, objective: str) -> bool:
    """Whether a parameter can change an objective."""
    level = level_of(path)
    if objective in ("loss", "training_seconds"):
        return level == "training"
    if objective in ("selection_auroc", "selection_average_precision"):
        return path != "calibration.target_fpr"
    return objective != "nfe" or level == "evidence"


def _loss_differs(space: SearchSpace) -> str | None:
    return next((path for path in space.parameters if path.partition(".")[0] in _LOSS_DEPENDS_ON), None)


def _check_pruning(space: SearchSpace, start: ExperimentConfig) -> None:
    if space.pruning is None:
        return
    if not space.paths(["training"]):
        raise ConfigError("pruning stops trainings, and no parameter here opens one; leave pruning out")
    if space.num_workers > 1:
        raise ConfigError(
            f"pruning cannot stop a trial of several workers (num_workers is {space.num_workers}); leave pruning out"
        )
    if different := _loss_differs(space):
        raise ConfigError(
            f"pruning goes by the denoising loss, and {different} changes what that measures; leave pruning out"
        )
    steps, grace = start.training.num_steps, space.pruning.grace_steps
    if "training.num_steps" not in space.parameters and grace >= steps:
        raise ConfigError(
            f"pruning.grace_steps is {grace} and training.num_steps {steps}, so nothing would be stopped; set it lower"
        )


def _check_point(space: SearchSpace, key: str, point: Mapping[str, Any]) -> None:
    for path, value in point.items():
        if path not in space.parameters:
            raise ConfigError(f"{key}: {path} is not a parameter; {registry.nearest(path, list(space.parameters))}")
        parameter = space.parameters[path]
        if not parameter.admits(value):
            raise ConfigError(f"{key}: {path} is {stored(value)!r}; {_has(parameter)}")
        if not space.applies(path, point):
            needed = ", ".join(
                f"{parent} in {[stored(one) for one in parameter.when[parent]]}" for parent in parameter.when
            )
            raise ConfigError(f"{key}: {path} applies only with {needed}; give that too, or leave {path} out")
