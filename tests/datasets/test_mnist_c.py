from __future__ import annotations

import gzip
import struct
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raydiff.config import ExperimentConfig
from raydiff.datasets.mnist_c import CORRUPTIONS, Options, build
from raydiff.errors import ConfigError, DataError
from raydiff.images import ImageSpec, decode
from raydiff.testing import check_dataset

COUNT = 30


def save(root: Path, name: str, part: str, value: int, count: int = COUNT) -> None:
    (root / name).mkdir(parents=True, exist_ok=True)
    np.save(root / name / f"{part}_images.npy", np.full((count, 28, 28, 1), value, np.uint8))
    np.save(root / name / f"{part}_labels.npy", np.arange(count) % 10)


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """The official layout with the training images; a corruption's images all have its number as grey value."""
    root = tmp_path / "data" / "mnist_c"
    for number, name in enumerate(["identity", *CORRUPTIONS]):
        save(root, name, "train", 100 + number)
        save(root, name, "test", number)
    return root


def pack(root: Path) -> Path:
    archive = root.parent / "mnist_c.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(root.rglob("*.npy")):
            file.write(path, path.relative_to(root.parent).as_posix())
    return archive


def options(source: Path, **fields: Any) -> Options:
    return Options(source=str(source), **fields)


def test_fifteen_corruptions_of_the_same_images(official: Path) -> None:
    entries = build(options(official)).entries()
    defects = Counter((entry.split, entry.defect) for entry in entries)
    assert defects == {("train", "good"): COUNT, ("test", "good"): COUNT} | {("test", c): COUNT for c in CORRUPTIONS}
    assert [e.defect for e in entries[2 * COUNT :: COUNT]] == list(CORRUPTIONS)
    assert entries[COUNT + 3].image_id == "identity/00003"
    assert {e.class_name for e in entries if e.image_id.endswith("/00013")} == {"3"}


@pytest.mark.parametrize("where", ["folder", "above", "zip", "above the zip"])
def test_folder_and_zip_hold_the_same(official: Path, where: str) -> None:
    ids = [entry.image_id for entry in build(options(official)).entries()]
    archive = pack(official)
    if where == "above the zip":
        official.rename(official.parent / "elsewhere")
    source = {"folder": official, "zip": archive}.get(where, official.parent)
    data = build(options(source))
    assert [e.image_id for e in data.entries()] == ids
    by_id = {entry.image_id: entry for entry in data.entries()}
    for image_id, value in (("train/00007", 100), ("identity/00007", 0), ("canny_edges/00029", 15)):
        pixels = decode(data.read(by_id[image_id])[0], ImageSpec((28, 28), 1, "strict"), image_id)
        assert np.unique(pixels).tolist() == [value]
    check_dataset("mnist_c", source=str(source))


def test_training_images_of_mnist_itself(official: Path) -> None:
    (official / "identity" / "train_images.npy").unlink()
    with pytest.raises(ConfigError, match=r"^data.dataset.mnist is not set and .* has no identity/train_images.npy"):
        build(options(official))
    mnist = official.parent / "mnist"
    mnist.mkdir()
    with pytest.raises(DataError, match=r"lacks train-images-idx3-ubyte.gz, .*; set data.dataset.mnist to"):
        build(options(official, mnist=str(mnist)))
    images = struct.pack(">4I", 0x803, 20, 28, 28) + bytes([77]) * (20 * 784)
    (mnist / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
    (mnist / "train-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 20) + bytes([4] * 20))
    data = build(options(official, mnist=str(mnist)))
    train = [entry for entry in data.entries() if entry.split == "train"]
    assert (len(train), {entry.class_name for entry in train}) == (20, {"4"})
    assert np.unique(decode(data.read(train[5])[0], ImageSpec((28, 28), 1), "a")).tolist() == [77]


def test_some_corruptions(official: Path) -> None:
    entries = build(options(official, corruptions=["fog", "shear"])).entries()
    assert {entry.defect for entry in entries} == {"good", "fog", "shear"}


def test_a_missing_corruption_is_named(official: Path) -> None:
    (official / "zigzag" / "test_labels.npy").unlink()
    with pytest.raises(DataError, match=r"lacks test_images.npy or test_labels.npy of zigzag; unpack mnist_c.zip"):
        build(options(official))
    with pytest.raises(DataError, match=r"of zigzag; unpack"):
        build(options(pack(official)))
    with pytest.raises(DataError, match=r"of frost; .*name the corruptions that there are"):
        build(options(official, corruptions=["frost", "fog"]))


def test_other_counts_and_labels_are_refused(official: Path) -> None:
    save(official, "stripe", "test", 0, count=29)
    with pytest.raises(DataError, match=r"stripe has 29 test images and identity 30"):
        build(options(official))
    save(official, "stripe", "test", 0)
    np.save(official / "stripe" / "test_labels.npy", np.arange(COUNT)[::-1] % 10)
    with pytest.raises(DataError, match=r"the labels of stripe are not those of identity"):
        build(options(official))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((COUNT, 28, 28), np.float32), r"fog/test_images.npy is float32 \(30, 28, 28\); expected uint8"),
        (np.zeros((COUNT, 32, 32, 1), np.uint8), r"is uint8 \(30, 32, 32, 1\)"),
        (np.uint8(3), r"is uint8 \(\); expected uint8"),
        (np.array([{"a": 1}]), "fog/test_images.npy is truncated or unreadable .*allow_pickle=False"),
    ],
)
def test_other_arrays_are_refused(official: Path, array: Any, message: str) -> None:
    np.save(official / "fog" / "test_images.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=message):
        build(options(official))


def test_truncated_files_are_named(official: Path) -> None:
    archive = pack(official)
    archive.write_bytes(archive.read_bytes()[:-500])
    with pytest.raises(DataError, match=r"mnist_c.zip: is truncated or no zip file"):
        build(options(archive))
    path = official / "rotate" / "test_images.npy"
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(DataError, match=r"rotate/test_images.npy is truncated or unreadable"):
        build(options(official))


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds neither mnist_c.zip nor mnist_c/<corruption>/test_images.npy"):
        build(options(tmp_path))


def test_identity_is_no_corruption() -> None:
    with pytest.raises(ConfigError, match=r"identity is the clean images"):
        ExperimentConfig().override({"data.dataset": {"name": "mnist_c", "source": "x", "corruptions": ["identity"]}})
