"""What the checks share: building a component by name, and the numbers of a row that stands alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raydiff import registry

__all__ = ["BATCH_SIZES", "build", "check_rows", "equal", "require", "tensors", "untouched_generators"]

BATCH_SIZES = (1, 2, 3, 7, 16)
"""In which rows are asked for, and must give the same numbers."""


def build(kind: registry.Kind, name: str, fields: dict[str, Any], **arguments: Any) -> Any:
    """The component with these option fields, built by its file; ``arguments`` are what its kind is built with."""
    return registry.build(kind, registry.component(kind, name).Options(**fields), **arguments)


def check_rows(what: str, score: Callable[[Tensor], list[Tensor]], rows: Tensor) -> None:
    """Contract 1: row i of the result is a function of row i, bit for bit, whatever is around it."""
    whole = score(rows)
    require(equal(score(rows), whole), f"{what}: a second call gives other numbers")
    for size in BATCH_SIZES:
        parts = [score(rows[i : i + size]) for i in range(0, len(rows), size)]
        joined = [torch.cat(pieces) for pieces in zip(*parts, strict=True)]
        require(equal(joined, whole), f"{what}: batches of {size} give other numbers than one batch of {len(rows)}")
    backwards = [result.flip(0) for result in score(rows.flip(0))]
    require(equal(backwards, whole), f"{what}: the order of the rows changes the numbers")
    neighbours = torch.cat([rows[:1], rows[1:].flip(0) * 0.5])
    require(equal([r[:1] for r in score(neighbours)], [r[:1] for r in whole]), f"{what}: depends on its neighbours")
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(score, [rows] * 4):
            require(equal(result, whole), f"{what}: four threads at once give other numbers")


@contextmanager
def untouched_generators(what: str) -> Iterator[None]:
    """See that the body draws from no global generator.

    Raises:
        AssertionError: it draws from torch's or numpy's.
    """
    before, before_numpy = torch.get_rng_state(), _numpy_state()
    yield
    require(torch.equal(torch.get_rng_state(), before), f"{what}: draws from torch's global generator")
    require(_numpy_state() == before_numpy, f"{what}: draws from numpy's global generator")


def _numpy_state() -> tuple[bytes, object, object, object]:
    """Key, position and the kept normal draw: most draws move the position alone."""
    _, key, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return np.asarray(key).tobytes(), position, has_gauss, gauss


def tensors(scores: Any) -> list[Tensor]:
    """The scores, (B,), and the maps, (B, 1, H, W), where there are any."""
    return [scores.image] if scores.map is None else [scores.image, scores.map]


def equal(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Whether both are the same tensors, bit for bit."""
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def require(condition: bool, message: str) -> None:
    """``assert`` that ``python -O`` keeps.

    Raises:
        AssertionError: ``condition`` does not hold.
    """
    if not condition:
        raise AssertionError(message)
