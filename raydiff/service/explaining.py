"""Why a score is what it is: boxes around anomalous regions in the original image, and pictures of the anomaly map.

The pictures are those of :func:`raydiff.heatmap.drawn`.

The colours' scale is the artefact's, not the image's, so pictures can be compared: half-way up is the calibrated
``mask_threshold``, which few normal images reach; the ends are its own size away, so that for a positive threshold 0
is at the bottom and twice the threshold at the top.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raydiff.heatmap import Pictures, drawn
from raydiff.placement import Placement
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
    level = None if anomaly_map is None or scale is None else scale.level(anomaly_map)
    return drawn(received.data, received.spec, received.image, level, reconstruction)
