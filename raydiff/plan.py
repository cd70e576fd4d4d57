"""From a suite to its cells: what there is to run, what can be shared, and whether all of it can work.

A cell is one method on one category of a data set with one seed. Cells share shards (one set per data section) and
trainings (one per config with the scoring left out). Configs and digests are those of the suite file, paths relative to
``--data``: the same on every machine. Only what shards are written from has the paths of this one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from raydiff.config import DataConfig, ExperimentConfig, Options, component_options
from raydiff.detector import space_options
from raydiff.errors import ConfigError
from raydiff.fitted_spaces import takes_long
from raydiff.shards.layout import recorded_fields
from raydiff.suite import Method, Resources, Suite, load_suite, merged

__all__ = ["Cell", "Plan", "Training", "plan", "training_scoring"]

_PATHS = ("source", "mnist")
"""Options of data sets that are relative to ``--data``."""

_BEHIND = ("denoiser", "schedule", "objective", "training", "scoring", "calibration", "cross_fitting")
"""Sections of a config that its space does not depend on."""

_DEFAULT_NAMES = {
    "data": {"dataset": {"name": "digits"}}, "space": {"name": "pixel"}, "denoiser": {"name": "unet"},
    "scoring": {"name": "denoising_error"},
}  # fmt: skip
"""Those of :class:`ExperimentConfig`, so that a suite can set an option of one without naming it."""


@dataclass(frozen=True)
class Cell:
    """One point of a benchmark. ``cell_id`` is 12 hex characters over everything that can change its row.

    ``config`` holds the scoring, or the defaults beside a ``baseline``, with paths relative to ``--data``; ``training``
    is the key of the training that it scores with, None for a baseline; ``shards`` that of its images.
    """

    method: str
    dataset: str
    category: str
    seed: int
    cell_id: str
    config: ExperimentConfig
    baseline: Options | None
    training: str | None
    shards: str
    resources: Resources

    @property
    def name(self) -> str:
        """``method/dataset/category/seed``; a data set without categories has ``-`` there."""
        return f"{self.method}/{self.dataset}/{self.category or '-'}/{self.seed}"

    def __repr__(self) -> str:
        return f"Cell({self.name}, {self.cell_id})"


@dataclass(frozen=True)
class Training:
    """A network to train; ``key`` is 12 hex characters over everything that can change its weights.

    Paths in ``config`` are relative to ``--data``. A student's is that of what it is distilled from, scorer included:
    the network of the training ``teacher``; ``distil`` is what its own training differs in.
    """

    key: str
    name: str
    config: ExperimentConfig
    shards: str
    resources: Resources
    teacher: str | None = None
    distil: Mapping[str, Any] | None = None

    @cached_property
    def space(self) -> str | None:
        """The same for trainings that need the same trained space, so that one task can fit it for all of them.

        None where there is no such space, or what it learns from is known only on the way.
        """
        config = self.config
        if self.teacher is not None or not takes_long(config) or config.contamination.max_share:
            return None
        others = {name: ExperimentConfig.model_fields[name].get_default(call_default_factory=True) for name in _BEHIND}
        others["space"] = space_options(config)
        if not config.augmentation.changes:  # else its views are drawn from the run's seed
            others["seed"] = 0
        content = [self.shards, config.model_copy(update=others).digest(), *_threads(self.resources)]
        return _short([*content, self.resources.num_gpus > 0])


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything a suite asks for: cells in the file's order, and by key the trainings and data they share.

    ``shards`` has the paths of this machine. ``whole`` are the suite's cells where ``cells`` is a part of them.
    """

    path: Path
    suite: Suite
    cells: tuple[Cell, ...]
    trainings: Mapping[str, Training]
    shards: Mapping[str, DataConfig]
    whole: tuple[Cell, ...]

    def only(self, pattern: str) -> Plan:
        """The part whose cells' names match a pattern such as ``unet*/digits/*/0``.

        Raises:
            ConfigError: none does.
        """
        cells = [cell for cell in self.cells if fnmatchcase(cell.name, pattern)]
        if not cells:
            raise ConfigError(
                f"--only {pattern}: no cell is called so; a name is method/dataset/category/seed, such as"
                f" {self.cells[0].name}"
            )
        return self.of(cells)

    def of(self, cells: list[Cell]) -> Plan:
        """The plan of some of the cells, with what they need, in the order given."""
        keys = {cell.training for cell in cells}
        keys |= {training.teacher for key, training in self.trainings.items() if key in keys}
        data = {cell.shards for cell in cells}
        return replace(
            self,
            cells=tuple(cells),
            trainings={key: training for key, training in self.trainings.items() if key in keys},
            shards={key: section for key, section in self.shards.items() if key in data},
        )


def plan(path: str | Path, data_dir: str | Path | None = None) -> Plan:
    """Read a suite and lay out its cells; opens no data.

    Args:
        path: the suite file.
        data_dir: what relative paths of data sets are relative to; the working directory by default.

    Raises:
        ConfigError: a key is unknown or invalid, a component or class is not there; names the file and the key.
    """
    suite = load_suite(path)
    layout = _Layout(Path(path), suite, Path(data_dir or ".").resolve())
    for name, dataset in suite.datasets.items():
        for category, assignments in dataset.assignments():
            for seed in suite.seeds:
                for method in dataset.methods or tuple(suite.methods):
                    if seed in suite.seeds_of(method):
                        layout.add(method, name, category, assignments, seed)
    return Plan(Path(path), suite, tuple(layout.cells), layout.trainings, layout.shards, tuple(layout.cells))


class _Layout:
    """What :func:`plan` gathers."""

    def __init__(self, path: Path, suite: Suite, data_dir: Path) -> None:
        self._path, self._suite, self._data_dir = path, suite, data_dir
        self.cells: list[Cell] = []
        self.trainings: dict[str, Training] = {}
        self.shards: dict[str, DataConfig] = {}
        self._baselines = {name: self._baseline(name, method) for name, method in suite.methods.items()}

    def add(self, name: str, dataset: str, category: str, assignments: Mapping[str, Any], seed: int) -> None:
        """One cell, and the training and shards it needs."""
        method, options = self._suite.methods[name], self._baselines[name]
        config = self._config(name, method, dataset, category, assignments, seed)
        shards = shards_key(config.data)
        if shards not in self.shards:
            self.shards[shards] = self._rooted(config).data
        training = None if method.training is None else self._add_training(method, config, shards, dataset, category)
        if training is not None and method.distil is not None:
            training = self._add_student(name, method, config, training)
        described = None if options is None else options.model_dump(mode="json")
        resources = [self._resources(method)] + ([self.trainings[training].resources] if training else [])
        content = [name, dataset, category, seed, config.digest(), described, *_threads(*resources)]
        content += [] if method.distil is None else [{"distil": method.distil}]
        self.cells.append(
            Cell(
                name, dataset, category, seed, _short(content), config, options, training, shards, resources[0],
            )
        )  # fmt: skip

    def _add_training(self, method: Method, config: ExperimentConfig, shards: str, dataset: str, category: str) -> str:
        fitted = config.model_copy(update={"scoring": training_scoring(config)})
        unusual, resources = _unusual(config.data), self._suite.training(method.training or "")[1]
        more = [*([unusual] if unusual else []), *_threads(resources)]
        key = _short([fitted.digest(), *more] if more else fitted.digest())
        if key not in self.trainings:
            name = f"{method.training}/{dataset}/{category or '-'}/{config.seed}"
            self.trainings[key] = Training(key, name, fitted, shards, resources)
        return key

    def _add_student(self, name: str, method: Method, config: ExperimentConfig, teacher: str) -> str:
        """The training of a method's student; ``config`` is its teacher's, with the scoring that it learns."""
        of, distil = self.trainings[teacher], dict(method.distil or {})
        try:
            config.override({f"training.{field}": value for field, value in distil.items()})
        except ConfigError as error:
            raise ConfigError(f"{self._path}: methods.{name}.distil: {error}") from error
        key = _short([teacher, config.digest(), {"distil": distil}])
        if key not in self.trainings:
            named = f"student of {of.name}: {config.scoring.name}"
            self.trainings[key] = replace(of, key=key, name=named, config=config, teacher=teacher, distil=distil)
        return key

    def _config(
        self, name: str, method: Method, dataset: str, category: str, assignments: Mapping[str, Any], seed: int
    ) -> ExperimentConfig:
        """The merged config as the suite has it, paths relative."""
        suite = self._suite
        fields = merged(merged(_DEFAULT_NAMES, suite.base), suite.datasets[dataset].config)
        for path, value in assignments.items():
            fields = merged(fields, _nested(path, value))
        of_data = f"datasets.{dataset}" + (f" ({category})" if category else "")
        where = f"{self._path}: {of_data}"
        if method.training is not None:
            fields = merged(fields, suite.training(method.training)[0])
            fields = {**fields, "scoring": method.scoring}
            where = f"{self._path}: methods.{name} (trainings.{method.training}) on {of_data}"
        config = ExperimentConfig.from_dict({**fields, "seed": seed}, where)
        if config.data.shards is not None:
            raise ConfigError(f"{where}: data.shards is set; a benchmark keeps its shards under --out, so leave it out")
        return config

    def _baseline(self, name: str, method: Method) -> Options | None:
        if method.baseline is None:
            return None
        try:
            return component_options("baselines", method.baseline)
        except ValueError as error:  # a ConfigError, or pydantic's for an option
            raise ConfigError(f"{self._path}: methods.{name}.baseline: {_one_line(error)}") from error

    def _rooted(self, config: ExperimentConfig) -> ExperimentConfig:
        """Relative paths of the data set, and of grids, made absolute."""
        dataset = config.data.dataset
        places = {
            f"data.dataset.{option}": str(self._data_dir / Path(value).expanduser())
            for option in _PATHS
            if isinstance(value := getattr(dataset, option, None), str) and value and "://" not in value
        }
        return config.located().override(places)

    def _resources(self, method: Method) -> Resources:
        """A baseline holds no GPU: it runs on the CPU."""
        if method.resources is not None:
            return method.resources
        if method.training is not None:
            return self._suite.training(method.training)[1]
        return self._suite.resources.model_copy(update={"num_gpus": 0.0})


def _nested(path: str, value: Any) -> dict[str, Any]:
    first, _, rest = path.partition(".")
    return {first: _nested(rest, value) if rest else value}


def shards_key(data: DataConfig) -> str:
    """12 hex characters over everything that can change which images a set of shards holds, or whether it is made."""
    unusual = _unusual(data)
    return _short([recorded_fields(data), data.on_bad_image, *([unusual] if unusual else [])])


def _unusual(data: DataConfig) -> dict[str, Any]:
    """What decides whether shards are made at all or an image is left out, where it is not the default."""
    found: dict[str, Any] = {}
    if data.max_pixels != DataConfig.model_fields["max_pixels"].default:
        found["max_pixels"] = data.max_pixels
    counted = type(data.dataset).model_fields.get("check_counts")
    asked = data.dataset.model_dump().get("check_counts")
    if counted is not None and asked != counted.default:
        found["check_counts"] = asked
    return found


def _threads(*resources: Resources) -> list[int]:
    """How many each gives torch, where one is not 1: the last bits of weights and scores change with it."""
    counts = [math.ceil(each.num_cpus) for each in resources]
    return [] if set(counts) == {1} else counts


def _short(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _one_line(error: Exception) -> str:
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg'][0].lower()}{first['msg'][1:]}"


def training_scoring(config: ExperimentConfig) -> Options:
    """What a training's own artefact scores with, one step that it knows; every method replaces it."""
    low, high = config.objective.step_range
    if config.objective.prediction_type == "deviation":
        correcting = {"name": "deviation_correction", "num_inference_steps": 1, "start_step": (low + high) / 2}
        return component_options("scorers", correcting)
    fields = {"name": "denoising_error", "num_inference_steps": 1, "start": low, "stop": high}
    return component_options("scorers", fields)
