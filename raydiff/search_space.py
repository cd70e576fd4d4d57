"""``search_spaces/*.yaml``: which config fields a sweep varies, over what, to what end, at what cost.

A parameter is a dotted config path with a distribution; it may depend on another one's value. The space is checked
against the config that the sweep begins with before anything runs. Three levels, found from the paths:

* ``training``: changes the network's weights; each new combination is a training.
* ``evidence``: changes what the scorer measures with a trained network; costs network evaluations.
* ``judgement``: changes what is made of measured evidence (pooling, blur, density, threshold); costs none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field

from raydiff.config import ExperimentConfig, Section
from raydiff.errors import ConfigError

__all__ = [
    "OBJECTIVES",
    "Around",
    "Level",
    "Objective",
    "Parameter",
    "Pruning",
    "SearchSpace",
    "Suggester",
    "load_search_space",
]

Level = Literal["training", "evidence", "judgement"]
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


class Suggester(Protocol):
    """What :meth:`SearchSpace.suggest` needs of an Optuna trial."""

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...  # noqa: D102
    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int: ...  # noqa: D102
    def suggest_float(  # noqa: D102
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float: ...


class Parameter(Section):
    """One distribution: exactly one of ``choices``, ``int`` and ``float``."""

    choices: tuple[Any, ...] | None = None
    int: tuple[int, int] | None = None
    float: tuple[float, float] | None = None
    log: bool = False
    step: float | None = None
    when: dict[str, tuple[Any, ...]] = Field(
        default_factory=dict, description="only where each of these other parameters has one of these values"
    )


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
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="trainings per value")


class SearchSpace(Section):
    """A sweep: what is varied and how it is judged."""

    title: str = "raydiff sweep"
    base: dict[str, Any] = Field(default_factory=dict, description="dotted config path: value, over the config")
    parameters: dict[str, Parameter] = Field(min_length=1)
    objectives: tuple[Objective, ...] = Field((Objective(name="selection_auroc"),), min_length=1)
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

    def level(self, path: str) -> Level:
        """Which kind of work a parameter costs."""
        raise NotImplementedError

    def paths(self, levels: Collection[Level]) -> tuple[str, ...]:
        """The parameters of these levels, parents before those that depend on them."""
        raise NotImplementedError

    def directions(self) -> tuple[Direction, ...]:
        """Of the objectives, in order."""
        raise NotImplementedError

    def suggest(
        self, trial: Suggester, levels: Collection[Level], given: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Ask a trial for the parameters of these levels whose conditions hold.

        ``given`` has the values of those of other levels. Values are as the config has them; what Optuna stores for a
        list or mapping is its JSON.
        """
        raise NotImplementedError

    def apply(self, config: ExperimentConfig, params: Mapping[str, Any]) -> ExperimentConfig:
        """The config with ``base`` and then the parameters' values set.

        Raises:
            ConfigError: the combination is not a valid config; says which values are at fault.
        """
        raise NotImplementedError

    def check(self, config: ExperimentConfig, where: str) -> None:
        """See that the space fits the config it will vary; errors begin with ``where``.

        Raises:
            ConfigError: a path is not in the config (names the nearest) or may not be varied, a distribution is empty
                or of the wrong type for its field, a condition names a missing parameter or a value that it never has,
                an objective is not produced, a point has an unknown parameter or a value out of range.
        """
        raise NotImplementedError

    def digest(self) -> str:
        """SHA-256 (hex) of what a study's trials depend on: parameters, base, objectives, seeds; not budgets."""
        kept = self.model_dump(mode="json", include={"base", "parameters", "objectives", "seeds"})
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def load_search_space(path: str | Path) -> SearchSpace:
    """Read a search space file.

    Raises:
        ConfigError: it is missing or unreadable, or a key is unknown, invalid or given twice; names the file and the
            key.
    """
    raise ConfigError(f"{path}: not written yet")
