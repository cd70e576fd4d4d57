"""YAML files read as mappings; a key that is given twice is refused, where YAML would quietly keep the last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from raydiff.errors import ConfigError

__all__ = ["read_mapping"]


class _Loader(yaml.SafeLoader):
    """Looks at a mapping's keys before ``<<`` is resolved: those that come with it may be given again."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """The mapping as it is written.

        Raises:
            ConfigError: a key is in it twice.
        """
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if (key.tag, key.value) in lines:
                earlier = lines[key.tag, key.value]
                raise ConfigError(f"line {line}: {key.value} is given twice, first in line {earlier}; keep one of them")
            lines[key.tag, key.value] = line
        return node


def read_mapping(path: str | Path, kind: str, content: str) -> dict[str, Any]:
    """A YAML or JSON file that holds a mapping; an empty one gives an empty mapping.

    Args:
        path: the file.
        kind: what it should be, for messages: ``config``.
        content: what such a file holds, for messages.

    Raises:
        ConfigError: it is missing, unreadable, no YAML or no mapping, or has a key twice; names the file.
    """
    try:
        loader = _Loader(Path(path).read_text(encoding="utf-8"))
        try:
            data = loader.get_single_data()
        finally:
            loader.dispose()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a {kind} file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not YAML ({' '.join(str(error).split())})") from error
    except ConfigError as error:
        raise ConfigError(f"{path} {error}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: holds a {type(data).__name__}; a {kind} is a mapping {content}")
    return data
