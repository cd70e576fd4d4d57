"""Pieces of work that need one another, run by whoever is there: in this process, or by Ray.

A task that fails takes those that need it with it, and no other.
"""

from __future__ import annotations

import math
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from threadpoolctl import threadpool_limits

from raydiff.errors import ConfigError
from raydiff.suite import Resources

__all__ = ["Failure", "Kind", "Outcome", "Progress", "SerialWorkers", "Task", "Workers", "drive", "perform"]

Kind = Literal["shards", "space", "training", "diffusion", "baseline", "robustness"]
"""What the time of one task says something about the time of another for."""


@dataclass(frozen=True)
class Failure:
    """Why a task did not end well: an error's type, its message in one line, its traceback."""

    type: str
    message: str
    traceback: str = ""


@dataclass(frozen=True)
class Task:
    """A piece of work for one worker; ``needs`` are the keys of those that must have ended well before."""

    key: str
    kind: Kind
    name: str
    needs: tuple[str, ...]
    resources: Resources
    call: Callable[[], Any]


@dataclass(frozen=True)
class Outcome:
    """What became of a task: its value, or a failure; and the seconds it took."""

    key: str
    seconds: float
    value: Any = None
    failure: Failure | None = None


class Workers(Protocol):
    """Who runs tasks. The order in which outcomes come does not matter."""

    num_slots: int
    """How many tasks are handed over before the first outcome is waited for."""

    num_parallel: int
    """How many run at the same time, about."""

    def submit(self, task: Task) -> None:
        """Take a task over; all that it needs is done."""
        ...

    def next(self) -> Outcome:
        """Wait for one of the tasks that were submitted."""
        ...

    def cancel(self) -> None:
        """Stop what is running and forget what waits."""
        ...


class SerialWorkers:
    """One task after the other, in this process."""

    num_slots = num_parallel = 1

    def __init__(self, tasks: Sequence[Task] = ()) -> None:
        """For these tasks.

        Raises:
            ConfigError: one asks for a GPU and there is none here.
        """
        num_gpus = torch.cuda.device_count()
        for task in tasks:
            if task.resources.num_gpus > num_gpus:
                raise ConfigError(
                    f"{task.name}: resources ask for {task.resources.num_gpus:g} GPU and there are {num_gpus} here; set"
                    " num_gpus to 0, or run on a machine with one"
                )
        self._waiting: deque[Task] = deque()

    def submit(self, task: Task) -> None:
        """See :class:`Workers`."""
        self._waiting.append(task)

    def next(self) -> Outcome:
        """Run the task that was submitted first."""
        return perform(self._waiting.popleft())

    def cancel(self) -> None:
        """See :class:`Workers`."""
        self._waiting.clear()


def perform(task: Task) -> Outcome:
    """Run a task with as many threads as it has CPUs, torch's and the numerical libraries'; an error is its outcome."""
    threads, wanted = torch.get_num_threads(), max(1, math.ceil(task.resources.num_cpus))
    torch.set_num_threads(wanted)
    begun = time.monotonic()
    try:
        with threadpool_limits(wanted):
            value = task.call()
    except Exception as error:  # whatever it is: the other cells go on
        message = " ".join(str(error).split()) or "no message"
        failure = Failure(type(error).__name__, message, traceback.format_exc())
        return Outcome(task.key, time.monotonic() - begun, failure=failure)
    finally:
        torch.set_num_threads(threads)
    return Outcome(task.key, time.monotonic() - begun, value)


@dataclass
class Progress:
    """Where a benchmark stands. ``seconds_left`` is None until a task of the kind has ended."""

    task: Task
    outcome: Outcome
    num_done: int
    num_failed: int
    num_tasks: int
    seconds_left: float | None


def drive(tasks: Sequence[Task], workers: Workers) -> Iterator[Progress]:
    """Hand tasks over as what they need is done; what needs a failed one fails with it, unrun."""
    waiting, running = {task.key: task for task in tasks}, dict[str, Task]()
    unsettled = set(waiting)
    failed: dict[str, Failure] = {}
    clock = _Clock(tasks)
    try:
        while waiting or running:
            for task in list(waiting.values()):
                broken = next((need for need in task.needs if need in failed), None)
                if broken is not None:
                    del waiting[task.key]
                    reason = failed[broken]
                    failed[task.key] = Failure(reason.type, reason.message)
                    outcome = Outcome(task.key, 0.0, failure=failed[task.key])
                    clock.ended(task, None)
                    yield clock.progress(task, outcome, len(failed), workers.num_parallel)
                elif len(running) < workers.num_slots and not any(need in unsettled for need in task.needs):
                    running[task.key] = waiting.pop(task.key)
                    workers.submit(task)
            if not running:
                continue
            outcome = workers.next()
            task = running.pop(outcome.key)
            if outcome.failure is None:
                unsettled.remove(task.key)
            else:
                failed[task.key] = outcome.failure
            clock.ended(task, outcome.seconds if outcome.failure is None else None)
            yield clock.progress(task, outcome, len(failed), min(len(running) + 1, workers.num_parallel))
    except BaseException:
        workers.cancel()
        raise


class _Clock:
    """How long the rest takes, from the mean of what has ended of each kind."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._total = len(tasks)
        self._left = {task.key: task.kind for task in tasks}
        self._taken: dict[Kind, list[float]] = {}

    def ended(self, task: Task, seconds: float | None) -> None:
        """A task has ended; its seconds count where it ended well."""
        del self._left[task.key]
        if seconds is not None:
            self._taken.setdefault(task.kind, []).append(seconds)

    def progress(self, task: Task, outcome: Outcome, num_failed: int, num_parallel: int) -> Progress:
        """The state after a task, of which so many ran at the same time."""
        means = {kind: sum(taken) / len(taken) for kind, taken in self._taken.items()}
        known = all(kind in means for kind in self._left.values())
        left = sum(means[kind] for kind in self._left.values()) / num_parallel if known else None
        done = self._total - len(self._left)
        return Progress(task, outcome, done - num_failed, num_failed, self._total, left)
