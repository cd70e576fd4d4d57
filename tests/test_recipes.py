"""Recipes: the right kind of config for what the user points at."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from raydiff import backbone
from raydiff.config import load_config
from raydiff.errors import ConfigError
from raydiff.recipes import digits, photographs, recipe


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_a_folder_decides_about_colour(tmp_path: Path, mode: str, channels: int) -> None:
    (tmp_path / "good").mkdir()
    Image.new(mode, (20, 20)).save(tmp_path / "good" / "a.png")
    config = recipe(str(tmp_path))
    assert config.data.channels == channels
    assert config.data.dataset.model_dump()["source"] == str(tmp_path)


@pytest.mark.parametrize("category", ["", "screw"])
def test_masks_do_not_decide_about_colour(tmp_path: Path, category: str) -> None:
    root = tmp_path / category
    for name in ("train/good", "test/dent", "ground_truth/dent"):
        (root / name).mkdir(parents=True)
        mode = "L" if name.startswith("ground_truth") else "RGB"
        Image.new(mode, (20, 20)).save(root / name / "a.png")
    assert recipe(str(tmp_path)).data.channels == 3


def test_an_image_to_learn_from_decides_about_colour(tmp_path: Path) -> None:
    for name, mode in (("a", "RGB"), ("train/good", "L")):
        (tmp_path / name).mkdir(parents=True)
        Image.new(mode, (20, 20)).save(tmp_path / name / "a.png")
    assert recipe(str(tmp_path)).data.channels == 1


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\nhalf"])
def test_a_garbled_image_does_not_decide_about_colour(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    assert recipe(str(tmp_path)).data.channels == 3
    Image.new("L", (20, 20)).save(tmp_path / "b.png")
    assert recipe(str(tmp_path)).data.channels == 1


def test_an_enormous_image_is_not_decoded(tmp_path: Path) -> None:
    Image.new("L", (20, 20)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    header = b"IHDR" + struct.pack(">II", 100_000, 10_000) + content[24:29]
    (tmp_path / "a.png").write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])
    assert recipe(str(tmp_path)).data.channels == 3


def test_an_image_that_cannot_be_opened_is_left_to_prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    Image.new("L", (20, 20)).save(tmp_path / "a.png")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert recipe(str(tmp_path)).data.channels == 3


def test_names(tmp_path: Path) -> None:
    assert recipe("digits") == digits()
    assert recipe("cifar10", str(tmp_path)).data.dataset.name == "cifar10"
    with pytest.raises(ConfigError, match=r"data\.dataset\.source is missing"):
        recipe("cifar10")
    with pytest.raises(ConfigError, match="neither a folder nor a data set's name; there are: cifar10, digits, folder"):
        recipe("nothing")


def test_a_folder_is_learnt_in_feature_space_where_the_weights_are_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (20, 20)).save(tmp_path / "a.png")
    assert recipe(str(tmp_path)).space.name == "feature"
    monkeypatch.setattr(backbone, "_PACKAGES", {})
    config = recipe(str(tmp_path))
    assert config.space.name == "pixel"
    assert config.data.image_size == (64, 64)


def test_the_shipped_config_for_photographs_is_the_recipe() -> None:
    shipped = load_config(Path(__file__).parent.parent / "examples" / "configs" / "photographs.yaml")
    assert shipped == photographs({"name": "folder", "source": "screw"}, channels=3)
