"""What every section of a config is made of, and the options of a component."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    JsonValue,
    SerializeAsAny,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from raydiff import registry

__all__ = [
    "KIND_OF_FIELD",
    "NO_EFFECT",
    "WHERE_SET",
    "DatasetOptions",
    "DenoiserOptions",
    "Options",
    "ScorerOptions",
    "Section",
    "SpaceOptions",
    "component_options",
]

NO_EFFECT: dict[str, JsonValue] = {"affects_scores": False}
"""``Field(json_schema_extra=NO_EFFECT)``: this field cannot change a score, so the digest leaves it out."""

WHERE_SET: dict[str, JsonValue] = {"in_digest": "unless it is the default"}
"""``Field(json_schema_extra=WHERE_SET)``: a field that came later; configs without it keep their digest."""

KIND_OF_FIELD: dict[str, registry.Kind] = {
    "dataset": "datasets", "space": "spaces", "denoiser": "denoisers", "scoring": "scorers",
}  # fmt: skip
"""Fields that hold a component's options, and of which kind the component is."""


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


def _types_in(annotation: Any) -> set[Any]:
    """The plain types that a field's annotation is made of: ``tuple[Literal[1], float]`` gives int and float."""
    inner = get_args(annotation)
    if inner:
        return {kind for part in inner for kind in _types_in(part)}
    return {annotation if isinstance(annotation, type) else type(annotation)}


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
