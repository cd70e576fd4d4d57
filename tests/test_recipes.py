"""Recipes: the right kind of config for what the user points at."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from raydiff.errors import ConfigError
from raydiff.recipes import digits, recipe


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_a_folder_decides_about_colour(tmp_path: Path, mode: str, channels: int) -> None:
    (tmp_path / "good").mkdir()
    Image.new(mode, (20, 20)).save(tmp_path / "good" / "a.png")
    config = recipe(str(tmp_path))
    assert config.data.channels == channels
    assert config.data.dataset.model_dump()["source"] == str(tmp_path)


def test_names(tmp_path: Path) -> None:
    assert recipe("digits") == digits()
    assert recipe("cifar10", str(tmp_path)).data.dataset.name == "cifar10"
    with pytest.raises(ConfigError, match=r"data\.dataset\.source is missing"):
        recipe("cifar10")
    with pytest.raises(ConfigError, match="neither a folder nor a data set's name; there are: cifar10, digits, folder"):
        recipe("nothing")
