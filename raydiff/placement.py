"""Where an image comes to lie on the canvas that a detector works on: stretched, padded, or its part turned level.

A part that lies at any angle is a new picture each time to a network that sees grids of cells. ``principal_axis`` finds
the part, turns it so that its longest extent lies level with the heavier end left, and puts its middle into the canvas'
middle: what is learnt about a cell is then about a place of the part. It is the software's answer to a fixture.

The part is what stands out of the background, which is the median of the image's border, without small pieces (dust):
pixels are split in two by 2-means of their distance from it (Otsu's threshold, IEEE Trans. SMC 9, 1979). Its axis is
that of largest variance of its pixels' places, and the heavier end follows from the third moment along it
(Hu, IRE Trans. Information Theory 8, 1962). The scale is the same for every image of one size, so that a part which is
too short looks too short.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from raydiff.config import DataConfig

__all__ = ["ImageSpec", "Placement", "Pose", "find_part", "place"]

_LOOKED_AT = 256
"""Longest side in pixels of the copy in which a part is looked for."""
_ITERATIONS = 10
_SAMPLED = 64
"""Least rows and columns of it from which the two kinds of pixels are told apart."""
_LEAST_PART = 0.002
"""Share of the image below which nothing is taken for a part."""
_LEAST_CONTRAST = 8
"""Grey levels of 255 between the part and the background below which nothing stands out."""
_FRAGMENT = 0.1
"""Share of the largest piece from which another is of the same part, which a defect may have cut in two."""
_ROUND = 1.2
"""Extent along the axis over that across, both as deviations, below which a part has no direction."""


@dataclass(frozen=True)
class ImageSpec:
    """The pixels a detector works on, and how any file is brought to them.

    ``image_size`` is (H, W); ``channels`` 1 or 3. ``resize``: ``stretch`` ignores the aspect ratio, ``pad`` keeps it
    and repeats the edge pixels around the image, ``own`` does too and never enlarges: what fits is left at its own
    resolution; ``strict`` refuses another size or channel count. A file with more than ``max_pixels`` is refused before
    it is decoded. ``aligned_width``: the image's part is turned level (see the module), and the canvas is as wide as
    this share of the image's longer side; None: it is left as it lies.
    """

    image_size: tuple[int, int]
    channels: Literal[1, 3] = 3
    resize: Literal["stretch", "pad", "own", "strict"] = "stretch"
    max_pixels: int = 64_000_000
    aligned_width: float | None = None

    @classmethod
    def of(cls, data: DataConfig) -> ImageSpec:
        """The spec of an experiment's ``data`` section."""
        width = None if data.align == "none" else data.aligned_width
        return cls(data.image_size, data.channels, data.resize, data.max_pixels, width)


@dataclass(frozen=True)
class Pose:
    """Where a part lies: ``row`` and ``column`` of its middle in pixels, ``angle`` of its axis in radians, clockwise.

    At angle 0 the axis lies level, the heavier end left. ``extent`` is how long the part is along its axis and how
    broad across, in pixels; None: no part stands out, and these are the image's middle.
    """

    row: float
    column: float
    angle: float = 0.0
    extent: tuple[float, float] | None = None


@dataclass(frozen=True)
class Placement:
    """Where an upright original of ``height`` x ``width`` lies on a canvas.

    It fills ``rows`` x ``columns`` of the canvas from ``top`` and ``left``. ``pose``: these show its part, turned, at
    ``scale`` pixels of the canvas per pixel of the original.
    """

    height: int
    width: int
    top: int
    left: int
    rows: int
    columns: int
    pose: Pose | None = None
    scale: float = 1.0

    @property
    def is_whole(self) -> bool:
        """Whether all of an aligned part is on the canvas."""
        if self.pose is None or self.pose.extent is None:
            return True
        length, breadth = self.pose.extent
        return length * self.scale <= self.columns + 1 and breadth * self.scale <= self.rows + 1

    @property
    def inside(self) -> tuple[slice, slice]:
        """The part of the canvas that shows the original, without padding."""
        return np.s_[self.top : self.top + self.rows, self.left : self.left + self.columns]

    def fitted(self, image: Image.Image, canvas: tuple[int, int], *, mask: bool = False) -> NDArray[np.uint8]:
        """The original in mode L or RGB on a canvas (H, W), uint8 (H, W) or (H, W, 3).

        Images are filtered bicubically, with antialiasing, and their edges repeated around them; masks are sampled by
        nearest neighbour and 0 around.
        """
        if self.pose is not None:
            return self._turned(image, mask=mask)
        inner = (self.rows, self.columns)
        if (image.height, image.width) != inner:
            resample = Image.Resampling.NEAREST if mask else Image.Resampling.BICUBIC
            image = image.resize((self.columns, self.rows), resample)
        pixels: NDArray[np.uint8] = np.asarray(image)
        if inner == canvas:
            return pixels
        below, right = canvas[0] - self.rows - self.top, canvas[1] - self.columns - self.left
        margins = [(self.top, below), (self.left, right), (0, 0)][: pixels.ndim]
        return np.pad(pixels, margins) if mask else np.pad(pixels, margins, mode="edge")

    def box(self, region: NDArray[np.bool_], row: int, column: int) -> tuple[int, int, int, int] | None:
        """The least upright rectangle of the original around a region of :attr:`inside`: (x, y, width, height).

        Args:
            region: (h, w), True where the region is.
            row: of the region's array in :attr:`inside`.
            column: the same.

        Returns:
            Whole pixels; None where all of it lies outside of the original.
        """
        if self.pose is None:
            y, bottom = _stretched(row, row + region.shape[0], self.height, self.rows)
            x, right = _stretched(column, column + region.shape[1], self.width, self.columns)
            return x, y, right - x, bottom - y
        rows = np.flatnonzero(region.any(1))
        first, last = region[rows].argmax(1), region.shape[1] - 1 - region[rows, ::-1].argmax(1)
        ends = [(rows + up, columns) for up in (-0.5, 0.5) for columns in (first - 0.5, last + 0.5)]
        found = [self._on_original(row + one, column + other) for one, other in ends]  # no other pixel lies further out
        ys = np.concatenate([y for y, _ in found]).round(6) + 0.5
        xs = np.concatenate([x for _, x in found]).round(6) + 0.5
        y, bottom = max(0, math.floor(ys.min())), min(self.height, math.ceil(ys.max()))
        x, right = max(0, math.floor(xs.min())), min(self.width, math.ceil(xs.max()))
        return (x, y, right - x, bottom - y) if x < right and y < bottom else None

    def on_original(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """What of a mask of :attr:`inside` lies on the original, by the centres of its pixels."""
        if self.pose is None:
            return mask
        rows, columns = np.nonzero(mask)
        ys, xs = self._on_original(rows, columns)
        kept = mask.copy()
        kept[rows, columns] = (ys > -0.5) & (ys < self.height - 0.5) & (xs > -0.5) & (xs < self.width - 0.5)
        return kept

    @property
    def pixel_area(self) -> float:
        """Pixels of the original that a pixel of the canvas covers."""
        if self.pose is not None:
            return 1 / self.scale**2
        return (self.height / self.rows) * (self.width / self.columns)

    def back(self, values: NDArray[np.floating], size: tuple[int, int]) -> NDArray[np.float64]:
        """Values of the canvas (H, W, C) where they lie on the original, shown at ``size``, (h, w, C), and as a channel
        more whether there are any: 1, or 0 (with values 0) where the canvas does not reach. For aligned parts.
        """
        assert self.pose is not None  # noqa: S101
        if (block := math.floor(self.scale * max(self.height / size[0], self.width / size[1]))) > 1:
            small = F.adaptive_max_pool2d(
                torch.from_numpy(values).permute(2, 0, 1), (-(-values.shape[0] // block), -(-values.shape[1] // block))
            )
            values = small.permute(1, 2, 0).numpy()  # a single hot pixel stays to be seen
        rows, columns = np.meshgrid(
            (np.arange(size[0]) + 0.5) * self.height / size[0] - 0.5 - self.pose.row,
            (np.arange(size[1]) + 0.5) * self.width / size[1] - 0.5 - self.pose.column,
            indexing="ij",
        )
        sine, cosine = math.sin(self.pose.angle), math.cos(self.pose.angle)
        down, along = rows * cosine - columns * sine, rows * sine + columns * cosine
        grid = np.stack([2 * along * self.scale / self.columns, 2 * down * self.scale / self.rows], axis=-1)
        inside = (np.abs(grid) <= 1).all(-1, keepdims=True)
        sampled = F.grid_sample(
            torch.from_numpy(values).double().permute(2, 0, 1)[None], torch.from_numpy(grid)[None],
            align_corners=False, padding_mode="border",
        )  # fmt: skip
        return np.concatenate([sampled[0].permute(1, 2, 0).numpy() * inside, inside], axis=-1)

    def _on_original(self, rows: NDArray[Any], columns: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Places of the canvas (centres of pixels are whole numbers) on the original."""
        assert self.pose is not None  # noqa: S101
        down, along = (rows - (self.rows - 1) / 2) / self.scale, (columns - (self.columns - 1) / 2) / self.scale
        sine, cosine = math.sin(self.pose.angle), math.cos(self.pose.angle)
        return self.pose.row + along * sine + down * cosine, self.pose.column + along * cosine - down * sine

    def _shown(self) -> tuple[int, int, int, int]:
        """What the canvas reaches of the original: left, upper, right and lower edge, with room for a filter."""
        ends = np.array([-0.5, -0.5, self.rows - 0.5, self.rows - 0.5]), np.array([-0.5, self.columns - 0.5] * 2)
        ys, xs = self._on_original(*ends)
        room = 3 * max(1.0, 1 / self.scale)
        left, top = max(0, math.floor(xs.min() - room)), max(0, math.floor(ys.min() - room))
        right, bottom = (
            min(self.width, math.ceil(xs.max() + room) + 1),
            min(self.height, math.ceil(ys.max() + room) + 1),
        )
        return left, top, right, bottom

    def _turned(self, image: Image.Image, *, mask: bool) -> NDArray[np.uint8]:
        """The canvas, (rows, columns) or (rows, columns, 3)."""
        left, top, right, bottom = self._shown()
        image = image.crop((left, top, right, bottom))
        width, height = image.size
        if self.scale < 1 and not mask:  # antialiased first, then turned at about its own resolution
            smaller = (max(1, round(width * self.scale)), max(1, round(height * self.scale)))
            image = image.resize(smaller, Image.Resampling.BICUBIC)
        pixels = np.array(image)
        channels = torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)[None]  # (1, C, h, w)
        ys, xs = self._on_original(np.arange(self.rows)[:, None], np.arange(self.columns))  # (rows, columns)
        grid = np.stack([(2 * (xs - left) + 1) / width - 1, (2 * (ys - top) + 1) / height - 1], axis=-1)
        sampled = F.grid_sample(
            channels.float(), torch.from_numpy(grid)[None].float(), align_corners=False,
            mode="nearest" if mask else "bicubic", padding_mode="zeros" if mask else "border",
        )  # fmt: skip
        turned: NDArray[np.uint8] = sampled[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
        return np.ascontiguousarray(turned.reshape(self.rows, self.columns, *pixels.shape[2:]))


def place(spec: ImageSpec, image: Image.Image) -> Placement:
    """Where an upright image in mode L or RGB lies on the spec's canvas.

    An image in which no part stands out is shown around its middle, not turned.
    """
    (rows, columns), height, width = spec.image_size, image.height, image.width
    if spec.aligned_width is not None:
        pose = find_part(image) or Pose((height - 1) / 2, (width - 1) / 2)
        scale = columns / (spec.aligned_width * max(height, width))
        return Placement(height, width, 0, 0, rows, columns, pose, scale)
    if spec.resize not in ("pad", "own"):
        return Placement(height, width, 0, 0, rows, columns)
    scale = min(rows / height, columns / width)
    if spec.resize == "own":
        scale = min(scale, 1.0)
    inner = (min(rows, max(1, round(height * scale))), min(columns, max(1, round(width * scale))))
    return Placement(height, width, (rows - inner[0]) // 2, (columns - inner[1]) // 2, *inner)


def find_part(image: Image.Image) -> Pose | None:
    """The pose of what stands out of the background; None where nothing does.

    A part that is about as wide as long has no direction: its angle is 0. One whose two ends weigh the same can come
    out either way round.

    Args:
        image: upright, mode L or RGB.
    """
    from scipy import ndimage

    factor = max(1.0, max(image.height, image.width) / _LOOKED_AT)
    size = (max(1, round(image.width / factor)), max(1, round(image.height / factor)))
    small = np.asarray(image.resize(size, Image.Resampling.BILINEAR), dtype=np.float64).reshape(size[1], size[0], -1)
    standing = np.pad(_standing_out(small), 3)
    labels, _ = ndimage.label(ndimage.binary_closing(standing, iterations=3)[3:-3, 3:-3])
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0  # the background
    if sizes.max() < max(2, _LEAST_PART * labels.size):  # a single pixel has no axis
        return None
    places = np.argwhere((sizes >= _FRAGMENT * sizes.max())[labels]).astype(np.float64)  # (n, 2), row and column
    centre = places.mean(0)
    variances, axes = np.linalg.eigh(np.cov((places - centre).T) + 1e-9 * np.eye(2))
    enlarge = image.height / small.shape[0]
    if variances[1] < _ROUND**2 * variances[0]:
        high, wide = (np.ptp(places, axis=0) + 1) * enlarge
        return _enlarged(centre, 0.0, (float(wide), float(high)), small.shape, image)
    axis = axes[:, 1]
    across = (places - centre) @ axes[:, 0]
    along = (places - centre) @ axis
    if (along**3).mean() < 0:  # the longer, lighter end lies towards the axis' end
        axis, along = -axis, -along
    middle = centre + axis * (along.max() + along.min()) / 2
    extent = (float(np.ptp(along) + 1) * enlarge, float(np.ptp(across) + 1) * enlarge)
    return _enlarged(middle, math.atan2(axis[0], axis[1]), extent, small.shape, image)


def _standing_out(pixels: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which pixels (H, W) of an image (H, W, C) are not of the background."""
    edge = max(1, round(0.03 * min(pixels.shape[:2])))
    middle = np.zeros(pixels.shape[:2], bool)
    middle[edge:-edge, edge:-edge] = True
    distance = np.abs(pixels - np.median(pixels[~middle], axis=0)).max(2)
    some = max(1, min(distance.shape) // _SAMPLED)  # a threshold needs no more
    sample = distance[::some, ::some]
    low, high = float(distance.min()), float(distance.max())
    for _ in range(_ITERATIONS):  # 2-means of numbers; SciPy's warns of empty clusters, which no thread can silence
        above = sample > (low + high) / 2
        low = float(sample[~above].mean()) if not above.all() else low
        high = float(sample[above].mean()) if above.any() else high
    return np.asarray((distance > (low + high) / 2) & (high - low >= _LEAST_CONTRAST))


def _enlarged(
    place: NDArray[np.float64], angle: float, extent: tuple[float, float], shape: tuple[int, ...], image: Image.Image
) -> Pose:
    """A pose of the small copy of ``shape`` as one of the image."""
    row = (place[0] + 0.5) * image.height / shape[0] - 0.5
    column = (place[1] + 0.5) * image.width / shape[1] - 0.5
    return Pose(float(row), float(column), angle, extent)


def _stretched(start: int, stop: int, original: int, fitted: int) -> tuple[int, int]:
    """The least range of whole pixels of the original that covers some of the canvas."""
    return start * original // fitted, -(-stop * original // fitted)
