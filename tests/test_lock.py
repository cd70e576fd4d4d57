"""Who leads in a place: one at a time, the killed let go, and who is taken over from notices before it writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from raydiff.errors import ConfigError
from raydiff.lock import LOCK, StoreLock, alone_at
from raydiff.mirror import mirrored
from raydiff.storage import Storage, as_place


def held(place: str) -> dict[str, object]:
    return dict(json.loads(Storage.of(place).read(LOCK)))


def test_the_second_is_refused_and_told_who_is_there(object_store: Callable[[str], str], tmp_path: Path) -> None:
    place = object_store(f"store/{tmp_path.name}")
    with mirrored(place):
        assert held(place)["pid"] == os.getpid()
        with pytest.raises(ConfigError) as error:
            mirrored(place).__enter__()
        said = str(error.value)
        assert said.startswith(f"another raydiff command (process {os.getpid()} on ")
        assert f"runs in s3://store/{tmp_path.name}; wait for it to end, or choose another --out; one that" in said
        assert f"or remove s3://store/{tmp_path.name}/_lock.json" in said
        with mirrored(place, alone=False):
            pass
        assert held(place)["pid"] == os.getpid(), "who looks takes nothing"
    assert not Storage.of(place).exists(LOCK)
    with mirrored(place):
        pass


@pytest.mark.parametrize("kind", ["disk", "store"])
def test_one_command_at_a_time_works_at_a_place(object_store: Callable[[str], str], tmp_path: Path, kind: str) -> None:
    place = as_place(str(tmp_path) if kind == "disk" else object_store(f"store/{tmp_path.name}"))
    for _ in range(2):
        with (
            alone_at(place),
            pytest.raises(ConfigError, match=r"^another raydiff command .*; wait for it to end"),
            alone_at(place),
        ):
            pass


def test_one_that_was_killed_on_this_machine_lets_go_at_once(tmp_path: Path) -> None:
    place = str(tmp_path / "store")
    script = (
        "import os, signal, sys, raydiff.mirror as m\n"
        "with m.mirrored(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script, place], check=False)
    assert done.returncode == -signal.SIGKILL
    assert Storage.of(place).exists(LOCK)
    with mirrored(place):
        assert held(place)["pid"] == os.getpid()


@pytest.mark.parametrize(("silent_s", "free"), [(170, False), (200, True)])
def test_one_on_another_machine_lets_go_when_it_has_been_silent(tmp_path: Path, silent_s: float, free: bool) -> None:
    storage = Storage.of(tmp_path)
    storage.write(LOCK, json.dumps({"token": "x", "host": "far", "pid": 1, "since": "today"}).encode())
    then = time.time() - silent_s
    os.utime(tmp_path / LOCK, (then, then))
    lock = StoreLock(storage)
    if free:
        lock.take()
        lock.check()
        lock.release()
    else:
        with pytest.raises(ConfigError, match="process 1 on far, since today"):
            lock.take()
    assert not [name for name in storage.files() if name.startswith("_clock")]


def test_who_is_taken_over_from_stops_before_it_writes(tmp_path: Path) -> None:
    place = str(tmp_path)
    with mirrored(place) as mirror:
        mirror.put()
        mirror.storage.write(LOCK, json.dumps({"token": "x", "host": "far", "pid": 1, "since": "today"}).encode())
        (mirror.folder / "results.jsonl").write_text("{}\n")
        with pytest.raises(ConfigError, match=r"another raydiff command \(process 1 on far, .*; this command stops"):
            mirror.put()
    assert sorted(mirror.storage.files()) == [LOCK], "and the other's lock stays"


def test_a_lock_that_is_removed_stops_its_holder(tmp_path: Path) -> None:
    with mirrored(str(tmp_path)) as mirror:
        mirror.storage.delete(LOCK)
        with pytest.raises(ConfigError, match=r"its lock was removed; this command stops"):
            mirror.put()


def test_a_sign_is_given_while_the_holder_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raydiff.lock._BEAT_S", 0.1)
    with mirrored(str(tmp_path)):
        before = (tmp_path / LOCK).stat().st_mtime_ns
        deadline = time.monotonic() + 60
        while (tmp_path / LOCK).stat().st_mtime_ns == before:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    time.sleep(0.3)
    assert not (tmp_path / LOCK).exists()
