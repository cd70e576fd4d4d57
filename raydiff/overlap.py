"""Reading ahead: the next batches are read, decoded and sent to the device while this one is computed with.

One thread beside the training loop goes through the stream, a few items ahead and no more, in the stream's own order,
so nothing about the result can change. Most of what it does (reading, decoding, copying) holds no lock of Python's.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from queue import Empty, Full, Queue
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from raydiff.core.moving import to_device

__all__ = ["AHEAD", "Courier", "Sent", "ahead"]

_T = TypeVar("_T")

AHEAD = 2
"""Items that wait, beside the one that is made and the one that is used."""

_LOOK_S, _STOP_S = 0.1, 10.0


def ahead(items: Iterator[_T], depth: int = AHEAD) -> Generator[_T]:
    """The same items in the same order, up to ``depth`` of them made in advance by a thread.

    What ``items`` raises is raised here, after the items before it. Closing this closes ``items``, in its thread.
    """
    waiting: Queue[_Made[_T]] = Queue(depth)
    stop = threading.Event()
    thread = threading.Thread(target=_make, args=(items, waiting, stop), name="ahead", daemon=True)
    thread.start()
    try:
        while (made := waiting.get()).error is None:
            yield made.item
        if not isinstance(made.error, StopIteration):
            raise made.error
    finally:
        stop.set()
        _emptied(waiting)
        thread.join(_STOP_S)


@dataclass(frozen=True)
class _Made(Generic[_T]):
    """An item, or the error that came in its place."""

    item: Any = None
    error: BaseException | None = None


def _make(items: Iterator[_T], waiting: Queue[_Made[_T]], stop: threading.Event) -> None:
    try:
        while not stop.is_set():
            try:
                made = _Made[_T](next(items))
            except BaseException as error:  # whatever it is, it is the reader's
                made = _Made[_T](error=error)
            _put(made, waiting, stop)
            if made.error is not None:
                return
    finally:
        close = getattr(items, "close", None)
        if close is not None:
            close()


def _put(made: _Made[_T], waiting: Queue[_Made[_T]], stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            waiting.put(made, timeout=_LOOK_S)
        except Full:
            continue
        return


def _emptied(waiting: Queue[Any]) -> None:
    try:
        while True:
            waiting.get_nowait()
    except Empty:
        return


@dataclass(frozen=True)
class Sent:
    """A tensor on its way to the device: ``arrived`` is None where it is there."""

    tensor: Tensor
    arrived: Any = None

    def received(self) -> Tensor:
        """The tensor, for use on the current stream of its device, which waits for it; the host does not."""
        if self.arrived is not None:
            stream = torch.cuda.current_stream(self.tensor.device)
            stream.wait_event(self.arrived)
            self.tensor.record_stream(stream)
        return self.tensor


class Courier:
    """Sends tensors to a device: to a GPU on a stream of its own, so that copies overlap with what is computed."""

    def __init__(self, device: str) -> None:
        self._device = device
        cuda = torch.device(device).type == "cuda"
        self._stream: Any = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]

    def send(self, tensor: Tensor) -> Sent:
        """Send one; may be called from another thread than the one that receives it."""
        if self._stream is None:
            return Sent(tensor.to(self._device))
        with torch.cuda.stream(self._stream):
            moved = to_device(tensor, self._device)
            return Sent(moved, self._stream.record_event())
