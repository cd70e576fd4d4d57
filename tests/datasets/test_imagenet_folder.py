from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raydiff.config import ExperimentConfig
from raydiff.datasets.imagenet_folder import Options, build
from raydiff.errors import ConfigError, DataError
from raydiff.images import encode_png
from raydiff.testing import check_dataset

TRAIN = {"n01": 12, "n02": 7, "n03": 6}


def put(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = np.full((5, 7, 3), (sum(map(ord, str(folder))) + number) % 256, np.uint8)
        (folder / f"{folder.name}_{number:03d}.png").write_bytes(encode_png(pixels))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three classes, each to learn from and to test on."""
    for name, count in TRAIN.items():
        put(tmp_path / "train" / name, count)
        put(tmp_path / "val" / name, 3)
    return tmp_path


def counted(source: Path, **fields: Any) -> dict[tuple[str, str, str], int]:
    entries = build(Options(source=str(source), **fields)).entries()
    assert all(entry.is_anomaly == (entry.defect != "good") for entry in entries)
    return Counter((entry.split, entry.class_name, entry.defect) for entry in entries)


def test_one_class(photos: Path) -> None:
    assert counted(photos, normal="n02") == {
        ("train", "n02", "good"): 7, ("test", "n02", "good"): 3, ("test", "n01", "n01"): 3, ("test", "n03", "n03"): 3,
    }  # fmt: skip
    check_dataset("imagenet_folder", source=str(photos), normal="n02")


def test_chosen_anomalies_and_several_normals(photos: Path) -> None:
    assert counted(photos, normal=["n01", "n03"], anomalous="n02") == {
        ("train", "n01", "good"): 12, ("train", "n03", "good"): 6,
        ("test", "n01", "good"): 3, ("test", "n03", "good"): 3, ("test", "n02", "n02"): 3,
    }  # fmt: skip
    assert ("test", "n03", "n03") not in counted(photos, normal="n01", anomalous="n02")


def test_val_and_test_are_both_tested(photos: Path) -> None:
    put(photos / "test" / "n01", 4)
    put(photos / "test" / "n09", 2)
    found = counted(photos, normal="n01")
    assert (found["test", "n01", "good"], found["test", "n09", "n09"]) == (7, 2)


def test_disjoint_classes_hold_out_a_sixth(photos: Path) -> None:
    for name in TRAIN:
        (photos / "val" / name).rename(photos / "val" / f"x{name}")
    found = counted(photos, normal=["n01", "n02"])
    assert (found["train", "n01", "good"], found["test", "n01", "good"]) == (10, 2)
    assert (found["train", "n02", "good"], found["test", "n02", "good"]) == (6, 1)
    assert (found["test", "n03", "n03"], found["test", "xn01", "xn01"]) == (1, 3)
    build_again = [build(Options(source=str(photos), normal=("n01",))).entries() for _ in range(2)]
    assert build_again[0] == build_again[1]
    ids = [entry.image_id for entry in build_again[0]]
    assert len(set(ids)) == len(ids)


def test_a_half_extracted_part_is_refused(photos: Path) -> None:
    (photos / "val" / "n02").rename(photos / "n02")
    with pytest.raises(
        DataError, match=r"1 classes of train are not in val, the first n02; extract the data set again"
    ):
        build(Options(source=str(photos), normal=("n01",)))
    (photos / "n02").rename(photos / "val" / "n02")
    for path in (photos / "val" / "n03").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"val/n03: holds no image \(.bmp, .*; extract the data set again, or remove"):
        build(Options(source=str(photos), normal=("n01",)))


def test_a_class_that_is_only_tested_cannot_be_learnt(photos: Path) -> None:
    put(photos / "val" / "n07", 2)
    with pytest.raises(DataError, match=r"the class n07 has no training image; choose others in data.dataset.normal"):
        build(Options(source=str(photos), normal=("n07",)))


def test_class_names_are_checked(photos: Path) -> None:
    with pytest.raises(ConfigError, match=r"normal is empty; name at least one of the 3 classes: n01, n02, n03$"):
        build(Options(source=str(photos)))
    with pytest.raises(ConfigError, match=r"has no class 'n0'; did you mean 'n0"):
        build(Options(source=str(photos), normal=("n0",)))
    dataset = {"name": "imagenet_folder", "source": "x", "normal": "n01", "anomalous": ["n02", "n01"]}
    with pytest.raises(ConfigError, match=r"name the class 'n01' twice"):
        ExperimentConfig().override({"data.dataset": dataset})


def test_another_layout_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "n01", 3)
    with pytest.raises(
        DataError, match=r"has no train/<class> folder; set data.dataset.source to the folder that holds"
    ):
        build(Options(source=str(tmp_path), normal=("n01",)))


def test_a_file_that_vanished_is_named(photos: Path) -> None:
    data = build(Options(source=str(photos), normal=("n01",)))
    entry = data.entries()[0]
    (photos / entry.image_id).unlink()
    for attempt in (lambda: data.read(entry), data.entries):
        with pytest.raises(DataError, match=r"n01_000.png: cannot be read \(No such file"):
            attempt()
