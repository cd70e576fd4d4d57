"""The tasks of :mod:`raydiff.benchmark` as Ray tasks: each holds the CPUs and the share of a GPU that it declares.

Ray runs as many at a time as fit, several on one GPU where their shares allow it, and runs a task again elsewhere when
its node is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from raydiff.distributed.cluster import room_for
from raydiff.errors import ConfigError
from raydiff.tasks import Failure, Outcome, Task, perform

__all__ = ["RayWorkers"]

_MAX_RETRIES = 3
_POLL_S = 1.0
_ALL = 1_000_000


class RayWorkers:
    """:class:`raydiff.tasks.Workers` on the cluster that is connected.

    Raises:
        ConfigError: a task asks for more than any node has.
    """

    def __init__(self, tasks: Sequence[Task], *, num_workers: int | None = None) -> None:
        """For these tasks, at most ``num_workers`` at a time (as many as fit by default)."""
        rooms = [_room_for(task) for task in tasks]
        self.num_slots = num_workers or _ALL
        self.num_parallel = min(self.num_slots, max(rooms, default=1))
        self._running: dict[Any, str] = {}

    def submit(self, task: Task) -> None:
        """See :class:`raydiff.tasks.Workers`."""
        held = task.resources
        remote = ray.remote(perform).options(
            num_cpus=held.num_cpus, num_gpus=held.num_gpus, max_retries=_MAX_RETRIES, name=task.name
        )
        self._running[remote.remote(task)] = task.key

    def next(self) -> Outcome:
        """The outcome of whichever task ends first. What Ray cannot save (a worker killed again and again) fails."""
        ready: list[Any] = []
        while not ready:
            ready, _ = ray.wait(list(self._running), num_returns=1, timeout=_POLL_S)
        key = self._running.pop(ready[0])
        try:
            outcome: Outcome = ray.get(ready[0])
        except RayError as error:
            return Outcome(key, 0.0, failure=Failure(type(error).__name__, " ".join(str(error).split())[:500]))
        return outcome

    def cancel(self) -> None:
        """Kill what runs. Nothing that is finished is lost, and a training goes on from its last checkpoint."""
        for ref in self._running:
            ray.cancel(ref, force=True)
        self._running.clear()


def _room_for(task: Task) -> int:
    held = {"CPU": task.resources.num_cpus, "GPU": task.resources.num_gpus}
    room, num_nodes = room_for(held)
    if not room:
        raise ConfigError(
            f"{task.name}: resources ask for {held['CPU']:g} CPU and {held['GPU']:g} GPU; none of the cluster's"
            f" {num_nodes} node(s) has so much; ask for less, or add a node"
        )
    return room
