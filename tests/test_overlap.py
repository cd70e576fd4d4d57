"""Reading ahead changes nothing but when work is done."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from raydiff.overlap import AHEAD, Courier, ahead


class Source:
    """Numbers, and how many were asked for; ``closed`` once it is."""

    def __init__(self, broken_at: int = -1) -> None:
        self.made, self.closed, self.threads = 0, threading.Event(), set[int]()
        self._broken_at = broken_at

    def numbers(self, count: int) -> Iterator[int]:
        try:
            for i in range(count):
                if i == self._broken_at:
                    raise KeyboardInterrupt(f"at {i}")
                self.made += 1
                self.threads.add(threading.get_ident())
                yield i
        finally:
            self.closed.set()

    def wait_for(self, made: int) -> None:
        end = time.monotonic() + 20
        while self.made < made:
            assert time.monotonic() < end, f"{self.made} were made, not {made}"
            time.sleep(0.001)


def test_the_same_items_in_order_made_by_another_thread() -> None:
    source = Source()
    assert list(ahead(source.numbers(50))) == list(range(50))
    assert source.threads != {threading.get_ident()}
    assert source.closed.is_set()


def test_no_more_than_a_few_are_made_in_advance() -> None:
    source = Source()
    items = ahead(source.numbers(1000))
    for _ in range(3):
        next(items)
    source.wait_for(3 + AHEAD + 1)
    time.sleep(0.3)
    assert source.made == 3 + AHEAD + 1
    items.close()
    assert source.closed.is_set(), "who stops reading stops the source"
    assert source.made <= 3 + AHEAD + 2


def test_an_error_comes_where_it_happened() -> None:
    items = ahead(Source(broken_at=4).numbers(10))
    assert [next(items) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(KeyboardInterrupt, match="at 4"):
        next(items)


def test_making_and_using_overlap() -> None:
    source = Source()
    for item in ahead(source.numbers(10)):
        source.wait_for(min(10, item + 2))  # the next one is made while this one is used


def test_a_courier_on_the_host_carries_nothing() -> None:
    tensor = torch.arange(3)
    assert Courier("cpu").send(tensor).received() is tensor


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_courier_brings_what_it_was_given_while_the_gpu_is_busy() -> None:
    courier, busy = Courier("cuda"), torch.randn(4096, 4096, device="cuda")
    sent = [courier.send(torch.full((1000,), float(i))) for i in range(20)]
    for _ in range(10):
        busy = busy @ busy / 4096
    sums = [each.received().sum() for each in sent]
    assert [float(value) for value in sums] == [1000.0 * i for i in range(20)]
