"""Real files, broken in the ways that files break: what is said of them, and what is left when they are skipped."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from raydiff.config import DataConfig
from raydiff.contracts import Split
from raydiff.errors import DataError, StorageError
from raydiff.images import ImageSpec
from raydiff.shards import ShardSet, TrainingOrder, write_shards
from raydiff.shards.groups import GroupReader
from raydiff.shards.integrity import fault_of, find_faults
from raydiff.shards.order import Share
from raydiff.storage import Storage

SPEC = ImageSpec((128, 128), 1)
BAD = "train-00002.parquet"


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Digits drawn large: five shards to train on, two to calibrate on, some to test on."""
    config = DataConfig(
        dataset={"name": "digits", "normal": ("0", "1", "2")}, image_size=(128, 128), shard_format="raw", shard_mb=1,
        max_test_images=80,
    )  # fmt: skip
    shards = write_shards(config, str(tmp_path_factory.mktemp("many")))
    assert len(shards.shard_names("train")) == 5
    return shards


@pytest.fixture
def own(many: ShardSet, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(many.uri, tmp_path / "shards"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garble(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # one bit, inside an image
    path.write_bytes(content)


def garble_footer(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-40:-8] = os.urandom(32)
    path.write_bytes(content)


def take_anothers(path: Path) -> None:
    shutil.copy(path.with_name("train-00004.parquet"), path)


def drop_rows(path: Path) -> None:
    pq.write_table(pq.read_table(path).slice(0, 40), path)


BREAKS = {
    truncate: r"the shard has \d+ bytes, the manifest says \d+",
    empty: "the shard is empty",
    garble: "its SHA-256 is not the manifest's, so it was changed",
    garble_footer: "its SHA-256 is not the manifest's, so it was changed",
    take_anothers: r"the shard has \d+ bytes, the manifest says \d+",
    drop_rows: r"the shard has \d+ bytes, the manifest says \d+",
    Path.unlink: "the shard is missing",
}


@pytest.mark.parametrize("spoil", BREAKS, ids=lambda spoil: spoil.__name__)
def test_a_bad_shard_is_named_or_skipped_and_counted(
    many: ShardSet, own: Path, spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    spoil(own / BAD)
    with pytest.raises(DataError, match=rf"/{BAD}: .*; run raydiff prepare again, or leave it out with data.on_bad"):
        for _ in ShardSet.open(str(own)).read("train", SPEC):
            pass
    with caplog.at_level(logging.WARNING):
        shards = ShardSet.open(str(own), on_bad_shard="skip")
    (left,) = shards.left_out
    assert (left.record.name, left.record.rows) == (BAD, 64)
    assert re.fullmatch(BREAKS[spoil], left.reason)
    assert f"left out: {own}/{BAD} (64 train images): {left.reason}" in caplog.text
    assert shards.count("train") == many.count("train") - 64
    read = [image_id for batch in shards.read("train", SPEC) for image_id in batch.ids]
    whole = [image_id for batch in many.read("train", SPEC) for image_id in batch.ids]
    assert read == whole[:128] + whole[192:]


def test_what_was_written_has_no_fault(many: ShardSet) -> None:
    assert find_faults(Storage.of(many.uri), many.records) == {}
    assert ShardSet.open(many.uri, on_bad_shard="skip") == many


def test_the_digests_are_those_of_the_images_that_are_left(many: ShardSet, own: Path) -> None:
    truncate(own / BAD)
    (own / many.shard_names("test")[0]).unlink()
    shards = ShardSet.open(str(own), on_bad_shard="skip")
    assert shards.digest not in (many.digest, shards.normal_digest)
    assert shards.normal_digest != many.normal_digest
    assert shards.whole_normal_digest == many.normal_digest == many.whole_normal_digest
    only_test = replace(many, uri=str(own)).without({many.shard_names("test")[0]: "lost"})
    assert only_test.normal_digest == many.normal_digest
    assert only_test.digest != many.digest


def test_every_worker_passes_over_the_same_images(many: ShardSet, own: Path) -> None:
    """The order is made of the good shards: each of their images once per epoch, in equal batches, for any number."""
    empty(own / BAD)
    order = TrainingOrder.of(ShardSet.open(str(own), on_bad_shard="skip"), seed=0, window=128)
    assert order.num_rows == many.count("train") - 64
    for world_size in (1, 2, 3, 5, 7):
        shares = [Share(7, 0, rank, world_size) for rank in range(world_size)]
        taken = [[row for window in order.epoch(0) for row in share.of(order, window)[0].tolist()] for share in shares]
        assert sorted(row for rows in taken for row in rows) == list(range(order.num_rows))


def test_skipped_shards_are_refused_by_a_config_that_does_not_allow_it(many: ShardSet, own: Path) -> None:
    config = DataConfig.model_validate({**DataConfig().model_dump(), **many.data})
    garble(own / BAD)
    shards = ShardSet.open(str(own), on_bad_shard="skip")
    shards.check(config.model_copy(update={"on_bad_shard": "skip"}))
    with pytest.raises(DataError, match=rf"{BAD}: its SHA-256 .* \(1 such shard\(s\) left out\); run raydiff prepare"):
        shards.check(config)


@pytest.mark.parametrize("split", ["train", "calibration"])
def test_nothing_is_left(many: ShardSet, own: Path, split: Split) -> None:
    for name in many.shard_names(split):
        empty(own / name)
    with pytest.raises(
        DataError, match=rf"/{split}-00000.parquet: the shard is empty, and without it no {split} image"
    ):
        ShardSet.open(str(own), on_bad_shard="skip")


def test_a_shard_that_breaks_in_use_is_named(many: ShardSet, own: Path) -> None:
    shards = ShardSet.open(str(own))
    with GroupReader(shards, "train") as reader:
        reader.table(1)
        empty(own / BAD)
        (own / "train-00003.parquet").unlink()
        assert reader.table(1).num_rows == 64
        with pytest.raises(
            DataError, match=rf"{BAD}: the shard cannot be read \(.*; the shard is empty\); run raydiff"
        ):
            reader.table(2)
        with pytest.raises(
            DataError, match=r"train-00003.parquet: .*; the shard is missing\); run raydiff prepare again"
        ):
            reader.table(3)


def test_a_shard_that_comes_back_is_read(many: ShardSet, own: Path) -> None:
    """As when a disk is mounted again: the open file is stale, the shard is not at fault."""
    with GroupReader(ShardSet.open(str(own)), "train") as reader:
        expected = reader.table(2)
        content = (own / BAD).read_bytes()
        (own / BAD).write_bytes(content[:1000])  # the file that is open
        os.replace(own / BAD, own / "aside")  # noqa: PTH105
        (own / BAD).write_bytes(content)
        assert reader.table(2).equals(expected)


def test_rows_that_are_not_the_manifests(many: ShardSet, own: Path) -> None:
    drop_rows(own / BAD)
    manifest = json.loads((own / "manifest.json").read_text())
    record = next(record for record in manifest["shards"] if record["name"] == BAD)
    content = (own / BAD).read_bytes()
    record |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (own / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        DataError, match=rf"{BAD}: .*\(row group 0 has 40 rows, the manifest says 64; its bytes are the"
    ):
        list(ShardSet.open(str(own)).read("train", SPEC))


def test_a_place_that_does_not_answer_is_no_shards_fault(many: ShardSet) -> None:
    """A refused connection, with no retries."""
    gone = fs.S3FileSystem(
        access_key="a", secret_key="b", endpoint_override="127.0.0.1:1", scheme="http", region="us-east-1",
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1), connect_timeout=1,
    )  # fmt: skip
    with pytest.raises(StorageError, match=r"^s3://bucket/x/train-00000.parquet: cannot be read .* see that the place"):
        fault_of(Storage("s3://bucket/x", gone, "bucket/x"), many.records[0])


def test_preparing_again_gives_a_broken_shard_its_bytes_back(tmp_path: Path) -> None:
    """With and without a manifest; what is whole is not written again."""
    config = DataConfig(dataset={"name": "digits", "normal": "0"}, image_size=(64, 64), shard_format="raw", shard_mb=1)
    shards = write_shards(config, str(tmp_path))
    names = ("train-00000.parquet", "test-00001.parquet")
    expected = {record.name: (tmp_path / record.name).read_bytes() for record in shards.records}
    for keep_manifest in (True, False):
        for name in names:
            garble(tmp_path / name)
        inodes = {name: (tmp_path / name).stat().st_ino for name in expected}
        if not keep_manifest:
            (tmp_path / "manifest.json").unlink()
        assert write_shards(config, str(tmp_path)) == shards
        assert {name: (tmp_path / name).read_bytes() for name in expected} == expected
        kept = {name for name in expected if (tmp_path / name).stat().st_ino == inodes[name]}
        assert kept == set(expected) - set(names)
