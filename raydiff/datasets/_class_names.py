"""``ClassNames``: the type of an option that lists classes, as people write it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

__all__ = ["ClassNames", "DigitNames", "checked_names"]


def _as_names(value: Any) -> Any:
    """YAML reads ``[3]`` as a number and ``ship`` as one string; a bool stays what it is, and is refused."""
    listed = (value,) if isinstance(value, str) or _is_number(value) else value
    return [str(item) if _is_number(item) else item for item in listed] if isinstance(listed, list | tuple) else listed


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


ClassNames = Annotated[tuple[str, ...], BeforeValidator(_as_names)]
"""``["3", "5"]``, ``[3, 5]``, ``"8"`` or ``8``: kept, and written out, as strings."""


def checked_names(names: tuple[str, ...], known: Collection[str], unknown: str, what: str) -> tuple[str, ...]:
    """The names, once each and all known, or a ValueError: ``'x' <unknown>``, or ``... names a <what> twice``."""
    for name in names:
        if name not in known:
            raise ValueError(f"{name!r} {unknown}")
    if len(set(names)) != len(names):
        raise ValueError(f"{', '.join(names)} names a {what} twice; name each once")
    return names


def _digits(names: tuple[str, ...]) -> tuple[str, ...]:
    return checked_names(names, set("0123456789"), 'is no digit; write digits as "0" to "9"', "digit")


DigitNames = Annotated[ClassNames, AfterValidator(_digits)]
"""Digits from "0" to "9", once each."""
