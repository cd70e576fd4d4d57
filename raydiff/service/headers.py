"""What the head of an image file says, read without a decoder: its size, and whether decoding is worth a try.

A decoder reads more than pixels: directories of TIFF and EXIF entries, each of which may claim the same megabytes
again; chains of pages; scans of a JPEG, each over the whole image. A few kB can so ask for GB or minutes. What is
refused here no camera writes. Layouts: PNG (ISO/IEC 15948), JPEG (ITU-T T.81), TIFF 6.0 (which EXIF follows),
WebP container (RFC 9649).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from raydiff.service.problems import ProblemError

__all__ = ["MAX_CHUNKS", "MAX_JPEG_SCANS", "MAX_METADATA_BYTES", "check_header"]

MAX_CHUNKS = 20_000
"""Chunks of a PNG or WebP, segments of a JPEG: what 32 MB of pixels in pieces of 2 kB come to."""

MAX_JPEG_SCANS = 64
"""A progressive JPEG has about ten; each costs as much as decoding the whole image once."""

MAX_METADATA_BYTES = 16_000_000
"""What the entries of all directories of one file may claim together, pixels' offsets and profiles included."""

_TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}


def check_header(data: bytes) -> tuple[int, int] | None:
    """(height, width) as the head of the file says, or None where it does not say; the decoder has the last word.

    Raises:
        ProblemError: the file would cost more than an image does, or holds several pages.
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png(data)
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        _webp(data)
    elif data[:4] in (b"II*\x00", b"MM\x00*"):
        return _tiff(data)
    return None


def _png(data: bytes) -> tuple[int, int] | None:
    for kind, start, end in _chunks(data, 8, ">I4s"):
        if kind == b"eXIf":
            _directories(data[start:end])
    if len(data) < 24 or data[12:16] != b"IHDR":
        return None
    width, height = struct.unpack_from(">II", data, 16)
    return height, width


def _jpeg(data: bytes) -> tuple[int, int] | None:
    if data.count(b"\xff\xda") > MAX_JPEG_SCANS:
        raise _costly(f"has more than {MAX_JPEG_SCANS} scans")
    position, seen = 2, 0
    while position + 4 <= len(data) and data[position] == 0xFF:
        seen += 1
        if seen > MAX_CHUNKS:
            raise _costly(f"has more than {MAX_CHUNKS} segments")
        marker = data[position + 1]
        if marker == 0xFF:  # fill
            position += 1
            continue
        length = struct.unpack_from(">H", data, position + 2)[0]
        body = data[position + 4 : position + 2 + length]
        if marker == 0xE1 and body.startswith(b"Exif\x00\x00"):
            _directories(body[6:])
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and len(body) >= 5:
            height, width = struct.unpack_from(">HH", body, 1)
            return height, width
        elif marker == 0xDA:
            return None
        position += 2 + length
    return None


def _webp(data: bytes) -> None:
    for kind, start, end in _chunks(data, 12, "<4sI"):
        if kind == b"EXIF":
            _directories(data[start:end].removeprefix(b"Exif\x00\x00"))


def _chunks(data: bytes, position: int, layout: str) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of the content of every chunk of a PNG (">I4s") or WebP ("<4sI")."""
    png = layout == ">I4s"
    for _ in range(MAX_CHUNKS):
        if position + 8 > len(data):
            return
        first, second = struct.unpack_from(layout, data, position)
        kind, length = (second, first) if png else (first, second)
        yield kind, position + 8, position + 8 + length
        position += 8 + length + (4 if png else length % 2)
    raise _costly(f"has more than {MAX_CHUNKS} chunks")


def _tiff(data: bytes) -> tuple[int, int] | None:
    values, following = _directories(data)
    if following:
        raise ProblemError("several-frames", "The file is an animation or has pages; send the one frame that is meant.")
    width, height = values.get(256), values.get(257)
    return None if width is None or height is None else (height, width)


def _directories(data: bytes) -> tuple[dict[int, int], int]:
    """The single numbers in the first directory, and where the next directory is (0: nowhere)."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None or len(data) < 8:
        return {}, 0
    start = struct.unpack_from(order + "I", data, 4)[0]
    if start + 2 > len(data):
        return {}, 0
    count = struct.unpack_from(order + "H", data, start)[0]
    values: dict[int, int] = {}
    claimed = 0
    for position in range(start + 2, min(start + 2 + 12 * count, len(data) - 11), 12):
        tag, kind, number = struct.unpack_from(order + "HHI", data, position)
        claimed += min(number * _TIFF_SIZES.get(kind, 0), len(data))
        if claimed > MAX_METADATA_BYTES:
            raise _costly(f"has entries of more than {MAX_METADATA_BYTES} bytes beside its pixels")
        if number == 1 and kind in (3, 4):
            values[tag] = struct.unpack_from(order + ("H" if kind == 3 else "I"), data, position + 8)[0]
    end = start + 2 + 12 * count
    return values, struct.unpack_from(order + "I", data, end)[0] if end + 4 <= len(data) else 0


def _costly(what: str) -> ProblemError:
    return ProblemError("damaged-image", f"The image {what}; save it anew without what is not pixels.")
