"""``ClassNames``: the type of an option that lists classes, as people write it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator

__all__ = ["ClassNames"]


def _as_names(value: Any) -> Any:
    """YAML reads ``[3]`` as a number and ``ship`` as one string; a bool stays what it is, and is refused."""
    listed = (value,) if isinstance(value, str) or _is_number(value) else value
    return [str(item) if _is_number(item) else item for item in listed] if isinstance(listed, list | tuple) else listed


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


ClassNames = Annotated[tuple[str, ...], BeforeValidator(_as_names)]
"""``["3", "5"]``, ``[3, 5]``, ``"8"`` or ``8``: kept, and written out, as strings."""
