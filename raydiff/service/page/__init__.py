"""The page at ``/``: try the endpoint in a browser. Plain files, sent as they are; nothing is built, nothing fetched.

Addresses in the files are relative, so the page also works under a prefix. It asks ``v1/model``, ``v1/drift`` and
``v1/score?explain=true``, puts ``v1/threshold``, and talks to nobody else: :data:`HEADERS` has the browser see to that
(Content Security Policy Level 3, https://www.w3.org/TR/CSP3/).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import PurePath

__all__ = ["HEADERS", "PageFile", "page_files"]

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""To be sent with every file of the page: no inline script or style runs, and no other host is asked."""

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True)
class PageFile:
    """What is answered to a GET of one file of the page."""

    body: bytes
    content_type: str


@cache
def page_files() -> dict[str, PageFile]:
    """The whole page by its addresses: ``/`` and ``/static/...``."""
    here = files(__package__)
    found = {"/": PageFile((here / "index.html").read_bytes(), _TYPES[".html"])}
    for entry in sorted((here / "static").iterdir(), key=lambda entry: entry.name):
        kind = _TYPES.get(PurePath(entry.name).suffix)
        if kind is not None:
            found[f"/static/{entry.name}"] = PageFile(entry.read_bytes(), kind)
    return found
