"""The whole config: its sections together, what they demand of each other, and how it is read from a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from raydiff.config.explaining import explain
from raydiff.config.options import (
    WHERE_SET,
    DenoiserOptions,
    ScorerOptions,
    Section,
    SpaceOptions,
    component_options,
)
from raydiff.config.overrides import assign, parse_override
from raydiff.config.sections import (
    AugmentationConfig,
    CalibrationConfig,
    ContaminationConfig,
    CrossFittingConfig,
    DataConfig,
    DistillationConfig,
    ExecutionConfig,
    ObjectiveConfig,
    ScheduleConfig,
    TilesConfig,
    TrainingConfig,
)
from raydiff.errors import ConfigError
from raydiff.yaml_file import read_mapping

__all__ = ["ExperimentConfig", "load_config"]

_TO_OTHER_PLACES = ("horizontal_flip", "vertical_flip", "quarter_turns")
"""Augmentations that show a part in another place altogether."""

_HALF_QUARTER = 45
"""Degrees from which on a turned image may look more like another quarter turn."""


class ExperimentConfig(Section):
    """One experiment: data, diffusion model, training, scoring and calibration."""

    seed: int = Field(0, ge=0, lt=2**31, description="of weights, order, noise; a headline needs three")
    data: DataConfig = Field(default_factory=DataConfig)  # not DataConfig(): that would import a data set from here
    augmentation: AugmentationConfig = AugmentationConfig()
    tiles: TilesConfig = TilesConfig()
    space: SpaceOptions = Field(
        default_factory=partial(component_options, "spaces", "pixel"), description="what is diffused"
    )
    denoiser: DenoiserOptions = Field(
        default_factory=partial(component_options, "denoisers", "unet"), description="the network"
    )
    schedule: ScheduleConfig = ScheduleConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    training: TrainingConfig = TrainingConfig()
    scoring: ScorerOptions = Field(
        default_factory=partial(component_options, "scorers", "denoising_error"),
        description="how an image gets its score",
    )
    calibration: CalibrationConfig = CalibrationConfig()
    cross_fitting: CrossFittingConfig = CrossFittingConfig()
    contamination: ContaminationConfig = ContaminationConfig()
    distillation: DistillationConfig | None = Field(
        None, description="whose student the network is; none for one of its own", json_schema_extra=WHERE_SET
    )
    execution: ExecutionConfig = ExecutionConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.schedule.rescale_to_zero_terminal_snr and self.objective.prediction_type == "epsilon":
            raise ValueError(
                "schedule.rescale_to_zero_terminal_snr leaves nothing of the image at the last step, so epsilon cannot"
                " tell it; set objective.prediction_type to v_prediction or sample"
            )
        if self.objective.condition == "rotation" and len(set(self.model_size)) > 1:
            field = "tiles.size" if self.tiles.size else "data.image_size"
            raise ValueError(
                f"objective.condition is rotation and {field} {self.model_size}; quarter turns need square"
                " images, so set both sides alike"
            )
        if self.augmentation.quarter_turns and len(set(self.data.image_size)) > 1:
            raise ValueError(
                f"augmentation.quarter_turns is set and data.image_size {self.data.image_size}; quarter turns need"
                " square images, so set both sides alike, or use augmentation.rotation"
            )
        if self.objective.condition == "rotation" and (
            self.augmentation.quarter_turns or self.augmentation.rotation >= _HALF_QUARTER
        ):
            raise ValueError(
                "objective.condition is rotation, so the network is told how far an image is turned, and"
                " augmentation.quarter_turns or rotation turns it further; leave quarter_turns out, and set"
                f" augmentation.rotation below {_HALF_QUARTER}"
            )
        self._check_folds()
        self._check_grids()
        self._check_places()
        share = self.execution.num_workers * self.training.accumulation_steps
        if self.training.batch_size < share:
            raise ValueError(
                f"training.batch_size is {self.training.batch_size}; it must be at least execution.num_workers x "
                f"training.accumulation_steps ({share})"
            )
        return self

    def _check_folds(self) -> None:
        if self.contamination.max_share and not self.cross_fitting.folds:
            raise ValueError(
                "contamination.max_share needs networks that were trained without the images they judge; set"
                " cross_fitting.folds to 2 or more"
            )
        if self.needs_folds and self.distillation is not None:
            if self.data.calibration_fraction:
                raise ValueError(
                    "a student cannot leave out folds of images that its teacher saw; set contamination.max_share to 0"
                )
            raise ValueError(
                "data.calibration_fraction is 0, so a student's teacher saw all images; fit the teacher with it above"
                " 0, or set cross_fitting.folds and contamination.max_share to 0: the threshold then says so"
            )

    def _check_places(self) -> None:
        """Statistics of one place in all images need images whose places mean the same."""
        if getattr(self.space, "statistics", "shared") != "per_cell":
            return
        moved = {
            "tiles.size": self.tiles.size is not None,
            "training.horizontal_flip": self.training.horizontal_flip,
            "objective.condition: rotation": self.objective.condition == "rotation",
            **{f"augmentation.{name}": getattr(self.augmentation, name) for name in _TO_OTHER_PLACES},
        }
        if field := next((field for field, is_set in moved.items() if is_set), None):
            raise ValueError(
                f"space.statistics is per_cell, where each place has its own, and {field} shows a part in other places;"
                " leave one of them out"
            )

    def _check_grids(self) -> None:
        if self.data.grids is None:
            return
        if self.tiles.size is not None and self.tiles.crops == "random":
            raise ValueError(
                "data.grids keeps every view of the training images and tiles.crops is random, which has no end of"
                " them; set tiles.crops to regular, or leave data.grids out"
            )
        if self.augmentation.changes and not self.augmentation.views:
            raise ValueError(
                "data.grids keeps every view of the training images and augmentation.views is 0, which has no end of"
                " them; set augmentation.views, or leave data.grids out"
            )

    @property
    def needs_folds(self) -> bool:
        """Whether networks are trained beside the run's own, each without a fold of the training images."""
        unset = not self.data.calibration_fraction
        return bool(self.cross_fitting.folds) and (unset or bool(self.contamination.max_share))

    @property
    def model_size(self) -> tuple[int, int]:
        """Height and width in pixels of what the model sees at once: a tile, or else the image."""
        return self.tiles.size or self.data.image_size

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str) -> ExperimentConfig:
        """Validate a mapping as :func:`load_config` does a file; errors begin with ``where``.

        Raises:
            ConfigError: a field is unknown or invalid.
        """
        return _validate(data, where)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types with every default written out; :func:`load_config` reads it back."""
        return self.model_dump(mode="json")

    def digest(self) -> str:
        """SHA-256 (hex, 64 characters) of every field that can change a score."""
        payload = _without_no_effect(self)
        return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()

    def override(self, assignments: Sequence[str] | Mapping[str, Any]) -> ExperimentConfig:
        """A copy with fields changed by dotted path: ``["training.num_steps=200"]`` or ``{"seed": 1}``.

        Setting a component's ``name`` to another one drops the old component's options.

        Raises:
            ConfigError: an unknown path (names the nearest) or a value of the wrong type.
        """
        pairs = assignments if isinstance(assignments, Mapping) else dict(parse_override(a) for a in assignments)
        data = self.to_dict()
        for path, value in pairs.items():
            assign(data, path, deepcopy(value))  # a later path may lie within it
        return _validate(data, "--set")

    def located(self) -> ExperimentConfig:
        """The same with ``data.grids`` and ``data.spaces`` found from any working directory: paths made absolute."""
        places = {"data.grids": None if self.data.grids == "run" else self.data.grids, "data.spaces": self.data.spaces}
        folders = {field: Path(place) for field, place in places.items() if place is not None and "://" not in place}
        return self.override({field: str(folder.expanduser().resolve()) for field, folder in folders.items()})

    def to_resume(self, assignments: Sequence[str]) -> ExperimentConfig:
        """:meth:`override` for a run that goes on: its checkpoints hold for this config only.

        Raises:
            ConfigError: a field other than ``data.on_bad_shard`` and those that cannot change a score is changed.
        """
        changed = self.override(assignments)
        if changed.override({"data.on_bad_shard": self.data.on_bad_shard}).digest() != self.digest():
            raise ConfigError(
                f"--set {' '.join(assignments)}: changes what the run to resume was begun with; only fields that cannot"
                " change a score, and data.on_bad_shard, can be set with --resume; start a new run"
            )
        return changed


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read a YAML or JSON config file and apply ``path=value`` overrides.

    Raises:
        ConfigError: the file is missing or unreadable, or a field is unknown, invalid or given twice.
    """
    data = read_mapping(path, "config", "of section to fields")
    return _validate(data, str(path)).override(overrides)


def _validate(data: Mapping[str, Any], where: str) -> ExperimentConfig:
    try:
        return ExperimentConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error, where, ExperimentConfig)) from error
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _without_no_effect(section: BaseModel) -> dict[str, Any]:
    dumped = section.model_dump(mode="json")
    kept: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("affects_scores") is False:
            continue
        value = getattr(section, name)
        if extra == WHERE_SET and value == field.default:
            continue
        inner = _without_no_effect(value) if isinstance(value, BaseModel) else dumped[name]
        if inner == {} and isinstance(value, BaseModel):
            continue  # a section that came later, as it is by default
        kept[name] = inner
    return kept
