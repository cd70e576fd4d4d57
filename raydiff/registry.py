"""Components by name: a component's name is its file's name, and it is imported when it is first named.

Each file in a component folder defines two names:

``Options``
    a subclass of :class:`raydiff.config.Options`: the fields a user may set, with a sentence each.
``build(options, ...)``
    makes the component. The keyword arguments per kind are those of the protocols in :mod:`raydiff.contracts`.

To add a component, add a file. Nothing else needs to know.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from functools import cache
from types import ModuleType
from typing import Any, Literal

from raydiff.errors import ConfigError

__all__ = ["KINDS", "Kind", "build", "component", "names", "nearest"]

Kind = Literal["denoisers", "spaces", "scorers", "baselines", "datasets", "perturbations"]
KINDS: tuple[Kind, ...] = ("denoisers", "spaces", "scorers", "baselines", "datasets", "perturbations")


@cache
def names(kind: Kind) -> tuple[str, ...]:
    """The names a user may write for ``kind``, sorted; found by listing the folder, without importing its files."""
    package = importlib.import_module(f"raydiff.{kind}")
    return tuple(sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")))


def nearest(word: str, known: tuple[str, ...] | list[str]) -> str:
    """A hint for an unknown word: ``did you mean 'x'?`` where one is near, else the list of what there is."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}"


def component(kind: Kind, name: str) -> ModuleType:
    """Import the file that defines a component.

    Raises:
        ConfigError: there is no such component; the message names the nearest.
    """
    if name not in names(kind):
        raise ConfigError(f"no {kind.removesuffix('s')} is called {name!r}; {nearest(name, names(kind))}")
    return importlib.import_module(f"raydiff.{kind}.{name}")


def build(kind: Kind, options: Any, **arguments: Any) -> Any:
    """Make the component that ``options`` (with its ``name``) describes."""
    return component(kind, options.name).build(options, **arguments)
