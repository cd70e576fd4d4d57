from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raydiff.config import DataConfig
from raydiff.shards import ShardSet, write_shards


def draw_parts(root: Path, *, normal: int = 40) -> Path:
    """An MVTec-AD folder of small pictures of unequal sizes: textures, some with a square burnt in and its mask."""
    rng = np.random.default_rng(0)

    def save(path: Path, pixels: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)

    def texture(number: int) -> Any:
        coarse = rng.integers(60, 200, (6, 6), dtype=np.uint8)
        return np.asarray(Image.fromarray(coarse).resize((20 + number % 3, 16)))

    for number in range(normal):
        save(root / f"train/good/{number:03d}.{'png' if number % 2 else 'jpg'}", texture(number))
    for number in range(6):
        save(root / f"test/good/{number:03d}.png", texture(number))
        burnt, mask = texture(number).copy(), np.zeros((16, 20 + number % 3), dtype=np.bool_)
        burnt[4:9, 5:12], mask[4:9, 5:12] = 0, True
        save(root / f"test/burn/{number:03d}.png", burnt)
        save(root / f"ground_truth/burn/{number:03d}_mask.png", mask)
    return root


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that no test may change."""
    return draw_parts(tmp_path_factory.mktemp("data") / "parts")


@pytest.fixture(scope="session")
def parts_config(parts: Path) -> Callable[..., DataConfig]:
    """The config of that folder, with fields changed by keyword."""

    def make(**fields: Any) -> DataConfig:
        return DataConfig(**{"dataset": {"name": "folder", "source": str(parts)}, "image_size": (16, 20)} | fields)

    return make


@pytest.fixture(scope="session")
def part_shards(parts_config: Callable[..., DataConfig], tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Shards that no test may change."""
    return write_shards(parts_config(), str(tmp_path_factory.mktemp("shards") / "encoded"))


@pytest.fixture(scope="session")
def digit_shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Three normal digits: 358 training images in six row groups, of which the last is small."""
    config = DataConfig(dataset={"name": "digits", "normal": ("0", "1", "2")})
    return write_shards(config, str(tmp_path_factory.mktemp("shards") / "digits"))
