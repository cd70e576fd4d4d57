"""A memory of limited size that forgets what was not asked for the longest."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

__all__ = ["Recent"]

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """Values by key, at most ``limit`` bytes of them; one that is larger is not kept at all."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self._values: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()

    def get(self, key: Hashable) -> Value | None:
        """The value, which is now the most recent one; None where there is none."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key][0]

    def put(self, key: Hashable, value: Value, nbytes: int) -> None:
        """Remember a value of so many bytes, in place of one under the same key; the oldest make room."""
        self.nbytes -= self._values.pop(key, (None, 0))[1]
        if nbytes > self.limit:
            return
        self._values[key] = value, nbytes
        self.nbytes += nbytes
        while self.nbytes > self.limit:
            self.nbytes -= self._values.popitem(last=False)[1][1]
