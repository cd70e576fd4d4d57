"""The client against small real servers that answer badly, late, or not at all."""

from __future__ import annotations

import json
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from raydiff.cli import main
from raydiff.client import IMAGE_PROBLEMS, Client, answers
from raydiff.errors import ConfigError, DataError, RaydiffError, ServiceError, ShapeError
from raydiff.service import PROBLEM_TYPES, explaining, service

KEY = "a-key-for-the-tests-only"
ANSWER = {
    "score": 0.1 + 0.2, "p_value": 0.5, "threshold": 1.0, "target_fpr": 0.01, "verdict": "normal",
    "artifact_id": "a" * 64, "image": "b" * 64, "format": "png", "height": 8, "width": 9, "batch_size": 1,
    "timing_ms": {"decode": 0.1}, "explanation": None,
}  # fmt: skip
MODEL = {"artifact_id": "a", "calibration": {"threshold": {"value": 1.0}}, "limits": {}, "has_maps": False}

Reply = tuple[int, dict[str, str], bytes]
Script = Callable[["Handler"], Reply | None]


def as_json(value: Any, status: int = 200) -> Reply:
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()


def problem(kind: str, status: int, detail: str = "What to do.", **headers: str) -> Reply:
    _, _, body = as_json({"type": kind, "title": "Title", "status": status, "detail": detail})
    return status, {"Content-Type": "application/problem+json", **headers}, body


class Handler(BaseHTTPRequestHandler):
    """Answers by the server's script; None closes the connection with a reset."""

    protocol_version = "HTTP/1.1"
    server: Server

    def answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.server.lock:
            self.server.requests.append(self)
        reply = self.server.script(self)
        if reply is None:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return
        status, headers, body = reply
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, script: Script, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.script, self.requests, self.lock = script, list[Handler](), threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        pass


@contextmanager
def server(script: Script, port: int = 0) -> Iterator[Server]:
    made = Server(script, port)
    threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield made
    finally:
        made.shutdown()
        made.server_close()


def in_turn(*replies: Reply | None) -> Script:
    """These, and the last one for ever."""
    left = list(replies)
    return lambda _: left.pop(0) if len(left) > 1 else left[0]


# --- answers ----------------------------------------------------------------------------------------------------------


def test_an_answer_is_read_whatever_a_newer_service_adds() -> None:
    box = {"x": 1, "y": 2, "width": 3, "height": 4, "peak": 0.5, "area": 6.0, "new": 1}
    explanation = {
        "boxes": [box], "num_regions": 1, "heat_scale": {"low": 0.0, "middle": 1.0, "high": 2.0, "new": 1},
        "pictures": {"heat_map": "iVBO", "heat_layer": None, "reconstruction": None, "new": 1}, "new": 1,
    }  # fmt: skip
    with server(in_turn(as_json({**ANSWER, "explanation": explanation, "new": [1]}))) as there:
        with Client(there.url) as client:
            answer = client.score(b"image", explain=True)
        assert there.requests[0].path == "/v1/score?explain=true"
        assert there.requests[0].body == b"image"
    assert (answer.score, answer.verdict, answer.is_anomaly) == (0.1 + 0.2, "normal", False)
    assert answer.explanation is not None
    assert answer.explanation.boxes == (answers.Box(1, 2, 3, 4, 0.5, 6.0),)
    assert answer.explanation.pictures == answers.Pictures(b"\x89PN", None, None)


def test_its_answers_are_those_of_the_service() -> None:
    def names(kind: Any) -> list[str]:
        return list(kind.__dataclass_fields__)

    assert names(answers.ScoredImage) == names(service.ScoredImage)
    assert names(answers.Explanation) == names(service.Explanation)
    for name in ("Box", "HeatScale", "Pictures"):
        assert names(getattr(answers, name)) == names(getattr(explaining, name))
    assert set(PROBLEM_TYPES) - IMAGE_PROBLEMS == {"score-not-finite", "invalid-target-rate", "no-previous-artifact"}


def test_pixels_go_as_png_and_files_as_they_are(tmp_path: Path) -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    with server(in_turn(as_json(ANSWER))) as there, Client(there.url) as client:
        for image in (pixels, Image.fromarray(pixels), path, str(path), path.read_bytes()):
            client.score(image)
        for request in there.requests:
            (tmp_path / "sent.png").write_bytes(request.body)
            assert np.array_equal(np.asarray(Image.open(tmp_path / "sent.png")), pixels)
        with pytest.raises(ShapeError, match="float64"):
            client.score(pixels / 255)  # type: ignore[arg-type]
        with pytest.raises(DataError, match=r"no\.png: cannot be read"):
            client.score(tmp_path / "no.png")
        with pytest.raises(DataError, match="convert it"):
            client.score(Image.new("CMYK", (2, 2)))
        with pytest.raises(ConfigError, match="is a list"):
            client.score([1])  # type: ignore[arg-type]
        assert len(there.requests) == 5


# --- what is waited out, and for how long -----------------------------------------------------------------------------


def test_a_503_and_a_reset_are_waited_out() -> None:
    full = problem("over-capacity", 503, **{"Retry-After": "1"})
    proxy = (503, {"Content-Type": "text/plain"}, b"starting")
    started = time.monotonic()
    killed = (500, {"Content-Type": "text/plain"}, b"Internal Server Error")  # Serve's, of a door that ended
    with server(in_turn(full, None, proxy, killed, as_json(ANSWER))) as there, Client(there.url) as client:
        assert client.score(b"image").verdict == "normal"
        assert len(there.requests) == 5
    assert 1 < time.monotonic() - started < 30


def test_a_refused_connection_is_waited_out_once_the_service_has_answered() -> None:
    status, headers, body = as_json(ANSWER)
    with server(in_turn((status, {**headers, "Connection": "close"}, body))) as there:
        client = Client(there.url, max_wait_s=10)
        client.score(b"image")
    with client, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.score, b"image")
        time.sleep(0.5)
        assert not waiting.done()
        with server(in_turn(as_json(ANSWER)), there.server_address[1]):
            assert waiting.result().verdict == "normal"


@pytest.mark.parametrize(
    ("reply", "limits", "tries"),
    [
        (problem("over-capacity", 503, **{"Retry-After": "1"}), {"retries": 0}, 1),
        (problem("over-capacity", 503, **{"Retry-After": "3600"}), {}, 1),
        (problem("over-capacity", 503), {"retries": 2}, 3),
        (problem("over-capacity", 503), {"max_wait_s": 1.5}, 4),
        (problem("replica-lost", 503), {}, 2),
        (problem("damaged-image", 422), {}, 1),
        (problem("internal", 500), {}, 1),
        (problem("timed-out", 504), {"retries": 1}, 2),
    ],
)
def test_waiting_has_an_end(reply: Reply, limits: dict[str, Any], tries: int) -> None:
    with server(in_turn(reply)) as there, Client(there.url, **limits) as client:
        with pytest.raises(ServiceError, match="What to do") as caught:
            client.score(b"image")
        assert len(there.requests) == tries
    assert (caught.value.type, caught.value.status) == (json.loads(reply[2])["type"], reply[0])
    assert caught.value.detail == "What to do."
    assert there.url in str(caught.value)
    assert ("asked" in str(caught.value)) == (tries > 1)


def test_what_must_not_happen_twice_is_not_sent_twice() -> None:
    with server(in_turn(None)) as there, Client(there.url) as client:
        for attempt in (client.roll_back, lambda: client.roll("other")):
            with pytest.raises(ServiceError, match="cannot be reached"):
                attempt()
        assert [request.path for request in there.requests] == ["/v1/artifact/rollback", "/v1/artifact"]


def test_an_answer_that_does_not_come_is_not_waited_for(tmp_path: Path) -> None:
    part = tmp_path / "part.png"
    part.write_bytes(b"image")

    def slowly(_: Handler) -> Reply:
        time.sleep(1)
        return as_json(ANSWER)

    with server(slowly) as there, Client(there.url, timeout_s=0.2) as client:
        with pytest.raises(ServiceError, match=r"part\.png: .*no answer within 0\.2 s") as caught:
            client.score(part)
        assert caught.value.type == "timed-out"
        assert not client.ready()


# --- what is no raydiff -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ((200, {"Content-Type": "text/html"}, b"<html>"), "200 (text/html), which is no answer of raydiff's"),
        (as_json({"score": 1}), "no answer of raydiff's"),
        (as_json([1]), "no answer of raydiff's"),
        (as_json({**ANSWER, "score": None}), "no answer of raydiff's"),
        (as_json({**ANSWER, "verdict": "perhaps"}), "no answer of raydiff's"),
        (as_json({"detail": "Not Found"}, 404), "404 (application/json), which is no answer of raydiff's"),
        ((301, {"Location": "https://x/v1/score"}, b""), "redirects to https://x/v1/score; give that address"),
        ((501, {"Content-Type": "text/html"}, b"<html>"), "a proxy may be starting"),
        ((422, {"Content-Type": "application/problem+json"}, b"[]"), "no answer of raydiff's"),
    ],
)
def test_an_answer_of_something_else_is_called_that(reply: Reply, said: str) -> None:
    with server(in_turn(reply)) as there, Client(there.url) as client:
        with pytest.raises(ServiceError, match=r"^http") as caught:
            client.score(b"image")
        assert said in str(caught.value)
        assert (caught.value.type, caught.value.status) == ("not-raydiff", reply[0])


def test_an_address_where_nothing_listens_is_given_up_within_seconds() -> None:
    with server(in_turn(None)) as there:
        url = there.url
    started = time.monotonic()
    with Client(url) as client:
        assert not client.ready()
        with pytest.raises(ServiceError, match=r"cannot be reached .* see that `raydiff serve` runs") as caught:
            client.model()
    assert caught.value.type == "unreachable"
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    "url", ["localhost:8000", "", "ftp://host", "http://", "http://user:secret@host", "http://host?key=1", 7]
)
def test_an_address_that_is_none_is_refused(url: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        Client(url)
    assert "secret" not in str(caught.value)


def test_a_service_may_lie_below_a_path() -> None:
    with server(in_turn(as_json(MODEL))) as there, Client(f"{there.url}/screws/") as client:
        client.model()
        assert there.requests[0].path == "/screws/v1/model"


def test_what_a_service_says_cannot_move_the_cursor() -> None:
    with server(in_turn(problem("internal", 500, "a\x1b[2Jb\r\nc"))) as there, Client(there.url) as client:  # noqa: SIM117
        with pytest.raises(ServiceError, match=r"\(500\): a\[2Jb c$"):
            client.score(b"image")


# --- the key ----------------------------------------------------------------------------------------------------------


def test_the_key_goes_to_the_service_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    with server(in_turn(problem("unauthorized", 401, "Send a key."))) as there:
        monkeypatch.setenv("RAYDIFF_API_KEY", KEY)
        for made in (Client(there.url), Client(there.url, api_key=f" {KEY}\n")):
            with made as client, pytest.raises(ServiceError) as caught:
                client.score(b"image")
            assert there.requests.pop().headers["Authorization"] == f"Bearer {KEY}"
            assert "Send a key; give it as api_key" in str(caught.value)
            assert KEY not in f"{caught.value!r}{vars(caught.value)}{client!r}"
    for bad in ("", "a\nb-secret", "clé-secret"):
        with pytest.raises(ConfigError) as refused:
            Client("http://host", api_key=bad)
        assert "secret" not in str(refused.value)


# --- many -------------------------------------------------------------------------------------------------------------


def test_many_come_in_order_several_at_once_and_are_read_only_so_far_ahead() -> None:
    now, most, taken = 0, 0, 0
    lock = threading.Lock()

    def count(request: Handler) -> Reply:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02 if int(request.body) % 3 else 0.06)
        with lock:
            now -= 1
        return as_json({**ANSWER, "score": int(request.body)})

    def images() -> Iterator[bytes]:
        nonlocal taken
        for i in range(20):
            taken += 1
            yield str(i).encode()

    with server(count) as there, Client(there.url) as client:
        scores = []
        for answer in client.score_many(images(), max_in_flight=4):
            scores.append(answer.score)
            assert taken <= len(scores) + 4
        assert scores == list(range(20))
        assert most == 4
        with pytest.raises(ConfigError, match="max_in_flight is 0"):
            client.score_many([], max_in_flight=0)


def test_a_bad_image_ends_the_iteration_or_takes_its_place_in_it(tmp_path: Path) -> None:
    def refuse(request: Handler) -> Reply:
        return problem("damaged-image", 422) if request.body == b"bad" else as_json(ANSWER)

    images = [b"good", b"bad", tmp_path / "no.png", b"good"]
    with server(refuse) as there, Client(there.url) as client:
        found = list(client.score_many(images, on_bad_image="yield"))
        assert [type(one).__name__ for one in found] == ["ScoredImage", "ServiceError", "DataError", "ScoredImage"]
        with pytest.raises(ServiceError, match=r"^image 1: http.*damaged-image \(422\)"):
            list(client.score_many(images))
        there.script = in_turn(problem("internal", 500))
        with pytest.raises(ServiceError, match="internal"):
            list(client.score_many(images, on_bad_image="yield"))


def test_pixels_that_cannot_be_sent_are_refused_in_their_turn() -> None:
    images: list[Any] = [b"good", b"good", np.zeros((2, 2)), b"good"]
    with server(in_turn(as_json(ANSWER))) as there, Client(there.url) as client:
        found = client.score_many(images, on_bad_image="yield")
        assert [next(found).verdict for _ in range(2)] == ["normal", "normal"]  # type: ignore[union-attr]
        with pytest.raises(ShapeError, match=r"^image 2: .*float64"):
            next(found)
        with pytest.raises(ConfigError, match=r"^image 0: an image is a list"):
            next(client.score_many([[1]]))  # type: ignore[list-item]


def test_closing_while_many_threads_ask_leaves_none_waiting() -> None:
    def ask(client: Client) -> str:
        try:
            while True:
                client.model()
        except (ServiceError, ConfigError) as error:
            return str(error)

    with server(in_turn(as_json(MODEL))) as there, ThreadPoolExecutor(4) as pool:
        for turn in range(30):
            client = Client(there.url)
            asking = [pool.submit(ask, client) for _ in range(4)]
            if turn % 2:  # in the other turns it closes while they connect
                client.model()
            client.close()
            client.close()
            for one in asking:
                assert "closed" in one.result(timeout=10)


def test_no_proxy_is_asked_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    with server(in_turn(as_json(ANSWER))) as there, server(in_turn(problem("internal", 500))) as proxy:
        for name in ("http_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        for host in ("127.0.0.1", "localhost"):
            with Client(there.url.replace("127.0.0.1", host), api_key=KEY) as client:
                assert client.score(b"image").verdict == "normal"
        assert not proxy.requests
        with Client("http://raydiff.invalid", retries=0) as client, pytest.raises(ServiceError):
            client.model()
        assert len(proxy.requests) == 1


def test_an_iteration_that_is_left_gives_up_what_it_asked() -> None:
    gone = threading.Event()

    def watch(request: Handler) -> Reply | None:
        if request.body == b"first":
            return as_json(ANSWER)
        request.connection.settimeout(10)
        if request.connection.recv(1) == b"":  # the client's end is closed
            gone.set()
        return None

    with server(watch) as there, Client(there.url) as client:
        many = client.score_many([b"first", b"second"], max_in_flight=2)
        assert next(many).verdict == "normal"
        many.close()
        assert gone.wait(5)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(client.score, b"second")
            while len(there.requests) < 3:
                time.sleep(0.01)
            client.close()
            with pytest.raises(ServiceError, match="was closed before"):
                waiting.result()
        for attempt in (client.model, client.ready):
            with pytest.raises(ConfigError, match="is closed"):
                attempt()


# --- the command ------------------------------------------------------------------------------------------------------


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["score", *map(str, arguments)])
    return result.exit_code, result.output


def test_a_service_that_goes_away_costs_no_row_that_was_scored(tmp_path: Path) -> None:
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(str(i).encode())

    def until_four(request: Handler) -> Reply:
        if request.command == "GET":
            return as_json(MODEL)
        return as_json(ANSWER) if int(request.body) < 4 else problem("internal", 500)

    with server(until_four) as there:
        code, said = run(tmp_path, "--url", there.url, "--out", tmp_path / "s.csv")
    assert code == 1
    assert f"{tmp_path / '4.png'}: {there.url}/v1/score: internal (500): What to do" in said
    assert f"the 4 rows before are in {tmp_path / 's.csv.partial'}" in said
    assert not (tmp_path / "s.csv").exists()
    rows = (tmp_path / "s.csv.partial").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["path", *(str(tmp_path / f"{i}.png") for i in range(4))]


def test_it_is_said_when_the_service_rolled_meanwhile(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(str(i).encode())

    def roll(request: Handler) -> Reply:
        if request.command == "GET":
            return as_json(MODEL)
        return as_json({**ANSWER, "artifact_id": request.body.decode() * 64})

    with server(roll) as there:
        code, said = run(tmp_path, "--url", there.url, "--out", tmp_path / "s.csv")
    assert code == 0
    assert f"changed its artefact meanwhile ({'0' * 12}, {'1' * 12})" in said


def test_an_interrupted_command_ends_at_once_and_keeps_its_rows(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(str(i).encode())
    asked, end = threading.Event(), threading.Event()

    def hang_at_the_last(request: Handler) -> Reply:
        if request.command == "GET":
            return as_json({**MODEL, "max_batch": 1, "num_replicas": 1})
        if request.body == b"2":
            time.sleep(0.3)
            asked.set()
            end.wait(60)
        return as_json(ANSWER)

    command = [sys.executable, "-m", "raydiff", "score", "--out", str(tmp_path / "s.csv"), str(tmp_path), "--url"]
    with server(hang_at_the_last) as there:
        with subprocess.Popen(
            [*command, there.url], stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
        ) as process:  # fmt: skip
            assert asked.wait(60)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=20)
        end.set()
    assert process.returncode == 130
    assert f"Interrupted; the 2 rows so far are in {tmp_path / 's.csv.partial'}." in said
    assert len((tmp_path / "s.csv.partial").read_text().splitlines()) == 3


def test_what_does_not_go_with_a_service_is_refused(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    out = ("--out", tmp_path / "s.csv")
    service = ("--url", "http://127.0.0.1:9", tmp_path / "a.png", *out)
    refusals = {
        "--target-fpr is the service's": ("--target-fpr", 0.1, *service),
        "--device is the service's": ("--device", "cpu", *service),
        "is an artefact, and --url scores": ("--url", "http://127.0.0.1:9", run_dir, tmp_path, *out),
        "must be like http://": ("--url", "127.0.0.1:9", tmp_path / "a.png", *out),
        "holds no API key": ("--api-key-file", tmp_path / "a.png", *service),
        "is for --url": ("--api-key-file", tmp_path / "a.png", run_dir, tmp_path, *out),
        "PATH is missing": (run_dir, *out),
    }
    for said, arguments in refusals.items():
        code, output = run(*arguments)
        assert (code, said in output) == (2, True), output
    with server(in_turn(as_json(MODEL))) as there:
        code, output = run("--url", there.url, tmp_path / "a.png", *out, "--maps", tmp_path / "maps")
        assert (code, "draws no anomaly maps" in output) == (2, True), output


def test_the_client_needs_no_torch() -> None:
    script = "import sys; from raydiff.client import Client; print('torch' in sys.modules, 'ray' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.split() == ["False", "False"]
    assert issubclass(ServiceError, RaydiffError)
