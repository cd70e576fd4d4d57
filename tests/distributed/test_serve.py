"""The endpoint, whole: a real Serve application on loopback, two replicas, asked over real HTTP."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from openapi_spec_validator import validate
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from torch import Tensor

from raydiff.batch import score_files
from raydiff.detector import DiffusionDetector, load_detector
from raydiff.distributed.serve import serving
from raydiff.distributed.serve_settings import ServeSettings
from raydiff.experiment import begin_distillation, fit_locally
from raydiff.images import decode, encode_png, to_tensor, to_uint8
from raydiff.shards import ShardSet

pytestmark = pytest.mark.distributed

KEY = "a-key-for-the-tests-only"
PLACES = 8 + 2 * 8
"""Of the application below: images that wait, and those in two replicas."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def files(digit_images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> dict[Path, bytes]:
    folder = tmp_path_factory.mktemp("images")
    for i, pixels in enumerate(to_uint8(digit_images)):
        (folder / f"{i:02}.png").write_bytes(encode_png(pixels))
    return {path: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def root(
    detector: DiffusionDetector, run_dir: Path, digit_shards: ShardSet, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Artefacts that may be rolled to: ``other`` is stricter, ``student`` a distilled run, ``damaged`` not whole."""
    folder = tmp_path_factory.mktemp("artifacts")
    for name in ("other", "damaged"):
        detector.with_target_fpr(0.3).save(folder / name)
    (folder / "damaged" / "weights.safetensors").write_bytes(b"")
    few = ["training.num_steps=4", "training.warmup_steps=0"]
    fit_locally(begin_distillation(folder / "student", run_dir, few), folder / "student", digit_shards)
    return folder


@pytest.fixture(scope="module")
def url(run_dir: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text(f"# one a line\n{KEY}\n")
    settings = ServeSettings.of(
        {"artifact": run_dir, "min_replicas": 2, "max_replicas": 2, "num_cpus": 0.1, "max_batch_size": 4,
         "max_queued": 8, "batch_wait_ms": 20, "max_mb": 0.1, "max_pixels": 10_000, "timeout_s": 120,
         "api_key_file": str(keys), "artifact_root": str(root)}
    )  # fmt: skip
    with serving(settings, port=free_port()) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    """For several threads: with a limit on kept connections httpcore 1.0.9 closes some that are in use."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=url, headers=headers, timeout=60, limits=limits) as made:
        yield made


def png(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((side, side), 50).save(buffer, format="PNG")
    return buffer.getvalue()


def is_problem(response: httpx.Response, status: int, kind: str) -> None:
    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json"), (
        response.text
    )
    assert response.json()["type"] == kind
    assert set(response.json()) == {"type", "title", "status", "detail"}
    assert "/tmp" not in response.text
    assert "Traceback" not in response.text


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


# --- what it says -----------------------------------------------------------------------------------------------------


def test_it_says_what_scoring_the_files_says_alone_and_in_batches(
    client: httpx.Client, run_dir: Path, files: dict[Path, bytes], tmp_path: Path
) -> None:
    score_files(load_detector(run_dir / "artifact"), list(files), tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    expected = [(row["score"], row["p_value"], row["threshold"], row["is_anomaly"]) for row in rows]

    def said(answer: dict[str, Any]) -> tuple[float, float, float, bool]:
        return answer["score"], answer["p_value"], answer["threshold"], answer["verdict"] == "anomalous"

    def score(data: bytes) -> dict[str, Any]:
        response = client.post("/v1/score", content=data)
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found

    bodies = list(files.values())
    assert [said(score(data)) for data in bodies[:4]] == expected[:4]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(score, bodies * 2))
    assert [said(answer) for answer in together] == expected * 2
    assert max(answer["batch_size"] for answer in together) > 1
    form = [("files", (path.name, data)) for path, data in files.items()]
    results = client.post("/v1/score/batch", files=form).json()["results"]
    assert [result["name"] for result in results] == [path.name for path in files]
    assert [said(result["answer"]) for result in results] == expected


def test_an_image_comes_as_a_body_a_form_or_json(client: httpx.Client, files: dict[Path, bytes]) -> None:
    data = next(iter(files.values()))
    answers = [
        client.post("/v1/score", content=data),
        client.post("/v1/score", content=data, headers={"Content-Type": "application/x-www-form-urlencoded"}),
        client.post("/v1/score", files={"file": ("a.png", data)}),
        client.post("/v1/score", json={"image": base64.b64encode(data).decode()}),
    ]
    assert [answer.status_code for answer in answers] == [200] * 4
    assert len({answer.json()["score"] for answer in answers}) == 1


def test_it_explains_in_json_or_as_a_picture(client: httpx.Client, files: dict[Path, bytes]) -> None:
    data = next(iter(files.values()))
    explained = client.post("/v1/score?explain=true", content=data).json()
    pictures = {name: Image.open(io.BytesIO(base64.b64decode(picture)))
                for name, picture in explained["explanation"]["pictures"].items()}  # fmt: skip
    assert {name: picture.mode for name, picture in pictures.items()} == {
        "heat_map": "RGB", "heat_layer": "RGBA", "reconstruction": "L",
    }  # fmt: skip
    response = client.post("/v1/score", content=data, headers={"Accept": "image/png"})
    assert response.headers["content-type"] == "image/png"
    assert response.content == base64.b64decode(explained["explanation"]["pictures"]["heat_map"])
    assert float(response.headers["x-raydiff-score"]) == explained["score"]


def test_one_bad_image_of_a_batch_does_not_fail_the_others(client: httpx.Client, files: dict[Path, bytes]) -> None:
    data = next(iter(files.values()))
    form = [("files", ("good", data)), ("files", ("bad", b"GIF89a")), ("files", ("empty", b"")), ("files", ("2", data))]
    results = client.post("/v1/score/batch", files=form).json()["results"]
    problems = [result["problem"] and result["problem"]["type"] for result in results]
    assert problems == [None, "unsupported-format", "empty-body", None]
    assert results[0]["answer"]["score"] == results[3]["answer"]["score"]


def test_a_name_of_half_a_character_is_answered(client: httpx.Client) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="+2AA-"\r\n\r\n?\r\n--x--\r\n'
    kind = "multipart/form-data; boundary=x; charset=utf-7"
    response = client.post("/v1/score/batch", content=body, headers={"Content-Type": kind})
    assert [result["problem"]["type"] for result in response.json()["results"]] == ["unsupported-format"]


def test_the_openapi_document_is_valid_and_names_every_operation(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    validate(document)
    assert "Problem" in document["components"]["schemas"]
    assert set(document["paths"]) == {
        "/v1/score", "/v1/score/batch", "/v1/model", "/v1/threshold", "/v1/drift", "/v1/artifact",
        "/v1/artifact/rollback", "/healthz", "/readyz", "/metrics",
    }  # fmt: skip


def test_the_page_is_served_with_a_strict_policy(url: str) -> None:
    response = httpx.get(f"{url}/", timeout=60)
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert httpx.get(f"{url}/static/icon.svg", timeout=60).headers["content-type"].startswith("image/svg+xml")
    assert httpx.get(f"{url}/static/..%2f__init__.py", timeout=60).status_code == 404


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "status", "kind"),
    [
        ({"content": b""}, 400, "empty-body"),
        ({"content": b"GIF89a, no image of ours"}, 415, "unsupported-format"),
        ({"content": png(101)}, 413, "too-many-pixels"),
        ({"content": png(90)[:-40]}, 422, "damaged-image"),
        ({"content": b"\xff" * 100_001}, 413, "body-too-large"),
        ({"json": {"image": "%%"}}, 400, "invalid-request"),
        ({"json": ["image"]}, 400, "invalid-request"),
        ({"content": b"[" * 9000, "headers": {"Content-Type": "application/json"}}, 400, "invalid-request"),
        ({"data": {"a": "b"}}, 415, "unsupported-format"),
        ({"files": {"a": b"1", "b": b"2"}}, 400, "invalid-request"),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400, "invalid-request"),
        ({"content": png(8), "params": {"explain": "perhaps"}}, 400, "invalid-request"),
        ({"content": png(8), "headers": {"Content-Encoding": "gzip"}}, 415, "unsupported-media-type"),
    ],
)
def test_what_cannot_be_scored_is_a_problem(
    client: httpx.Client, request_: dict[str, Any], status: int, kind: str
) -> None:
    is_problem(client.post("/v1/score", **request_), status, kind)


def test_unknown_addresses_and_methods_are_problems(client: httpx.Client) -> None:
    is_problem(client.get("/v2/score"), 404, "not-found")
    is_problem(client.get("/v1/score"), 405, "method-not-allowed")


def test_a_body_is_refused_while_it_is_still_being_sent(url: str) -> None:
    address = httpx.URL(url)
    head = f"POST /v1/score HTTP/1.1\r\nHost: x\r\nX-API-Key: {KEY}\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection((address.host, address.port or 80), timeout=20) as raw:
        raw.sendall(head.encode())
        for _ in range(3):  # no end is ever sent
            raw.sendall(b"c350\r\n" + b"\xff" * 50_000 + b"\r\n")
        assert raw.recv(200).startswith(b"HTTP/1.1 413")


def test_without_the_key_nothing_is_said(url: str, files: dict[Path, bytes]) -> None:
    data = next(iter(files.values()))
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"X-API-Key": KEY + "x"}, {"Authorization": KEY}):
        response = httpx.post(f"{url}/v1/score", content=data, headers=headers, timeout=60)
        is_problem(response, 401, "unauthorized")
        assert response.headers["www-authenticate"] == "Bearer"
    assert httpx.get(f"{url}/metrics", timeout=60).status_code == 401
    other_way = httpx.post(f"{url}/v1/score", content=data, headers={"X-API-Key": KEY}, timeout=60)
    assert other_way.status_code == 200
    assert [httpx.get(f"{url}{path}", timeout=60).status_code for path in ("/healthz", "/readyz")] == [200, 200]


def test_over_capacity_a_request_is_refused_at_once_and_none_hangs(
    client: httpx.Client, files: dict[Path, bytes]
) -> None:
    data = next(iter(files.values()))
    started = time.monotonic()
    with ThreadPoolExecutor(6 * PLACES) as pool:
        answers = list(pool.map(lambda _: client.post("/v1/score", content=data), range(6 * PLACES)))
    assert time.monotonic() - started < 60
    refused = [answer for answer in answers if answer.status_code != 200]
    assert 0 < len(refused) <= 5 * PLACES
    for answer in refused:
        is_problem(answer, 503, "over-capacity")
        assert answer.headers["retry-after"] == "1"
    assert client.post("/v1/score", content=data).status_code == 200


def hold(stack: ExitStack, address: httpx.URL, head: str) -> None:
    """A request whose body never comes, until ``stack`` ends; one asked meanwhile may have had its place."""
    raw = stack.enter_context(socket.create_connection((address.host, address.port or 80), timeout=20))
    raw.sendall(head.encode())


def test_who_goes_away_gives_the_place_back(url: str, client: httpx.Client, files: dict[Path, bytes]) -> None:
    data, address = next(iter(files.values())), httpx.URL(url)
    head = f"POST /v1/score HTTP/1.1\r\nHost: x\r\nX-API-Key: {KEY}\r\nContent-Length: 100\r\n\r\n"
    with ExitStack() as stack:

        def refused() -> bool:
            hold(stack, address, head)
            return client.post("/v1/score", content=data).status_code == 503

        for _ in range(PLACES - 1):
            hold(stack, address, head)
        until(refused)
    until(lambda: client.post("/v1/score", content=data).status_code == 200)


def test_large_batches_are_held_only_so_many_at_a_time(
    url: str, client: httpx.Client, files: dict[Path, bytes]
) -> None:
    data, address = next(iter(files.values())), httpx.URL(url)
    head = (
        f"POST /v1/score/batch HTTP/1.1\r\nHost: x\r\nX-API-Key: {KEY}\r\nContent-Type: multipart/form-data; boundary=x"
    )
    largest = {"content": b"?" * 400_000, "headers": {"Content-Type": "multipart/form-data; boundary=x"}}
    with ExitStack() as stack:

        def refused() -> bool:
            hold(stack, address, f"{head}\r\nContent-Length: 400000\r\n\r\n")
            return client.post("/v1/score/batch", **largest).status_code == 503

        for _ in range(3):
            hold(stack, address, f"{head}\r\nContent-Length: 400000\r\n\r\n")
        until(refused)
        assert client.post("/v1/score", content=data).status_code == 200
    until(lambda: client.post("/v1/score/batch", **largest).status_code == 400)


def test_no_process_of_it_can_be_reached_from_other_machines(url: str) -> None:
    assert socket.gethostbyname(httpx.URL(url).host) == "127.0.0.1"
    mine, listening = family_of(os.getpid()), set()
    for pid in mine:
        inodes = {name[8:-1] for name in open_files(pid) if name.startswith("socket:[")}
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and fields[9] in inodes:
                    listening.add(fields[1].split(":")[0])
    assert len(mine) > 5
    assert listening <= {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1, also in IPv6's words


def family_of(pid: int) -> set[int]:
    """A process and all that it started."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    family = {pid}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return family


def open_files(pid: int) -> set[str]:
    found = set()
    with suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                found.add(str(link.readlink()))
    return found


# --- what can be changed ----------------------------------------------------------------------------------------------


def test_a_new_rate_holds_on_every_replica_from_the_next_batch_on(
    client: httpx.Client, detector: DiffusionDetector, files: dict[Path, bytes]
) -> None:
    bodies = list(files.values())
    with ThreadPoolExecutor(8) as pool:
        for rate in (0.3, 0.1, None):
            answer = client.put("/v1/threshold", json={"target_fpr": rate})
            assert answer.status_code == 200, answer.text
            wanted = detector if rate is None else detector.with_target_fpr(rate)
            assert wanted.calibration is not None
            scored = list(pool.map(lambda data: client.post("/v1/score", content=data).json(), bodies))
            assert {one["threshold"] for one in scored} == {wanted.calibration.threshold.value}
            assert answer.json()["value"] == wanted.calibration.threshold.value
    for bad in (0, 1.5, "0.1", True):
        is_problem(client.put("/v1/threshold", json={"target_fpr": bad}), 422, "invalid-target-rate")
    is_problem(client.put("/v1/threshold", json={"rate": 0.1}), 400, "invalid-request")
    is_problem(client.put("/v1/threshold", content=b"{}"), 415, "unsupported-media-type")


def test_a_roll_under_load_drops_nothing_and_can_be_taken_back(
    client: httpx.Client, root: Path, files: dict[Path, bytes]
) -> None:
    bodies = list(files.values())
    before = client.get("/v1/model").json()["artifact_id"]
    new = load_detector(root / "other").artifact_digest
    going = True

    def load(start: int) -> list[tuple[float, int, str]]:
        answers = []
        while going:
            response = client.post("/v1/score", content=bodies[(start + len(answers)) % len(bodies)])
            answers.append((time.monotonic(), response.status_code, response.json().get("artifact_id")))
        return answers

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(load, i) for i in range(4)]
        try:
            time.sleep(0.3)
            rolled = client.post("/v1/artifact", json={"path": "other"})
            now = client.post("/v1/score", content=bodies[0]).json()["artifact_id"]
            time.sleep(0.3)
            back = client.post("/v1/artifact/rollback", json={})
            time.sleep(0.3)
        finally:
            going = False
        answers = [answer for job in running for answer in job.result()]
    assert (rolled.status_code, rolled.json()) == (200, {"artifact_id": new, "previous_artifact_id": before})
    assert now == new
    assert back.json() == {"artifact_id": before, "previous_artifact_id": new}
    assert {status for _, status, _ in answers} == {200}
    names = [name for _, _, name in sorted(answers)]
    assert set(names) == {before, new}
    assert (names[0], names[-1]) == (before, before)


def test_a_student_takes_its_teachers_place(client: httpx.Client, root: Path, files: dict[Path, bytes]) -> None:
    student = load_detector(root / "student" / "artifact")
    try:
        rolled = client.post("/v1/artifact", json={"path": "student/artifact"})
        assert (rolled.status_code, rolled.json()["artifact_id"]) == (200, student.artifact_digest)
        assert client.get("/v1/model").json()["num_evaluations"] == 1
        for path, body in list(files.items())[:3]:
            images = to_tensor(decode(path.read_bytes(), student.image_spec, path.name)[None])
            assert client.post("/v1/score", content=body).json()["score"] == float(student.score(images).image)
    finally:
        assert client.post("/v1/artifact/rollback", json={}).status_code == 200


def test_only_whole_artefacts_below_the_root_are_rolled_to(client: httpx.Client, run_dir: Path) -> None:
    before = client.get("/v1/model").json()["artifact_id"]
    is_problem(client.post("/v1/artifact", json={"path": "damaged"}), 422, "artifact-unusable")
    is_problem(client.post("/v1/artifact", json={"path": "nothing"}), 422, "artifact-unusable")
    for path in (str(run_dir), "../run", "."):
        is_problem(client.post("/v1/artifact", json={"path": path}), 403, "artifact-not-allowed")
    is_problem(client.post("/v1/artifact", json={"path": "x" * 300}), 422, "artifact-unusable")
    half = {"content": b'{"path": "\\ud800"}', "headers": {"Content-Type": "application/json"}}
    is_problem(client.post("/v1/artifact", **half), 403, "artifact-not-allowed")
    for path in ("", 7, "a\0b"):
        is_problem(client.post("/v1/artifact", json={"path": path}), 400, "invalid-request")
    assert client.get("/v1/model").json()["artifact_id"] == before


# --- what it measures -------------------------------------------------------------------------------------------------


def test_metrics_and_drift_are_those_of_all_replicas(client: httpx.Client, files: dict[Path, bytes]) -> None:
    def values(name: str, label: str) -> dict[str, float]:
        text = client.get("/metrics").text
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == name:
                    found[sample.labels.get(label, "")] = found.get(sample.labels.get(label, ""), 0) + sample.value
        return found

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda data: client.post("/v1/score", content=data), list(files.values()) * 3))
    scored = client.get("/v1/drift").json()
    until(lambda: client.get("/v1/drift").json()["num_scores"] == sum(values("raydiff_drift_scores", "").values()))
    assert scored["num_calibration"] == client.get("/v1/model").json()["calibration"]["threshold"]["num_images"]
    assert len(values("raydiff_images_total", "replica")) == 2
    assert values("raydiff_replicas", "") == {"": 2}
    assert values("raydiff_requests_total", "status")["200"] > 60
    assert values("raydiff_request_seconds_count", "operation")["score"] > 60
    assert values("raydiff_requests_in_progress", "") == {"": 0}


def test_a_replica_that_is_killed_costs_no_answer(url: str, client: httpx.Client, files: dict[Path, bytes]) -> None:
    data, going = next(iter(files.values())), True

    def load(_: int) -> list[int]:
        statuses = []
        while going:
            statuses.append(client.post("/v1/score", content=data).status_code)
        return statuses

    replicas = [pid for pid in family_of(os.getpid()) if b":scorer" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(replicas) == 2
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(load, i) for i in range(8)]
        try:
            time.sleep(0.5)
            os.kill(replicas[0], signal.SIGKILL)
            time.sleep(1.5)
        finally:
            going = False
        assert {status for job in running for status in job.result()} == {200}


def test_clients_who_leave_at_any_moment_leave_the_others_their_answers(
    client: httpx.Client, files: dict[Path, bytes]
) -> None:
    data = next(iter(files.values()))
    for wait_ms in range(4, 64, 4):
        with suppress(httpx.TimeoutException):
            client.post("/v1/score", content=data, timeout=wait_ms / 1000)
    assert client.post("/v1/score", content=data, timeout=10).status_code == 200
