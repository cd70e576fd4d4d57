from __future__ import annotations

import pickle
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raydiff.config import ExperimentConfig
from raydiff.datasets.mvtec_ad import COUNTS, Options, build
from raydiff.errors import ConfigError, DataError
from raydiff.images import encode_png
from raydiff.testing import check_dataset


def write_category(root: Path, name: str, *, whole: bool = False) -> Path:
    """A category of tiny pictures, no two alike: 4, 2 and 3 of them, or as many as there really are."""
    train, good, anomalous = COUNTS[name] if whole else (4, 2, 3)
    value = sum(map(ord, name))

    def put(path: str, count: int, start: int = 0, size: int = 4) -> None:
        (root / name / path).parent.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = np.full((size, size), 255 if "mask" in path else (value + start + number) % 256, np.uint8)
            pixels[0, 0] = 0
            (root / name / path.format(number)).write_bytes(encode_png(pixels))

    put("train/good/{:03d}.png", train)
    put("test/good/{:03d}.png", good, 60)
    put("test/crack/{:03d}.png", 2, 120)
    put("ground_truth/crack/{:03d}_mask.png", 2)
    put("test/dent/{:03d}.png", anomalous - 2, 180)
    put("ground_truth/dent/{:03d}_mask.png", anomalous - 2)
    return root / name


def pack(archive: Path, *folders: Path, mode: Any = "w", below: str = "") -> Path:
    with tarfile.open(archive, mode) as file:
        for folder in folders:
            file.add(folder, f"{below}{folder.name}")
    return archive


def options(source: Path, *categories: str, check_counts: bool = False) -> Options:
    return Options(source=str(source), categories=categories, check_counts=check_counts)


def test_the_table_has_the_published_totals() -> None:
    assert len(COUNTS) == 15
    assert tuple(map(sum, zip(*COUNTS.values(), strict=True))) == (3629, 467, 1258)


def test_several_categories_in_one_model(tmp_path: Path) -> None:
    for name in ("screw", "tile", "wood"):
        write_category(tmp_path, name)
    (tmp_path / "notes").mkdir()
    data = build(options(tmp_path, "tile", "screw"))
    entries = data.entries()
    assert Counter((e.class_name, e.split, e.defect) for e in entries) == {
        (name, *kind): count
        for name in ("screw", "tile")
        for kind, count in {
            ("train", "good"): 4,
            ("test", "good"): 2,
            ("test", "crack"): 2,
            ("test", "dent"): 1,
        }.items()
    }
    assert entries[0].image_id == "tile/train/good/000.png"
    for entry in entries:
        content, mask = data.read(entry)
        assert content == (tmp_path / entry.image_id).read_bytes()
        assert (mask is not None) == entry.is_anomaly
    everything = build(options(tmp_path))
    assert [one.class_name for one in everything.categories] == ["screw", "tile", "wood"]
    check_dataset("mvtec_ad", source=str(tmp_path), check_counts=False)


@pytest.mark.parametrize("below", ["", "./", "mvtec_anomaly_detection/"])
@pytest.mark.parametrize("archive", ["screw.tar", "mvtec_anomaly_detection.tar", "in the folder"])
def test_tar_files_are_read_where_they_lie(tmp_path: Path, archive: str, below: str) -> None:
    folder = write_category(tmp_path / "unpacked", "screw")
    name = "screw.tar" if archive == "in the folder" else archive
    packed = pack(tmp_path / name, folder, below=below)
    source = tmp_path if archive == "in the folder" else packed
    data, unpacked = build(options(source, "screw")), build(options(tmp_path / "unpacked", "screw"))
    pairs = list(zip(data.entries(), unpacked.entries(), strict=True))
    assert len(pairs) == 9
    for ours, theirs in pairs:
        assert (ours.image_id, ours.size, ours.defect) == (theirs.image_id, theirs.size, theirs.defect)
        assert data.read(ours) == unpacked.read(theirs)
    travelled = pickle.loads(pickle.dumps(data))
    assert travelled.read(pairs[-1][0]) == data.read(pairs[-1][0])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "unpacked"])  # nothing was unpacked


def test_a_folder_that_is_a_category(tmp_path: Path) -> None:
    assert len(build(options(write_category(tmp_path, "screw"))).entries()) == 9


@pytest.mark.parametrize("name", ["screw.tar.xz", "mvtec_anomaly_detection.tar.xz"])
def test_a_compressed_archive_is_refused_with_the_remedy(tmp_path: Path, name: str) -> None:
    archive = pack(tmp_path / name, write_category(tmp_path / "unpacked", "screw"), mode="w:xz")
    for source in (tmp_path, archive):
        with pytest.raises(DataError) as caught:
            build(options(source, "screw"))
        assert f"run tar -xf {archive} -C {tmp_path} and set data.dataset.source to {tmp_path}" in str(caught.value)


def test_full_counts_pass_and_others_do_not(tmp_path: Path) -> None:
    folder = write_category(tmp_path, "toothbrush", whole=True)
    assert len(build(options(tmp_path, check_counts=True)).entries()) == 102
    (folder / "train/good/007.png").unlink()
    (folder / "ground_truth").rename(tmp_path / "masks")
    message = (
        r"toothbrush: train/good holds 59 images, expected 60; ground_truth holds 0 images, expected 30; extract the"
        r" archive again, or set data.dataset.check_counts=false"
    )
    with pytest.raises(DataError, match=message):
        build(options(tmp_path, check_counts=True))
    data = build(options(tmp_path))
    assert all(data.read(entry)[1] is None for entry in data.entries())


def test_a_truncated_tar_file_is_refused(tmp_path: Path) -> None:
    archive = pack(tmp_path / "toothbrush.tar", write_category(tmp_path / "unpacked", "toothbrush", whole=True))
    assert len(build(options(archive, check_counts=True)).entries()) == 102
    content = archive.read_bytes()
    with tarfile.open(archive) as file:
        member = file.getmember("toothbrush/train/good/030.png")
    for length in (member.offset_data + 20, member.offset):  # inside an image, and just before one
        archive.write_bytes(content[:length])
        with pytest.raises(
            DataError, match=r"toothbrush.tar: (is truncated|.*train/good holds \d+ images, expected 60)"
        ):
            build(options(archive, check_counts=True))


def test_a_tar_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "screw.tar").write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(DataError, match=r"screw.tar: is truncated or no tar file \(.*\); fetch it again"):
        build(options(tmp_path, "screw"))


def test_missing_categories(tmp_path: Path) -> None:
    write_category(tmp_path, "screw")
    with pytest.raises(DataError, match=r"does not hold the category tile, wood \(.*\); it has: screw$"):
        build(options(tmp_path, "tile", "screw", "wood"))
    with pytest.raises(DataError, match=r"nowhere: no such file or folder"):
        build(options(tmp_path / "nowhere", "screw"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"does not hold any category of MVTec AD"):
        build(options(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("categories", "message"),
    [("screws", "no category of MVTec AD; did you mean 'screw'"), (["tile", "tile"], "twice")],
)
def test_category_names_are_checked(categories: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExperimentConfig().override({"data.dataset": {"name": "mvtec_ad", "source": "x", "categories": categories}})


@pytest.mark.shared
def test_the_real_screws(shared_data: Path) -> None:
    if not (shared_data / "mvtec_ad" / "screw").is_dir():
        pytest.skip("RAYDIFF_DATA has no mvtec_ad/screw")
    data = build(options(shared_data / "mvtec_ad", "screw", check_counts=True))
    assert all(data.read(entry)[1] for entry in data.entries() if entry.is_anomaly)
