"""How much of a figure on magnetic tiles comes from tiles that are in training and in test, photographed twice.

    python -m benchmarks.siblings DATA OUT
    raydiff benchmark examples/suites/in_place.yaml --data OUT/apart --out RUNS/apart --only "*/magnetic tile/*/*"
    raydiff benchmark examples/suites/in_place.yaml --data OUT/as_many --out RUNS/as_many --only "*/magnetic tile/*/*"

The good images of the set show some tiles several times, in other light or moved, and the usual splits draw images, not
tiles. ``OUT/apart`` keeps only those training images that look like no good test image (correlation of high-passed
64 px thumbnails below ``--below``); ``OUT/as_many`` is as many training images at random. Both are folders of links.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from raydiff.images import find_images
from raydiff.provenance import source_commit

PART = "magnetic_tile"


def thumbnails(paths: Sequence[Path]) -> NDArray[np.float64]:
    """(n, 4096), each of mean 0 and length 1, without what changes slowly, such as light."""
    rows = []
    for path in paths:
        small = np.asarray(Image.open(path).convert("L").resize((64, 64), Image.Resampling.BILINEAR), dtype=float)
        fine = (small - ndimage.uniform_filter(small, 9)) / (small.std() + 1e-9)
        rows.append((fine - fine.mean()).ravel())
    found = np.stack(rows)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def linked(data: Path, target: Path, train: Sequence[Path]) -> None:
    """A copy of all parts, in links, whose tiles have these training images alone."""
    (target / PART / "train" / "good").mkdir(parents=True)
    for path in train:
        (target / PART / "train" / "good" / path.name).symlink_to(path.resolve())
    for folder in ("test", "ground_truth"):
        (target / PART / folder).symlink_to((data / PART / folder).resolve())
    (target / "mvtec_ad").symlink_to((data / "mvtec_ad").resolve())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--below", type=float, default=0.6)
    arguments = parser.parse_args()
    train = find_images([arguments.data / PART / "train" / "good"])
    test = find_images([arguments.data / PART / "test" / "good"])
    alike = thumbnails(test) @ thumbnails(train).T >= arguments.below  # (test, training)
    apart = [path for path, shown in zip(train, alike.any(0), strict=True) if not shown]
    chosen = np.sort(np.random.default_rng(0).permutation(len(train))[: len(apart)])
    linked(arguments.data, arguments.out / "apart", apart)
    linked(arguments.data, arguments.out / "as_many", [train[i] for i in chosen])
    seen = alike.any(1).mean()
    print(f"commit {source_commit()}: {seen:.2f} of {len(test)} good test images show a tile of training;")
    print(f"{len(apart)} of {len(train)} training images show none of test: {arguments.out / 'apart'}")


if __name__ == "__main__":
    main()
