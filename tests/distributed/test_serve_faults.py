"""The endpoint when something breaks: clients that leave or dawdle, a replica that hangs, processes that are killed.

Everything is real: a Serve application on loopback, sockets, and signals to its processes.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from torch import Tensor

from raydiff.detector import DiffusionDetector
from raydiff.distributed.serve import serving
from raydiff.distributed.serve_settings import ServeSettings
from raydiff.errors import WorkerError
from raydiff.images import encode_png, to_uint8

pytestmark = pytest.mark.distributed

TIMEOUT_S = 10.0
MAX_QUEUED = 8


@pytest.fixture(scope="module")
def root(detector: DiffusionDetector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One artefact that may be rolled to: ``other``."""
    folder = tmp_path_factory.mktemp("artifacts")
    detector.with_target_fpr(0.3).save(folder / "other")
    return folder


@pytest.fixture(scope="module")
def url(run_dir: Path, root: Path) -> Iterator[str]:
    settings = ServeSettings.of(
        {"artifact": run_dir, "num_cpus": 0.1, "max_batch_size": 4, "max_queued": MAX_QUEUED, "timeout_s": TIMEOUT_S,
         "roll_timeout_s": TIMEOUT_S, "artifact_root": root}
    )  # fmt: skip
    with serving(settings, port=free_port()) as address:
        yield address


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def image(digit_images: Tensor) -> bytes:
    return encode_png(to_uint8(digit_images[:1])[0])


def process(name: str) -> int:
    """The one process of this Ray whose title ends so; while a process works, the method's name follows."""
    parents, found = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    family = {os.getpid()}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    for pid in family:
        with suppress(OSError):
            title = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0 ").decode()
            if title.startswith("ray::") and re.search(rf"{name}(\.\w+)?$", title):
                found.append(pid)
    assert len(found) == 1, (name, found)
    return found[0]


@contextmanager
def hanging(name: str) -> Iterator[None]:
    """The process does nothing, as if its work took for ever."""
    pid = process(name)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def until(condition: Callable[[], bool], seconds: float) -> float:
    """Seconds until it was true; an address that cannot be reached, or refuses, counts as not yet."""
    start = time.monotonic()
    while True:
        with suppress(httpx.HTTPError):
            if condition():
                return time.monotonic() - start
        assert time.monotonic() - start < seconds
        time.sleep(0.05)


def begin(url: str, head: str, body: bytes) -> socket.socket:
    address = httpx.URL(url)
    raw = socket.create_connection((address.host, address.port or 80), timeout=20)
    raw.sendall(f"POST /v1/score HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{head}\r\n\r\n".encode() + body)
    return raw


def in_progress(url: str) -> float:
    lines = httpx.get(f"{url}/metrics", timeout=30).raise_for_status().text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("raydiff_requests_in_progress "))


def timed_out(url: str) -> float:
    """Requests for a score that the service gave up."""
    lines = httpx.get(f"{url}/metrics", timeout=30).raise_for_status().text.splitlines()
    head = 'raydiff_requests_total{operation="score",status="504"} '
    return sum(float(line.removeprefix(head)) for line in lines if line.startswith(head))


@dataclass(frozen=True)
class Answer:
    """``status`` is 0 where the connection broke."""

    status: int
    began: float
    seconds: float


@contextmanager
def load(url: str, image: bytes, clients: int = 3) -> Iterator[list[Answer]]:
    """Clients that score one image after another; their answers are complete when the block has ended."""
    answers: list[Answer] = []
    going = True

    def client() -> None:
        with httpx.Client(base_url=url, timeout=60) as made:
            while going:
                began = time.monotonic()
                try:
                    status = made.post("/v1/score", content=image).status_code
                except httpx.TransportError:
                    status = 0
                answers.append(Answer(status, began, time.monotonic() - began))
                if status != 200:
                    time.sleep(0.05)

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(client) for _ in range(clients)]
        try:
            yield answers
        finally:
            going = False
        for job in running:
            job.result()


def test_a_body_that_does_not_arrive_is_given_up(url: str) -> None:
    started = time.monotonic()
    with begin(url, "Content-Length: 100", b"\x89PNG") as raw:
        said = b"".join(iter(lambda: raw.recv(4096), b""))
    assert TIMEOUT_S - 0.5 < time.monotonic() - started < 2 * TIMEOUT_S
    assert said.startswith(b"HTTP/1.1 408")
    assert b"body-timeout" in said
    until(lambda: in_progress(url) == 0, 60)


def test_an_answer_that_is_late_is_given_up(url: str, image: bytes) -> None:
    """Of a batch too, with the files that were never looked at."""
    started = time.monotonic()
    form = [("files", (str(i), image)) for i in range(12)]
    with hanging(":scorer"), ThreadPoolExecutor(2) as pool:
        whole = pool.submit(httpx.post, f"{url}/v1/score/batch", files=form, timeout=30)
        response = httpx.post(f"{url}/v1/score", content=image, timeout=30)
        results = whole.result().json()["results"]
    assert TIMEOUT_S - 0.5 < time.monotonic() - started < 2 * TIMEOUT_S  # once, and not once more
    assert [result["problem"]["type"] for result in results] == ["timed-out"] * 12
    assert (response.status_code, response.json()["type"]) == (504, "timed-out")
    assert response.headers["retry-after"] == "1"
    until(lambda: httpx.post(f"{url}/v1/score", content=image, timeout=30).status_code == 200, 60)


def test_a_roll_that_takes_too_long_is_given_up_and_none_begins_beside_it(
    url: str, image: bytes, detector: DiffusionDetector
) -> None:
    def roll() -> httpx.Response:
        return httpx.post(f"{url}/v1/artifact", json={"path": "other"}, timeout=30)

    with hanging(":scorer"), ThreadPoolExecutor(2) as pool:
        both = [job.result() for job in [pool.submit(roll) for _ in range(2)]]
    said = sorted((response.status_code, response.json()["type"]) for response in both)
    assert said == [(409, "roll-in-progress"), (504, "timed-out")]
    assert httpx.get(f"{url}/v1/model", timeout=30).json()["artifact_id"] == detector.artifact_digest
    until(lambda: roll().status_code == 200, 60)
    until(lambda: httpx.post(f"{url}/v1/artifact/rollback", json={}, timeout=30).status_code == 200, 60)
    assert httpx.post(f"{url}/v1/score", content=image, timeout=30).json()["artifact_id"] == detector.artifact_digest


def test_where_serve_runs_already_the_command_refuses_and_harms_nothing(url: str, run_dir: Path) -> None:
    with (
        pytest.raises(WorkerError, match="Serve runs on this cluster already"),
        serving(ServeSettings.of({"artifact": run_dir, "num_cpus": 0.1}), port=free_port()),
    ):
        pass
    assert httpx.get(f"{url}/readyz", timeout=30).status_code == 200


def test_who_leaves_while_being_scored_frees_the_place_at_once(url: str, image: bytes) -> None:
    until(lambda: in_progress(url) == 0, 60)
    late = timed_out(url)
    with hanging(":scorer"), ExitStack() as clients:
        for _ in range(MAX_QUEUED):  # more would be refused: a replica that hangs takes none
            clients.enter_context(begin(url, f"Content-Length: {len(image)}", image))
        until(lambda: in_progress(url) == MAX_QUEUED, TIMEOUT_S)
        clients.close()
        until(lambda: in_progress(url) == 0, TIMEOUT_S)
    assert timed_out(url) == late
    until(lambda: httpx.post(f"{url}/v1/score", content=image, timeout=30).status_code == 200, 60)


def test_the_board_may_be_killed(url: str, image: bytes, detector: DiffusionDetector) -> None:
    """Scoring goes on with the rate that was set, and the new board learns it from the replica."""
    expected = detector.with_target_fpr(0.3).calibration
    assert expected is not None
    assert httpx.put(f"{url}/v1/threshold", json={"target_fpr": 0.3}, timeout=30).status_code == 200
    killed = process(":board")
    with load(url, image) as answers:
        os.kill(killed, signal.SIGKILL)
        until(lambda: httpx.get(f"{url}/readyz", timeout=30).status_code == 200 and process(":board") != killed, 60)
    assert {answer.status for answer in answers} == {200}
    assert max(answer.seconds for answer in answers) < TIMEOUT_S
    assert httpx.post(f"{url}/v1/score", content=image, timeout=30).json()["threshold"] == expected.threshold.value
    assert httpx.put(f"{url}/v1/threshold", json={"target_fpr": None}, timeout=30).status_code == 200


@pytest.mark.parametrize("name", [":door", "::ProxyActor"])
def test_what_takes_requests_may_be_killed(url: str, image: bytes, name: str) -> None:
    """What is under way fails, at once; nothing hangs; and the service comes back by itself, in 5 to 10 s."""
    killed = process(name)
    with load(url, image) as answers:
        until(lambda: len(answers) > 5, 60)
        at = time.monotonic()
        os.kill(killed, signal.SIGKILL)
        until(lambda: any(answer.status == 200 and answer.began > at + 0.2 for answer in answers), 120)
    failed = [answer for answer in answers if answer.status != 200]
    assert {answer.status for answer in failed} <= ({500, 503} if name == ":door" else {0})
    assert max((answer.seconds for answer in failed), default=0) < TIMEOUT_S  # not by a time-out
    assert sum(answer.began < at for answer in failed) <= 3  # one of each client
    if name == ":door":  # what comes later waits for the new one
        assert all(answer.began < at + TIMEOUT_S for answer in failed)
    assert max(answer.seconds for answer in answers) < 2 * TIMEOUT_S + 5
    assert httpx.post(f"{url}/v1/score", content=image, timeout=30).status_code == 200
