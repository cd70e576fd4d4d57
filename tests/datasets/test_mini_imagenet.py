from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raydiff.datasets.mini_imagenet import Options, build
from raydiff.errors import DataError
from raydiff.images import encode_png
from raydiff.testing import check_dataset

CLASSES = {"train.csv": ("n01", "n02", "n03"), "val.csv": ("n04",), "test.csv": ("n05", "n06")}


def write_table(path: Path, rows: list[tuple[str, str]], columns: tuple[str, str] = ("filename", "label")) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([columns, *rows])


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """The csv splits with 13 images of each of six classes."""
    (tmp_path / "images").mkdir()
    for name, labels in CLASSES.items():
        rows = [(f"{label}{number:08d}.png", label) for label in labels for number in range(13)]
        write_table(tmp_path / name, rows)
        for number, (file, _) in enumerate(rows):
            (tmp_path / "images" / file).write_bytes(encode_png(np.full((4, 4, 3), number, np.uint8)))
    return tmp_path


def options(source: Path, *normal: str, **fields: Any) -> Options:
    return Options(**{"source": str(source), "normal": normal, "check_counts": False} | fields)


def test_the_last_sixth_of_each_class_is_tested(tables: Path) -> None:
    data = build(options(tables, "n01", "n05"))
    entries = data.entries()
    assert Counter((e.split, e.class_name, e.defect) for e in entries) == {
        ("train", "n01", "good"): 11, ("train", "n05", "good"): 11, ("test", "n01", "good"): 2,
        ("test", "n05", "good"): 2, **{("test", name, name): 2 for name in ("n02", "n03", "n04", "n06")},
    }  # fmt: skip
    assert len({entry.image_id for entry in entries}) == len(entries)
    assert data.read(entries[0])[0] == (tables / entries[0].image_id).read_bytes()
    check_dataset("mini_imagenet", source=str(tables), normal="n01", check_counts=False)


def test_what_is_held_out_does_not_depend_on_the_order_of_the_table(tables: Path) -> None:
    before = build(options(tables, "n01")).entries()
    with (tables / "train.csv").open(newline="") as file:
        rows = [(row["filename"], row["label"]) for row in csv.DictReader(file)]
    write_table(tables / "train.csv", rows[::-1])
    assert build(options(tables, "n01")).entries() == before


def test_class_disjoint(tables: Path) -> None:
    entries = build(options(tables, *CLASSES["train.csv"], anomalous=CLASSES["test.csv"])).entries()
    tested = Counter((e.class_name, e.is_anomaly) for e in entries if e.split == "test")
    assert tested == {(n, False): 2 for n in CLASSES["train.csv"]} | {(n, True): 2 for n in CLASSES["test.csv"]}


def test_class_folders(tmp_path: Path) -> None:
    for part, count in (("train", 6), ("val", 2)):
        for name in ("n01", "n02"):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                content = encode_png(np.full((4, 4, 3), number, np.uint8))
                (tmp_path / part / name / f"{name}{number}.png").write_bytes(content)
    entries = build(options(tmp_path, "n02", check_counts=True)).entries()
    assert Counter((e.split, e.defect) for e in entries) == {
        ("train", "good"): 6, ("test", "good"): 2, ("test", "n01"): 2,
    }  # fmt: skip


def test_counts_are_checked(tables: Path) -> None:
    with pytest.raises(DataError, match=r"train.csv: names 3 classes, expected 64; or set .*check_counts=false"):
        build(options(tables, "n01", check_counts=True))
    for name, count in (("train.csv", 64), ("val.csv", 16), ("test.csv", 20)):
        write_table(tables / name, [(f"{name}{c}_{i}.jpg", f"{name}{c}") for c in range(count) for i in range(600)])
    with pytest.raises(
        DataError, match=r"images/train.csv0_0.jpg: is missing \(60000 of the 60000 images that the csv"
    ):
        build(options(tables, "train.csv0", check_counts=True))
    write_table(tables / "val.csv", [(f"{c}_{i}.jpg", f"n{c}") for c in range(16) for i in range(600 - (c == 3))])
    with pytest.raises(DataError, match=r"val.csv: names 599 images of n3, expected 600"):
        build(options(tables, "n0", check_counts=True))


def test_missing_files_are_named(tables: Path) -> None:
    (tables / "images" / "n0400000003.png").unlink()
    with pytest.raises(DataError, match=r"images/n0400000003.png: is missing \(1 of the 78 images"):
        build(options(tables, "n01"))
    (tables / "val.csv").unlink()
    assert len(build(options(tables, "n01")).entries()) == 11 + 5 * 2
    with pytest.raises(DataError, match=r"lacks val.csv; add it, or set data.dataset.check_counts=false"):
        build(options(tables, "n01", check_counts=True))


def test_another_table_is_refused(tables: Path) -> None:
    write_table(tables / "val.csv", [("a.png", "n04")], ("file", "label"))
    with pytest.raises(DataError, match=r"val.csv: is no table with the columns filename,label \('filename'\)"):
        build(options(tables, "n01"))
