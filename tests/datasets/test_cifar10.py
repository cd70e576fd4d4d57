from __future__ import annotations

import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raydiff.config import ExperimentConfig
from raydiff.datasets.cifar10 import CLASSES, Options, build, download
from raydiff.errors import ConfigError, DataError
from raydiff.images import ImageSpec, decode, encode_png
from raydiff.testing import check_dataset

SPEC = ImageSpec((32, 32), 3, "strict")
BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


def write(path: Path, content: Any, protocol: int = 2) -> None:
    path.write_bytes(pickle.dumps(content, protocol=protocol))


@pytest.fixture(params=[2, 4])
def batches(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The official layout with ten images a batch, by an old and a new pickle protocol."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in BATCHES:
        data = rng.integers(0, 256, (10, 3072), dtype=np.uint8)
        write(folder / name, {b"data": data, b"labels": [*range(10)], b"batch_label": name.encode()}, request.param)
    names = [name.encode() for name in CLASSES]
    write(folder / "batches.meta", {b"label_names": names, b"num_cases_per_batch": 10, b"num_vis": 3072}, request.param)
    return folder


def test_one_class_protocol(batches: Path) -> None:
    data = build(Options(source=str(batches.parent), normal=("cat", "dog")))
    entries = data.entries()
    train = [entry for entry in entries if entry.split == "train"]
    test = [entry for entry in entries if entry.split == "test"]
    assert [entry.image_id for entry in train[:3]] == ["data_batch_1/00003", "data_batch_1/00005", "data_batch_2/00003"]
    assert len(train) == 10
    assert not any(entry.is_anomaly for entry in train)
    assert [entry.class_name for entry in test] == list(CLASSES)
    assert [entry.is_anomaly for entry in test] == [name not in ("cat", "dog") for name in CLASSES]
    assert test[3].defect == "good"
    assert test[4].defect == "deer"


def test_pixels_are_planes_of_red_green_and_blue(batches: Path) -> None:
    data = build(Options(source=str(batches), normal=("cat",)))
    stored = pickle.loads((batches / "data_batch_2").read_bytes())[b"data"][3]
    entry = next(entry for entry in data.entries() if entry.image_id == "data_batch_2/00003")
    content, mask = data.read(entry)
    pixels = decode(content, SPEC, "a")
    assert mask is None
    assert pixels[4, 7].tolist() == [stored[plane * 1024 + 4 * 32 + 7] for plane in range(3)]


def test_missing_files_are_listed(batches: Path) -> None:
    (batches / "data_batch_3").unlink()
    (batches / "batches.meta").unlink()
    with pytest.raises(
        DataError, match=r"cifar-10-batches-py: lacks data_batch_3, batches.meta; unpack cifar-10-python"
    ):
        build(Options(source=str(batches)))


def test_a_short_batch_is_counted(batches: Path) -> None:
    write(batches / "data_batch_4", {b"data": np.zeros((9, 3072), dtype=np.uint8), b"labels": [0] * 9})
    with pytest.raises(DataError, match=r"data_batch_4: holds 9 images, expected 10"):
        build(Options(source=str(batches)))


def test_a_truncated_batch_is_named(batches: Path) -> None:
    content = (batches / "data_batch_4").read_bytes()
    (batches / "data_batch_4").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"data_batch_4: is truncated or not a CIFAR-10 batch \(.*\); unpack"):
        build(Options(source=str(batches)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "is not a CIFAR-10 batch"),
        ({b"labels": [0]}, "has no 'data'"),
        ({b"data": np.zeros((1, 3071), dtype=np.uint8), b"labels": [0]}, "data is not a uint8 array of n x 3072"),
        ({b"data": np.zeros((1, 3072), dtype=np.uint8), b"labels": [0, 1]}, "another number of labels"),
        ({b"data": np.zeros((1, 3072), dtype=np.uint8), b"labels": [10]}, "has the label 10; labels are 0 to 9"),
    ],
)
def test_another_content_is_refused(batches: Path, content: Any, message: str) -> None:
    write(batches / "test_batch", content)
    with pytest.raises(DataError, match=f"test_batch: .*{message}"):
        build(Options(source=str(batches)))


def test_other_class_names_are_refused(batches: Path) -> None:
    write(batches / "batches.meta", {b"label_names": [b"x"], b"num_cases_per_batch": 10})
    with pytest.raises(DataError, match=r"batches.meta: names the classes x; expected airplane, "):
        build(Options(source=str(batches)))


class _Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_cannot_run_code(batches: Path) -> None:
    victim = batches.parent / "ran"
    write(batches / "data_batch_1", {b"data": _Hostile(victim), b"labels": []})
    with pytest.raises(DataError, match=r"data_batch_1: .*asks for posix.mkdir, which is not allowed"):
        build(Options(source=str(batches)))
    assert not victim.exists()


def test_an_unknown_class_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'lorry' is no class of CIFAR-10; there are: airplane"):
        ExperimentConfig().override({"data.dataset": {"name": "cifar10", "source": "x", "normal": ["lorry"]}})


def test_one_class_needs_no_list() -> None:
    dataset = {"name": "cifar10", "source": "x"}
    bare, listed = (
        ExperimentConfig().override({"data.dataset": dataset | {"normal": normal}}) for normal in ("ship", ["ship"])
    )
    assert bare.to_dict() == listed.to_dict()
    assert bare.digest() == listed.digest()
    with pytest.raises(ConfigError, match=r"'3' is no class of CIFAR-10; there are: airplane"):
        ExperimentConfig().override({"data.dataset": dataset | {"normal": 3}})


def test_a_changed_batch_has_another_fingerprint_and_is_read_again(batches: Path) -> None:
    data = build(Options(source=str(batches), normal=("cat",)))
    before = data.entries()
    path = batches / "data_batch_2"
    content = pickle.loads(path.read_bytes())
    content[b"data"] = content[b"data"][:, ::-1].copy()  # the same bytes, so the file has the same size
    size = path.stat().st_size
    write(path, content, path.read_bytes()[1])
    assert path.stat().st_size == size
    changed = {
        old.image_id.split("/")[0]
        for old, new in zip(before, data.entries(), strict=True)
        if old.fingerprint != new.fingerprint
    }
    assert changed == {"data_batch_2"}
    pixels = decode(data.read(before[1])[0], SPEC, "a")
    assert before[1].image_id == "data_batch_2/00003"
    assert pixels[0, 0].tolist() == content[b"data"][3, [0, 1024, 2048]].tolist()


def test_the_archive_is_read_as_it_was_fetched(batches: Path) -> None:
    unpacked = build(Options(source=str(batches), normal=("cat",)))
    archive = batches.parent / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(batches, batches.name)
    for source in (archive, batches.parent / "fetched"):
        if source != archive:
            source.mkdir()
            archive.rename(source / archive.name)
        data = build(Options(source=str(source), normal=("cat",)))
        pairs = list(zip(data.entries(), unpacked.entries(), strict=True))
        assert all(
            ours.image_id == theirs.image_id and data.read(ours) == unpacked.read(theirs) for ours, theirs in pairs
        )
        check_dataset("cifar10", source=str(source))
    packed = batches.parent / "fetched" / archive.name
    packed.write_bytes(packed.read_bytes()[:-3000])
    with pytest.raises(DataError, match=r"cifar-10-python.tar.gz: is truncated or no tar archive"):
        build(Options(source=str(packed)))
    (batches / "data_batch_2").unlink()
    with tarfile.open(packed, "w:gz") as file:
        file.add(batches, batches.name)
    with pytest.raises(DataError, match=r"cifar-10-python.tar.gz: lacks data_batch_2; fetch"):
        build(Options(source=str(packed)))


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Three training images and two test images of each class, as PNG files."""
    for part, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(CLASSES):
            (tmp_path / "cifar10" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.full((32, 32, 3), 10 * label + number, np.uint8)
                (tmp_path / "cifar10" / part / name / f"{number:04d}.png").write_bytes(encode_png(pixels))
    return tmp_path / "cifar10"


def test_class_folders(folders: Path) -> None:
    data = build(Options(source=str(folders), normal=("cat", "dog"), check_counts=False))
    entries = data.entries()
    train = [entry.image_id for entry in entries if entry.split == "train"]
    assert train == [f"train/{name}/{number:04d}.png" for name in ("cat", "dog") for number in range(3)]
    test = [entry for entry in entries if entry.split == "test"]
    assert len(test) == 20
    assert {(e.defect, e.is_anomaly) for e in test if e.class_name in ("cat", "deer")} == {
        ("good", False),
        ("deer", True),
    }
    assert data.read(test[0]) == ((folders / test[0].image_id).read_bytes(), None)
    check_dataset("cifar10", source=str(folders), check_counts=False)


def test_class_folders_are_counted(folders: Path) -> None:
    with pytest.raises(DataError, match=r"train/airplane: holds 3 images, expected 5000; extract .*check_counts=false"):
        build(Options(source=str(folders)))
    (folders / "test/ship").rename(folders / "ship")
    with pytest.raises(DataError, match=r"1 classes of train are not in test, the first ship"):
        build(Options(source=str(folders), check_counts=False))
    (folders / "train/ship").rename(folders / "another")
    with pytest.raises(
        DataError, match=r"has 9 classes, of which ship should not be or are missing; expected airplane"
    ):
        build(Options(source=str(folders), check_counts=False))


def test_a_failing_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(DataError, match=r"CIFAR10 could not be fetched \(.+\); check the network, or copy") as caught:
        download(tmp_path / "data")
    assert "\n" not in str(caught.value)


@pytest.mark.shared
def test_the_whole_of_cifar10(shared_data: Path) -> None:
    if not (shared_data / "cifar-10-batches-py").is_dir():
        pytest.skip("RAYDIFF_DATA has no cifar-10-batches-py")
    data = build(Options(source=str(shared_data), normal=("ship",)))
    entries = data.entries()
    assert len(entries) == 15_000
    assert sum(entry.is_anomaly for entry in entries) == 9_000
    content, _ = data.read(entries[-1])
    assert decode(content, SPEC, "a").std() > 5
