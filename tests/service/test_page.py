"""The page in a real headless Chromium (see conftest.py), in front of a real service of a tiny detector."""

from __future__ import annotations

import base64
import hmac
import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from raydiff.config import ExperimentConfig
from raydiff.experiment import fit_baselines
from raydiff.images import encode_png, to_uint8
from raydiff.service import Limits, ProblemError, ScoredImage, ScoringService
from raydiff.service.page import HEADERS, page_files
from raydiff.shards import ShardSet
from raydiff.testing import planted_defect

if TYPE_CHECKING:
    from tests.service.conftest import Browser

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

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        service = self.server.service
        found = page_files().get(urlsplit(self.path).path)
        if found is not None:
            return self._answer(200, found.body, found.content_type, HEADERS)
        answers = {"/v1/model": service.model, "/v1/drift": lambda: service.drift().to_dict()}
        return self._api(answers[self.path])

    def do_POST(self) -> None:
        assert self.path == "/v1/score?explain=true"
        body = self._body()
        if self.server.refusals:
            self.server.refusals -= 1
            full = {"title": "The service is full", "detail": "Try again soon."}
            return self._answer(503, json.dumps(full).encode(), "application/problem+json", {"Retry-After": "0.2"})
        return self._api(lambda: self._score(body))

    def do_PUT(self) -> None:
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
    made.service = ScoringService(
        run_dir / "artifact", max_batch=4, limits=Limits(max_bytes=2_000_000), min_drift_scores=50
    )
    thread = Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()
    made.service.close()


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
def files(server: Server, digit_images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A plain digit, much higher than wide; a broken one, wider than high, as PNG and TIFF; what is refused."""
    folder = tmp_path_factory.mktemp("images")
    digits = [Image.fromarray(pixels[:, :, 0]).resize((12, 240)) for pixels in to_uint8(digit_images)]
    defects = to_uint8(planted_defect(digit_images)[0])
    broken = [Image.fromarray(pixels[:, :, 0]).resize((48, 32)) for pixels in defects]
    min(digits, key=lambda image: score(server, encode_png(np.asarray(image))).score).save(folder / "plain.png")
    odd = max(broken, key=lambda image: score(server, encode_png(np.asarray(image))).score)
    odd.save(folder / "broken.png")
    odd.save(folder / "broken.tiff")
    (folder / "notes.png").write_bytes(b"These are no pixels.")
    (folder / "large.png").write_bytes(bytes(2_000_001))
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


def test_a_chosen_image_gets_the_services_verdict_with_its_reasons(
    page: Browser, server: Server, files: dict[str, Path]
) -> None:
    page.choose(files["broken.png"])
    page.until("document.querySelector('.verdict.anomalous') !== null")
    answer = score(server, files["broken.png"].read_bytes())
    assert answer.explanation is not None
    shown = page.text("#result")
    assert page.text(".verdict .word") == "Anomalous"
    assert f"Score {answer.score:.4g}, above the threshold of {answer.threshold:.4g}." in shown
    assert "None of the 30 normal images of the calibration scored as high (p\u00a0=\u00a00.032)." in shown
    assert server.service.artifact_id in shown
    assert "48 × 32" in shown
    assert page.text("#said").startswith("broken.png: Anomalous. Score")
    assert f"threshold {answer.threshold:.4g}" in page.run("document.querySelector('.histogram').textContent")
    left_to_right = (
        "[...document.querySelectorAll('.histogram :is(.threshold, .score)')].map(e => e.getAttribute('x1'))"
    )
    assert page.run(f"(([cut, score]) => Number(cut) < Number(score))({left_to_right})")
    assert page.run("document.querySelectorAll('.boxes .box:not(.under)').length") == len(answer.explanation.boxes) > 0
    page.until("[...document.querySelectorAll('.stage img')].filter(i => i.naturalWidth > 0).length === 3")
    assert page.run(PROPORTION) == pytest.approx(48 / 32, rel=0.01)


def test_everything_is_reached_and_done_by_keyboard(page: Browser, server: Server, files: dict[str, Path]) -> None:
    page.send("Page.setInterceptFileChooserDialog", enabled=True)
    page.tab_to("#files")
    assert page.run("getComputedStyle(document.querySelector('label:has(#files)')).outlineStyle") == "solid"
    page.press("Enter", 13, "\r")
    chooser = page.event("Page.fileChooserOpened")
    page.send("Page.setInterceptFileChooserDialog", enabled=False)
    chosen = [str(files[name]) for name in ("broken.png", "plain.png")]
    page.send("DOM.setFileInputFiles", backendNodeId=chooser["backendNodeId"], files=chosen)
    page.until("document.querySelector('.verdict.anomalous') !== null")
    page.tab_to("#opacity")
    for expected in (0.85, 0.9):
        page.press("ArrowRight", 39)
        assert page.run("document.querySelector('.layer').style.opacity") == str(expected)
    page.tab_to("#show-boxes")
    page.press(" ", 32, " ")
    assert page.run("document.querySelector('.boxes').checkVisibility()") is False
    page.until("document.querySelectorAll('#list .sign.waiting').length === 0")
    page.tab_to("#list li:nth-child(2) button")
    page.press("Enter", 13, "\r")
    assert page.text(".verdict .word") == "Normal"
    assert page.run("document.querySelector('#list [aria-current] .name').textContent") == "plain.png"
    assert page.run("document.querySelector('.layer').style.opacity") == "0.9"
    page.tab_to("#shown button")
    page.press("Enter", 13, "\r")
    assert page.run("document.activeElement.id") == "result"
    page.until("document.querySelector('.verdict.normal') !== null")
    page.tab_to("#rate")
    page.run("document.activeElement.select()")
    page.send("Input.insertText", text="40")
    page.press("Enter", 13, "\r")
    page.until("document.querySelector('#rate-said').textContent.startsWith('The threshold is now')")
    assert server.service.model()["calibration"]["threshold"]["target_fpr"] == 0.4
    page.tab_to("#rate-own")
    page.press("Enter", 13, "\r")
    page.until("document.querySelector('#rate').value === '5'")


def test_what_is_refused_says_why_and_what_to_do(page: Browser, server: Server, files: dict[str, Path]) -> None:
    page.choose(files["notes.png"])
    page.until("document.querySelector('.verdict.refused') !== null")
    assert "send one of these" in page.text(".verdict")
    assert "send one of these" in page.text("#said")
    page.run("document.querySelector('#rate').value = 250; document.querySelector('#rate-form').requestSubmit()")
    page.until("document.querySelector('#rate-said').textContent.includes('between 0 and 1')")
    server.refusals = 1  # full for once: the page waits as long as it is told
    page.choose(files["plain.png"])
    page.until("document.querySelector('.verdict.normal') !== null")
    assert server.refusals == 0
    assert page.run(PROPORTION) == pytest.approx(12 / 240, rel=0.05)
    assert page.run("document.querySelector('.stage').getBoundingClientRect().height") < 900
    asked = len(page.events)
    page.choose(files["large.png"])
    page.until("document.querySelector('.verdict.refused') !== null")
    assert "at most 2000000 are taken" in page.text(".verdict")
    assert not [event for event in page.events[asked:] if event["method"] == "Network.requestWillBeSent"
                and "/v1/score" in event["params"]["request"]["url"]]  # fmt: skip


def test_a_format_the_browser_does_not_know_is_shown_by_the_service(page: Browser, files: dict[str, Path]) -> None:
    page.choose(files["broken.tiff"])
    page.until("document.querySelector('.base')?.naturalWidth > 0")
    assert page.run("document.querySelector('.base').src").startswith("data:image/png")
    assert "cannot show this format" in page.text("figcaption")
    assert page.run("document.querySelector('#opacity').disabled") is True
    page.until(
        "(c => c.getContext('2d').getImageData(28, 28, 1, 1).data[3])(document.querySelector('#list canvas')) > 0"
    )
    assert "TIFF, 48 × 32" in page.text("#result")


def test_a_new_artefact_and_drift_are_shown_as_they_come(
    page: Browser,
    server: Server,
    files: dict[str, Path],
    tiny_config: ExperimentConfig,
    digit_shards: ShardSet,
    tmp_path: Path,
) -> None:
    """The new one draws no maps and rebuilds nothing; most images it gets are broken."""
    service = server.service
    next(fit_baselines(tiny_config, digit_shards, ["knn"])).save(tmp_path / "knn")
    service.roll(tmp_path / "knn")
    try:
        page.choose(files["plain.png"])
        page.until("document.querySelector('.verdict.normal') !== null")
        assert service.artifact_id in page.text("#facts")
        assert service.artifact_id in page.text("#result")
        assert "no heat map" in page.text("#result")
        assert page.run("document.querySelectorAll('.stage').length") == 1
        page.until("document.querySelector('#drift-sentence').textContent.startsWith('Too early to say: 1 of the 50')")
        broken = service.receive(files["broken.png"].read_bytes())
        service.score([broken] * 60)
        page.choose(files["plain.png"])
        page.until("document.querySelector('#drift-sentence .sign.anomalous') !== null")
        sentence = page.text("#drift-sentence")
        assert sentence.startswith("The last 62 scores have moved far away from the calibration's")
        assert f"Flagged: {100 * (service.drift().share_flagged or 0):.2g}\u00a0%" in sentence
    finally:
        service.roll_back()


def test_images_can_be_dropped_pasted_and_taken(page: Browser, files: dict[str, Path]) -> None:
    encoded = base64.b64encode(files["plain.png"].read_bytes()).decode()
    given = f"""const bytes = Uint8Array.from(atob("{encoded}"), (c) => c.charCodeAt(0));
        const data = new DataTransfer(); data.items.add(new File([bytes], name, {{type: "image/png"}}));"""
    page.run(f"""{{ const name = "dropped.png"; {given} document.querySelector("h1").dispatchEvent(
        new DragEvent("drop", {{dataTransfer: data, bubbles: true, cancelable: true}})) }}""")
    page.run(f"""{{ const name = "pasted.png"; {given} document.body.dispatchEvent(
        new ClipboardEvent("paste", {{clipboardData: data, bubbles: true}})) }}""")
    page.run("document.querySelector('#camera-open').click()")
    page.until("document.querySelector('#video').videoWidth > 0")
    page.run("document.querySelector('#camera-take').click()")
    page.until("document.querySelectorAll('#list :is(.sign.normal, .sign.anomalous)').length === 3")
    names = page.run("[...document.querySelectorAll('#list .name')].map((e) => e.textContent)")
    assert names[0].startswith("camera ")
    assert names[1:] == ["pasted.png", "dropped.png"]
    assert page.run("document.querySelector('#video').srcObject === null")


def test_of_many_images_the_last_are_kept(page: Browser, server: Server, files: dict[str, Path]) -> None:
    before = server.service.drift().num_scores
    page.choose(*[files["plain.png"]] * 45)
    page.until("document.querySelectorAll('#list .sign.waiting').length === 0")
    assert server.service.drift().num_scores == before + 45
    assert page.run("document.querySelectorAll('#list li').length") == 40
    assert page.run("document.querySelector('#list [aria-current]') !== null")
    assert page.text("#latency").startswith("40 requests: ")


def test_a_key_is_asked_for_and_lives_in_memory_only(page: Browser, server: Server, files: dict[str, Path]) -> None:
    server.key = "correct horse"
    page.choose(files["plain.png"])
    page.until("document.querySelector('.verdict.refused') !== null")
    assert page.text(".verdict .word") == "An API key is needed"
    page.until("document.activeElement.id === 'key'")
    page.send("Input.insertText", text="correct horse")
    page.press("Enter", 13, "\r")
    page.run("document.querySelector('#shown button').click()")
    page.until("document.querySelector('.verdict.normal') !== null")
    kept = page.run("JSON.stringify([localStorage, sessionStorage, document.cookie, location.href])")
    assert "horse" not in kept


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_can_be_read(page: Browser, files: dict[str, Path], scheme: str) -> None:
    page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    page.resize(360)
    page.choose(files["broken.png"], files["notes.png"])
    page.until("document.querySelectorAll('#list .sign:not(.waiting)').length === 2")
    assert page.run("document.documentElement.scrollWidth") <= 360
    assert page.run(SMALL) == []
    assert page.run(FAINT) == []


PROPORTION = "(({width, height}) => width / height)(document.querySelector('.stage').getBoundingClientRect())"
SMALL = """[...document.querySelectorAll("button, .button")].filter((e) => e.checkVisibility())
    .filter((e) => e.getBoundingClientRect().height < 44).map((e) => e.textContent)"""
FAINT = """(() => {
  const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = (css) => css.match(/[\\d.]+/g).slice(0, 3).map((v) => linear(v / 255))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    const found = element === null ? "rgb(255, 255, 255)" : getComputedStyle(element).backgroundColor;
    return found.endsWith(", 0)") ? behind(element.parentElement) : found;
  };
  const written = [...document.querySelectorAll("body *")].filter((e) => e.checkVisibility() && !e.closest("svg")
    && [...e.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
  return written.filter((e) => {
    const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05) < 4.5;
  }).map((e) => e.textContent);
})()"""
"""Buttons too small for a thumb, and text with a contrast below 4.5 to 1 (WCAG 2.2, 1.4.3)."""


def score(server: Server, data: bytes) -> ScoredImage:
    answer = server.service.score([server.service.receive(data)], explain=True)[0]
    assert isinstance(answer, ScoredImage)
    return answer
