"""The page in a real headless Chromium, driven over the DevTools pipe, in front of a real service of a tiny detector.

Without ``chromium`` (or what RAYDIFF_CHROMIUM names) the tests of the browser are skipped, and the summary says so.
https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import fcntl
import hmac
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from PIL import Image
from torch import Tensor

from raydiff.images import to_uint8
from raydiff.service import ProblemError, ScoringService
from raydiff.service.page import HEADERS, page_files
from raydiff.testing import planted_defect

CHROMIUM = os.environ.get("RAYDIFF_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: THE PAGE WAS NOT TRIED in a browser")
WAIT_S = 30.0


# --- a browser --------------------------------------------------------------------------------------------------------

_LAUNCH = """import os, sys
for fd, source in ((3, int(sys.argv[1])), (4, int(sys.argv[2]))):
    os.dup2(source, fd)
os.execv(sys.argv[3], sys.argv[3:])"""
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream", "--remote-debugging-pipe",
)  # fmt: skip


class Browser:
    """Chromium with one page; commands over file descriptors 3 and 4, JSON ended by NUL, so no port is opened."""

    def __init__(self, folder: Path) -> None:
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        handed = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (theirs_in, theirs_out)]
        command = [sys.executable, "-c", _LAUNCH, *map(str, handed), str(CHROMIUM), *_FLAGS]
        self._process = subprocess.Popen(
            [*command, f"--user-data-dir={folder}", "about:blank"],
            pass_fds=handed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for fd in (theirs_in, theirs_out, *handed):
            os.close(fd)
        self._read, self._number, self._session = b"", 0, None
        self.events: list[dict[str, Any]] = []

    def close(self) -> None:
        try:
            self.send("Browser.close")
        finally:
            os.close(self._out)
            os.close(self._in)
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def attach(self) -> None:
        targets = self.send("Target.getTargets")["targetInfos"]
        target = next(target for target in targets if target["type"] == "page")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its result; events that come meanwhile are kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + WAIT_S
        while True:
            answer = self._next(deadline)
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return dict(answer["result"])

    def run(self, script: str) -> Any:
        """The value of an expression in the page, awaited."""
        found = self.send(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, script: str) -> Any:
        """Wait until an expression is true."""
        deadline = time.monotonic() + WAIT_S
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, f"never true: {script}\n{self.text()}"
            time.sleep(0.03)
        return value

    def text(self, selector: str = "main") -> str:
        return str(self.run(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    def event(self, method: str) -> dict[str, Any]:
        """Wait for an event; returns what it carries."""
        deadline = time.monotonic() + WAIT_S
        while not (found := [event for event in self.events if event["method"] == method]):
            self._next(deadline)
        return dict(found[-1]["params"])

    def press(self, key: str, code: int, text: str = "") -> None:
        event = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.send("Input.dispatchKeyEvent", type="keyDown", **event, **({"text": text} if text else {}))
        self.send("Input.dispatchKeyEvent", type="keyUp", **event)

    def tab_to(self, selector: str) -> None:
        for _ in range(60):
            if self.run(f"document.activeElement.matches({json.dumps(selector)})"):
                return
            self.press("Tab", 9)
        raise AssertionError(f"the Tab key never reaches {selector}")

    def choose(self, *paths: Path, selector: str = "#files") -> None:
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in paths])

    def resize(self, width: int, height: int = 900) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def picture(self, path: Path) -> None:
        """The whole page as PNG, to be looked at."""
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._in], [], [], max(deadline - time.monotonic(), 0))
            assert ready, "the browser does not answer"
            part = os.read(self._in, 1 << 16)
            assert part, "the browser has ended"
            self._read += part
        line, _, self._read = self._read.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return message


# --- a service behind the page ----------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """The page's files and the parts of the HTTP API that it asks for, on loopback."""

    daemon_threads = True
    service: ScoringService
    key: str | None = None
    refusals: int = 0


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:  # noqa: N802
        service = self.server.service
        found = page_files().get(urlsplit(self.path).path)
        if found is not None:
            return self._answer(200, found.body, found.content_type, HEADERS)
        answers = {"/v1/model": service.model, "/v1/drift": lambda: service.drift().to_dict()}
        return self._api(answers[self.path])

    def do_POST(self) -> None:  # noqa: N802
        assert self.path == "/v1/score?explain=true"
        body = self._body()
        if self.server.refusals:
            self.server.refusals -= 1
            full = {"title": "The service is full", "detail": "Try again soon."}
            return self._answer(503, json.dumps(full).encode(), "application/problem+json", {"Retry-After": "0.2"})
        return self._api(lambda: self._score(body))

    def do_PUT(self) -> None:  # noqa: N802
        assert self.path == "/v1/threshold"
        body = self._body()
        return self._api(lambda: self.server.service.set_target_fpr(json.loads(body)["target_fpr"]))

    def _score(self, body: bytes) -> dict[str, Any]:
        service = self.server.service
        answer = service.score([service.receive(body)], explain=True)[0]
        if isinstance(answer, ProblemError):
            raise answer
        return answer.to_dict()

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def _api(self, ask: Any) -> None:
        if self.server.key is not None and not hmac.compare_digest(self.headers.get("X-API-Key", ""), self.server.key):
            problem = {"title": "An API key is needed", "detail": "Send the service's key."}
            return self._answer(401, json.dumps(problem).encode(), "application/problem+json")
        try:
            return self._answer(200, json.dumps(ask()).encode(), "application/json")
        except ProblemError as error:
            return self._answer(error.status, json.dumps(error.to_dict()).encode(), "application/problem+json")

    def _answer(self, status: int, body: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def server(run_dir: Path) -> Iterator[Server]:
    made = Server(("127.0.0.1", 0), Handler)
    made.service = ScoringService(run_dir / "artifact", max_batch=4, min_drift_scores=8, drift_window=50)
    thread = Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()
    made.service.close()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    made = Browser(tmp_path_factory.mktemp("profile"))
    made.attach()
    yield made
    made.close()


@pytest.fixture
def page(chromium: Browser, server: Server) -> Iterator[Browser]:
    """The page, freshly loaded; afterwards: nothing went wrong in it, and it asked nobody but its server."""
    address = f"http://127.0.0.1:{server.server_port}/"
    server.key, server.refusals = None, 0
    server.service.set_target_fpr(None)
    chromium.resize(1280)
    chromium.events.clear()
    chromium.send("Page.navigate", url=address)
    chromium.until(f"location.href === '{address}' && document.querySelector('#shown .histogram') !== null")
    yield chromium
    chromium.run("0")
    asked = {e["params"]["request"]["url"] for e in chromium.events if e["method"] == "Network.requestWillBeSent"}
    assert {url for url in asked if not url.startswith((address, "data:", f"blob:{address[:-1]}"))} == set()
    assert [event["params"] for event in chromium.events if is_trouble(event)] == []


def is_trouble(event: dict[str, Any]) -> bool:
    """An exception, an error on the console, or a violated policy; a refused request is none."""
    if event["method"] == "Log.entryAdded":
        entry = event["params"]["entry"]
        return bool(entry["level"] == "error" and entry["source"] != "network")
    if event["method"] == "Runtime.consoleAPICalled":
        return event["params"]["type"] in ("error", "assert")
    return bool(event["method"] == "Runtime.exceptionThrown")


@pytest.fixture(scope="module")
def files(digit_images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A digit, a broken digit as TIFF and PNG, wider than high, and something that is no image."""
    folder = tmp_path_factory.mktemp("images")
    plain, broken = to_uint8(digit_images[:1])[0, :, :, 0], to_uint8(planted_defect(digit_images[:1])[0])[0, :, :, 0]
    Image.fromarray(plain).save(folder / "plain.png")
    Image.fromarray(broken).resize((48, 32)).save(folder / "broken.png")
    Image.fromarray(broken).resize((48, 32)).save(folder / "broken.tiff")
    (folder / "notes.png").write_bytes(b"These are no pixels.")
    return {path.name: path for path in folder.iterdir()}


# --- the files --------------------------------------------------------------------------------------------------------


def test_every_file_that_is_named_is_there_and_none_is_elsewhere() -> None:
    texts = {address: file.body.decode() for address, file in page_files().items()}
    named = set(re.findall(r'(?:src|href)="(?!#)([^"]+)"', texts["/"]))
    imported = {f"static/{name}" for text in texts.values() for name in re.findall(r'from "\./([^"]+)"', text)}
    assert {f"/{name}" for name in named | imported} == set(texts) - {"/"}
    for address, text in texts.items():
        assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text) == [], address
        assert re.findall(r"innerHTML|localStorage|sessionStorage|document\.cookie", text.partition("\n")[2]) == [], (
            address
        )
    assert re.findall(r"<[^>]*\s(?:on\w+|style)=", texts["/"]) == []


# --- in the browser ---------------------------------------------------------------------------------------------------


@needs_browser
def test_a_chosen_image_gets_the_services_verdict_with_its_reasons(
    page: Browser, server: Server, files: dict[str, Path]
) -> None:
    page.choose(files["broken.png"])
    page.until("document.querySelector('.verdict.anomalous') !== null")
    answer = server.service.score([server.service.receive(files["broken.png"].read_bytes())], explain=True)[0]
    assert not isinstance(answer, ProblemError)
    assert answer.explanation is not None
    shown = page.text("#result")
    assert page.text(".verdict .word") == "Anomalous"
    assert f"Score {answer.score:.4g}, above the threshold of {answer.threshold:.4g}." in shown
    assert server.service.artifact_id in shown
    assert "48 × 32" in shown
    assert page.run("document.querySelectorAll('.boxes .box:not(.under)').length") == len(answer.explanation.boxes) > 0
    assert page.until("[...document.querySelectorAll('.stage img')].filter(i => i.naturalWidth > 0).length === 3")
    stage = page.run("(({width, height}) => width / height)(document.querySelector('.stage').getBoundingClientRect())")
    assert stage == pytest.approx(48 / 32, rel=0.01)
    assert "anomalous, above" not in page.text("#said")
    assert page.text("#said").startswith("broken.png: Anomalous. Score")
