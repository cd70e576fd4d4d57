"""What one parameter may be: choices, whole numbers or real numbers, and when it applies."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, Protocol, Self

from pydantic import Field, field_validator, model_validator

from raydiff.config import Section

__all__ = ["Parameter", "Suggester", "same", "stored"]

_IntRange = tuple[int, int]  # named here: inside Parameter, int and float are its fields
_FloatRange = tuple[float, float]
_Float = float
_INSIDE = 0.381966  # where in a range: hardly ever at a whole number


class Suggester(Protocol):
    """What :meth:`raydiff.search_space.SearchSpace.suggest` needs of an Optuna trial."""

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...  # noqa: D102
    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int: ...  # noqa: D102
    def suggest_float(  # noqa: D102
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float: ...


class Parameter(Section):
    """One distribution: exactly one of ``choices``, ``int`` and ``float``."""

    choices: tuple[Any, ...] | None = Field(None, min_length=1, description="any values, also lists and mappings")
    int: _IntRange | None = Field(None, description="lowest and highest whole number, both included")
    float: _FloatRange | None = Field(None, description="lowest and highest number, both included")
    log: bool = Field(False, description="draw evenly on a logarithmic scale")
    step: _Float | None = Field(None, gt=0, description="only multiples of it above the lowest")
    when: dict[str, tuple[Any, ...]] = Field(
        default_factory=dict, description="only where each of these other parameters has one of these values"
    )

    @field_validator("when", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {path: allowed if isinstance(allowed, list | tuple) else (allowed,) for path, allowed in value.items()}

    @field_validator("choices")
    @classmethod
    def _check_choices(cls, choices: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        for number, choice in enumerate(choices or ()):
            try:
                json.dumps(choice, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{choice} cannot be stored; choices are text, finite numbers, true, false, null, lists or mappings"
                ) from error
            if any(stored(choice) == stored(other) for other in (choices or ())[:number]):
                raise ValueError(f"{choice!r} is given twice; leave one out")
        return choices

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [name for name in ("choices", "int", "float") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"has {' and '.join(given) or 'no distribution'}; give exactly one of choices, int, float")
        if self.choices is not None and (self.log or self.step is not None):
            raise ValueError(f"{'log' if self.log else 'step'} is set for choices; it goes with int or float")
        if any(not allowed for allowed in self.when.values()):
            raise ValueError("when has an empty list, so it never applies; give the parent's values, or leave it out")
        if self.range is not None:
            _check_range(*self.range, kind=given[0], log=self.log, step=self.step)
        return self

    @property
    def range(self) -> tuple[_Float, _Float] | None:
        """The lowest and the highest number; None for choices."""
        return self.float if self.int is None else self.int

    def admits(self, value: Any) -> bool:
        """Whether it ever has this value."""
        if self.choices is not None:
            return any(same(value, choice) for choice in self.choices)
        low, high = self.range or (0, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            return False
        if self.int is not None and value != int(value):
            return False
        step = self.step or (1 if self.int else None)
        return step is None or math.isclose((value - low) / step, round((value - low) / step), abs_tol=1e-9)

    def probes(self) -> tuple[Any, ...]:
        """Values to try it with: every choice, or both ends and one inside, on the grid where there is one."""
        if self.choices is not None:
            return self.choices
        low, high = self.range or (0, 0)
        step = self.step or (1 if self.int else None)
        inside = low + (_INSIDE * (high - low) if step is None else step * round(_INSIDE * (high - low) / step))
        kind = int if self.int else float
        return tuple(dict.fromkeys(kind(value) for value in (low, inside, high)))

    def suggest(self, trial: Suggester, path: str) -> Any:
        """Ask a trial for a value; Optuna stores lists and mappings as their JSON."""
        if self.choices is not None:
            kept = [stored(choice) for choice in self.choices]
            return self.choices[kept.index(trial.suggest_categorical(path, kept))]
        if self.int is not None:
            return trial.suggest_int(path, *self.int, step=int(self.step or 1), log=self.log)
        low, high = self.float or (0.0, 0.0)
        return trial.suggest_float(path, low, high, step=self.step, log=self.log)


def stored(value: Any) -> Any:
    """What Optuna keeps of a choice: JSON text of a list or mapping, anything else as it is."""
    return json.dumps(value, sort_keys=True) if isinstance(value, list | tuple | dict) else value


def same(left: Any, right: Any) -> bool:
    """Equal as config values: true is not 1."""
    return isinstance(left, bool) == isinstance(right, bool) and bool(stored(left) == stored(right))


def _check_range(low: float, high: float, *, kind: str, log: bool, step: float | None) -> None:
    """Raise ValueError for a range that Optuna would refuse, or quietly change."""
    shown: Sequence[float] = [low, high]
    if low >= high:
        raise ValueError(
            f"{kind} is {list(shown)}, an empty range; the lowest comes first and must be below the highest"
        )
    if log and low <= 0:
        raise ValueError(f"{kind} is {list(shown)} with log; the lowest must be above 0")
    if step is None:
        return
    if log:
        raise ValueError("log and step are both set; keep one of them")
    if kind == "int" and step != int(step):
        raise ValueError(f"step is {step:g} for whole numbers; make it a whole number, or use float")
    if (Decimal(str(high)) - Decimal(str(low))) % Decimal(str(step)):
        fitting = Decimal(str(low)) + (Decimal(str(high)) - Decimal(str(low))) // Decimal(str(step)) * Decimal(
            str(step)
        )
        raise ValueError(f"{kind} is {list(shown)} and step {step:g}, which does not reach the end; end at {fitting}")
