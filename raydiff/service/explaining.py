"""Why a score is what it is: boxes around anomalous regions in the original image, and pictures of the anomaly map.

All three pictures show what the original image shows, no padding, at the detector's resolution times a whole number:
laid over the upright original and stretched to it they fit.

The colours' scale is the artefact's, not the image's, so pictures can be compared: half-way up is the calibrated
``mask_threshold``, which few normal images reach; the ends are its own size away, so that for a positive threshold 0
is at the bottom and twice the threshold at the top.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raydiff.heatmap import blend, enlarge, layer
from raydiff.images import ImageSpec, placement
from raydiff.service.decoding import ReceivedImage

__all__ = ["MAX_BOXES", "Box", "HeatScale", "Pictures", "draw", "find_boxes"]

MAX_BOXES = 100
"""Boxes in one answer, the highest peaks first."""


@dataclass(frozen=True)
class HeatScale:
    """Values of the anomaly map at the bottom, the middle and the top of the colours."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, mask_threshold: float) -> HeatScale:
        """The scale of an artefact; a threshold of 0 has ends at -1 and 1."""
        reach = abs(mask_threshold) or 1.0
        return cls(mask_threshold - reach, mask_threshold, mask_threshold + reach)

    def level(self, values: NDArray[np.floating]) -> NDArray[np.float64]:
        """Where values lie on the scale, in [0, 1]."""
        share: NDArray[np.float64] = (values.astype(np.float64) - self.low) / (self.high - self.low)
        return share.clip(0.0, 1.0)


@dataclass(frozen=True)
class Box:
    """Pixels of the upright original: the left and upper edge, the sides; the map's ``peak``, the region's ``area``.

    A box is widened to whole pixels. ``area`` is in pixels of the original and need not be whole.
    """

    x: int
    y: int
    width: int
    height: int
    peak: float
    area: float


@dataclass(frozen=True)
class Pictures:
    """PNG files; None where the detector has no such thing.

    ``heat_map`` is the image in grey under the colours; ``heat_layer`` the colours alone, with opacity (RGBA).
    """

    heat_map: bytes | None = None
    heat_layer: bytes | None = None
    reconstruction: bytes | None = None


def find_boxes(
    anomaly_map: NDArray[np.floating], mask: NDArray[np.bool_], spec: ImageSpec, height: int, width: int
) -> tuple[list[Box], int]:
    """Connected regions of ``mask`` (H, W; corners touch), highest peak first, and how many there are.

    Args:
        anomaly_map: (H, W), raw.
        mask: where it counts as anomalous.
        spec: how the image was fitted to (H, W); what lies in the padding is left out.
        height: of the upright original.
        width: of the upright original.

    Returns:
        At most :data:`MAX_BOXES` boxes, and the number of regions.
    """
    from scipy import ndimage

    top, left, rows, columns = placement(spec, height, width)
    inside = mask[top : top + rows, left : left + columns]
    values = anomaly_map[top : top + rows, left : left + columns].astype(np.float64)
    labels, count = ndimage.label(inside, structure=np.ones((3, 3), bool))
    if not count:
        return [], 0
    numbers = np.arange(1, count + 1)
    peaks = np.asarray(ndimage.maximum(values, labels, numbers))
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    slices = ndimage.find_objects(labels)
    order = np.argsort(-peaks, kind="stable")[:MAX_BOXES]
    boxes = []
    for i in order:
        y, bottom = _stretched(slices[i][0], height, rows)
        x, right = _stretched(slices[i][1], width, columns)
        area = float(areas[i]) * (height / rows) * (width / columns)
        boxes.append(Box(x, y, right - x, bottom - y, float(peaks[i]), area))
    return boxes, count


def _stretched(part: slice, original: int, fitted: int) -> tuple[int, int]:
    """The least range of whole pixels of the original that covers ``part``."""
    return part.start * original // fitted, -(-part.stop * original // fitted)


def draw(
    received: ReceivedImage,
    anomaly_map: NDArray[np.floating] | None,
    scale: HeatScale | None,
    reconstruction: NDArray[np.uint8] | None,
) -> Pictures:
    """Heat map, layer and reconstruction as PNG files.

    Args:
        received: the image, at the detector's size.
        anomaly_map: (H, W), raw.
        scale: of the colours; without one there is no heat map.
        reconstruction: uint8 (H, W, C).
    """
    top, left, rows, columns = placement(received.spec, received.image.height, received.image.width)
    part = np.s_[top : top + rows, left : left + columns]
    rebuilt = None if reconstruction is None else _png(reconstruction[part])
    if anomaly_map is None or scale is None:
        return Pictures(reconstruction=rebuilt)
    level = scale.level(anomaly_map[part])
    return Pictures(_png(blend(received.image.pixels[part], level)), _png(layer(level)), rebuilt)


def _png(pixels: NDArray[np.uint8]) -> bytes:
    large = enlarge(pixels)
    buffer = io.BytesIO()
    Image.fromarray(large[:, :, 0] if large.shape[2] == 1 else large).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
