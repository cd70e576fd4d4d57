"""Drawn nails that lie at any angle, good and bad, in the MVTec-AD layout: parts to try raydiff on without a download.

    python examples/nails.py nails
    raydiff fit examples/configs/screw.yaml --set data.dataset.source=nails --out runs/nails

120 good nails to train on, 30 good and 30 bad ones to test with, 256 px, grey; the bad ones are nicked, scratched or
blunt, with masks. Each nail follows from ``--seed`` and its number.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIDE = 256
FINER = 4
"""Drawn so many times as large, then averaged down."""

DEFECTS = ("nick", "scratch", "blunt")


def drawn(rng: np.random.Generator, defect: str | None) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A photograph of a nail and the mask of its defect, both (256, 256)."""
    angle = rng.uniform(-math.pi, math.pi)
    column, row = SIDE / 2 + rng.uniform(-16, 16, 2)
    light, metal = rng.uniform(190, 215), rng.uniform(70, 85)
    photo, mask = (Image.new("F", (FINER * SIDE, FINER * SIDE), value) for value in (light, 0.0))

    def polygon(picture: Image.Image, corners: list[tuple[float, float]], grey: float) -> None:
        """Corners along and across the nail, in pixels from its middle."""
        turned = [
            (column + x * math.cos(angle) - y * math.sin(angle), row + x * math.sin(angle) + y * math.cos(angle))
            for x, y in corners
        ]
        ImageDraw.Draw(picture).polygon([(FINER * x, FINER * y) for x, y in turned], fill=grey)

    polygon(photo, [(-76, -7), (74, -7), (92, 0), (74, 7), (-76, 7)], metal)
    polygon(photo, [(-76, -7), (78, -7), (78, -3.5), (-76, -3.5)], metal + 45)  # the side that shines
    polygon(photo, [(-86, -21), (-76, -21), (-76, 21), (-86, 21)], metal + 15)
    for x in range(-70, -46, 5):
        polygon(photo, [(x, -7), (x + 2, -7), (x + 2, 7), (x, 7)], metal - 25)  # the grip below the head
    at = rng.uniform(-30, 60)
    if defect == "nick":
        shape = [(at - 5, 8), (at + 5, 8), (at, 1)]
    elif defect == "scratch":
        shape = [(at - 12, -3), (at + 10, 4), (at + 12, 6), (at - 12, -0.5)]
    else:
        shape = [(80, -8), (94, -8), (94, 8), (80, 8)]
    if defect is not None:
        polygon(photo, shape, metal + 70 if defect == "scratch" else light)
        polygon(mask, shape, 255.0)
    pixels = np.asarray(photo).reshape(SIDE, FINER, SIDE, FINER).mean((1, 3))
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE - 0.5
    pixels = pixels * (1 + rng.uniform(-0.06, 0.06) * x + rng.uniform(-0.06, 0.06) * y) + rng.normal(0, 3, (SIDE, SIDE))
    found = np.asarray(mask).reshape(SIDE, FINER, SIDE, FINER).mean((1, 3)) > 127
    return pixels.clip(0, 255).astype(np.uint8), (255 * found).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    wanted = {"train/good": (120, None), "test/good": (30, None)} | {f"test/{kind}": (10, kind) for kind in DEFECTS}
    for number, (name, (count, defect)) in enumerate(wanted.items()):
        folder = arguments.folder / name
        folder.mkdir(parents=True)
        for i in range(count):
            photo, mask = drawn(np.random.default_rng((arguments.seed, number, i)), defect)
            Image.fromarray(photo).save(folder / f"{i:03d}.png")
            if defect is not None:
                masks = arguments.folder / "ground_truth" / defect
                masks.mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(masks / f"{i:03d}_mask.png")
    print(f"{sum(count for count, _ in wanted.values())} nails in {arguments.folder}")


if __name__ == "__main__":
    main()
