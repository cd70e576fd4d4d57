"""Heat maps a person can read: an anomaly map laid over its image, or over the photo that it was made from.

The picture depends on the image and the artefact alone, so two heat maps can be compared: colour begins at the map's
median and is half-way up its scale at the calibrated ``mask_threshold``, which few normal images reach.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raydiff.errors import ShapeError
from raydiff.images import DecodedImage, ImageSpec, decode
from raydiff.placement import Placement

__all__ = ["Pictures", "blend", "drawn", "enlarge", "heat", "layer", "overlay"]

_LONGEST = 1024
"""Longest side in pixels of pictures of images whose parts were turned."""

_STOPS = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
_COLOURS = np.array(  # inferno without its black end: ordered by lightness, so it also reads without colour
    [[66, 10, 104], [147, 38, 103], [221, 81, 58], [252, 165, 10], [252, 255, 164]]
)
_OPACITY = np.array([0.0, 0.35, 0.7, 0.8, 0.9])


@dataclass(frozen=True)
class Pictures:
    """PNG files; None where the detector has no such thing.

    ``heat_map`` is the image in grey under the colours; ``heat_layer`` the colours alone, with opacity (RGBA).
    """

    heat_map: bytes | None = None
    heat_layer: bytes | None = None
    reconstruction: bytes | None = None


def drawn(
    data: bytes,
    spec: ImageSpec,
    image: DecodedImage,
    level: NDArray[np.float64] | None,
    reconstruction: NDArray[np.uint8] | None,
) -> Pictures:
    """Heat map, layer and reconstruction of what the file shows: no padding, and what was turned is turned back.

    They have the detector's resolution times a whole number, or, where the part was turned, the file's, at most 1,024
    pixels: laid over the upright original and stretched to it they fit.

    Args:
        data: the file.
        spec: by which it was decoded.
        image: what came of that.
        level: (H, W) in [0, 1], of the detector's pixels; without one there is no heat map.
        reconstruction: uint8 (H, W, C).
    """
    inside = image.placement.inside
    level = None if level is None else level[inside]
    if image.placement.pose is not None:
        placement = image.placement
        scale = min(placement.scale, _LONGEST / max(placement.height, placement.width))
        size = (max(1, round(placement.height * scale)), max(1, round(placement.width * scale)))
        photo = decode(data, replace(spec, image_size=size, resize="stretch", aligned_width=None), "image")
        return _turned_back(photo, placement, level, reconstruction)
    rebuilt = None if reconstruction is None else _png(reconstruction[inside])
    if level is None:
        return Pictures(reconstruction=rebuilt)
    return Pictures(_png(blend(image.pixels[inside], level)), _png(layer(level)), rebuilt)


def _turned_back(
    photo: NDArray[np.uint8], placement: Placement, level: NDArray[np.float64] | None,
    reconstruction: NDArray[np.uint8] | None,
) -> Pictures:  # fmt: skip
    """On the whole photo; beyond the canvas there is no colour."""
    size = (photo.shape[0], photo.shape[1])
    heat_map = heat_layer = rebuilt = None
    if level is not None:
        turned = placement.back(level[..., None], size)[..., 0]
        heat_map, heat_layer = _png(blend(photo, turned)), _png(layer(turned))
    if reconstruction is not None:
        turned = placement.back(reconstruction.astype(np.float64), size)
        joined = np.where(turned[..., -1:] > 0, turned[..., :-1], photo)
        rebuilt = _png(np.round(joined).clip(0, 255).astype(np.uint8))
    return Pictures(heat_map, heat_layer, rebuilt)


def _png(pixels: NDArray[np.uint8]) -> bytes:
    large = enlarge(pixels)
    buffer = io.BytesIO()
    Image.fromarray(large[:, :, 0] if large.shape[2] == 1 else large).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def heat(anomaly_map: NDArray[np.floating], mask_threshold: float | None) -> NDArray[np.float64]:
    """How far each pixel (H, W) stands out, in [0, 1]: 0 at the map's median, 0.5 at ``mask_threshold``.

    Without a threshold, or with one below the median, 1 is the map's own maximum.
    """
    values = anomaly_map.astype(np.float64)
    low = float(np.median(values))
    high = float(values.max()) if mask_threshold is None or mask_threshold <= low else 2 * mask_threshold - low
    return np.clip((values - low) / (high - low), 0.0, 1.0) if high > low else np.zeros_like(values)


def overlay(
    pixels: NDArray[np.uint8], anomaly_map: NDArray[np.floating], mask_threshold: float | None
) -> NDArray[np.uint8]:
    """The image in grey with the heat map over it, uint8 (H, W, 3).

    Args:
        pixels: (H, W, C), C = 1 or 3.
        anomaly_map: (H, W), raw.
        mask_threshold: as in :class:`raydiff.core.calibration.Calibration`.

    Raises:
        ShapeError: the two do not cover the same pixels.
    """
    if pixels.ndim != 3 or pixels.shape[:2] != anomaly_map.shape:
        raise ShapeError(f"image is {pixels.shape} and map {anomaly_map.shape}; expected (H, W, C) and (H, W)")
    return blend(pixels, heat(anomaly_map, mask_threshold))


def blend(pixels: NDArray[np.uint8], level: NDArray[np.float64]) -> NDArray[np.uint8]:
    """The image (H, W, C) in grey with the colours of ``level`` (H, W), in [0, 1], over it: uint8 (H, W, 3)."""
    colour, opacity = _colours(level)
    grey = pixels.astype(np.float64).mean(axis=-1, keepdims=True)
    blended: NDArray[np.uint8] = np.round(opacity * colour + (1 - opacity) * grey).astype(np.uint8)
    return blended


def layer(level: NDArray[np.float64]) -> NDArray[np.uint8]:
    """The colours of ``level`` (H, W), in [0, 1], with their opacity, to lay over an image: uint8 RGBA (H, W, 4)."""
    colour, opacity = _colours(level)
    rounded: NDArray[np.uint8] = np.round(np.concatenate([colour, 255 * opacity], axis=-1)).astype(np.uint8)
    return rounded


def _colours(level: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Colours (H, W, 3) in [0, 255] and opacity (H, W, 1)."""
    colour = np.stack([np.interp(level, _STOPS, channel) for channel in _COLOURS.T], axis=-1)
    return colour, np.interp(level, _STOPS, _OPACITY)[..., None]


def enlarge(pixels: NDArray[np.uint8], at_least: int = 128) -> NDArray[np.uint8]:
    """(H, W, C) repeated a whole number of times until the longer side has ``at_least`` pixels."""
    factor = -(-at_least // max(pixels.shape[:2]))
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)
