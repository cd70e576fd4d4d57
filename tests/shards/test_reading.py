from __future__ import annotations

import json
import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from raydiff.config import DataConfig
from raydiff.errors import DataError, StorageError
from raydiff.images import ImageSpec, decode, decode_mask
from raydiff.shards import LabelledImages, ShardSet, write_shards

SPEC = ImageSpec((16, 20), 1)


@pytest.fixture
def own_shards(part_shards: ShardSet, tmp_path: Path) -> Path:
    """A copy of the shards that a test may spoil."""
    return Path(shutil.copytree(part_shards.uri, tmp_path / "shards"))


def test_what_is_known_without_reading_a_shard(part_shards: ShardSet, digit_shards: ShardSet) -> None:
    assert [part_shards.count(split) for split in ("train", "calibration", "test")] == [30, 10, 12]
    assert part_shards.classes == part_shards.normal_classes == ("parts",)
    assert part_shards.has_masks
    assert part_shards.skipped == ()
    assert part_shards.row_groups("train") == (30,)
    assert part_shards.shard_names("test") == ("test-00000.parquet",)
    assert digit_shards.normal_classes == ("0", "1", "2")
    assert digit_shards.classes == tuple("0123456789")
    assert not digit_shards.has_masks
    assert pickle.loads(pickle.dumps(part_shards)) == part_shards


def test_reading_gives_what_the_files_hold(parts: Path, part_shards: ShardSet) -> None:
    batches = list(part_shards.read("test", SPEC, batch_size=5))
    assert [len(batch.ids) for batch in batches] == [5, 5, 2]
    for batch in batches:
        assert batch.images.dtype == np.uint8
        assert batch.images.shape == (len(batch.ids), 16, 20, 1)
        assert batch.masks is not None
        for place, image_id in enumerate(batch.ids):
            assert np.array_equal(batch.images[place], decode((parts / image_id).read_bytes(), SPEC, image_id))
            burnt = "burn" in image_id
            assert batch.is_anomaly[place] == burnt
            assert batch.defects[place] == ("burn" if burnt else "good")
            expected = np.zeros((16, 20), dtype=np.bool_)
            if burnt:
                mask = parts / "ground_truth/burn" / f"{Path(image_id).stem}_mask.png"
                expected = decode_mask(mask.read_bytes(), SPEC, "m")
                assert expected.any()
            assert np.array_equal(batch.masks[place], expected)


def test_batches_cross_row_groups_and_shards(tmp_path: Path, digit_shards: ShardSet) -> None:
    spec = ImageSpec((8, 8), 1)
    whole = list(digit_shards.read("test", spec, batch_size=10_000))
    assert len(whole) == 1
    assert whole[0].masks is None
    pieces = list(digit_shards.read("test", spec, batch_size=37))
    assert [len(piece.ids) for piece in pieces[:-1]] == [37] * (len(pieces) - 1)
    assert [image_id for piece in pieces for image_id in piece.ids] == whole[0].ids
    assert np.array_equal(np.concatenate([piece.images for piece in pieces]), whole[0].images)


def test_labels_are_places_in_classes(digit_shards: ShardSet) -> None:
    for batch in digit_shards.read("test", ImageSpec((8, 8), 1)):
        for label, anomalous, defect in zip(batch.labels, batch.is_anomaly, batch.defects, strict=True):
            assert anomalous == (label >= 3)
            assert defect == (digit_shards.classes[label] if anomalous else "good")


def test_reading_some_shards_only(parts_config: Callable[..., DataConfig], tmp_path: Path) -> None:
    config = parts_config(image_size=(256, 256), channels=3, shard_format="raw", shard_mb=1)
    shards = write_shards(config, str(tmp_path))
    assert shards.shard_names("test") == ("test-00000.parquet",)  # one row group is the least
    first, spec = shards.shard_names("train")[0], ImageSpec.of(config)
    assert [batch.ids for batch in shards.read("train", spec, only=[first])] == [
        batch.ids for batch in shards.read("train", spec)
    ]
    assert list(shards.read("train", spec, only=[])) == []


def test_an_image_that_does_not_fit_the_spec(part_shards: ShardSet, caplog: pytest.LogCaptureFixture) -> None:
    strict = ImageSpec((16, 20), 1, "strict")
    with pytest.raises(DataError, match=r"test/burn/001.png: is 16 x 21 .* expects 16 x 20"):
        list(part_shards.read("test", strict))
    with caplog.at_level(logging.WARNING):
        read = list(part_shards.read("test", strict, on_bad_image="skip"))
    assert sum(len(batch.ids) for batch in read) == 4
    assert len(caplog.records) == 8
    assert "left out: test/burn/001.png" in caplog.text


def test_raw_pixels_of_another_size_are_refused(parts_config: Callable[..., DataConfig], tmp_path: Path) -> None:
    shards = write_shards(parts_config(shard_format="raw"), str(tmp_path))
    with pytest.raises(
        DataError, match=r"the shard holds raw pixels of 16 x 20 x 1, the config asks for 8 x 8 x 3; run"
    ):
        list(shards.read("train", ImageSpec((8, 8), 3)))


def test_no_shards(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: holds no shards \(manifest.json is missing\); run raydiff prepare"):
        ShardSet.open(str(tmp_path / "nowhere"))
    (tmp_path / "train-00000.parquet").touch()
    with pytest.raises(DataError, match=r"is not finished \(manifest.json is missing\)"):
        ShardSet.open(str(tmp_path))


def test_a_newer_format(own_shards: Path) -> None:
    manifest = json.loads((own_shards / "manifest.json").read_text())
    (own_shards / "manifest.json").write_text(json.dumps(manifest | {"format_version": 2}))
    with pytest.raises(
        DataError, match=r"manifest.json: has format version 2, this raydiff reads up to 1; update raydiff"
    ):
        ShardSet.open(str(own_shards))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a manifest of shards"),
        ("[]", "is not a manifest of shards"),
        ('{"kind": "raydiff-shards", "format_version": 1}', r"is not a manifest of shards \(KeyError: 'digest'\)"),
        ('{"kind": "artifact"}', "is a 'artifact', not a set of shards"),
    ],
)
def test_another_manifest(own_shards: Path, content: str, message: str) -> None:
    (own_shards / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=message):
        ShardSet.open(str(own_shards))


def test_a_missing_shard(own_shards: Path) -> None:
    (own_shards / "test-00000.parquet").unlink()
    with pytest.raises(DataError, match=r"test-00000.parquet: the shard is missing; run raydiff prepare again"):
        ShardSet.open(str(own_shards))


def test_a_truncated_shard(own_shards: Path) -> None:
    path = own_shards / "train-00000.parquet"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2])
    message = (
        rf"train-00000.parquet: the shard has {size // 2} bytes, the manifest says {size}; run raydiff prepare again"
    )
    with pytest.raises(DataError, match=message):
        ShardSet.open(str(own_shards))


def test_a_shard_truncated_while_it_is_in_use(own_shards: Path) -> None:
    shards = ShardSet.open(str(own_shards))
    path = own_shards / "train-00000.parquet"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(
        DataError, match=r"train-00000.parquet: the shard cannot be read \(.*\); run raydiff prepare again"
    ):
        list(shards.read("train", SPEC))


def test_a_garbled_shard(own_shards: Path) -> None:
    path = own_shards / "train-00000.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # one bit, inside an image
    path.write_bytes(content)
    shards = ShardSet.open(str(own_shards))
    with pytest.raises(
        DataError, match=r"train-00000.parquet: the shard cannot be read \(.*CRC.*\); run raydiff prepare"
    ):
        list(shards.read("train", SPEC))
    with pytest.raises(DataError, match=r"train-00000.parquet: its SHA-256 is not the manifest's, so it was changed"):
        shards.verify()


def test_untouched_shards_verify(part_shards: ShardSet) -> None:
    part_shards.verify()


def test_shards_of_another_config(
    part_shards: ShardSet, parts_config: Callable[..., DataConfig], tmp_path: Path
) -> None:
    part_shards.check(parts_config(image_size=(64, 64), shard_mb=1, shard_format="raw"))
    for fields, message in (
        ({"split_seed": 3}, r"was prepared with data.split_seed = 0, the config says 3; run raydiff prepare again"),
        ({"calibration_fraction": 0.5}, r"was prepared with data.calibration_fraction = 0.25"),
        ({"dataset": {"name": "digits"}}, r"prepared with data.dataset.name = folder, the config says digits; run"),
    ):
        with pytest.raises(DataError, match=message):
            part_shards.check(parts_config(**fields))
    raw = write_shards(parts_config(shard_format="raw"), str(tmp_path))
    raw.check(parts_config())
    with pytest.raises(DataError, match=r"was prepared with data.image_size = \[16, 20\], the config says \[8, 8\]"):
        raw.check(parts_config(image_size=(8, 8)))


def test_the_options_of_the_data_set_are_compared(digit_shards: ShardSet) -> None:
    digit_shards.check(DataConfig(dataset={"name": "digits", "normal": [0, 1, 2]}))
    with pytest.raises(
        DataError,
        match=r"data.dataset.normal = \['0', '1', '2'\], the config says \['8'\]; run raydiff prepare again, or",
    ):
        digit_shards.check(DataConfig(dataset={"name": "digits", "normal": "8"}))


def test_shards_serve_where_the_source_lies_elsewhere_or_is_gone(
    parts: Path, part_shards: ShardSet, parts_config: Callable[..., DataConfig], tmp_path: Path
) -> None:
    moved = str(tmp_path / "nowhere" / parts.name)
    for source in (moved, str(parts) + "/"):
        part_shards.check(parts_config(dataset={"name": "folder", "source": source}))
    for options, message in (
        ({"category": "screw"}, "data.dataset.category = None, the config says screw"),
        ({"test_fraction": 0.5}, r"data.dataset.test_fraction = 0.0, the config says 0.5"),
    ):
        with pytest.raises(DataError, match=message):
            part_shards.check(parts_config(dataset={"name": "folder", "source": moved} | options))


def test_shards_of_a_folder_that_was_deleted(parts: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(parts, tmp_path / "parts"))
    config = DataConfig(dataset={"name": "folder", "source": str(source)}, image_size=(16, 20))
    write_shards(config, str(tmp_path / "shards"))
    shutil.rmtree(source)
    shards = ShardSet.open(str(tmp_path / "shards"))
    shards.check(config)
    assert sum(len(batch.ids) for batch in shards.read("train", SPEC)) == 30


def test_an_unknown_kind_of_place() -> None:
    with pytest.raises(StorageError, match=r"^ftp://host/x: .*give a folder or s3://bucket/path"):
        ShardSet.open("ftp://user:secret@host/x?key=secret")


def test_a_batch_has_named_fields(part_shards: ShardSet) -> None:
    assert isinstance(next(part_shards.read("calibration", SPEC)), LabelledImages)
