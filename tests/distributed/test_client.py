"""The client, and ``raydiff score --url``, against a real service over real HTTP."""

from __future__ import annotations

import csv
import io
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from torch import Tensor

from raydiff.cli import main
from raydiff.client import Client
from raydiff.detector import DiffusionDetector
from raydiff.distributed.serve import serving
from raydiff.distributed.serve_settings import ServeSettings
from raydiff.errors import ServiceError
from raydiff.images import encode_png, to_uint8

pytestmark = pytest.mark.distributed

KEY = "a-key-for-the-tests-only"
BATCH = 4
PLACES = 8 + 2 * BATCH
"""Of the service below: images that wait, and those in its replica."""
WAIT_S = 60


@pytest.fixture(scope="module")
def folder(digit_images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty digits in two folders."""
    made = tmp_path_factory.mktemp("images")
    for i, pixels in enumerate(to_uint8(digit_images)):
        path = made / ("a" if i < 9 else "b") / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode_png(pixels))
    return made


@pytest.fixture(scope="module")
def root(detector: DiffusionDetector, digit_images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artefacts that may be rolled to: ``slow`` takes seconds for a batch."""
    made = tmp_path_factory.mktemp("artifacts")
    detector.with_target_fpr(0.3).save(made / "other")
    slow = detector.config.override({"scoring.num_repeats": 400})
    DiffusionDetector.create(slow, num_classes=1).calibrate(digit_images).save(made / "slow")
    return made


@pytest.fixture(scope="module")
def url(run_dir: Path, root: Path, key_file: Path) -> Iterator[str]:
    settings = ServeSettings.of(
        {"artifact": run_dir, "num_cpus": 0.1, "max_batch_size": BATCH, "max_queued": 8, "timeout_s": 2 * WAIT_S,
         "max_mb": 1, "api_key_file": str(key_file), "artifact_root": str(root)}
    )  # fmt: skip
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with serving(settings, port=port) as address:
        yield address


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys.txt"
    path.write_text(f"# one a line\n{KEY}\n")
    return path


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url, api_key=KEY) as made:
        yield made


def until(condition: Callable[[], bool]) -> None:
    """Whether, not how soon."""
    end = time.monotonic() + WAIT_S
    while True:
        with suppress(httpx.HTTPError):
            if condition():
                return
        assert time.monotonic() < end
        time.sleep(0.05)


def score(*arguments: object) -> str:
    result = CliRunner().invoke(main, ["score", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_python_of_the_readme_and_the_guide_runs(
    url: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAYDIFF_API_KEY", KEY)
    paths = sorted(folder.rglob("*.png"))
    for document in ("README.md", "docs/SERVING.md"):
        text = (Path(__file__).parents[2] / document).read_text(encoding="utf-8")
        code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[-1]
        assert "http://127.0.0.1:8000" in code
        exec(code.replace("http://127.0.0.1:8000", url).replace('"part.png"', repr(str(paths[0]))), {"paths": paths})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(paths)
    assert {lines[0], lines[1].split()[0]} <= {"normal", "anomalous"}


# --- what it says -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_the_table_is_that_of_scoring_the_files_here(
    suffix: str, url: str, key_file: Path, run_dir: Path, folder: Path, tmp_path: Path
) -> None:
    here, there = tmp_path / f"here{suffix}", tmp_path / f"there{suffix}"
    said = score(run_dir, folder, "--out", here)
    served = score("--url", url, folder, "--out", there, "--api-key-file", key_file)
    assert there.read_bytes() == here.read_bytes()
    assert served.replace("there", "here") == said


def test_bad_images_stop_the_work_or_have_their_own_rows(
    url: str, run_dir: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYDIFF_API_KEY", KEY)
    good = sorted(folder.rglob("*.png"))[:2]
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "gif.png").write_bytes(b"GIF89a")
    (tmp_path / "huge.png").write_bytes(good[0].read_bytes() + bytes(40_000_000))
    bad = sorted(tmp_path.glob("*.png"))
    score(run_dir, *good, *bad[:2], "--out", tmp_path / "here.csv", "--skip-bad")
    score("--url", url, *good, *bad, "--out", tmp_path / "there.csv", "--skip-bad")
    here, there = ([*csv.DictReader((tmp_path / name).read_text().splitlines())] for name in ("here.csv", "there.csv"))
    errors = [row.pop("error") for row in there]
    assert there[:-1] == [{name: value for name, value in row.items() if name != "error"} for row in here]
    assert there[-1] == {
        "path": str(bad[2]),
        "score": "",
        "threshold": here[0]["threshold"],
        "p_value": "",
        "is_anomaly": "",
    }
    assert errors[:2] == ["", ""]
    assert [error.split(": ")[0] for error in errors[2:]] == [str(path) for path in bad]
    assert "more than 1000000 bytes" in errors[4]
    result = CliRunner().invoke(main, ["score", "--url", url, str(bad[1]), "--out", str(tmp_path / "no.csv")])
    assert result.exit_code == 1
    assert f"{bad[1]}: {url}/v1/score: unsupported-format (415)" in result.output
    assert not list(tmp_path.glob("no.csv*"))


def test_pictures_have_the_names_that_they_have_here(
    url: str, key_file: Path, run_dir: Path, folder: Path, tmp_path: Path
) -> None:
    score(run_dir, folder, "--out", tmp_path / "s.csv", "--maps", tmp_path / "here")
    score("--url", url, folder, "--out", tmp_path / "s.csv", "--maps", tmp_path / "there", "--api-key-file", key_file)
    here, there = (
        {path.relative_to(tmp_path / name): np.asarray(Image.open(path)) for path in (tmp_path / name).rglob("*.png")}
        for name in ("here", "there")
    )
    assert len(here) == 40
    assert set(here) == set(there)
    for path, pixels in here.items():
        assert pixels.shape == there[path].shape
        if "reconstruction" in path.name:
            assert np.array_equal(pixels, there[path])


def test_an_image_may_come_in_many_ways_and_is_explained(client: Client, folder: Path) -> None:
    path = next(folder.rglob("*.png"))
    image = Image.open(path)
    plain = [client.score(one) for one in (path, str(path), path.read_bytes(), image, np.asarray(image))]
    assert len({answer.score for answer in plain}) == 1
    assert (plain[0].format, plain[0].height, plain[0].width, plain[0].explanation) == ("png", 8, 8, None)
    explained = client.score(path, explain=True).explanation
    assert explained is not None
    assert explained.heat_scale is not None
    assert explained.pictures.heat_map is not None
    assert explained.pictures.heat_layer is not None
    assert Image.open(io.BytesIO(explained.pictures.heat_map)).size == (128, 128)
    assert Image.open(io.BytesIO(explained.pictures.heat_layer)).mode == "RGBA"
    assert explained.num_regions == len(explained.boxes)


def test_the_service_is_examined_and_changed(client: Client, root: Path, folder: Path) -> None:
    image = next(folder.rglob("*.png"))
    assert client.ready()
    before = client.model()
    own = before["calibration"]["threshold"]
    assert client.set_target_fpr(0.3)["value"] == client.score(image).threshold < own["value"]
    assert client.set_target_fpr(None)["value"] == own["value"]
    rolled = client.roll("other")
    assert rolled.previous_artifact_id == before["artifact_id"]
    assert client.score(image).artifact_id == rolled.artifact_id
    assert client.roll_back().artifact_id == before["artifact_id"]
    assert client.drift()["num_scores"] > 0
    refusals: dict[str, Callable[[], Any]] = {
        "invalid-target-rate": lambda: client.set_target_fpr(2),
        "artifact-not-allowed": lambda: client.roll("../run"),
        "artifact-unusable": lambda: client.roll("nothing"),
    }
    for kind, attempt in refusals.items():
        with pytest.raises(ServiceError) as caught:
            attempt()
        assert caught.value.type == kind


def test_without_the_key_nothing_is_said(url: str, folder: Path) -> None:
    with Client(url, api_key="another-key-of-the-tests") as stranger:
        assert stranger.ready()
        with pytest.raises(ServiceError, match=r"unauthorized \(401\).*RAYDIFF_API_KEY") as caught:
            stranger.score(next(folder.rglob("*.png")))
    assert "another-key" not in str(caught.value)


# --- when there is too much to do -------------------------------------------------------------------------------------


def test_a_service_at_capacity_is_waited_for(url: str, client: Client, folder: Path) -> None:
    image, address = next(folder.rglob("*.png")), httpx.URL(url)
    head = f"POST /v1/score HTTP/1.1\r\nHost: x\r\nX-API-Key: {KEY}\r\nContent-Length: 100\r\n\r\n"
    with Client(url, api_key=KEY, retries=0) as impatient, ThreadPoolExecutor(1) as pool:
        until(lambda: in_progress(url) == 0)  # what the tests before this one asked for
        with ExitStack() as stack:
            for _ in range(PLACES):  # their bodies never come
                raw = stack.enter_context(socket.create_connection((address.host, address.port or 80), timeout=20))
                raw.sendall(head.encode())
            until(lambda: in_progress(url) == PLACES)
            assert refused(impatient, image)
            patient = pool.submit(client.score, image)
            time.sleep(0.5)
            assert not patient.done()
        assert patient.result().verdict in ("normal", "anomalous")


def refused(client: Client, image: Path) -> bool:
    try:
        client.score(image)
    except ServiceError as error:
        return (error.type, error.status) == ("over-capacity", 503)
    return False


def test_many_more_than_there_are_places_are_all_scored(client: Client, folder: Path) -> None:
    images = sorted(folder.rglob("*.png")) * 3
    scores = [answer.score for answer in client.score_many(images, max_in_flight=2 * PLACES)]
    assert scores == scores[:20] * 3


@pytest.fixture(scope="module")
def slow(root: Path, url: str) -> Iterator[str]:
    """The artefact that takes seconds for a batch, in service while these tests run; its id as metrics have it."""
    with Client(url, api_key=KEY) as client:
        name = client.roll("slow").artifact_id[:12]
        try:
            until(lambda: [sample.labels["artifact"] for sample in metrics(url, "raydiff_artifact_info")] == [name])
            yield name
        finally:
            client.roll_back()


def test_what_a_client_that_left_waited_for_is_never_worked_on(url: str, slow: str, folder: Path) -> None:
    """And its places are free again; a count, since how long that takes depends on the machine."""
    data, address, before = next(folder.rglob("*.png")).read_bytes(), httpx.URL(url), scored(url)
    head = f"POST /v1/score HTTP/1.1\r\nHost: x\r\nX-API-Key: {KEY}\r\nContent-Length: {len(data)}\r\n\r\n"
    with ExitStack() as stack:
        asking = [
            stack.enter_context(socket.create_connection((address.host, address.port or 80), WAIT_S))
            for _ in range(PLACES)
        ]
        for raw in asking:
            raw.sendall(head.encode() + data[:-1])
        until(lambda: in_progress(url) == PLACES)
        patient, hasty = asking[:BATCH], asking[BATCH:]
        for some, pause in ((patient, 0.5), (hasty, 0.2)):
            for raw in some:
                raw.sendall(data[-1:])
            time.sleep(pause)  # the patient are under way; the hasty wait, in the replica or before it
        for raw in hasty:
            raw.close()
        assert all(raw.recv(15) == b"HTTP/1.1 200 OK" for raw in patient)
    until(lambda: in_progress(url) == 0)
    with Client(url, api_key=KEY, timeout_s=WAIT_S) as client:
        client.score(data)  # in order: the replica reports it after all that it did before
    until(lambda: scored(url)[slow] > before[slow] + BATCH)
    assert (scored(url) - before).total() < 2 * BATCH, "those who left were worked on"


def test_a_client_with_little_time_gives_its_places_back(url: str, slow: str, folder: Path) -> None:
    images = sorted(folder.rglob("*.png"))[:PLACES]
    before = scored(url)
    with Client(url, api_key=KEY, timeout_s=0.5) as hurried:
        with pytest.raises(ServiceError, match=r"no answer within 0\.5 s"):
            list(hurried.score_many(images, max_in_flight=PLACES))
        until(lambda: in_progress(url) == 0)
    with Client(url, api_key=KEY, timeout_s=WAIT_S) as client:
        client.score(images[0])
    until(lambda: scored(url)[slow] > before[slow])
    assert (scored(url) - before).total() < PLACES - BATCH


def in_progress(url: str) -> int:
    return int(metrics(url, "raydiff_requests_in_progress")[0].value)


def scored(url: str) -> Counter[str]:
    """Images that were worked on, by artefact."""
    found: Counter[str] = Counter()
    for sample in metrics(url, "raydiff_images_total"):
        found[sample.labels["artifact"]] += int(sample.value)
    return found


def metrics(url: str, name: str) -> list[Sample]:
    text = httpx.get(f"{url}/metrics", headers={"X-API-Key": KEY}, timeout=WAIT_S).raise_for_status().text
    return [
        sample for family in text_string_to_metric_families(text) for sample in family.samples if sample.name == name
    ]
