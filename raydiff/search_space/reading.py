"""A search space from its file."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ValidationError

from raydiff import registry
from raydiff.config.explaining import explain
from raydiff.errors import ConfigError
from raydiff.search_space.distributions import Parameter
from raydiff.search_space.space import Around, Objective, Pruning, SearchSpace
from raydiff.yaml_file import read_mapping

__all__ = ["load_search_space"]

_PARTS: dict[str, type[BaseModel]] = {
    "parameters": Parameter, "objectives": Objective, "pruning": Pruning, "around": Around,
}  # fmt: skip
"""What is below these keys of the file."""


def load_search_space(path: str | Path) -> SearchSpace:
    """Read a search space file.

    Raises:
        ConfigError: it is missing or unreadable, or a key is unknown, invalid or given twice; names the file and the
            key.
    """
    data = read_mapping(path, "search space", "of title, base, parameters, objectives and budgets")
    try:
        return SearchSpace.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explained(error, str(path))) from error


def _explained(error: ValidationError, where: str) -> str:
    """One line for the first problem; an unknown key goes first, before what it was meant to be is called missing."""
    problems = error.errors()
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    place = [str(part) for part in first["loc"]]
    name = ".".join(place)
    if first["type"] == "extra_forbidden":
        parent, known = ".".join(place[:-1]), _PARTS.get(place[0], SearchSpace).model_fields
        inside = f"{parent}: " if parent else ""
        return f"{where}: {inside}{place[-1]} is not a known key; {registry.nearest(place[-1], sorted(known))}"
    if first["type"] == "model_type" and place[0] == "parameters":
        return f"{where}: {name} is {first['input']!r}; write a distribution, such as {{choices: [1, 2]}}"
    if first["type"] == "tuple_type":
        return f"{where}: {name} is {first['input']!r}; write a list, such as [1, 2]"
    return explain(error, where, SearchSpace)
