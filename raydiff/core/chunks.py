"""Calling a network on rows so that no row's result depends on its neighbours, nor on the number of threads.

Libraries pick another kernel for another batch size, and cut up sums in another way for another number of threads; the
last bits of a result change with both. So a network is always called with the same number of rows, the last call padded
with zeros, and on a CPU each call runs in one thread: the threads a process may use share the calls between them
instead. On a CPU every row then comes out bit for bit the same, whatever stands beside it, at whatever position, on a
machine with however many cores (contract 1; tests/core/test_chunks.py). What follows the network in the same function
is part of the call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Barrier, Lock, Thread, current_thread

import torch
from torch import Tensor

__all__ = ["by_chunks", "each_by_chunks", "in_one_call"]


_whole: ContextVar[bool] = ContextVar("_whole", default=False)


@contextmanager
def in_one_call() -> Iterator[None]:
    """Within, :func:`by_chunks` calls its function once with all rows: for a graph that is drawn for any number.

    Rows then agree with those of other batches to rounding only.
    """
    token = _whole.set(True)
    try:
        yield
    finally:
        _whole.reset(token)


def by_chunks(function: Callable[..., Tensor], size: int, *rows: Tensor, device: torch.device | str) -> Tensor:
    """``function`` of all rows, called with exactly ``size`` of them at a time; (N, ...) as it gives.

    Args:
        function: of one (size, ...) tensor for each of ``rows``, to (size, ...). On a CPU it may be called in several
            threads at a time, which know nothing of the caller's gradient modes: it sets its own.
        size: rows per call, at least 1.
        rows: (N, ...) each, N at least 1.
        device: where the function computes.
    """
    return each_by_chunks(lambda *parts: [function(*parts)], size, *rows, device=device)[0]


def each_by_chunks(
    function: Callable[..., Sequence[Tensor]], size: int, *rows: Tensor, device: torch.device | str
) -> list[Tensor]:
    """:func:`by_chunks` of a function that gives several tensors, (size, ...) each: as many, (N, ...) each."""
    if _whole.get():
        return list(function(*rows))
    starts = range(0, len(rows[0]), size)
    threads = torch.get_num_threads() if torch.device(device).type == "cpu" else 1

    def call(start: int) -> list[Tensor]:
        count = min(size, len(rows[0]) - start)
        found = function(*(_filled(tensor[start : start + size], size) for tensor in rows))
        return [part[:count] for part in found]

    parts = map(call, starts) if threads == 1 else _pools.of(threads).map(call, starts)
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _filled(tensor: Tensor, size: int) -> Tensor:
    missing = size - len(tensor)
    return tensor if not missing else torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])


class _Pools:
    """Threads in each of which PyTorch uses no other, made when so many are first asked for.

    ``torch.set_num_threads`` holds for the thread that calls it and for those that are new to PyTorch after; so the
    caller's own number is set again once they are all there.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._pools: dict[int, tuple[ThreadPoolExecutor, list[Thread]]] = {}

    def of(self, threads: int) -> ThreadPoolExecutor:
        """So many; made anew in a forked process, which has none of its parent's."""
        with self._lock:
            pool, members = self._pools.get(threads, (None, []))
            if pool is None or not members[0].is_alive():
                pool, members = self._pools[threads] = self._made(threads)
            return pool

    @staticmethod
    def _made(threads: int) -> tuple[ThreadPoolExecutor, list[Thread]]:
        pool = ThreadPoolExecutor(threads, thread_name_prefix="chunks")
        barrier = Barrier(threads)

        def alone(_: int) -> Thread:
            torch.get_num_threads()  # the first time, it sets the number that other threads have
            torch.set_num_threads(1)
            barrier.wait()
            return current_thread()

        before = torch.get_num_threads()
        members = list(pool.map(alone, range(threads)))
        torch.set_num_threads(before)
        return pool, members


_pools = _Pools()
