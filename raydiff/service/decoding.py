"""From the bytes of one image, from anybody, to the detector's input: the same pixels as ``raydiff score`` sees.

A format is known by its content. Bytes are counted before anything is looked at, and pixels, frames and directories
(:mod:`raydiff.service.headers`) before anything is decoded. How each kind of image is taken:

=======================  ============================================================================
EXIF orientation         the image is turned upright; all coordinates are those of the upright image
16 bits                  scaled to 8 over the full range (colour PNG: the high byte)
palette, 1 bit           resolved to colour or grey
CMYK, YCCK               converted to RGB as Pillow does, without a colour profile
alpha                    taken where every pixel is opaque; refused otherwise (``transparent-image``)
animated, multi-page     refused (``several-frames``): which frame is meant cannot be known
32 bits                  refused (``unknown-range``)
truncated                refused (``damaged-image``) wherever it was cut; of a BMP the padding may be missing
garbled                  refused (``damaged-image``); a garbled JPEG may still decode, it has no checksums
=======================  ============================================================================

How it then gets the detector's size and channels is the artefact's ``data`` section (:func:`raydiff.images.decode`).
"""

from __future__ import annotations

import hashlib
import time
import warnings
from dataclasses import dataclass, replace

from raydiff.images import DecodedImage, ImageError, ImageSpec, Reason, decode_file
from raydiff.service.headers import check_header
from raydiff.service.problems import ProblemError, ProblemType

__all__ = ["Limits", "ReceivedImage", "quiet_decoders", "receive"]


@dataclass(frozen=True)
class Limits:
    """What an image may cost: bytes as sent, and pixels (the artefact's ``data.max_pixels`` where that is less)."""

    max_bytes: int = 32_000_000
    max_pixels: int = 64_000_000

    def pixels(self, spec: ImageSpec) -> int:
        """The pixels that are decoded for a detector at most."""
        return min(self.max_pixels, spec.max_pixels)


@dataclass(frozen=True, eq=False)
class ReceivedImage:
    """An image that was decoded for a detector; ``data`` is kept for a detector that works at another size.

    ``digest`` is the SHA-256 of ``data`` (hex); ``image.size`` is the upright original's;
    ``decode_ms`` is how long checking and decoding took.
    """

    data: bytes
    digest: str
    spec: ImageSpec
    image: DecodedImage
    decode_ms: float


_ANSWERS: dict[Reason, tuple[ProblemType, str]] = {
    "empty": ("empty-body", "The body is empty; send the bytes of one image."),
    "format": ("unsupported-format", "The body is not a PNG, JPEG, WebP, BMP or TIFF image; send one of these."),
    "frames": ("several-frames", "The file is an animation or has pages; send the one frame that is meant."),
    "depth": ("unknown-range", "The image has 32-bit pixels, whose range is not known; send 8 or 16 bits."),
    "transparent": (
        "transparent-image",
        "The image has transparent pixels; flatten it onto the background that is meant.",
    ),
    "damaged": ("damaged-image", "The image is truncated or damaged; send the whole file, or save it anew."),
}


def quiet_decoders() -> None:
    """Print no warnings of Pillow's from now on, in the whole process.

    What it warns of (odd EXIF entries) does not change pixels, its text is the sender's to choose, and Python remembers
    each text for ever: memory that a sender could fill.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")


def receive(data: bytes, spec: ImageSpec, limits: Limits | None = None) -> ReceivedImage:
    """Check and decode one image.

    Args:
        data: the file's bytes.
        spec: of the detector that will score it (``detector.image_spec``).
        limits: what the image may cost; :class:`Limits` by default.

    Raises:
        ProblemError: it is refused; see :mod:`raydiff.service.problems`.
    """
    started = time.perf_counter()
    limits = limits or Limits()
    if len(data) > limits.max_bytes:
        raise ProblemError(
            "body-too-large",
            f"The image has {len(data)} bytes and at most {limits.max_bytes} are taken; send a smaller one.",
        )
    max_pixels = limits.pixels(spec)
    header = check_header(data)
    if header is not None and header[0] * header[1] > max_pixels:
        raise _too_many(header, max_pixels)
    try:
        image = decode_file(data, replace(spec, max_pixels=max_pixels), "image")
    except ImageError as error:
        raise _answer(error, spec, max_pixels) from error
    digest = hashlib.sha256(data).hexdigest()
    return ReceivedImage(data, digest, spec, image, 1000 * (time.perf_counter() - started))


def _answer(error: ImageError, spec: ImageSpec, max_pixels: int) -> ProblemError:
    if error.reason == "pixels":
        return _too_many(None, max_pixels)
    if error.reason == "size":
        height, width = spec.image_size
        colours = "grey" if spec.channels == 1 else "RGB"
        return ProblemError(
            "wrong-size", f"This detector takes {colours} images of {width} x {height} pixels only; send such an image."
        )
    return ProblemError(*_ANSWERS[error.reason])


def _too_many(size: tuple[int, int] | None, max_pixels: int) -> ProblemError:
    found = "The image has" if size is None else f"The image is {size[1]} x {size[0]}, which is"
    return ProblemError("too-many-pixels", f"{found} more than {max_pixels} pixels; send a smaller one.")
