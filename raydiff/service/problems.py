"""What is told to whoever sent a request that cannot be answered: problem details (RFC 9457), as an exception.

``type`` is a short word that programs can rely on (a relative URI reference), ``title`` says the same to people,
``detail`` says what is wrong with this request and what to do. None of them holds a path or a traceback.

=====================  ======  =======================================================================
type                   status  when
=====================  ======  =======================================================================
empty-body             400     there are no bytes
body-too-large         413     more bytes than the service takes
unsupported-format     415     no PNG, JPEG, WebP, BMP or TIFF, by content
too-many-pixels        413     more pixels than the service decodes; found before decoding
several-frames         422     an animation, or pages
unknown-range          422     32-bit pixels
transparent-image      422     pixels that are not opaque
wrong-size             422     the detector is strict about the size and channels
damaged-image          422     truncated, garbled, or built to cost more than an image does
score-not-finite       500     the detector gave no number for this image
invalid-target-rate    422     a rate that is no number between 0 and 1
no-previous-artifact   409     nothing to roll back to
=====================  ======  =======================================================================
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from raydiff.errors import RaydiffError

__all__ = ["PROBLEM_TYPES", "ProblemError", "ProblemType"]

ProblemType = Literal[
    "empty-body", "body-too-large", "unsupported-format", "too-many-pixels", "several-frames", "unknown-range",
    "transparent-image", "wrong-size", "damaged-image", "score-not-finite", "invalid-target-rate",
    "no-previous-artifact",
]  # fmt: skip
PROBLEM_TYPES: tuple[ProblemType, ...] = get_args(ProblemType)
"""All there are, so that counters know their labels beforehand."""

_KINDS: dict[ProblemType, tuple[int, str]] = {
    "empty-body": (400, "There is no image"),
    "body-too-large": (413, "The image has too many bytes"),
    "unsupported-format": (415, "This is not an image of a known format"),
    "too-many-pixels": (413, "The image has too many pixels"),
    "several-frames": (422, "The file holds more than one image"),
    "unknown-range": (422, "The range of the pixel values is not known"),
    "transparent-image": (422, "The image has transparent pixels"),
    "wrong-size": (422, "The image has another size than the detector takes"),
    "damaged-image": (422, "The image cannot be decoded"),
    "score-not-finite": (500, "The image has no score"),
    "invalid-target-rate": (422, "The target rate cannot be used"),
    "no-previous-artifact": (409, "There is no artefact to go back to"),
}


class ProblemError(RaydiffError):
    """A request that cannot be answered; :meth:`to_dict` is the body of an ``application/problem+json`` answer."""

    def __init__(self, type: ProblemType, detail: str) -> None:  # noqa: A002
        super().__init__(detail)
        self.type: ProblemType = type
        self.status, self.title = _KINDS[type]
        self.detail = detail

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.type, self.detail)

    def to_dict(self) -> dict[str, Any]:
        """``type``, ``title``, ``status`` and ``detail``."""
        return {"type": self.type, "title": self.title, "status": self.status, "detail": self.detail}
