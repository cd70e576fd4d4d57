"""Training from kept grids: the same bits, once made, whatever happens to the files or the run."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from raydiff.artifact import read_folder
from raydiff.config import ExperimentConfig
from raydiff.detector import build_space
from raydiff.errors import ConfigError, DataError, StorageError
from raydiff.experiment import cached, fit_locally, open_run
from raydiff.grids import Grids, layout, reading
from raydiff.images import to_tensor
from raydiff.runtime import CHECKPOINTS, LocalRuntime
from raydiff.shards import ShardSet, TrainingBatch
from raydiff.spaces.feature import FeatureSpace
from raydiff.splits import training_images
from raydiff.storage import PARTIAL, Storage
from raydiff.tracking import progress_line, read_metrics
from raydiff.views import Views

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "views": {"augmentation.rotation": 20, "augmentation.views": 3, "training.horizontal_flip": True},
    "turned": {"objective.condition": "rotation", "training.accumulation_steps": 3, "training.precision": "bfloat16"},
    "tiles": {"tiles.size": [4, 4], "tiles.cell": 1, "space.grid": [4, 4], "scoring.blur": 0},
}


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call of the space's ``encode`` was given."""
    calls: list[int] = []
    encode = FeatureSpace.encode

    def counted(self: FeatureSpace, images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(FeatureSpace, "encode", counted)
    return calls


def trained(config: ExperimentConfig, path: Path, shards: ShardSet) -> str:
    """The digest of the artefact's files that a score depends on; where grids lie is in its config."""
    fit_locally(config, path, shards)
    folder = read_folder(path / "artifact")
    return "".join((folder.path / name).read_bytes().hex() for name in ("weights.safetensors", "calibration.json"))


def parts(place: Path) -> list[Path]:
    return sorted(place.rglob("*.parquet"))


@pytest.mark.parametrize("way", WAYS)
def test_no_bit_of_the_result_changes(
    feature_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path, way: str
) -> None:
    config = feature_config.override(WAYS[way])
    without = trained(config.override({"data.cache_mb": 0}), tmp_path / "without", digit_shards)
    remembered = trained(config, tmp_path / "remembered", digit_shards)
    kept = trained(config.override({"data.grids": str(tmp_path / "grids")}), tmp_path / "kept", digit_shards)
    assert without == remembered == kept
    again = trained(config.override({"data.grids": str(tmp_path / "grids")}), tmp_path / "again", digit_shards)
    assert again == kept
    made = [[line for line in read_metrics(tmp_path / run) if "grids_made" in line] for run in ("kept", "again")]
    assert made[0]
    assert not made[1], "the second run found them"


def test_balanced_classes_are_streamed_from_grids_too(
    feature_config: ExperimentConfig, uneven_config: ExperimentConfig, uneven_shards: ShardSet, tmp_path: Path
) -> None:
    config = feature_config.override({"data.dataset": uneven_config.data.dataset.model_dump(), **WAYS["views"]})
    config = config.override({"training.balance_classes": True, "space.num_fit_images": 20})
    remembered = trained(config, tmp_path / "remembered", uneven_shards)
    assert (
        trained(config.override({"data.grids": str(tmp_path / "grids")}), tmp_path / "kept", uneven_shards)
        == remembered
    )


def test_a_run_that_is_resumed_reads_on_and_ends_the_same(
    feature_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path, encoded: list[int]
) -> None:
    """Interrupted in the middle of an epoch; its own grids are there until its network is trained."""
    config = feature_config.override({"data.grids": "run", "augmentation.shift": 0.2, "augmentation.views": 2})
    without = trained(config.override({"data.grids": None}), tmp_path / "without", digit_shards)
    with pytest.raises(KeyboardInterrupt):
        fit_locally(config, tmp_path / "cut", digit_shards, on_metrics=_interrupting(12))
    assert parts(tmp_path / "cut" / "grids")
    encoded.clear()
    assert trained(config, tmp_path / "cut", digit_shards) == without
    num_held_out = digit_shards.count("calibration")
    assert sum(encoded) <= 2 * num_held_out, "held-out loss and calibration; no training image"
    assert not (tmp_path / "cut" / "grids").exists()
    assert sorted(p.name for p in (tmp_path / "cut" / CHECKPOINTS).iterdir())[-1] == "step-00000024"


def _interrupting(step: int) -> Any:
    def interrupt(line: Mapping[str, Any]) -> None:
        if line["step"] == step and "loss" in line:
            raise KeyboardInterrupt

    return interrupt


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of 10 digits, row groups of 3."""
    monkeypatch.setattr(layout, "_PART_BYTES", 10 * 6 * 16 * 4)
    monkeypatch.setattr(layout, "_GROUP_BYTES", 3 * 6 * 16 * 4)


@pytest.mark.usefixtures("small_parts")
def test_what_is_whole_is_kept_and_the_rest_is_made_anew(
    feature_config: ExperimentConfig,
    digit_shards: ShardSet,
    tmp_path: Path,
    encoded: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A file that is missing, one that is truncated, another program's, another part's: each is named and made anew."""
    config = feature_config.override({"data.grids": str(tmp_path / "grids")})
    first = trained(config, tmp_path / "first", digit_shards)
    files = parts(tmp_path / "grids")
    assert len(files) == -(-digit_shards.count("train") // 10)
    contents = [file.read_bytes() for file in files]
    files[0].unlink()
    files[1].write_bytes(contents[1][:-100])
    files[2].write_bytes(b"")
    pq.write_table(pq.read_table(digit_shards.uri + "/" + digit_shards.shard_names("train")[0]), files[3])
    files[4].write_bytes(contents[5])
    encoded.clear()
    with caplog.at_level(logging.WARNING, "raydiff.grids"):
        assert trained(config, tmp_path / "second", digit_shards) == first
    assert [file.read_bytes() for file in files] == contents
    assert [file.name for file in files if f"{file.name}: " in caplog.text] == [file.name for file in files[1:5]]
    line = next(line for line in read_metrics(tmp_path / "second") if "grids_made" in line)
    assert (line["grids_made"], line["grids_missing"]) == (5, 5)
    assert progress_line(line, 24, 16).startswith("grids: 5 of 5 files made")


@pytest.mark.usefixtures("small_parts")
def test_a_page_that_is_garbled_is_named(
    feature_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path
) -> None:
    """It is found when it is read; the run then goes on once the file is removed."""
    config = feature_config.override({"data.grids": str(tmp_path / "grids")})
    first = trained(config, tmp_path / "first", digit_shards)
    file = parts(tmp_path / "grids")[1]
    content = bytearray(file.read_bytes())
    place = pq.ParquetFile(file).metadata.row_group(1).column(2).data_page_offset + 200
    content[place] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"{file.name}: these grids cannot be read \(.*\); remove it and resume"):
        trained(config, tmp_path / "second", digit_shards)
    file.unlink()
    assert trained(config, tmp_path / "second", digit_shards) == first


@pytest.mark.usefixtures("small_parts")
def test_grids_that_were_half_made_are_gone_on_with(
    feature_config: ExperimentConfig,
    digit_shards: ShardSet,
    tmp_path: Path,
    encoded: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from raydiff.grids.writing import Maker

    config = feature_config.override({"data.grids": str(tmp_path / "grids")})
    content, made = Maker.content, list[str]()

    def stopping(self: Maker, grids: Any, part: Any) -> Any:
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(part.name)
        return content(self, grids, part)

    monkeypatch.setattr(Maker, "content", stopping)
    with pytest.raises(KeyboardInterrupt):
        trained(config, tmp_path / "run", digit_shards)
    assert sorted(made) == [file.name for file in parts(tmp_path / "grids")]
    monkeypatch.setattr(Maker, "content", content)
    encoded.clear()
    trained(config, tmp_path / "run", digit_shards)
    num_train = digit_shards.count("train")
    assert num_train - 40 < sum(encoded) <= num_train - 40 + 2 * digit_shards.count("calibration") + 40


class Pair:
    """Two workers in two threads: what :class:`raydiff.runtime.Runtime` is to what makes grids."""

    def __init__(self) -> None:
        self.values: list[torch.Tensor] = [torch.zeros(0)] * 2
        self.lines: list[Mapping[str, Any]] = []
        self.barrier = threading.Barrier(2, timeout=60)

    def rank(self, rank: int) -> Any:
        runtime = LocalRuntime(Path(), rank=rank, world_size=2, on_metrics=self.lines.append if rank == 0 else len)

        def reduce_mean(values: torch.Tensor) -> torch.Tensor:
            self.values[rank] = values
            self.barrier.wait()
            mean = (self.values[0] + self.values[1]) / 2
            self.barrier.wait()
            return mean

        runtime.reduce_mean = reduce_mean  # type: ignore[method-assign]
        return runtime


@pytest.mark.usefixtures("small_parts")
def test_two_workers_make_each_grid_once_and_stream_their_shares(
    feature_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path, encoded: list[int]
) -> None:
    """From step 7 on, windows of 50 images: each worker's batches are what it would encode, bit for bit."""
    config = feature_config.override(
        {"data.grids": str(tmp_path / "grids"), "data.shuffle_window": 50, **WAYS["views"]}
    )  # fmt: skip
    space = build_space(config)
    space.fit(training_images(config, digit_shards, 40))
    encoded.clear()
    views, pair = Views.of(config, rotates=False), Pair()

    def batches(rank: int) -> list[TrainingBatch]:
        grids = Grids.of(config, tmp_path / "run", digit_shards)
        assert grids is not None
        stream = grids.stream(space, views, pair.rank(rank))(7)
        return [next(stream) for _ in range(20)]

    with ThreadPoolExecutor(2) as pool:
        shares = list(pool.map(batches, (0, 1)))
    assert sum(encoded) == 6 * digit_shards.count("train"), "three views, flipped and not"
    assert pair.lines[-1]["grids_made"] == len(parts(tmp_path / "grids"))
    for rank, share in enumerate(shares):
        images = cached(config, digit_shards, rank=rank, world_size=2)(7)
        for batch, plain in zip(share, images, strict=False):
            assert batch.ids == plain.ids
            assert batch.epochs.tolist() == plain.epochs.tolist()
            drawn = views.drawn([(config.seed, int(e), i) for e, i in zip(plain.epochs, plain.ids, strict=True)])
            pictures = to_tensor(views.pictures(plain.images, plain.ids, drawn))
            turned = torch.stack([p.flip(-1) if v.flip else p for p, v in zip(pictures, drawn, strict=True)])
            assert batch.grids is not None
            assert torch.equal(torch.from_numpy(batch.grids), space.encode(turned))


@pytest.mark.slow
@pytest.mark.usefixtures("small_parts")
def test_kill_9_in_the_middle_of_a_file(
    feature_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path, encoded: list[int]
) -> None:
    """The process ends while it writes its fourth file. That is not there; what was left of it goes after a day."""
    config = feature_config.override({"data.grids": str(tmp_path / "grids")})
    script = f"""
import itertools, json, os, shutil, signal
from pathlib import Path
from raydiff.config import ExperimentConfig
from raydiff.experiment import fit_locally
from raydiff.grids import layout
from raydiff.shards import ShardSet
layout._PART_BYTES, layout._GROUP_BYTES = {layout._PART_BYTES}, {layout._GROUP_BYTES}
copy, calls = shutil.copyfileobj, itertools.count()
def killed(source, target, *rest):
    if list(Path({str(tmp_path / "grids")!r}).rglob("*.parquet"))[2:]:
        target.write(source.read(100))
        target.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    copy(source, target, *rest)
shutil.copyfileobj = killed
fit_locally(ExperimentConfig.model_validate(json.loads(input())), Path({str(tmp_path / "run")!r}),
            ShardSet.open({digit_shards.uri!r}))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(config.to_dict()), capture_output=True, text=True, check=False
    )
    assert done.returncode == -9
    (left,) = (tmp_path / "grids").rglob(f"{PARTIAL}*")
    assert len(parts(tmp_path / "grids")) == 3
    os.utime(left, (0, 0))
    resumed = trained(config, tmp_path / "run", digit_shards)
    num_held_out = digit_shards.count("calibration")
    assert sum(encoded) <= digit_shards.count("train") - 30 + 2 * num_held_out + 40
    assert not left.exists()
    assert resumed == trained(feature_config, tmp_path / "without", digit_shards)


@pytest.mark.slow
def test_grids_in_an_object_store(
    feature_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path, object_store: Callable[[str], str]
) -> None:
    """Shared by two runs, the second of which lies in the store itself and has its own."""
    place = object_store("store/grids")
    without = trained(feature_config, tmp_path / "without", digit_shards)
    for name in ("first", "second"):
        assert trained(feature_config.override({"data.grids": place}), tmp_path / name, digit_shards) == without
    assert not [line for line in read_metrics(tmp_path / "second") if "grids_made" in line]
    own = Storage.of(object_store("store/run"))
    fit_locally(feature_config.override({"data.grids": "run"}), own, digit_shards)
    assert (read_folder(own / "artifact").path / "weights.safetensors").read_bytes().hex() in without
    assert not [name for name in own.files() if name.endswith(".parquet")]


def test_one_is_told_that_memory_does_not_hold_it(
    feature_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = feature_config.override({"data.cache_mb": 0})
    with caplog.at_level(logging.WARNING, "raydiff.training"):
        fit_locally(config, tmp_path / "run", digit_shards)
    assert "takes 1 MB, more than data.cache_mb (0): most is made anew each time; set data.grids to run" in caplog.text


def test_sets_differ_by_what_grids_depend_on_and_nothing_else(
    feature_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path
) -> None:
    place = tmp_path / "grids"
    config = feature_config.override({"data.grids": str(place), "training.num_steps": 1})

    def sets(overrides: Mapping[str, Any]) -> int:
        run = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        fit_locally(config.override(overrides), run, digit_shards)
        return len(list(place.iterdir()))

    assert sets({}) == 1
    assert sets({"seed": 5, "denoiser.width": 8, "training.batch_size": 8}) == 1
    assert sets({"space.num_components": 5}) == 2
    assert sets({"training.horizontal_flip": True}) == 3
    assert sets({"augmentation.shift": 0.1, "augmentation.views": 2}) == 4
    assert sets({"augmentation.shift": 0.1, "augmentation.views": 2, "seed": 5}) == 5, "views are drawn by the seed"
    assert sets({"data.grids_dtype": "float16"}) == 6


def test_float16_is_half_as_large_and_another_config(
    feature_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path
) -> None:
    config = feature_config.override({"data.grids": str(tmp_path / "full")})
    half = config.override({"data.grids": str(tmp_path / "half"), "data.grids_dtype": "float16"})
    assert half.digest() != config.digest()
    assert config.digest() == feature_config.digest()
    weights = [trained(each, tmp_path / f"run{i}", digit_shards) for i, each in enumerate((config, half))]
    assert weights[0] != weights[1]
    losses = [[line["loss"] for line in read_metrics(tmp_path / f"run{i}") if "loss" in line] for i in (0, 1)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    full, halved = (pq.read_table(parts(tmp_path / name)[0]) for name in ("full", "half"))
    assert full.schema.field("grid").type.byte_width == 2 * halved.schema.field("grid").type.byte_width
    values = [np.frombuffer(t["grid"][0].as_py(), d) for t, d in ((full, np.float32), (halved, np.float16))]
    np.testing.assert_array_equal(values[0].astype(np.float16), values[1])
    assert full["image_id"].to_pylist() == halved["image_id"].to_pylist()


def test_no_room_is_said_before_any_work(
    feature_config: ExperimentConfig,
    digit_shards: ShardSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = namedtuple("usage", ("total", "used", "free"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6, 1000))
    config = feature_config.override({"data.grids": str(tmp_path / "grids")})
    with pytest.raises(StorageError, match=r"grids need .* MB \(1 view\(s\) of each image\) and 0.0 MB are free; make"):
        fit_locally(config, tmp_path / "run", digit_shards)
    assert not parts(tmp_path)


def test_what_cannot_be_kept_is_refused(feature_config: ExperimentConfig) -> None:
    for overrides, message in (
        ({"data.grids": "run", "augmentation.shift": 0.1, "augmentation.views": 0}, "set augmentation.views, or leave"),
        ({"data.grids": "run", "tiles.size": [4, 4], "tiles.crops": "random"}, "set tiles.crops to regular, or leave"),
        ({"data.grids_dtype": "float16"}, "grids_dtype is float16 and grids is not set"),
        ({"data.grids": ""}, "grids is empty; give run, a folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            feature_config.override(overrides)


def test_a_space_that_costs_nothing_keeps_none(
    tiny_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path
) -> None:
    fit_locally(tiny_config.override({"data.grids": str(tmp_path / "grids")}), tmp_path / "run", digit_shards)
    assert not (tmp_path / "grids").exists()


def test_a_run_knows_its_grids_from_anywhere(
    feature_config: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_run(tmp_path / "a", feature_config.override({"data.grids": "g"}), resume=False).data.grids == str(
        tmp_path / "g"
    )
    assert open_run(tmp_path / "b", feature_config.override({"data.grids": "run"}), resume=False).data.grids == "run"


def test_no_file_is_opened_for_each_row(
    feature_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names are kept when a file has been open once, and rows are read file by file, however few may stay open."""
    monkeypatch.setattr("raydiff.grids.layout._PART_BYTES", 1)  # an image a file
    monkeypatch.setattr("raydiff.grids.reading._MAX_OPEN_FILES", 4)
    opened: list[Any] = []
    original = reading._opened

    def counted(*arguments: Any) -> Any:
        opened.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(reading, "_opened", counted)
    fit_locally(feature_config.override({"data.grids": str(tmp_path / "grids")}), tmp_path / "run", digit_shards)
    grids, storage, _ = opened[0]
    assert len(grids.parts) == digit_shards.count("train") > 4
    rows = np.random.default_rng(0).integers(0, len(grids.parts), 500)
    files = reading.GridFiles(grids, storage)
    for expected in (len(np.unique(rows)), 0):
        opened.clear()
        files.images(rows)
        assert len(opened) == expected
    files.read(rows, np.zeros_like(rows))
    assert len(opened) <= len(np.unique(rows))
    files.close()
