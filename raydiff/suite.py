"""``SUITE.yaml``: which methods a benchmark runs on which data sets, with which seeds. docs: examples/suites/*.yaml.

A suite names data sets, trainings (networks), and methods: a scorer on a training's network, or a baseline. Configs are
merged: ``base``, then the data set's ``config``, then the training, then the seed. A mapping is merged key by key; a
component (anything with a ``name``) of another name replaces the one before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from raydiff import registry
from raydiff.config import Section
from raydiff.core.metrics import IMAGE_METRICS, PIXEL_METRICS
from raydiff.errors import ConfigError
from raydiff.results import CLASSICS
from raydiff.yaml_file import read_mapping

__all__ = ["CostPlan", "Method", "Resources", "RobustnessPlan", "Suite", "SuiteDataset", "load_suite", "merged"]

_COMPONENTS = ("dataset", "space", "denoiser", "scoring")

_RESOURCES = "leave it out, and say under resources what a task holds"
_ELSEWHERE = {
    "seed": "leave it out, and list seeds under seeds",
    "scoring": "leave it out, and give each of methods its own scoring",
    "execution.num_workers": f"each task has one worker; {_RESOURCES}",
    "execution.use_gpu": _RESOURCES,
    "execution.cpus_per_worker": _RESOURCES,
    "execution.max_failures": "leave it out; the same command tries what failed again",
}
"""Config fields that a benchmark sets itself, and what to write in their place."""


class Resources(Section):
    """What one task holds while it runs. A share of a GPU lets several tasks run on one."""

    num_cpus: float = Field(1.0, gt=0, description="rounded up, also the threads of torch")
    num_gpus: float = Field(0.0, ge=0, description="above 0 the task runs on a GPU; above 1 a whole number")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_gpus > 1 and not self.num_gpus.is_integer():
            raise ValueError(f"num_gpus is {self.num_gpus:g}; above 1 it must be a whole number")
        return self


class SuiteDataset(Section):
    """A data set: its config, and its categories where it is run once for each of several values."""

    config: dict[str, Any] = Field(default_factory=dict, description="merged over the suite's base")
    each: dict[str, list[Any]] = Field(
        default_factory=dict, description="dotted config path: one value per category; several paths go together"
    )
    categories: tuple[str, ...] | None = Field(None, description="their names; by default from the values")
    methods: tuple[str, ...] | None = Field(None, description="only these methods; all by default")
    metrics: tuple[str, ...] = Field((), description="more metrics to lead with on this data set, such as aupro")

    @model_validator(mode="after")
    def _check(self) -> Self:
        lengths = {path: len(values) for path, values in self.each.items()}
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"{path} {count}" for path, count in lengths.items())
            raise ValueError(f"each has lists of different lengths ({listed}); give every path one value per category")
        if 0 in lengths.values():
            raise ValueError("each has an empty list; give one value per category, or leave it out")
        names = self.category_names()
        if self.categories is not None and len(names) != max(lengths.values(), default=1):
            raise ValueError(
                f"categories has {len(names)} names for {max(lengths.values(), default=1)} values of each; give one per"
                " value"
            )
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"categories has {repeated[0]!r} twice; give every category a name of its own")
        return self

    def category_names(self) -> tuple[str, ...]:
        """One name per category; a single empty one without ``each``."""
        if self.categories is not None:
            return self.categories
        first = next(iter(self.each.values()), None)
        return ("",) if first is None else tuple(_named(value) for value in first)

    def assignments(self) -> list[tuple[str, dict[str, Any]]]:
        """(category, {dotted path: value}) of every category."""
        return [
            (name, {path: values[i] for path, values in self.each.items()})
            for i, name in enumerate(self.category_names())
        ]


class Method(Section):
    """A scorer on a training's network, or a student of it (``distil``), or a baseline."""

    training: str | None = Field(None, description="whose network, one of the suite's trainings")
    scoring: dict[str, Any] | str | None = Field(None, description="the scorer and its options")
    baseline: dict[str, Any] | str | None = Field(None, description="the baseline and its options")
    distil: dict[str, Any] | None = Field(
        None, description="not the scorer itself but its one-evaluation student: what its training has of its own"
    )
    resources: Resources | None = Field(None, description="by default those of the training, then of the suite")
    seeds: tuple[int, ...] | None = Field(
        None, min_length=1, description="only these of the suite's, for a method that takes long; all by default"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.training is None) == (self.baseline is None):
            raise ValueError("needs either training (with scoring) or baseline")
        if self.training is not None and self.scoring is None:
            raise ValueError("scoring is missing; name a scorer")
        if self.baseline is not None and self.scoring is not None:
            raise ValueError("scoring is set for a baseline; leave it out")
        if self.baseline is not None and self.distil is not None:
            raise ValueError("distil is set for a baseline, which has no network; leave it out")
        if self.baseline is not None and self.resources is not None and self.resources.num_gpus > 0:
            raise ValueError(
                f"resources.num_gpus is {self.resources.num_gpus:g} for a baseline, which runs on the CPU; leave it out"
            )
        return self


class RobustnessPlan(Section):
    """Which methods are also run on changed test images."""

    methods: tuple[str, ...] | None = Field(None, description="all by default")
    datasets: tuple[str, ...] | None = Field(None, description="all by default")
    perturbations: tuple[str, ...] = Field((), description="applied to normal and anomalous images alike")
    severities: tuple[int, ...] = Field((1, 3, 5), min_length=1, description="1 to 5")
    attacks: tuple[float, ...] = Field((), description="L-infinity budgets, in units of the range [-1, 1]")
    max_images: int = Field(200, ge=2, description="test images at most, half of them anomalous where there are enough")


class CostPlan(Section):
    """At which batch sizes the time of an image is measured."""

    batch_sizes: tuple[int, ...] = Field((1, 4, 16, 64), min_length=1)
    num_images: int = Field(64, ge=1, description="test images to measure with")


class Suite(Section):
    """A benchmark: methods x data sets x categories x seeds."""

    title: str = "raydiff benchmark"
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    base: dict[str, Any] = Field(default_factory=dict, description="config fields under everything")
    datasets: dict[str, SuiteDataset] = Field(min_length=1)
    trainings: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="config fields of a network and its training; resources may be among them"
    )
    methods: dict[str, Method] = Field(min_length=1)
    metrics: tuple[str, ...] = Field(("auroc",), min_length=1, description="those that the report leads with")
    classics: tuple[str, ...] | None = Field(None, description="methods that the others are compared with")
    resources: Resources = Resources()
    robustness: RobustnessPlan | None = None
    cost: CostPlan | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key, names, known in self._references():
            for name in names or ():
                if name not in known:
                    raise ValueError(f"{key} names {name!r}, which is not there; {registry.nearest(name, list(known))}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds is {list(self.seeds)}; give each once")
        for name in self.trainings:
            self.training(name)
        for key, path in self._written():
            remedy = _ELSEWHERE.get(path, _ELSEWHERE.get(path.partition(".")[0]))
            if remedy is not None:
                raise ValueError(f"{key}.{path} has no effect in a suite; {remedy}")
        return self

    def _written(self) -> Iterable[tuple[str, str]]:
        """(where, dotted path) of every config field and section that the suite sets."""
        places = {"base": self.base} | {f"trainings.{name}": fields for name, fields in self.trainings.items()}
        places |= {f"datasets.{name}.config": dataset.config for name, dataset in self.datasets.items()}
        for key, fields in places.items():
            for section, value in fields.items():
                yield key, section
                yield from ((key, f"{section}.{field}") for field in (value if isinstance(value, dict) else ()))
        for name, dataset in self.datasets.items():
            yield from ((f"datasets.{name}.each", path) for path in dataset.each)

    def _references(self) -> Iterable[tuple[str, Iterable[str] | None, Iterable[str]]]:
        """(key, names written there, names that exist)."""
        for name, method in self.methods.items():
            yield f"methods.{name}.training", [method.training] if method.training else None, self.trainings
            yield f"methods.{name}.seeds", map(str, method.seeds or ()), list(map(str, self.seeds))
        metrics = (*IMAGE_METRICS, *PIXEL_METRICS)
        for name, dataset in self.datasets.items():
            yield f"datasets.{name}.methods", dataset.methods, self.methods
            yield f"datasets.{name}.metrics", dataset.metrics, metrics
        yield "metrics", self.metrics, metrics
        yield "classics", self.classics, self.methods
        if self.robustness is not None:
            yield "robustness.methods", self.robustness.methods, self.methods
            yield "robustness.datasets", self.robustness.datasets, self.datasets

    def seeds_of(self, method: str) -> tuple[int, ...]:
        """The method's seeds, in the suite's order."""
        own = self.methods[method].seeds
        return tuple(seed for seed in self.seeds if own is None or seed in own)

    def training(self, name: str) -> tuple[dict[str, Any], Resources]:
        """A training's config fields and what a task of it holds."""
        fields = dict(self.trainings[name])
        resources = fields.pop("resources", None)
        try:
            return fields, self.resources if resources is None else Resources.model_validate(resources)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(["trainings", name, "resources", *map(str, first["loc"])])
            own = first["type"] == "value_error"
            reason = str(first["ctx"]["error"]) if own else f"{first['msg'][0].lower()}{first['msg'][1:]}"
            raise ValueError(f"{where}: {reason}") from error

    def classic_methods(self) -> tuple[str, ...]:
        """The methods that the others are compared with."""
        if self.classics is not None:
            return self.classics
        return tuple(name for name, method in self.methods.items() if _component_name(method.baseline) in CLASSICS)

    def leading_metrics(self, dataset: str) -> tuple[str, ...]:
        """The suite's metrics and the data set's own."""
        return tuple(dict.fromkeys((*self.metrics, *self.datasets[dataset].metrics)))


def load_suite(path: str | Path) -> Suite:
    """Read a suite file.

    Raises:
        ConfigError: it is missing or unreadable, or a key is unknown, invalid or given twice; names the file and the
            key.
    """
    data = read_mapping(path, "suite", "with datasets and methods")
    try:
        return Suite.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(error, str(path))) from error


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid over ``under``, key by key; a component of another name replaces the one under it."""
    result = dict(under)
    for key, value in over.items():
        new = {"name": value} if key in _COMPONENTS and isinstance(value, str) else value
        old = result.get(key)
        old = {"name": old} if key in _COMPONENTS and isinstance(old, str) else old
        same = isinstance(new, Mapping) and isinstance(old, Mapping) and _same_component(old, new)
        result[key] = merged(old, new) if same and isinstance(old, Mapping) else new
    return result


def _same_component(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return "name" not in new or "name" not in old or old["name"] == new["name"]


def _named(value: Any) -> str:
    """A category's name from the config value that makes it: the classes, or the last part of a path."""
    if isinstance(value, (list, tuple)):
        return "+".join(str(item) for item in value)
    return str(value).rstrip("/").rpartition("/")[2]


def _component_name(component: dict[str, Any] | str | None) -> str | None:
    return component.get("name") if isinstance(component, dict) else component


_Entry = Literal["datasets", "methods", "resources", "robustness", "cost"]
_MODELS: dict[_Entry, type[Section]] = {
    "datasets": SuiteDataset, "methods": Method, "resources": Resources, "robustness": RobustnessPlan, "cost": CostPlan,
}  # fmt: skip


def _explain(error: ValidationError, where: str) -> str:
    """One line for the first problem, with the nearest valid key for an unknown one; says how many more there are."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] == "missing")  # as a mistyped key makes one
    first = problems[0]
    parts = [str(part) for part in first["loc"]]
    path = ".".join(parts)
    if first["type"] == "extra_forbidden":
        message = f"{path} is not a known key; {registry.nearest(parts[-1], sorted(_model_of(parts).model_fields))}"
    elif first["type"] == "value_error":
        message = f"{path + ': ' if path else ''}{first['ctx']['error']}"
    elif first["type"] == "missing":
        message = f"{path} is missing; set it"
    else:
        message = f"{path} is {first['input']!r}; {first['msg'][0].lower()}{first['msg'][1:]}"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{where}: {message}{more}"


def _model_of(parts: list[str]) -> type[Section]:
    """The model in which the last part of a path is a key."""
    if len(parts) == 1:
        return Suite
    if "resources" in parts[:-1]:
        return Resources
    return next((model for name, model in _MODELS.items() if name == parts[0]), Suite)
