"""The steps that fit and the benchmarks share; contract 3: nothing of a test label reaches an artefact."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from raydiff.artifact import read_folder
from raydiff.config import ExperimentConfig
from raydiff.errors import ArtifactError, ConfigError, DataError, StorageError
from raydiff.experiment import (
    artifact_of,
    begin_run,
    cached,
    fit_baselines,
    fit_locally,
    held_out_images,
    open_run,
    split_batches,
    streamed,
)
from raydiff.shards import ShardSet, write_shards
from raydiff.storage import Storage, as_place
from raydiff.tracking import read_metrics


def test_changing_test_labels_changes_no_byte_of_the_artefact(tiny_config: ExperimentConfig, tmp_path: Path) -> None:
    """The same normal images; the test folders swap their names, and one test image goes."""
    digits = load_digits()
    for folder, digit, count in (("train/good", 1, 24), ("test/good", 1, 4), ("test/seven", 7, 5)):
        (tmp_path / "one" / folder).mkdir(parents=True)
        for i, image in enumerate(digits.images[digits.target == digit][-count:]):
            Image.fromarray((image * 15.9).astype(np.uint8)).save(tmp_path / "one" / folder / f"{i}.png")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two" / "test" / "good").rename(tmp_path / "two" / "test" / "swap")
    (tmp_path / "two" / "test" / "seven").rename(tmp_path / "two" / "test" / "good")
    (tmp_path / "two" / "test" / "swap").rename(tmp_path / "two" / "test" / "seven")
    (tmp_path / "two" / "test" / "good" / "0.png").unlink()
    contents = []
    source = tmp_path / "source"
    for name in ("one", "two"):
        (tmp_path / name).rename(source)  # the path is part of the config, so both stand at the same one
        config = tiny_config.override({"data.dataset": {"name": "folder", "source": str(source)}})
        shards = write_shards(config.data, str(tmp_path / f"{name}-shards"))
        detectors = [fit_locally(config, tmp_path / f"{name}-run", shards), *fit_baselines(config, shards, ["knn"])]
        contents.append([detector.files() for detector in detectors])
        source.rename(tmp_path / name)
    assert contents[0] == contents[1]
    digests = [ShardSet.open(str(tmp_path / f"{name}-shards")).digest for name in ("one", "two")]
    assert digests[0] != digests[1], "the data sets do differ"


def test_images_that_do_not_fit_in_memory_are_decoded_again(
    tiny_config: ExperimentConfig, digit_shards: ShardSet, run_dir: Path, tmp_path: Path
) -> None:
    """The same batches, from any step on, and so the same weights bit for bit."""
    config = tiny_config.override({"data.cache_mb": 0, "data.shuffle_window": 100, "training.batch_size": 32})
    for start in (0, 5):
        streams = (stream(config, digit_shards)(start) for stream in (cached, streamed))
        for left, right in islice(zip(*streams, strict=True), 12):
            assert left.ids == right.ids
            assert np.array_equal(left.images, right.images)
            assert np.array_equal(left.epochs, right.epochs)
    again = fit_locally(tiny_config.override({"data.cache_mb": 0}), tmp_path, digit_shards)
    assert again.files()["weights.safetensors"] == (run_dir / "artifact" / "weights.safetensors").read_bytes()


def test_every_local_run_gives_the_same_artefact(
    tiny_config: ExperimentConfig, digit_shards: ShardSet, run_dir: Path, tmp_path: Path
) -> None:
    again = fit_locally(tiny_config, tmp_path, digit_shards)
    assert again.artifact_digest == artifact_digest(run_dir)


def test_a_baseline_says_how_many_images_it_was_fitted_on(
    tiny_config: ExperimentConfig, digit_shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def number() -> int:
        (found,) = fit_baselines(tiny_config, digit_shards, ["knn"])
        return int(found.provenance["num_train_images"])

    assert number() == digit_shards.count("train")
    monkeypatch.setattr("raydiff.fitting._MAX_BASELINE_IMAGES", 40)
    assert number() == 40


def artifact_digest(run_dir: Path) -> str:
    from raydiff.artifact import read_folder

    return read_folder(artifact_of(run_dir)).digest


def test_held_out_images_are_the_first_calibration_normals(
    tiny_config: ExperimentConfig, digit_shards: ShardSet
) -> None:
    held_out = held_out_images(tiny_config.override({"training.validation_images": 5}), digit_shards)
    first = next(split_batches(digit_shards, "calibration", tiny_config))
    assert held_out.images.equal(first[:5])
    assert len(held_out.ids) == len(held_out.labels) == 5


def test_a_run_folder_begins_once(tiny_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path) -> None:
    config = open_run(tmp_path / "run", tiny_config, resume=False)
    assert open_run(tmp_path / "run", tiny_config, resume=False) == config, "nothing has begun yet"
    begin_run(tmp_path / "run", config, digit_shards)
    assert open_run(tmp_path / "run", None, resume=True) == config
    with pytest.raises(ConfigError, match="already holds a run; add --resume"):
        open_run(tmp_path / "run", tiny_config, resume=False)
    with pytest.raises(ConfigError, match="holds no run to resume"):
        open_run(tmp_path / "other", None, resume=True)
    (tmp_path / "run" / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match="holds no run to resume"):
        open_run(tmp_path / "run", None, resume=True)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"cannot be made .*change --out"):
        open_run(tmp_path / "file" / "run", tiny_config, resume=False)


def test_what_does_not_fit_together_does_not_begin(
    tiny_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path
) -> None:
    for path, value, error in (
        ("data.image_size", [9, 9], ConfigError),
        ("data.calibration_fraction", 0.5, DataError),
        ("scoring", {"name": "reconstruction", "num_inference_steps": 500}, ConfigError),
    ):
        with pytest.raises(error):
            begin_run(tmp_path / "run", tiny_config.override({path: value}), digit_shards)
    assert not (tmp_path / "run").exists()


def test_local_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = ExperimentConfig().override({"data.dataset": {"name": "folder", "source": "parts"}, "data.shards": "s"})
    begun = open_run(tmp_path / "run", config, resume=False)
    assert begun.data.shards == str(tmp_path / "s")
    assert begun.data.dataset.model_dump()["source"] == str(tmp_path / "parts")
    networks = {"space": {"name": "feature", "weights": "a.pth"}}
    networks["scoring"] = {"name": "conditioned", "feature_weights": "b.safetensors"}
    begun = open_run(tmp_path / "run", config.override(networks), resume=False)
    assert begun.space.model_dump()["weights"] == str(tmp_path / "a.pth")
    assert begun.scoring.model_dump()["feature_weights"] == str(tmp_path / "b.safetensors")
    remote = config.override({"data.shards": "s3://bucket/s"})
    assert open_run(tmp_path / "run", remote, resume=False).data.shards == "s3://bucket/s"


def test_artefact_of_a_run_folder_or_itself(run_dir: Path, tmp_path: Path) -> None:
    assert artifact_of(run_dir) == artifact_of(run_dir / "artifact") == run_dir / "artifact"
    with pytest.raises(ArtifactError, match="no such folder"):
        artifact_of(tmp_path / "nothing")


def test_a_run_in_a_store_learns_what_one_on_disk_does(
    tiny_config: ExperimentConfig, digit_shards: ShardSet, run_dir: Path, object_store: Callable[[str], str],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Also stopped and gone on with; the artefact has the same bytes, the metrics say the same but for the speed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = as_place(object_store(f"store/{tmp_path.name}/run"))
    config = open_run(place, tiny_config, resume=False)

    def stop(metrics: Mapping[str, Any]) -> None:
        if metrics["step"] == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_locally(config, place, digit_shards, on_metrics=stop)
    lines: list[Mapping[str, Any]] = []
    again = open_run(place, None, resume=True)
    fit_locally(again, place, digit_shards, on_metrics=lines.append)
    assert lines[0] == {"step": 16, "resumed": True, "images_repeated": 4 * 16}
    assert artifact_of(place) == artifact_of(place / "artifact")
    assert read_folder(place / "artifact").digest == read_folder(run_dir / "artifact").digest
    mine, theirs = (
        [(line["step"], line["loss"]) for line in read_metrics(run) if "loss" in line] for run in (place, run_dir)
    )
    assert mine == theirs
    assert isinstance(place, Storage)
    assert {name.partition("/")[0] for name in place.files() if name} == {
        "artifact", "checkpoints", "config.yaml", "metrics.jsonl", "tensorboard"
    }  # fmt: skip
    steps = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert set((place / "checkpoints").folders()) == steps
    with pytest.raises(ConfigError, match=r"^s3://store/.*/run: already holds a run"):
        open_run(place, tiny_config, resume=False)
    with pytest.raises(ConfigError, match=r"^s3://store/.*/none: holds no run to resume"):
        open_run(place / "none", None, resume=True)


def test_too_few_images_to_calibrate_on_are_told_before_training(tiny_config: ExperimentConfig, tmp_path: Path) -> None:
    config = tiny_config.override({"data.calibration_fraction": 0.02})
    shards = write_shards(config.data, str(tmp_path / "shards"))
    assert 0 < shards.count("calibration") < 4
    seen = list[object]()
    with pytest.raises(ConfigError, match=r"^\d calibration image\(s\); a threshold needs at least 4.*few_shot"):
        fit_locally(config, tmp_path / "run", shards, on_metrics=seen.append)
    assert not seen
