"""From the bytes of an image file to pixels, the same way everywhere: shards, scoring of loose files, the endpoint.

One image is uint8 (H, W, C), row 0 at the top, C = 1 (grey) or 3 (RGB). A file is recognised by its content, not its
name; nothing is decoded before its size in pixels has been checked. What could be read in two ways is refused instead
of guessed: transparent pixels, several frames, 32-bit values.

A truncated file is an error wherever it was cut: of a PNG every chunk up to the last must be there, with its checksum,
also where the decoder would have had all pixels before the cut (what says how to turn them may come after). A JPEG has
no checksums: one whose middle was altered still decodes to an image, and only the checksums of a shard would tell.
"""

from __future__ import annotations

import io
import math
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import (
    BmpImagePlugin,
    ExifTags,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from torch import Tensor

from raydiff.errors import DataError, ShapeError
from raydiff.placement import ImageSpec, Placement, place

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from raydiff.config import ExperimentConfig

__all__ = [
    "SUFFIXES",
    "DecodedImage",
    "ImageError",
    "ImageSpec",
    "decode",
    "decode_file",
    "decode_mask",
    "encode_png",
    "find_images",
    "fitted",
    "images_in",
    "images_per_batch",
    "shrunk",
    "to_tensor",
    "to_uint8",
]

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Names of files that :func:`find_images` and the folder data set take for images (in any case)."""

_BATCH_VALUES = 2**24
"""Numbers in a batch of images, at most: 64 MB as float32, 85 colour images of 256 px or 5 of 1,024."""

_SIGNATURES: tuple[tuple[bytes, type[ImageFile.ImageFile]], ...] = (
    (b"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    (b"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
    (b"BM", BmpImagePlugin.BmpImageFile),
    (b"II*\x00", TiffImagePlugin.TiffImageFile),
    (b"MM\x00*", TiffImagePlugin.TiffImageFile),
)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_REMEDY = "replace the file, or leave it out with --skip-bad or data.on_bad_image: skip"

Reason = Literal["empty", "format", "pixels", "frames", "depth", "transparent", "size", "damaged"]


class ImageError(DataError):
    """An image that is not decoded, and in one word why, for those who answer in other words (the endpoint)."""

    def __init__(self, message: str, reason: Reason = "damaged") -> None:
        super().__init__(message)  # all of args, so that Ray can take it from a worker to the driver
        self.reason: Reason = reason


@dataclass(frozen=True)
class DecodedImage:
    """``pixels`` uint8 (H, W, C) at the spec's size, and where the file's lie on them; ``channels`` are the file's."""

    pixels: NDArray[np.uint8]
    format: str
    placement: Placement
    channels: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the file's image, upright."""
        return self.placement.height, self.placement.width


def decode(data: bytes, spec: ImageSpec, name: str) -> NDArray[np.uint8]:
    """The pixels of an image file, (H, W, C), read-only.

    Turned upright by its EXIF orientation; 16 bits scaled to 8 over the full range (colour PNG: the high byte);
    palettes resolved; grey from colour by ITU-R 601 luma; resized with antialiased bicubic filtering.

    Args:
        data: the file, one of PNG, JPEG, WebP, BMP, TIFF.
        spec: the size and channels wanted.
        name: what error messages call the image.

    Raises:
        ImageError: not an image, truncated, garbled, too many pixels, not opaque, several frames, or, with
            ``resize="strict"``, another size or channel count.
    """
    return decode_file(data, spec, name).pixels


def decode_file(data: bytes, spec: ImageSpec, name: str) -> DecodedImage:
    """:func:`decode`, with what the file was like before it was fitted to the spec."""
    image, kind = _load(data, spec, name)
    channels = 1 if image.mode == "L" else 3
    pixels, placement = _fitted(image, spec, name)
    return DecodedImage(pixels, kind, placement, channels)


def fitted(image: Image.Image, spec: ImageSpec, name: str) -> NDArray[np.uint8]:
    """Pixels (H, W, C) at the spec's size of an upright image in mode L or RGB, from a file or not (a video's frame).

    Raises:
        ImageError: too many pixels, or, with ``resize="strict"``, another size or channel count.
    """
    return _fitted(image, spec, name)[0]


def decode_mask(data: bytes, spec: ImageSpec, name: str, *, image: DecodedImage | None = None) -> NDArray[np.bool_]:
    """A ground-truth mask, (H, W): True above one half; fitted like its image, but by nearest neighbour.

    Args:
        data: the mask's file.
        spec: the spec of the images; padding is False.
        name: what error messages call the mask.
        image: what the mask is of, which must be as large, and by which it is placed; needed where parts are aligned.

    Raises:
        DataError: as :func:`decode`; another size than its image; or nothing in it exceeds one half although it is not
            all zero (written as 0 and 1, say).
    """
    mask, _ = _load(data, spec, name)
    size = (mask.height, mask.width)
    if image is not None and size != image.size:
        raise DataError(
            f"{name}: the mask is {size[0]} x {size[1]} and its image {image.size[0]} x {image.size[1]}; "
            f"make them the same size"
        )
    if image is None and spec.aligned_width is not None:
        raise DataError(f"{name}: a mask is turned as its image is, and there is none; give the image too")
    if spec.resize == "strict" and size != spec.image_size:
        raise DataError(
            f"{name}: is {size[0]} x {size[1]}; data.resize: strict expects {spec.image_size[0]} x "
            f"{spec.image_size[1]}; set data.resize to stretch or pad"
        )
    grey = mask.convert("L")
    brightest = int(np.asarray(grey).max())
    if 0 < brightest < 128:
        raise DataError(f"{name}: the brightest mask value is {brightest} of 255; write masks as 0 and 255")
    placement = place(spec, grey) if image is None else image.placement
    return placement.fitted(grey, spec.image_size, mask=True) > 127


def encode_png(pixels: NDArray[np.uint8] | NDArray[np.bool_]) -> bytes:
    """A PNG file of (H, W), (H, W, 1) or (H, W, 3) uint8 pixels, or of an (H, W) bool mask (0 and 255).

    Raises:
        ShapeError: another shape or dtype.
    """
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8) * np.uint8(255)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)):
        raise ShapeError(f"pixels are {pixels.dtype} {pixels.shape}; a PNG needs uint8 (H, W), (H, W, 1) or (H, W, 3)")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def shrunk(pixels: NDArray[Any], longest: int = 512) -> NDArray[Any]:
    """(H, W) or (H, W, C), uint8 or bool, with sides of ``longest`` at most, for a picture that is only looked at.

    Blocks of pixels become their mean, or, of a mask, True where any of them is.
    """
    factor = -(-max(pixels.shape[:2]) // longest)
    if factor <= 1:
        return pixels
    height, width = (-(-side // factor) for side in pixels.shape[:2])
    margins = [(0, height * factor - pixels.shape[0]), (0, width * factor - pixels.shape[1])]
    filled = np.pad(pixels, [*margins, (0, 0)][: pixels.ndim], mode="edge")
    blocks = filled.reshape(height, factor, width, factor, *pixels.shape[2:])
    if pixels.dtype == np.bool_:
        return np.asarray(blocks.any((1, 3)))
    return np.asarray(np.round(blocks.mean((1, 3), dtype=np.float32)).astype(pixels.dtype))


def images_per_batch(config: ExperimentConfig) -> int:
    """Images that are read and scored together: ``execution.scoring_batch_size``, fewer where they are large."""
    values = math.prod(config.data.image_size) * config.data.channels
    return max(1, min(config.execution.scoring_batch_size, _BATCH_VALUES // values))


def to_tensor(images: NDArray[np.uint8]) -> Tensor:
    """uint8 (B, H, W, C) to float32 (B, C, H, W) in [-1, 1]."""
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ShapeError(f"images are {images.dtype} {images.shape}; expected uint8 (B, H, W, C)")
    moved = torch.from_numpy(
        np.array(images.transpose(0, 3, 1, 2), order="C")
    )  # (B, C, H, W), a copy: shards are read-only
    return moved.float().div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """(B, C, H, W) in [-1, 1] back to uint8 (B, H, W, C); values outside are clipped."""
    scaled = images.detach().float().add(1.0).mul(127.5).round().clamp(0, 255)
    array: NDArray[np.uint8] = scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return array


def find_images(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Image files among files and folders (searched recursively, hidden ones left out), sorted, each once.

    A file given by name is taken whatever it is called; in folders the suffix decides.

    Raises:
        DataError: a path does not exist, or there is no image in any.
    """
    given = [Path(path) for path in paths]
    found: set[Path] = set()
    for path in given:
        if path.is_file():
            found.add(path)
        elif path.is_dir():
            found.update(images_in(path))
        else:
            raise DataError(f"{path}: no such file or folder; give image files, or folders that hold some")
    if not found:
        where = ", ".join(str(path) for path in given) or "(no path given)"
        raise DataError(f"{where}: no image found; expected files ending in {', '.join(SUFFIXES)}")
    return sorted(found)


def images_in(folder: Path) -> list[Path]:
    """Image files at any depth, sorted by their path below ``folder``; hidden files and folders are left out."""
    found = [
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    ]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _load(data: bytes, spec: ImageSpec, name: str) -> tuple[Image.Image, str]:
    """The decoded, upright image in mode L or RGB, and its format's name in lower case."""
    plugin = _plugin(data)
    if plugin is None:
        what = "is not a PNG, JPEG, WebP, BMP or TIFF image" if data else "is an empty file"
        raise ImageError(f"{name}: {what}; {_REMEDY}", "format" if data else "empty")
    try:
        with plugin(io.BytesIO(data)) as image:
            _check_size(image, spec, name)
            if plugin is PngImagePlugin.PngImageFile and not _is_whole_png(data):
                raise ImageError(
                    f"{name}: cannot be decoded (the PNG is truncated or was altered); {_REMEDY}", "damaged"
                )
            image.load()
            orientation = image.getexif().get(ExifTags.Base.Orientation)
            plain = _eight_bit(image, name)
            kind = str(plugin.format).lower()
    except (DataError, MemoryError):  # the latter says nothing of the file
        raise
    except Exception as error:  # Pillow's parsers raise whatever a garbled file makes them trip over
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name}: cannot be decoded ({reason}); {_REMEDY}", "damaged") from error
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return (plain if turn is None else plain.transpose(turn)), kind


def _plugin(data: bytes) -> type[ImageFile.ImageFile] | None:
    """The reader for this content; called directly, since ``Image.open`` brings a global pixel limit of its own."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return WebPImagePlugin.WebPImageFile
    return next((plugin for signature, plugin in _SIGNATURES if data.startswith(signature)), None)


def _check_size(image: Image.Image, spec: ImageSpec, name: str) -> None:
    pixels = image.width * image.height
    if pixels > spec.max_pixels:
        raise ImageError(
            f"{name}: has {image.height} x {image.width} = {pixels} pixels, more than data.max_pixels "
            f"({spec.max_pixels}); raise data.max_pixels if the file is to be trusted",
            "pixels",
        )
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        raise ImageError(f"{name}: holds {frames} frames; save the one that is meant as a file of its own", "frames")


def _is_whole_png(data: bytes) -> bool:
    """Whether every chunk up to IEND is there and has its checksum (ISO/IEC 15948, 5.3); Pillow stops at the pixels."""
    position, view = 8, memoryview(data)
    while position + 12 <= len(data):
        end = position + 8 + int.from_bytes(view[position : position + 4], "big")
        if zlib.crc32(view[position + 4 : end]) != int.from_bytes(view[end : end + 4], "big") or end + 4 > len(data):
            return False
        if data[position + 4 : position + 8] == b"IEND":
            return True
        position = end + 4
    return False


def _eight_bit(image: Image.Image, name: str) -> Image.Image:
    """Mode L or RGB from any mode whose meaning is plain."""
    if image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ImageError(f"{name}: has 32-bit pixels, whose range is not known; convert it to 8 or 16 bits", "depth")
    grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        colour = image.convert("RGBA")
        if colour.getchannel("A").getextrema() != (255, 255):
            raise ImageError(
                f"{name}: has transparent pixels; flatten it onto the background that is meant", "transparent"
            )
        return colour.getchannel("R") if grey else colour.convert("RGB")
    return _in_mode(image, "L" if grey else "RGB")


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)


def _fitted(image: Image.Image, spec: ImageSpec, name: str) -> tuple[NDArray[np.uint8], Placement]:
    """:func:`fitted`, and how."""
    _check_size(image, spec, name)
    channels = 1 if image.mode == "L" else 3
    if spec.resize == "strict" and ((image.height, image.width) != spec.image_size or channels != spec.channels):
        raise ImageError(
            f"{name}: is {image.height} x {image.width} with {channels} channel(s); data.resize: strict expects "
            f"{spec.image_size[0]} x {spec.image_size[1]} with {spec.channels}; set data.resize to stretch or pad, or "
            f"data.image_size and data.channels to what the images have",
            "size",
        )
    plain = _in_mode(image, "L" if spec.channels == 1 else "RGB")
    placement = place(spec, plain)
    return placement.fitted(plain, spec.image_size).reshape(*spec.image_size, spec.channels), placement
