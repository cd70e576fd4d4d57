"""A scorer's own network on the whole way: fit, resume, artefact, folds, tiles, benchmark, sweep, export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from raydiff.artifact import Folder, read_folder, write_folder
from raydiff.config import ExperimentConfig, component_options
from raydiff.contracts import Split
from raydiff.detector import Detector, DiffusionDetector, load_detector
from raydiff.errors import ConfigError, RaydiffError, StorageError
from raydiff.experiment import calibrated, fit_locally, split_batches
from raydiff.exported import load_exported
from raydiff.exporting import export
from raydiff.heads import HEADS, planted_examples, with_timed_scorer, with_trained_scorer
from raydiff.images import to_tensor, to_uint8
from raydiff.planting import Plants
from raydiff.shards import ShardSet, write_shards
from raydiff.splits import image_ids, labelled_batches, training_images
from raydiff.sweep import EvidenceCache, measure_setting
from raydiff.testing import small_images
from raydiff.tracking import progress_line, read_metrics

SCORING: dict[str, Any] = {
    "name": "discriminative", "num_steps": 10, "num_anomalies": 40, "num_fit_images": 30, "width": 8, "depth": 1,
    "start": 0.3, "blur": 0.5,
}  # fmt: skip


def with_head(config: ExperimentConfig, **fields: object) -> ExperimentConfig:
    return config.override({"scoring": {**SCORING, **fields}})


def head_of(detector: Detector) -> dict[str, Tensor]:
    assert isinstance(detector, DiffusionDetector)
    return detector.scorer.state()


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def without_of(run: Path) -> list[str]:
    """The images that a run's only head never saw."""
    (kept,) = (run / HEADS).iterdir()
    return list(json.loads((kept / "origin.json").read_text())["without"])


@pytest.fixture(scope="module")
def config(tiny_config: ExperimentConfig) -> ExperimentConfig:
    return with_head(tiny_config).override({"training.num_steps": 8, "training.checkpoint_every": 8})


@pytest.fixture(scope="module")
def lines() -> list[Mapping[str, Any]]:
    return []


@pytest.fixture(scope="module")
def run(
    config: ExperimentConfig, digit_shards: ShardSet, lines: list[Mapping[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:  # fmt: skip
    path = tmp_path_factory.mktemp("head") / "run"
    fit_locally(config, path, digit_shards, on_metrics=lines.append)
    return path


def test_a_run_has_a_head_in_its_artefact(run: Path, lines: list[Mapping[str, Any]], digit_images: Tensor) -> None:
    loaded = load_detector(run / "artifact")
    assert isinstance(loaded, DiffusionDetector)
    assert loaded.num_evaluations == 1
    assert loaded.name == "unet/discriminative"
    whole = loaded.score(digit_images)
    assert whole.map is not None
    for i in range(0, 20, 7):
        alone = loaded.score(digit_images[i : i + 1])
        assert torch.equal(alone.image[0], whole.image[i])
        assert alone.map is not None
        assert torch.equal(alone.map[0], whole.map[i])
    assert loaded.predict(digit_images).pred_mask is not None
    assert loaded.explain(digit_images[:2]).reconstruction is not None
    of_head = [line for line in lines if "head_step" in line]
    assert [line["head_step"] for line in of_head] == list(range(1, 11))
    assert lines.index(of_head[0]) == len(lines) - 10  # after the denoiser's
    assert progress_line(of_head[4], 8, 16).startswith("head: step 5/10   50 %  loss ")
    assert not any("head_step" in line for line in read_metrics(run))


def test_a_resumed_run_finds_its_head(
    run: Path, config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path
) -> None:
    again = tmp_path / "run"
    shutil.copytree(run, again)
    shutil.rmtree(again / "artifact")
    lines: list[Mapping[str, Any]] = []
    fit_locally(config, again, digit_shards, on_metrics=lines.append)
    assert not any("head_step" in line for line in lines)
    assert read_folder(again / "artifact").digest == read_folder(run / "artifact").digest
    other = config.override({"scoring.num_steps": 3})
    detector = load_detector(run / "artifact")
    assert isinstance(detector, DiffusionDetector)
    (kept,) = (again / HEADS).iterdir()
    took = json.loads((kept / "progress.json").read_text())["seconds"]
    assert with_timed_scorer(detector, digit_shards, keep_in=again)[1] == took
    fresh = with_trained_scorer(detector.with_scoring(other.scoring), digit_shards, keep_in=again, report=lines.append)
    assert [line["head_step"] for line in lines if "head_step" in line] == [1, 2, 3]
    assert len(list((again / HEADS).iterdir())) == 2
    combined = component_options("scorers", {**other.scoring.model_dump(), "combine": "max", "blur": 3})
    shared = with_trained_scorer(detector.with_scoring(combined), digit_shards, keep_in=again, report=lines.append)
    assert len([line for line in lines if "head_step" in line]) == 3
    assert same(head_of(shared), head_of(fresh))
    assert isinstance(shared, DiffusionDetector)
    found, seconds = with_timed_scorer(shared, digit_shards, keep_in=again)
    assert same(head_of(found), head_of(fresh))
    assert 0 < seconds in [json.loads(path.read_text())["seconds"] for path in (again / HEADS).glob("*/progress.json")]
    assert (
        with_timed_scorer(
            detector.with_scoring(component_options("scorers", "denoising_error")), digit_shards, keep_in=again
        )[1]
        == 0
    )


def test_no_calibration_or_test_image_has_a_part_in_it(
    run: Path, config: ExperimentConfig, digit_shards: ShardSet
) -> None:
    detector = load_detector(run / "artifact")
    assert isinstance(detector, DiffusionDetector)
    examples = planted_examples(detector, Plants(30, 40, (), (3,)), digit_shards)
    assert (examples.num_normal, len(examples)) == (30, 70)
    seen = {image.tobytes() for image in examples.images}
    splits: tuple[Split, ...] = ("calibration", "test")
    for split in splits:
        own = {image.tobytes() for part in labelled_batches(digit_shards, split, config) for image in part.images}
        assert not own & seen
    assert torch.equal(to_tensor(examples.images[:30]), training_images(config, digit_shards, 30))
    assert not examples.shares(range(30)).any()
    assert examples.shares(range(30, 70)).flatten(1).any(1).all()
    assert examples.latents([3, 31]).shape == (2, 1, 8, 8)


def test_the_head_follows_from_the_seed(run: Path, config: ExperimentConfig, digit_shards: ShardSet) -> None:
    detector = load_detector(run / "artifact")
    assert isinstance(detector, DiffusionDetector)
    untrained = detector.with_scoring(component_options("scorers", {**SCORING, "combine": "max", "width": 9}))
    first, again = (with_trained_scorer(untrained, digit_shards) for _ in range(2))
    assert same(head_of(first), head_of(again))
    moved = replace(untrained, config=untrained.config.override({"seed": 1}))
    assert not same(head_of(first), head_of(with_trained_scorer(moved, digit_shards)))
    assert with_trained_scorer(first, digit_shards) is first


def test_methods_of_one_network_have_each_their_head(detector: DiffusionDetector, digit_shards: ShardSet) -> None:
    """As cells of a benchmark: a trained network, another scorer, calibrated."""
    bare = detector.with_scoring(component_options("scorers", SCORING))
    with pytest.raises(RaydiffError, match="head is not trained yet"):
        bare.score(small_images(2))
    one = calibrated(bare, digit_shards)
    assert isinstance(one, DiffusionDetector)
    assert one.calibration is not None
    otherwise = one.with_scoring(component_options("scorers", {**SCORING, "combine": "head", "blur": 2}))
    assert same(head_of(otherwise), head_of(one))
    assert not head_of(one.with_scoring(component_options("scorers", {**SCORING, "sees": "image"})))


def test_each_fold_has_a_head_that_never_saw_what_it_judges(tiny_config: ExperimentConfig, tmp_path: Path) -> None:
    config = with_head(tiny_config).override(
        {"data.calibration_fraction": 0, "data.max_train_images": 6, "data.max_test_images": 10,
         "cross_fitting.folds": 2, "training.num_steps": 2}
    )  # fmt: skip
    shards = write_shards(config.data, str(tmp_path / "shards"))
    lines: list[Mapping[str, Any]] = []
    fit_locally(config, tmp_path / "run", shards, on_metrics=lines.append)
    assert [line.get("fold") for line in lines if line.get("head_step") == 10] == ["0", "1", None]
    heads = []
    for fold in ("0", "1"):
        place = tmp_path / "run" / "folds" / fold
        left_out = without_of(place)
        assert left_out == sorted(json.loads((place / "weights.json").read_text()))
        judge = load_detector(place / "artifact")
        assert isinstance(judge, DiffusionDetector)
        heads.append(head_of(judge))
        examples = planted_examples(judge, Plants(30, 1, (), (3,)), shards, without=left_out)
        assert examples.num_normal == 3
    assert len(left_out) == 3
    assert set(left_out) < set(image_ids(shards, "train"))
    assert not same(*heads)


def test_contaminated_images_are_left_out_of_it(tiny_config: ExperimentConfig, tmp_path: Path) -> None:
    config = with_head(tiny_config).override(
        {"data.max_train_images": 24, "data.max_test_images": 10, "training.num_steps": 2, "cross_fitting.folds": 2,
         "contamination.max_share": 0.2, "contamination.cutoff": 0}
    )  # fmt: skip
    shards = write_shards(config.data, str(tmp_path / "shards"))
    fit_locally(config, tmp_path / "run", shards)
    without = without_of(tmp_path / "run")
    assert without
    assert without == sorted(json.loads((tmp_path / "run" / "weights.json").read_text()))


def test_tiles_have_a_head_for_tiles(tiny_config: ExperimentConfig, tmp_path: Path) -> None:
    config = with_head(tiny_config).override(
        {"data.image_size": [16, 24], "tiles.size": [8, 8], "tiles.overlap": 0, "tiles.cell": 2,
         "data.max_train_images": 30, "data.max_test_images": 10, "training.num_steps": 2}
    )  # fmt: skip
    shards = write_shards(config.data, str(tmp_path / "shards"))
    detector = fit_locally(config, tmp_path / "run", shards)
    assert isinstance(detector, DiffusionDetector)
    assert planted_examples(detector, Plants(12, 12, (), (3,)), shards).images.shape == (24, 8, 8, 1)
    images = next(split_batches(shards, "test", config))
    whole, loaded = detector.score(images), load_detector(tmp_path / "run" / "artifact")
    assert whole.map is not None
    assert whole.map.shape[-2:] == (16, 24)
    assert torch.equal(loaded.score(images[3:4]).image[0], whole.image[3])


def test_a_sweep_trains_one_head_for_all_that_share_it(
    detector: DiffusionDetector, digit_shards: ShardSet, tiny_config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []

    def counted(one: Detector, *given: Any, **more: Any) -> Detector:
        trained.append(one)
        return with_trained_scorer(one, *given, **more)

    monkeypatch.setattr("raydiff.sweep.evidence.with_trained_scorer", counted)
    cache = EvidenceCache.of(detector, digit_shards, max_images=24, kinds=("noise_patch",))
    for fields in ({}, {"combine": "max"}, {"blur": 2}, {"width": 4}, {"combine": "head"}):
        values = measure_setting(cache, with_head(tiny_config, **fields))
        assert values["nfe"] == 1
        assert 0 <= values["selection_auroc"] <= 1
    assert len(trained) == 2
    evidence = cache.evidence(with_head(tiny_config)).normals
    own = with_trained_scorer(detector.with_scoring(component_options("scorers", SCORING)), digit_shards)
    assert isinstance(own, DiffusionDetector)
    assert torch.equal(evidence, own.measure(to_tensor(cache.normals)))


@pytest.mark.slow
def test_an_export_scores_alike(run: Path, digit_images: Tensor, tmp_path: Path) -> None:
    detector = load_detector(run / "artifact")
    export(detector, tmp_path / "head.pt2")
    exported = load_exported(tmp_path / "head.pt2")
    images = to_tensor(to_uint8(digit_images))
    torch.testing.assert_close(exported.score(images).image, detector.score(images).image, rtol=1e-3, atol=1e-3)


def test_a_head_cannot_be_distilled(run: Path) -> None:
    from raydiff.distillation import student_config

    with pytest.raises(ConfigError, match="does not come down to one predicted image"):
        student_config(load_detector(run / "artifact"))


def test_an_anomaly_covers_cells_by_their_share(detector: DiffusionDetector, digit_shards: ShardSet) -> None:
    examples = planted_examples(detector, Plants(2, 2, (), (3,)), digit_shards)
    masks = np.zeros((4, 8, 8), dtype=np.bool_)
    masks[2, :2, :1] = True
    halves = replace(examples, masks=masks, cells=(4, 4)).shares([2])[0, 0]
    assert float(halves[0, 0]) == 0.5
    assert float(halves.sum()) == 0.5


def test_whoever_comes_second_takes_the_head_that_is_there(
    detector: DiffusionDetector, digit_shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two cells that train it at once: nobody replaces what a third may be reading, and nobody fails."""
    bare = detector.with_scoring(component_options("scorers", {**SCORING, "num_steps": 1}))
    first = Event()
    theirs: list[tuple[Detector, float]] = []

    def slow(*given: Any, **more: Any) -> Any:
        if not first.is_set():  # somebody else trains and keeps one, once this has seen that there is none
            first.set()
            theirs.append(with_timed_scorer(bare, digit_shards, keep_in=tmp_path))
            kept.extend(tmp_path.glob("heads/*/*"))
            times.extend(path.stat().st_ino for path in kept)
        return planted_examples(*given, **more)

    kept, times = list[Path](), list[int]()
    monkeypatch.setattr("raydiff.heads.planted_examples", slow)
    mine, seconds = with_timed_scorer(bare, digit_shards, keep_in=tmp_path)
    assert same(head_of(mine), head_of(theirs[0][0]))
    assert seconds == theirs[0][1]
    assert len(kept) == 4
    assert [path.stat().st_ino for path in kept] == times


def test_writers_that_collide_both_go_on(
    detector: DiffusionDetector, digit_shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = detector.with_scoring(component_options("scorers", {**SCORING, "num_steps": 1}))

    def late(place: Path, kind: Any, files: Mapping[str, bytes], **more: Any) -> str:
        write_folder(place, kind, files, **more)
        raise StorageError(f"{place}: cannot be written (Directory not empty)")

    monkeypatch.setattr("raydiff.heads.write_folder", late)
    mine, seconds = with_timed_scorer(bare, digit_shards, keep_in=tmp_path)
    assert seconds > 0
    assert head_of(mine)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        with_timed_scorer(bare, digit_shards, keep_in=tmp_path / "file")


def test_a_head_that_is_torn_away_is_trained_again(
    detector: DiffusionDetector, digit_shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = detector.with_scoring(component_options("scorers", {**SCORING, "num_steps": 1}))
    first = with_trained_scorer(bare, digit_shards, keep_in=tmp_path)

    def torn(place: Path) -> Folder:
        folder = read_folder(place)
        shutil.rmtree(place)
        return folder

    monkeypatch.setattr("raydiff.heads.read_folder", torn)
    again, seconds = with_timed_scorer(bare, digit_shards, keep_in=tmp_path)
    assert same(head_of(first), head_of(again))
    assert seconds > 0


def test_methods_of_one_network_share_the_heads_of_its_folds(
    tiny_config: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config.override(
        {"data.calibration_fraction": 0, "data.max_train_images": 4, "data.max_test_images": 10,
         "cross_fitting.folds": 2, "training.num_steps": 2}
    )  # fmt: skip
    shards, run = write_shards(config.data, str(tmp_path / "shards")), tmp_path / "run"
    trained = fit_locally(config, run, shards)
    assert isinstance(trained, DiffusionDetector)
    made = []

    def counted(*given: Any, **more: Any) -> Any:
        made.append(more["without"])
        return planted_examples(*given, **more)

    monkeypatch.setattr("raydiff.heads.planted_examples", counted)
    for combine in ("mean", "max"):
        bare = trained.with_scoring(component_options("scorers", {**SCORING, "num_steps": 2, "combine": combine}))
        found = calibrated(with_trained_scorer(bare, shards, keep_in=run), shards, run_dir=run)
        assert isinstance(found, DiffusionDetector)
        assert found.calibration is not None
    assert [len(left_out) for left_out in made] == [0, 2, 2]
    assert [without_of(run / "folds" / fold) for fold in ("0", "1")] == [sorted(left_out) for left_out in made[1:]]
