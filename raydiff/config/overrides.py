"""``path=value``: how one field of a config is changed."""

from __future__ import annotations

from typing import Any

import yaml

from raydiff import registry
from raydiff.config.options import KIND_OF_FIELD
from raydiff.errors import ConfigError

__all__ = ["assign", "parse_override"]


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


def assign(data: dict[str, Any], path: str, value: Any) -> None:
    """Set one field of a config's plain form, in place; another component's name drops the old one's options.

    Raises:
        ConfigError: there is no such field; the message names the nearest.
    """
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
    elif last in KIND_OF_FIELD and isinstance(value, str):
        value = {"name": value}
    elif last not in node and "name" not in node:
        raise ConfigError(f"--set {path}: {last!r} is not a known key; {registry.nearest(last, sorted(node))}")
    node[last] = value
