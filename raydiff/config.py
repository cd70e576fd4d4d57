"""``ExperimentConfig``: everything that defines an experiment, frozen, with every default written out.

A config is a YAML file, or the ``config.json`` inside an artefact. Unknown keys are errors that name the nearest
valid key. ``--set training.num_steps=200`` changes one field by its dotted path.

A field marked :data:`NO_EFFECT` cannot change a score (where it runs, how often it logs) and does not enter
:meth:`ExperimentConfig.digest`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from raydiff import registry
from raydiff.errors import ConfigError

__all__ = [
    "NO_EFFECT",
    "CalibrationConfig",
    "DataConfig",
    "ExecutionConfig",
    "ExperimentConfig",
    "ObjectiveConfig",
    "Options",
    "ScheduleConfig",
    "Section",
    "TrainingConfig",
    "component_options",
    "load_config",
    "parse_override",
]

NO_EFFECT: dict[str, JsonValue] = {"affects_scores": False}
"""``Field(json_schema_extra=NO_EFFECT)``: this field cannot change a score, so the digest leaves it out."""


def _types_in(annotation: Any) -> set[Any]:
    """The plain types that a field's annotation is made of: ``tuple[Literal[1], float]`` gives int and float."""
    inner = get_args(annotation)
    if inner:
        return {kind for part in inner for kind in _types_in(part)}
    return {annotation if isinstance(annotation, type) else type(annotation)}


class Section(BaseModel):
    """A frozen group of fields; unknown keys are errors, defaults are validated."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML's ``yes`` and ``true`` are no numbers, though Python takes them for 1."""
        accepted = _types_in(cls.model_fields[info.field_name or ""].annotation)
        given = value if isinstance(value, list | tuple) else [value]
        if bool not in accepted and accepted & {int, float} and any(isinstance(item, bool) for item in given):
            raise PydanticCustomError("bool_for_a_number", "Input should be a number, not true or false")
        return value


class Options(Section):
    """The fields of one component. ``name`` says which file under ``raydiff/<kind>/`` it is."""

    name: str


def component_options(kind: registry.Kind, value: Any) -> Options:
    """Validate a component's mapping (or bare name) with the ``Options`` of the file it names.

    Raises:
        ConfigError: no such component, or one of its fields is unknown or invalid.
    """
    if isinstance(value, Options):
        return value
    fields = {"name": value} if isinstance(value, str) else value
    if not isinstance(fields, Mapping) or not isinstance(fields.get("name"), str):
        raise ValueError(f"needs a name, one of: {', '.join(registry.names(kind))}")
    options_class: type[Options] = registry.component(kind, fields["name"]).Options
    return options_class.model_validate(dict(fields))


DatasetOptions = Annotated[SerializeAsAny[Options], BeforeValidator(partial(component_options, "datasets"))]
SpaceOptions = Annotated[SerializeAsAny[Options], BeforeValidator(partial(component_options, "spaces"))]
DenoiserOptions = Annotated[SerializeAsAny[Options], BeforeValidator(partial(component_options, "denoisers"))]
ScorerOptions = Annotated[SerializeAsAny[Options], BeforeValidator(partial(component_options, "scorers"))]


class DataConfig(Section):
    """Which images, in which size, and how they are split."""

    dataset: DatasetOptions = Field(
        default_factory=partial(component_options, "datasets", "digits"), description="the data set and its own options"
    )
    image_size: tuple[int, int] = Field((8, 8), description="height and width in pixels that the detector works at")
    channels: Literal[1, 3] = Field(1, description="1 (grey) or 3 (RGB)")
    resize: Literal["stretch", "pad", "strict"] = Field(
        "stretch", description="how an image of another size is fitted; strict refuses it"
    )
    calibration_fraction: float = Field(
        0.25, gt=0, lt=1, description="share of the training normals set aside for calibration"
    )
    split_seed: int = Field(0, ge=0, description="which normals are set aside, and which images a limit keeps")
    max_train_images: int | None = Field(
        None, gt=0, description="at most so many training normals, calibration included; equal shares per class"
    )
    max_test_images: int | None = Field(
        None, gt=0, description="at most so many test images, each class and defect in proportion"
    )
    on_bad_image: Literal["error", "skip"] = Field(
        "error", description="skip: leave an unreadable image out, count it and name it"
    )
    max_pixels: int = Field(
        64_000_000, gt=0, description="an image with more pixels is refused before it is decoded (decompression bomb)"
    )
    shuffle_window: int = Field(4096, gt=0, description="images among which the order is random when streaming")
    shards: str | None = Field(
        None,
        description="where the shards lie or go: a folder or s3://...; the run's own folder when empty",
        json_schema_extra=NO_EFFECT,
    )
    shard_format: Literal["encoded", "raw"] = Field(
        "encoded", description="encoded: files as they are; raw: uint8 pixels at image_size, if decoding is the limit",
        json_schema_extra=NO_EFFECT,
    )  # fmt: skip
    shard_mb: int = Field(128, gt=0, description="target size of a shard in MB", json_schema_extra=NO_EFFECT)
    cache_mb: int = Field(
        1024, ge=0, description="keep decoded training images in memory when they fit in this many MB per worker",
        json_schema_extra=NO_EFFECT,
    )  # fmt: skip

    @model_validator(mode="after")
    def _check(self) -> Self:
        if min(self.image_size) < 1:
            raise ValueError(f"image_size is {self.image_size}; both sides must be at least 1")
        return self


class ScheduleConfig(Section):
    """The noise schedule: how much signal is left at each of T steps."""

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] = "squaredcos_cap_v2"
    num_train_timesteps: int = Field(1000, ge=2, description="T")
    beta_start: float = Field(1e-4, gt=0, lt=1, description="first beta of linear, scaled_linear and sigmoid")
    beta_end: float = Field(2e-2, gt=0, lt=1, description="last beta of linear, scaled_linear and sigmoid")
    rescale_to_zero_terminal_snr: bool = Field(False, description="Lin et al. 2024 (arXiv:2305.08891), algorithm 1")


class ObjectiveConfig(Section):
    """What the denoiser predicts and how the loss weighs the steps."""

    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    loss_weighting: Literal["uniform", "min_snr"] = "uniform"
    min_snr_gamma: float = Field(5.0, gt=0, description="Hang et al. 2023 (arXiv:2303.09556)")
    step_range: tuple[float, float] = Field(
        (0.0, 1.0), description="lowest and highest step that is trained, as shares of T; scorers must stay within"
    )
    condition: Literal["none", "class", "rotation"] = Field(
        "none",
        description="what the denoiser is told: nothing, the image's class, or by how many quarter turns it was rotated"
        " (each training image by 0 to 3 of them)",
    )
    condition_dropout: float = Field(
        0.1, ge=0, le=1, description="share of labels replaced by 'none' when there is a condition"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.step_range
        if not 0 <= low < high <= 1:
            raise ValueError(f"step_range is {list(self.step_range)}; it must rise, between 0 and 1")
        return self


class TrainingConfig(Section):
    """The optimisation: a fixed budget of steps, AdamW, the average of the weights at the end."""

    num_steps: int = Field(1000, ge=1, description="optimiser steps")
    batch_size: int = Field(64, ge=1, description="images per optimiser step, over all workers")
    accumulation_steps: int = Field(1, ge=1, description="backward passes per optimiser step")
    learning_rate: float = Field(1e-3, gt=0)
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = Field(50, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0, description="gradient norms above this are scaled down")
    ema_decay: float = Field(0.995, ge=0, lt=1, description="per step; 0 keeps the last weights")
    horizontal_flip: bool = Field(False, description="flip half of the training images left to right")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="bfloat16: autocast, weights stay float32")
    compile: bool = Field(False, description="torch.compile")
    channels_last: bool = Field(False, description="memory layout NHWC")
    checkpoint_every: int = Field(200, ge=1, description="steps between checkpoints", json_schema_extra=NO_EFFECT)
    keep_checkpoints: int = Field(2, ge=1, json_schema_extra=NO_EFFECT)
    log_every: int = Field(20, ge=1, json_schema_extra=NO_EFFECT)
    validate_every: int = Field(
        200, ge=1, description="steps between held-out denoising losses", json_schema_extra=NO_EFFECT
    )
    validation_images: int = Field(256, ge=1, json_schema_extra=NO_EFFECT)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"batch_size is {self.batch_size}; it must be a multiple of accumulation_steps"
                f" ({self.accumulation_steps})"
            )
        return self


class CalibrationConfig(Section):
    """The threshold, from normal images alone."""

    target_fpr: float = Field(0.05, gt=0, lt=1, description="share of normal images that may be called anomalous")
    folds: int = Field(
        5, ge=2, description="scores for the threshold come from statistics fitted without the image's own fold"
    )


class ExecutionConfig(Section):
    """Where and how it runs. Nothing here can change a score."""

    num_workers: int = Field(1, ge=1, description="Ray Train workers", json_schema_extra=NO_EFFECT)
    use_gpu: bool = Field(False, json_schema_extra=NO_EFFECT)
    cpus_per_worker: float = Field(1.0, gt=0, json_schema_extra=NO_EFFECT)
    max_failures: int = Field(
        3, ge=0, description="restarts from the last checkpoint before the run fails", json_schema_extra=NO_EFFECT
    )
    scoring_batch_size: int = Field(
        64, ge=1, description="images per call when scoring many", json_schema_extra=NO_EFFECT
    )


class ExperimentConfig(Section):
    """One experiment: data, diffusion model, training, scoring and calibration."""

    seed: int = Field(0, ge=0, lt=2**31, description="of weights, order, noise; a headline needs three")
    data: DataConfig = Field(default_factory=DataConfig)  # not DataConfig(): that would import a data set from here
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
    execution: ExecutionConfig = ExecutionConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.schedule.rescale_to_zero_terminal_snr and self.objective.prediction_type == "epsilon":
            raise ValueError(
                "schedule.rescale_to_zero_terminal_snr leaves nothing of the image at the last step, so epsilon cannot"
                " tell it; set objective.prediction_type to v_prediction or sample"
            )
        if self.objective.condition == "rotation" and len(set(self.data.image_size)) > 1:
            raise ValueError(
                f"objective.condition is rotation and data.image_size {self.data.image_size}; quarter turns need square"
                " images, so set both sides alike"
            )
        share = self.execution.num_workers * self.training.accumulation_steps
        if self.training.batch_size % share:
            raise ValueError(
                f"training.batch_size is {self.training.batch_size}; it must be a multiple of execution.num_workers x "
                f"training.accumulation_steps ({share})"
            )
        return self

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
            _assign(data, path, value)
        return _validate(data, "--set")


def parse_override(text: str) -> tuple[str, Any]:
    """``key.path=value`` with the value read as YAML: ``("key.path", value)``.

    Raises:
        ConfigError: there is no ``=``, or the value is no YAML.
    """
    path, sign, value = text.partition("=")
    if not sign or not path:
        raise ConfigError(f"--set {text}: write it as path=value, for example training.num_steps=200")
    try:
        return path, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text}: the value is not YAML ({' '.join(str(error).split())})") from error


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read a YAML or JSON config file and apply ``path=value`` overrides.

    Raises:
        ConfigError: the file is missing or unreadable, or a field is unknown or invalid.
    """
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a config file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not YAML ({' '.join(str(error).split())})") from error
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: holds a {type(data).__name__}; a config is a mapping of section to fields")
    return _validate(data, str(path)).override(overrides)


def _validate(data: Mapping[str, Any], where: str) -> ExperimentConfig:
    try:
        return ExperimentConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(error, where)) from error
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _explain(error: ValidationError, where: str) -> str:
    """One line for the first problem, with the nearest valid key for an unknown one; says how many more there are."""
    problems = error.errors()
    first = problems[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        parent, key = ".".join(path.split(".")[:-1]), path.split(".")[-1]
        known = sorted(_fields_at(parent))
        message = f"{path} is not a known key; {registry.nearest(key, known)}"
    elif first["type"] in ("value_error", "assertion_error"):
        message = f"{path + ': ' if path else ''}{first['ctx']['error']}"
    elif first["type"] == "missing":
        message = f"{path} is missing; set it"
    else:
        message = f"{path} is {first['input']!r}; {first['msg'][0].lower()}{first['msg'][1:]}"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{where}: {message}{more}"


def _fields_at(parent: str) -> Iterator[str]:
    """Field names valid below a dotted path; for a component, those of all components of that kind."""
    model: Any = ExperimentConfig
    for part in parent.split(".") if parent else []:
        field = model.model_fields.get(part)
        annotation = field.annotation if field else None
        if annotation is Options and field is not None:
            yield from _component_fields(part)
            return
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return
        model = annotation
    yield from model.model_fields


_KIND_OF_FIELD: dict[str, registry.Kind] = {
    "dataset": "datasets", "space": "spaces", "denoiser": "denoisers", "scoring": "scorers",
}  # fmt: skip


def _component_fields(field: str) -> set[str]:
    kind = _KIND_OF_FIELD[field]
    return {key for name in registry.names(kind) for key in registry.component(kind, name).Options.model_fields}


def _assign(data: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    node: Any = data
    for part in parents:
        if not isinstance(node, dict) or part not in node:
            known = sorted(node) if isinstance(node, dict) else []
            raise ConfigError(f"--set {path}: {part!r} is not a known key; {registry.nearest(part, known)}")
        node = node[part]
    if not isinstance(node, dict):
        raise ConfigError(f"--set {path}: {'.'.join(parents)} has no fields")
    if last == "name" and node.get("name") not in (None, value):
        node.clear()
    elif last in _KIND_OF_FIELD and isinstance(value, str):
        value = {"name": value}
    elif last not in node and "name" not in node:
        raise ConfigError(f"--set {path}: {last!r} is not a known key; {registry.nearest(last, sorted(node))}")
    node[last] = value


def _without_no_effect(section: BaseModel) -> dict[str, Any]:
    dumped = section.model_dump(mode="json")
    kept: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("affects_scores") is False:
            continue
        value = getattr(section, name)
        kept[name] = _without_no_effect(value) if isinstance(value, BaseModel) else dumped[name]
    return kept
