from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raydiff import registry
from raydiff.config import DataConfig
from raydiff.errors import DataError, StorageError
from raydiff.images import ImageSpec
from raydiff.shards import SCHEMA, ShardPlan, ShardSet, plan_shards, write_shard, write_shards

Config = Callable[..., DataConfig]


@pytest.fixture
def own_parts(parts: Path, tmp_path: Path) -> Path:
    """A copy of the folder that a test may spoil."""
    return Path(shutil.copytree(parts, tmp_path / "parts"))


def config_of(source: Path, **fields: Any) -> DataConfig:
    return DataConfig(**{"dataset": {"name": "folder", "source": str(source)}, "image_size": (16, 20)} | fields)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def test_what_a_shard_holds(parts: Path, part_shards: ShardSet) -> None:
    table = pq.read_table(Path(part_shards.uri) / "test-00000.parquet")
    assert table.schema.equals(SCHEMA)
    rows = table.to_pylist()
    assert [row["image_id"] for row in rows[:2]] == ["test/burn/000.png", "test/burn/001.png"]
    assert rows[1]["image"] == (parts / "test/burn/001.png").read_bytes()
    assert rows[1]["mask"] == (parts / "ground_truth/burn/001_mask.png").read_bytes()
    assert rows[-1]["mask"] is None
    assert {name: rows[1][name] for name in ("format", "height", "width", "channels", "split", "class_name")} == {
        "format": "png", "height": 16, "width": 21, "channels": 1, "split": "test", "class_name": "parts",
    }  # fmt: skip
    assert (rows[1]["defect"], rows[1]["is_anomaly"]) == ("burn", True)


def test_equal_runs_give_equal_bytes(parts_config: Config, tmp_path: Path) -> None:
    for name in "ab":
        write_shards(parts_config(), str(tmp_path / name))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert set(files(tmp_path / "a")) == {
        "manifest.json", "train-00000.parquet", "calibration-00000.parquet", "test-00000.parquet",
    }  # fmt: skip


def test_progress_counts_images(parts_config: Config, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_shards(parts_config(), str(tmp_path), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(30, 52), (40, 52), (52, 52)]
    write_shards(parts_config(), str(tmp_path), progress=lambda done, total: seen.append((done, total)))
    assert seen[3:] == [(52, 52)]


class StopError(Exception):
    pass


def test_an_interrupted_run_goes_on(parts_config: Config, tmp_path: Path) -> None:
    def interrupted(write: Any, plans: list[ShardPlan]) -> Iterable[Any]:
        yield write(plans[0])
        raise StopError

    with pytest.raises(StopError):
        write_shards(parts_config(), str(tmp_path / "a"), map_plans=interrupted)
    assert list(files(tmp_path / "a")) == ["train-00000.parquet"]
    with pytest.raises(DataError, match=r"a: is not finished \(manifest.json is missing\); run raydiff prepare again"):
        ShardSet.open(str(tmp_path / "a"))
    before = (tmp_path / "a/train-00000.parquet").stat()
    write_shards(parts_config(), str(tmp_path / "a"))
    assert (tmp_path / "a/train-00000.parquet").stat().st_ino == before.st_ino  # not written again
    write_shards(parts_config(), str(tmp_path / "b"))
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_half_written_shard_is_written_again(parts_config: Config, tmp_path: Path) -> None:
    write_shards(parts_config(), str(tmp_path))
    expected = files(tmp_path)
    for name in ("train-00000.parquet", "test-00000.parquet"):
        truncate(tmp_path / name)
    (tmp_path / ".partial-0123-train-00000.parquet").write_bytes(b"left over")
    write_shards(parts_config(), str(tmp_path))
    assert files(tmp_path) == expected


def test_another_plan_replaces_the_shards(parts_config: Config, tmp_path: Path) -> None:
    first = write_shards(parts_config(), str(tmp_path))
    (tmp_path / "train-00007.parquet").write_bytes(b"stale")
    (tmp_path / "notes.txt").write_text("the user's own")
    second = write_shards(parts_config(split_seed=1), str(tmp_path))
    assert second.digest != first.digest
    assert set(files(tmp_path)) == {
        "manifest.json", "notes.txt", "train-00000.parquet", "calibration-00000.parquet", "test-00000.parquet",
    }  # fmt: skip


def test_the_digest_is_of_the_data_not_of_its_storage(parts_config: Config, tmp_path: Path) -> None:
    def digest(**fields: Any) -> str:
        return write_shards(parts_config(**fields), str(tmp_path / str(len(list(tmp_path.iterdir()))))).digest

    reference = digest()
    assert digest(shard_mb=1) == reference
    assert digest(shard_format="raw") == reference
    assert digest(image_size=(8, 8)) == reference
    assert digest(split_seed=1) != reference
    assert digest(calibration_fraction=0.5) != reference


@pytest.mark.parametrize("changed", ["train/good/000.jpg", "ground_truth/burn/003_mask.png"])
def test_the_digest_sees_every_file(own_parts: Path, part_shards: ShardSet, tmp_path: Path, changed: str) -> None:
    config = config_of(own_parts, dataset={"name": "folder", "source": str(own_parts)})
    assert write_shards(config, str(tmp_path / "same")).digest == part_shards.digest
    path = own_parts / changed
    path.write_bytes(path.read_bytes() + b"\0")
    assert write_shards(config, str(tmp_path / "changed")).digest != part_shards.digest


def test_other_pixels_at_the_same_size_are_written_again(own_parts: Path, tmp_path: Path) -> None:
    path = own_parts / "test/good/000.png"
    pixels = np.asarray(Image.open(path))
    Image.fromarray(pixels).save(path, compress_level=0)
    size = path.stat().st_size
    before = write_shards(config_of(own_parts), str(tmp_path / "out"))
    Image.fromarray(255 - pixels).save(path, compress_level=0)
    assert path.stat().st_size == size
    after = write_shards(config_of(own_parts), str(tmp_path / "out"))
    assert after.digest != before.digest
    assert after.normal_digest == before.normal_digest
    rows = pq.read_table(tmp_path / "out/test-00000.parquet").to_pylist()
    assert next(row["image"] for row in rows if row["image_id"] == "test/good/000.png") == path.read_bytes()


def test_masks_that_came_later_are_written(own_parts: Path, tmp_path: Path) -> None:
    (own_parts / "ground_truth").rename(tmp_path / "masks")
    before = write_shards(config_of(own_parts), str(tmp_path / "out"))
    kept = (tmp_path / "out/train-00000.parquet").stat().st_ino
    assert not before.has_masks
    (tmp_path / "masks").rename(own_parts / "ground_truth")
    after = write_shards(config_of(own_parts), str(tmp_path / "out"))
    assert after.has_masks
    assert after.digest != before.digest
    assert (tmp_path / "out/train-00000.parquet").stat().st_ino == kept  # no mask there, so nothing to write


def test_the_digests_depend_neither_on_where_the_files_lie_nor_on_when_they_were_written(
    own_parts: Path, part_shards: ShardSet, tmp_path: Path
) -> None:
    for path in own_parts.rglob("*.*"):
        os.utime(path, (1, 1))
    moved = write_shards(config_of(own_parts), str(tmp_path / "out"))
    assert {record.plan for record in moved.records}.isdisjoint(record.plan for record in part_shards.records)
    assert (moved.digest, moved.normal_digest) == (part_shards.digest, part_shards.normal_digest)


def test_a_truncated_image_stops_the_run_and_is_named(own_parts: Path, tmp_path: Path) -> None:
    truncate(own_parts / "train/good/001.png")
    said = rf"^{own_parts}: train/good/001.png: cannot be decoded .*data.on_bad_image: skip"
    with pytest.raises(DataError, match=said):
        write_shards(config_of(own_parts), str(tmp_path / "out"))
    assert "manifest.json" not in files(tmp_path / "out")


def test_skipped_images_are_named_and_counted(own_parts: Path, tmp_path: Path) -> None:
    for name in ("train/good/001.png", "test/burn/002.png"):
        truncate(own_parts / name)
    config = config_of(own_parts, on_bad_image="skip")
    shards = write_shards(config, str(tmp_path / "out"))
    assert {skipped.image_id for skipped in shards.skipped} == {"train/good/001.png", "test/burn/002.png"}
    assert all("cannot be decoded" in skipped.reason for skipped in shards.skipped)
    assert sum(shards.count(split) for split in ("train", "calibration", "test")) == 50
    assert write_shards(config, str(tmp_path / "out")).skipped == shards.skipped
    with pytest.raises(DataError, match=r"was prepared without 2 bad image\(s\), the first t"):
        shards.check(config_of(own_parts))
    with pytest.raises(DataError, match=r"cannot be decoded"):  # a later run that does not allow it
        write_shards(config_of(own_parts), str(tmp_path / "out"))


def test_nothing_left_after_skipping(own_parts: Path, tmp_path: Path) -> None:
    for path in (own_parts / "train/good").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"no train image is left after 40 were skipped"):
        write_shards(config_of(own_parts, on_bad_image="skip"), str(tmp_path / "out"))


def test_a_mask_of_another_size_is_named(own_parts: Path, tmp_path: Path) -> None:
    shutil.copy(own_parts / "ground_truth/burn/000_mask.png", own_parts / "ground_truth/burn/001_mask.png")
    said = rf"^{own_parts}: mask of test/burn/001.png: the mask is 16 x 20 and its image 16 x 21"
    with pytest.raises(DataError, match=said):
        write_shards(config_of(own_parts), str(tmp_path / "out"))


def test_strict_finds_the_image_of_another_size(parts_config: Config, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r".jpg: is 16 x 2[12] with 1 channel\(s\); data.resize: strict expects 16 x 20"
    ):
        write_shards(parts_config(resize="strict"), str(tmp_path))


def test_unwritable_output_is_found_before_work_starts(tmp_path: Path, parts_config: Config) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"file/shards: cannot be made \(.*\); change data.shards"):
        write_shards(parts_config(dataset={"name": "folder", "source": "/nowhere"}), str(tmp_path / "file/shards"))


def test_a_write_that_fails_leaves_no_half_written_shard(parts_config: Config, tmp_path: Path) -> None:
    config = parts_config()
    dataset = registry.build("datasets", config.dataset)
    plan = plan_shards(dataset.entries(), config)[0]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # as if the disk were full after 4 kB
    try:
        with pytest.raises(StorageError, match=r"train-00000.parquet: cannot be written \(.*make room there or change"):
            write_shard(plan, dataset, config, str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not files(tmp_path)


def test_the_manifest_says_what_made_it(part_shards: ShardSet, parts_config: Config) -> None:
    manifest = json.loads((Path(part_shards.uri) / "manifest.json").read_text())
    assert manifest["format_version"] == 1
    assert manifest["data"]["dataset"] == parts_config().model_dump(mode="json")["dataset"]
    assert manifest["data"]["calibration_fraction"] == 0.25
    assert [shard["rows"] for shard in manifest["shards"]] == [30, 10, 12]


def test_raw_shards_hold_the_pixels(parts_config: Config, part_shards: ShardSet, tmp_path: Path) -> None:
    config = parts_config(shard_format="raw", resize="pad", channels=3)
    raw = write_shards(config, str(tmp_path))
    for split in ("train", "calibration", "test"):
        expected = list(part_shards.read(split, ImageSpec.of(config), batch_size=7))
        for mine, theirs in zip(raw.read(split, ImageSpec.of(config), batch_size=7), expected, strict=True):
            assert mine.ids == theirs.ids
            assert (mine.images == theirs.images).all()
            assert mine.masks is not None
            assert theirs.masks is not None
            assert (mine.masks == theirs.masks).all()


def test_a_data_set_that_is_handed_over_is_read_in_place_of_the_named_one(parts: Path, tmp_path: Path) -> None:
    config = config_of(parts)
    own = registry.build("datasets", config.dataset)
    elsewhere = config_of(tmp_path / "nowhere")
    shards = write_shards(elsewhere, str(tmp_path / "out"), dataset=own)
    assert shards.digest == write_shards(config, str(tmp_path / "same")).digest
    assert shards.data["dataset"]["source"].endswith("nowhere")
