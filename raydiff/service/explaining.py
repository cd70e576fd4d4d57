"""Why a score is what it is: boxes around anomalous regions in the original image, and pictures of the anomaly map.

All three pictures show what the original image shows, no padding, at the detector's resolution times a whole number:
laid over the upright original and stretched to it they fit.

The colours' scale is the artefact's, not the image's, so pictures can be compared: half-way up is the calibrated
``mask_threshold``, which few normal images reach; the ends are its own size away, so that for a positive threshold 0
is at the bottom and twice the threshold at the top.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raydiff.heatmap import blend, enlarge, layer
from raydiff.images import decode
from raydiff.placement import Placement
from raydiff.service.decoding import ReceivedImage

__all__ = ["MAX_BOXES", "Box", "HeatScale", "Pictures", "draw", "find_boxes"]

MAX_BOXES = 100
"""Boxes in one answer, the highest peaks first."""

_LONGEST = 1024
"""Longest side in pixels of pictures of images whose parts were turned."""


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
    anomaly_map: NDArray[np.floating], mask: NDArray[np.bool_], placement: Placement
) -> tuple[list[Box], int]:
    """Connected regions of ``mask`` (H, W; corners touch), highest peak first, and how many there are.

    Args:
        anomaly_map: (H, W), raw.
        mask: where it counts as anomalous.
        placement: how the image was fitted to (H, W); what lies in the padding is left out.

    Returns:
        At most :data:`MAX_BOXES` boxes, and the number of regions.
    """
    from scipy import ndimage

    inside = placement.on_original(mask[placement.inside])
    values = anomaly_map[placement.inside].astype(np.float64)
    labels, count = ndimage.label(inside, structure=np.ones((3, 3), bool))
    if not count:
        return [], 0
    numbers = np.arange(1, count + 1)
    peaks = np.asarray(ndimage.maximum(values, labels, numbers))
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:] * placement.pixel_area
    slices = ndimage.find_objects(labels)
    boxes = []
    for i in np.argsort(-peaks, kind="stable")[:MAX_BOXES]:
        part = slices[i]
        place = placement.box(labels[part] == i + 1, part[0].start, part[1].start)
        if place is not None:
            boxes.append(Box(*place, float(peaks[i]), float(areas[i])))
    return boxes, count


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
    placement = received.image.placement
    level = None if anomaly_map is None or scale is None else scale.level(anomaly_map[placement.inside])
    if placement.pose is not None:
        return _draw_turned(received, level, reconstruction)
    rebuilt = None if reconstruction is None else _png(reconstruction[placement.inside])
    if level is None:
        return Pictures(reconstruction=rebuilt)
    return Pictures(_png(blend(received.image.pixels[placement.inside], level)), _png(layer(level)), rebuilt)


def _draw_turned(
    received: ReceivedImage, level: NDArray[np.float64] | None, reconstruction: NDArray[np.uint8] | None
) -> Pictures:
    """Of an image whose part was turned: turned back, on the whole original; beyond the canvas there is no colour."""
    placement, spec = received.image.placement, received.spec
    scale = min(placement.scale, _LONGEST / max(placement.height, placement.width))
    size = (max(1, round(placement.height * scale)), max(1, round(placement.width * scale)))
    original = decode(received.data, replace(spec, image_size=size, resize="stretch", aligned_width=None), "image")
    heat_map = heat_layer = rebuilt = None
    if level is not None:
        turned = placement.back(level[..., None], size)[..., 0]
        heat_map, heat_layer = _png(blend(original, turned)), _png(layer(turned))
    if reconstruction is not None:
        turned = placement.back(reconstruction.astype(np.float64), size)
        joined = np.where(turned[..., -1:] > 0, turned[..., :-1], original)
        rebuilt = _png(np.round(joined).clip(0, 255).astype(np.uint8))
    return Pictures(heat_map, heat_layer, rebuilt)


def _png(pixels: NDArray[np.uint8]) -> bytes:
    large = enlarge(pixels)
    buffer = io.BytesIO()
    Image.fromarray(large[:, :, 0] if large.shape[2] == 1 else large).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
