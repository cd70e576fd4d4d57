"""The board alone: what is settled when, and that it learns from the replicas what it forgot."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from raydiff.distributed.serve_board import Board, Wanted

pytestmark = pytest.mark.distributed

START = Wanted("epoch", "/old", "1")


def test_a_roll_is_settled_when_every_replica_has_it() -> None:
    async def play() -> None:
        board = Board(START)
        assert await board.follow("a", START, 0) == START
        await board.follow("b", START, 0)
        rolling = asyncio.create_task(board.roll("/new", "2", 10))
        await asyncio.sleep(0.05)
        unsettled = await board.follow("a", START, 0)
        assert (unsettled.artifact_id, unsettled.settled, unsettled.previous) == ("2", False, ("/old", "1"))
        await board.follow("a", unsettled, unsettled.version)
        changed = await board.set_rate(0.2)  # meanwhile
        await board.follow("a", changed, changed.version)
        await asyncio.sleep(0.05)
        assert not rolling.done()
        await board.follow("b", changed, changed.version)
        done = await asyncio.wait_for(rolling, 20)
        assert (done.artifact_id, done.settled, done.target_fpr) == ("2", True, 0.2)
        late = await board.roll("/third", "3", 0.05)  # no replica takes it up: the one so far goes on
        assert (late.folder, late.artifact_id, late.settled, late.previous) == ("/new", "2", True, ("/old", "1"))
        refused = asyncio.create_task(board.roll("/third", "3", 10))
        await asyncio.sleep(0.05)
        await board.refuse((await board.wanted()).version)
        assert replace(await asyncio.wait_for(refused, 20), version=late.version) == late
        left = asyncio.create_task(board.roll("/third", "3", 10))
        await asyncio.sleep(0.05)
        left.cancel()
        await asyncio.wait([left])
        again = await board.wanted()
        assert replace(again, version=late.version) == late
        assert again.version > late.version

    asyncio.run(play())


def test_a_board_that_was_started_again_learns_from_the_replicas() -> None:
    async def play() -> None:
        first = Board(START)
        later = await first.set_rate(0.3)
        second = Board(START)
        assert await second.follow("a", later, later.version) == later
        assert await second.follow("b", START, 0) == later
        other = replace(later, epoch="another application", version=99)
        assert await second.follow("c", other, 99) == later

    asyncio.run(play())
