"""A task runs with as many threads as it has CPUs, and leaves the process as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info

from raydiff.suite import Resources
from raydiff.tasks import Task, perform


def threads() -> dict[str, int]:
    """Of torch, and of the libraries behind numpy and scipy."""
    np.eye(2) @ np.eye(2)
    found = {pool["filepath"]: pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}
    assert found
    return found | {"torch": torch.get_num_threads()}


def fail() -> None:
    raise ValueError("no")


@pytest.mark.parametrize(("num_cpus", "expected"), [(0.5, 1), (1, 1), (1.5, 2)])
def test_a_task_has_as_many_threads_as_cpus(num_cpus: float, expected: int) -> None:
    before = threads()
    outcome = perform(Task("a", "baseline", "a task", (), Resources(num_cpus=num_cpus), threads))
    assert outcome.failure is None
    assert set(outcome.value.values()) == {expected}
    assert threads() == before
    failed = perform(Task("a", "baseline", "a task", (), Resources(num_cpus=num_cpus), fail))
    assert failed.failure is not None
    assert failed.failure.message == "no"
    assert threads() == before
