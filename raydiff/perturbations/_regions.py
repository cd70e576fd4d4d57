"""Where a synthetic defect lies: soft rotated spots, and thresholded Perlin noise."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["AREAS", "perlin_region", "soft_spot"]

Floats = NDArray[np.float64]

AREAS = ((0.005, 0.03), (0.01, 0.07), (0.02, 0.15), (0.04, 0.2), (0.08, 0.3))
"""Share of the image that a defect covers, drawn evenly from the range of its severity, 1 to 5.

Severity 3 is the range of CutPaste's patches (Li et al. 2021).
"""

_EDGE = 0.25  # share of a spot's radius over which it fades out


def soft_spot(size: tuple[int, int], share: float, rng: np.random.Generator) -> Floats:
    """Opacity (H, W) of a rotated ellipse or rectangle of about ``share`` of the image, fading out at its edge.

    Its centre is a pixel of the image, and opaque; what lies outside is cut off.
    """
    height, width = size
    centre = rng.integers(height), rng.integers(width)
    aspect, angle = np.exp(rng.uniform(-np.log(3), np.log(3))), rng.uniform(0, np.pi)
    rectangle = rng.random() < 0.5
    area = share * height * width
    radius = np.sqrt(area / (4 if rectangle else np.pi))
    y, x = np.mgrid[:height, :width].astype(np.float64)
    y, x = y - centre[0], x - centre[1]
    u = (x * np.cos(angle) + y * np.sin(angle)) / (radius * np.sqrt(aspect))
    v = (y * np.cos(angle) - x * np.sin(angle)) / (radius / np.sqrt(aspect))
    distance = np.maximum(np.abs(u), np.abs(v)) if rectangle else np.hypot(u, v)  # 1 at the edge
    return np.asarray(np.clip((1 - distance) / _EDGE, 0, 1))


def perlin_region(size: tuple[int, int], share: float, rng: np.random.Generator) -> Floats:
    """1.0 where Perlin noise is among its highest ``share``, else 0.0; (H, W), at least one pixel.

    As in DRAEM (Zavrtanik et al. 2021, arXiv:2108.07610): 1 to 32 cells along each side, drawn apart, and at least 4
    pixels each; turned by up to a quarter. DRAEM cuts at a fixed height of the noise instead.
    """
    cells = [2 ** int(rng.integers(0, max(1, min(6, int(np.log2(max(side / 4, 1))) + 1)))) for side in size]
    noise = _perlin(size, (cells[0], cells[1]), rng)
    noise = ndimage.rotate(noise, rng.uniform(-90, 90), reshape=False, order=1, mode="reflect")
    count = max(1, round(share * noise.size))
    return np.asarray(noise >= np.sort(noise, axis=None)[-count], dtype=np.float64)


def _perlin(size: tuple[int, int], cells: tuple[int, int], rng: np.random.Generator) -> Floats:
    """Perlin's gradient noise (2002, doi:10.1145/566570.566636), (H, W), with (rows, columns) of cells."""
    angle = rng.uniform(0, 2 * np.pi, (cells[0] + 1, cells[1] + 1))
    y, x = (np.arange(side) * (count / side) for side, count in zip(size, cells, strict=True))
    row, column = y.astype(int)[:, None], x.astype(int)[None, :]
    fy, fx = (y % 1)[:, None], (x % 1)[None, :]

    def corner(dy: int, dx: int) -> Floats:
        turn = angle[row + dy, column + dx]
        return np.asarray(np.cos(turn) * (fx - dx) + np.sin(turn) * (fy - dy))

    wy, wx = (f**3 * (f * (6 * f - 15) + 10) for f in (fy, fx))
    upper = corner(0, 0) * (1 - wx) + corner(0, 1) * wx
    lower = corner(1, 0) * (1 - wx) + corner(1, 1) * wx
    return np.asarray(upper * (1 - wy) + lower * wy)
