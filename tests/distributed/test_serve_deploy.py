"""The endpoint as a service's manager runs it: the command that is told to end, and ``serve deploy`` of its config."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from torch import Tensor

from raydiff.detector import DiffusionDetector, load_detector
from raydiff.images import encode_png, to_uint8
from tests.ports import free_ports

pytestmark = pytest.mark.distributed

BIN = Path(sys.executable).parent
START_S = 200.0


@contextmanager
def started(*command: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process for the time of the block; ended by SIGTERM if it is still there, and Ray's with it."""
    with log.open("wb") as out:
        environment = {name: value for name, value in os.environ.items() if name != "RAY_worker_niceness"}
        process = subprocess.Popen(
            [str(BIN / command[0]), *command[1:]], env=environment, stdout=out, stderr=subprocess.STDOUT
        )
        try:
            yield process
        finally:
            process.terminate()
            process.wait(60)


def niceness_below(process: subprocess.Popen[bytes]) -> set[int]:
    found = set()
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found.add(child.nice())
    return found


def answers(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_S
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        try:
            if httpx.get(url, timeout=20).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)


def command(words: list[str]) -> None:
    done = subprocess.run([str(BIN / words[0]), *words[1:]], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def score_until(stop: threading.Event, url: str, image: bytes) -> list[int]:
    statuses = []
    with httpx.Client(base_url=url, timeout=60) as client:
        while not stop.wait(0.02):
            statuses.append(client.post("/v1/score", content=image).status_code)
    return statuses


def reachable(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=20).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture
def image(digit_images: Tensor) -> bytes:
    return encode_png(to_uint8(digit_images[:1])[0])


def test_told_to_end_it_answers_what_is_under_way_first(run_dir: Path, image: bytes, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    url, log = f"http://127.0.0.1:{port}", tmp_path / "log"
    options = ("--port", str(port), "--num-cpus", "0.1", "--timeout-s", "120")
    head = f"POST /v1/score HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(image)}\r\n\r\n"
    with started("raydiff", "serve", str(run_dir), *options, log=log) as process:
        answers(f"{url}/readyz", process, log)
        while b"Ctrl-C ends it" not in log.read_bytes():
            time.sleep(0.05)
        assert niceness_below(process) == {os.nice(0)}, "an endpoint has as much of the processor as any program"
        with socket.create_connection(("127.0.0.1", port), 120) as raw:
            raw.sendall(head.encode() + image[:-1])  # has its place, and is waited for
            while " 1.0" not in next(line for line in httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
                                     if line.startswith("raydiff_requests_in_progress ")):  # fmt: skip
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            while (status := httpx.get(f"{url}/readyz", timeout=30).status_code) == 200:
                time.sleep(0.05)
            late = httpx.post(f"{url}/v1/score", content=image, timeout=30)
            assert (status, late.status_code, late.json()["type"]) == (503, 503, "ending")
            raw.sendall(image[-1:])
            assert raw.recv(15) == b"HTTP/1.1 200 OK"
        assert process.wait(60) == 0
    assert log.read_text().endswith("ended\n")


@pytest.mark.slow
def test_serve_deploy_and_deploy_again_without_a_failed_request(
    run_dir: Path, detector: DiffusionDetector, image: bytes, tmp_path: Path
) -> None:
    """First the run's artefact, then another one at another rate by editing the file; then it is taken down."""
    detector.with_target_fpr(0.3).save(tmp_path / "other")
    port, dashboard, *others = free_ports(5)
    url, ray = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
    config, log = tmp_path / "f.yaml", tmp_path / "log"
    command(["raydiff", "serve", str(run_dir), "--port", str(port), "--num-cpus", "0.1", "--write-config", str(config)])
    names = ("--port", "--dashboard-agent-listen-port", "--ray-client-server-port")
    head = ("ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--num-cpus=2",
            "--object-store-memory=100000000", "--include-dashboard=true", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard}", "--disable-usage-stats", "--min-worker-port=0", "--max-worker-port=0",
            *(f"{name}={value}" for name, value in zip(names, others, strict=True)))  # fmt: skip
    with started(*head, log=log) as process:
        answers(f"{ray}/api/version", process, log)
        command(["serve", "deploy", str(config), "-a", ray])
        answers(f"{url}/readyz", process, log)
        first = httpx.post(f"{url}/v1/score", content=image, timeout=60).json()
        assert first["artifact_id"] == detector.artifact_digest

        written = yaml.safe_load(config.read_text())
        written["applications"][0]["args"] |= {"artifact": str(tmp_path / "other"), "target_fpr": 0.2}
        config.write_text(yaml.safe_dump(written))
        stop = threading.Event()
        with ThreadPoolExecutor(2) as pool:
            running = [pool.submit(score_until, stop, url, image) for _ in range(2)]
            try:
                command(["serve", "deploy", str(config), "-a", ray])
                end = time.monotonic() + START_S
                while httpx.get(f"{url}/v1/model", timeout=60).json()["artifact_id"] == first["artifact_id"]:
                    assert time.monotonic() < end
                    time.sleep(0.2)
            finally:
                stop.set()
            assert {status for job in running for status in job.result()} == {200}
        second = httpx.post(f"{url}/v1/score", content=image, timeout=60).json()
        assert second["artifact_id"] == load_detector(tmp_path / "other").artifact_digest
        assert (second["score"], second["target_fpr"]) == (first["score"], 0.2)
        command(["serve", "shutdown", "-y", "-a", ray])
        end = time.monotonic() + 30
        while reachable(url):
            assert time.monotonic() < end
            time.sleep(0.2)
