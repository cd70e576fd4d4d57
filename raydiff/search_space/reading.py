"""A search space from its file."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from raydiff import registry
from raydiff.config.explaining import explain
from raydiff.errors import ConfigError
from raydiff.search_space.distributions import Parameter
from raydiff.search_space.space import SearchSpace
from raydiff.yaml_file import read_mapping

__all__ = ["load_search_space"]


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
    """One line for the first problem; a parameter's own key has dots, which the config's explaining would split at."""
    problems = error.errors()
    unknown = [
        problem["loc"][0] for problem in problems if problem["type"] == "extra_forbidden" and len(problem["loc"]) == 1
    ]
    if unknown:  # before what it was meant to be is called missing
        hint = registry.nearest(str(unknown[0]), sorted(SearchSpace.model_fields))
        return f"{where}: {unknown[0]} is not a known key; {hint}"
    place = problems[0]["loc"]
    if place[:1] != ("parameters",) or len(place) < 2:
        return explain(error, where, SearchSpace)
    name = f"parameters.{place[1]}"
    if problems[0]["type"] == "extra_forbidden":
        hint = registry.nearest(str(place[2]), sorted(Parameter.model_fields))
        return f"{where}: {name}: {place[2]} is not a known key; {hint}"
    if problems[0]["type"] == "model_type":
        return f"{where}: {name} is {problems[0]['input']!r}; write a distribution, such as {{choices: [1, 2]}}"
    return explain(error, where, SearchSpace)
