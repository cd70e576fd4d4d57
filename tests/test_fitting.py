"""A handful of images, folds that each leave some out, and training images that are not all normal."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from raydiff.config import ExperimentConfig, component_options
from raydiff.contracts import Split
from raydiff.crossfit import Fold, calibrated_across, fold_runs, parts_of, remove_checkpoints, suspects_csv, suspicions
from raydiff.detector import BaselineDetector, DiffusionDetector, load_detector
from raydiff.errors import ConfigError
from raydiff.evaluation import evaluate
from raydiff.experiment import cached, calibrated, fit_baseline, fit_locally, held_out_images
from raydiff.fitting import finish
from raydiff.results import load_evaluations, save_evaluations
from raydiff.service.artifacts import describe, load_artifact
from raydiff.shards import ShardSet, write_shards
from raydiff.spaces.pixel import PixelSpace
from raydiff.splits import image_ids, labelled_batches, training_images, weights_of
from raydiff.tracking import progress_line
from raydiff.weighting import read_weights, write_weights

FEW = {
    "data.calibration_fraction": 0,
    "augmentation.shift": 0.1,
    "augmentation.brightness": 0.1,
    "augmentation.views": 4,
    "cross_fitting.views": 4,
    "training.num_steps": 8,
    "training.checkpoint_every": 8,
    "data.max_test_images": 40,
}


def few(config: ExperimentConfig, count: int, **more: object) -> ExperimentConfig:
    return config.override({**FEW, "data.max_train_images": count, **more})


def ids_of(shards: ShardSet, split: Split, config: ExperimentConfig) -> list[str]:
    return [image_id for part in labelled_batches(shards, split, config) for image_id in part.ids]


@pytest.mark.parametrize("count", [1, 3])
def test_a_handful_of_images_gives_a_threshold_that_says_how_little_it_rests_on(
    tiny_config: ExperimentConfig, tmp_path: Path, count: int
) -> None:
    config = few(tiny_config, count)
    shards = write_shards(config.data, str(tmp_path / "shards"))
    assert (shards.count("train"), shards.count("calibration")) == (count, 0)
    detector = fit_locally(config, tmp_path / "run", shards)
    assert detector.calibration is not None
    threshold = detector.calibration.threshold
    assert threshold.num_images == count
    assert threshold.num_scores == len(detector.calibration.scores) == 4 * count
    assert threshold.origin == ("left_out" if count > 1 else "trained_on")
    assert threshold.nominal_fpr == 1 / (count + 1)
    assert threshold.value == detector.calibration.scores.max()
    assert ("trained on" in threshold.rule) == (count == 1)
    assert any(f"rests on {count} independent" in note for note in detector.notes)
    assert any("since its network was trained on them" in note for note in detector.notes) == (count == 1)
    assert any("roughly, since other networks gave its scores" in note for note in detector.notes) == (count > 1)
    smallest = float(detector.calibration.p_value(torch.tensor([1e9]))[0])
    assert smallest == 1 / (count + 1)  # not one over the number of views
    again = load_detector(tmp_path / "run" / "artifact")
    assert again.calibration is not None
    assert again.calibration.threshold == threshold
    evaluation = evaluate(again, shards, num_pictures=0, num_draws=50)
    assert evaluation.rows[0].notes == detector.notes
    save_evaluations(tmp_path / "results.jsonl", [evaluation])
    assert load_evaluations(tmp_path / "results.jsonl")[0].rows[0].notes == detector.notes


def test_each_fold_is_blind_to_what_it_judges(tiny_config: ExperimentConfig, tmp_path: Path) -> None:
    """Another image in its place changes the other folds' networks, and not that of the fold that left it out."""
    config = few(tiny_config, 3, **{"cross_fitting.folds": 3})
    shards = write_shards(config.data, str(tmp_path / "shards"))
    parts = parts_of(config, shards)
    assert sorted(image_id for part in parts for image_id in part) == sorted(image_ids(shards, "train"))
    assert [len(part) for part in parts] == [1, 1, 1]
    lines: list[Mapping[str, Any]] = []
    fit_locally(config, tmp_path / "run", shards, on_metrics=lines.append)
    assert [line.get("fold") for line in lines if line["step"] == 8] == ["0", "1", "2", None]
    assert progress_line(lines[0], 8, config.training.batch_size).startswith("fold 0: step ")
    states = [(tmp_path / "run" / "folds" / str(i) / "artifact" / "weights.safetensors").read_bytes() for i in range(3)]
    assert len(set(states)) == 3
    for number, part in enumerate(parts):
        place = tmp_path / "run" / "folds" / str(number)
        assert read_weights(place, 3).left_out == part
        assert held_out_images(config, shards, part).ids == sorted(part)


def test_a_left_out_image_has_no_part_in_the_weights(tiny_config: ExperimentConfig, tmp_path: Path) -> None:
    """Its pixels may be anything: the fold's network comes out the same bit for bit."""
    source = tmp_path / "source"
    (source / "train" / "good").mkdir(parents=True)
    (source / "test" / "bad").mkdir(parents=True)
    (source / "test" / "good").mkdir(parents=True)
    digits = load_digits()
    for i in range(4):
        Image.fromarray((digits.images[i * 10] * 15.9).astype(np.uint8)).save(source / "train" / "good" / f"{i}.png")
    config = few(
        tiny_config, 4,
        **{"data.dataset": {"name": "folder", "source": str(source)}, "cross_fitting.folds": 2, "seed": 3},
    )  # fmt: skip
    first = write_shards(config.data, str(tmp_path / "one"))
    fit_locally(config, tmp_path / "run-one", first)
    left_out = fold_runs(config, tmp_path / "run-one", first)[0].left_out
    for image_id in left_out:
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(source / "train" / "good" / Path(image_id).name)
    second = write_shards(config.data, str(tmp_path / "two"))
    assert second.digest != first.digest
    fit_locally(config, tmp_path / "run-two", second)
    files = [
        [(tmp_path / run / "folds" / fold / "artifact" / "weights.safetensors").read_bytes() for fold in ("0", "1")]
        for run in ("run-one", "run-two")
    ]
    assert files[0][0] == files[1][0]
    assert files[0][1] != files[1][1]


def test_finished_folds_are_not_trained_again(tiny_config: ExperimentConfig, tmp_path: Path) -> None:
    config = few(tiny_config, 2)
    shards = write_shards(config.data, str(tmp_path / "shards"))
    first = fit_locally(config, tmp_path / "run", shards)
    before = (tmp_path / "run" / "folds" / "0" / "artifact" / "manifest.json").stat().st_mtime_ns
    again = fit_locally(config, tmp_path / "run", shards)
    assert (tmp_path / "run" / "folds" / "0" / "artifact" / "manifest.json").stat().st_mtime_ns == before
    assert again.artifact_digest == first.artifact_digest


@pytest.mark.filterwarnings("ignore:Pydantic serializer")  # a shard of 100 bytes
def test_lost_images_move_nobody_to_another_fold(
    tiny_config: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever judges an image after shards were lost is still the fold that left it out: in the run, and resumed."""
    monkeypatch.setattr("raydiff.shards.layout._MAX_GROUP_ROWS", 4)
    config = few(tiny_config, 16, **{"training.num_steps": 2, "training.checkpoint_every": 2, "cross_fitting.views": 1})
    small = config.data.model_copy(update={"shard_mb": 1e-4, "shard_format": "raw"})
    whole = write_shards(small, str(tmp_path / "shards"))
    assert whole.shard_names("train")[1:]
    run = tmp_path / "run"
    fit_locally(config, run, whole)
    trained = [read_weights(run / "folds" / str(number), 16).left_out for number in range(4)]
    fewer = whole.without({whole.shard_names("train")[0]: "is lost"})
    assert set(parts_of(config, fewer)).isdisjoint(trained)
    assert [fold.left_out for fold in fold_runs(config, run, fewer)] == trained
    detector = finish(run, next((run / "checkpoints").iterdir()), fewer)
    resumed = fit_locally(config.override({"data.on_bad_shard": "skip"}), run, fewer)
    assert [read_weights(run / "folds" / str(number), 16).left_out for number in range(4)] == trained
    for found in (detector, resumed):
        assert found.calibration is not None
        assert found.calibration.threshold.num_images == fewer.count("train")
    folds = [Fold(part, load_detector(run / "folds" / str(i) / "artifact")) for i, part in enumerate(trained)]
    again = calibrated_across(detector, folds, fewer)
    assert torch.equal(again.calibration.scores, detector.calibration.scores)  # type: ignore[union-attr]
    lost = sorted(set(image_ids(whole, "train")) - set(image_ids(fewer, "train")))
    write_weights(run, {lost[0]: 0.0, image_ids(fewer, "train")[0]: 0.5})
    assert list(weights_of(run, fewer).by_id) == image_ids(fewer, "train")[:1]  # the lost have no share in the mean


def test_another_scorer_is_calibrated_on_the_same_folds(tiny_config: ExperimentConfig, tmp_path: Path) -> None:
    config = few(tiny_config, 2)
    shards = write_shards(config.data, str(tmp_path / "shards"))
    detector = fit_locally(config, tmp_path / "run", shards)
    assert isinstance(detector, DiffusionDetector)
    other = detector.with_scoring(component_options("scorers", {"name": "reconstruction", "blur": 0.0}))
    with pytest.raises(ConfigError, match="needs the folds of the run"):
        calibrated(other, shards)
    found = calibrated(other, shards, run_dir=tmp_path / "run")
    assert found.calibration is not None
    assert found.calibration.threshold.num_images == 2
    assert not torch.equal(found.calibration.scores, detector.calibration.scores)  # type: ignore[union-attr]


def test_a_limit_of_calibration_images_counts_no_views(tiny_config: ExperimentConfig, tmp_path: Path) -> None:
    config = few(tiny_config, 6, **{"cross_fitting.folds": 2, "training.num_steps": 2, "calibration.max_images": 4})
    shards = write_shards(config.data, str(tmp_path / "shards"))
    network = fit_locally(config, tmp_path / "run", shards)
    baseline = calibrated(fit_baseline(config, shards, component_options("baselines", "knn")), shards)
    for detector in (network, baseline):
        assert detector.calibration is not None
        assert detector.calibration.threshold.num_images == 4
        assert len(detector.calibration.scores) == 4 * 4


def test_a_baseline_is_calibrated_on_folds_of_its_own(tiny_config: ExperimentConfig, tmp_path: Path) -> None:
    config = few(tiny_config, 3)
    shards = write_shards(config.data, str(tmp_path / "shards"))
    baseline = fit_baseline(config, shards, component_options("baselines", {"name": "knn", "n_neighbors": 1}))
    assert baseline.provenance["num_train_images"] == 3  # views of an image are no images
    found = calibrated(baseline, shards)
    assert found.calibration is not None
    assert found.calibration.threshold.num_images == 3
    assert found.calibration.threshold.origin == "left_out"
    seen = found.score(training_images(config, shards, 3)).image.max()
    assert float(found.calibration.scores.min()) > float(seen)  # to itself a trained image is near, to the folds not


def test_remembered_views_are_the_views(
    tiny_config: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A costly space is asked once per view; training comes out the same bit for bit as when it is asked each time."""
    config = few(tiny_config, 3, **{"cross_fitting.folds": 0, "training.horizontal_flip": True})
    shards = write_shards(config.data, str(tmp_path / "shards"))
    plain = fit_locally(config, tmp_path / "plain", shards)
    asked = []
    encode = PixelSpace.encode
    monkeypatch.setattr(PixelSpace, "costly", True)
    monkeypatch.setattr(PixelSpace, "encode", lambda self, images: asked.append(len(images)) or encode(self, images))
    remembered = fit_locally(config, tmp_path / "remembered", shards)
    assert remembered.files()["weights.safetensors"] == plain.files()["weights.safetensors"]
    assert 0 < sum(asked) < 8 * 16  # 24 views and flips, held-out and calibration images; not each in each batch


def test_training_images_are_followed_by_their_views(tiny_config: ExperimentConfig, tmp_path: Path) -> None:
    config = few(tiny_config, 3)
    shards = write_shards(config.data, str(tmp_path / "shards"))
    images = training_images(config, shards, 100)
    assert len(images) == 3 * 4
    assert torch.equal(images[:3], training_images(config.override({"augmentation": {}}), shards, 100))
    assert len(images.unique(dim=0)) == 12
    assert len(training_images(config, shards, 5)) == 5


def test_tiles_of_training_images_are_followed_by_those_of_their_views(
    tiny_config: ExperimentConfig, tmp_path: Path
) -> None:
    config = few(tiny_config, 3, **{"tiles.size": [4, 4], "tiles.cell": 4, "tiles.overlap": 0})
    shards = write_shards(config.data, str(tmp_path / "shards"))
    alone = training_images(config.override({"augmentation": {}}), shards, 2000)
    tiles = training_images(config, shards, 2000)
    assert len(alone) % 3 == 0
    assert len(tiles) == 4 * len(alone)
    assert torch.equal(tiles[: len(alone)], alone)
    assert len(tiles.unique(dim=0)) > 2 * len(alone)  # an empty corner is the same in many views
    assert len(training_images(config, shards, 20)) == 20


# --- images that are not all normal -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def contaminated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """Sixty zeros among which are six sevens; the name of the sevens begins with x."""
    source = tmp_path_factory.mktemp("contaminated")
    digits = load_digits()
    for folder, digit, rows, prefix in (
        ("train/good", 0, slice(0, 60), "n"), ("train/good", 7, slice(0, 6), "x"),
        ("test/good", 0, slice(60, 80), "n"), ("test/seven", 7, slice(20, 40), "x"),
    ):  # fmt: skip
        (source / folder).mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(digits.images[digits.target == digit][rows]):
            Image.fromarray((image * 15.9).astype(np.uint8)).save(source / folder / f"{prefix}{i}.png")
    return source, {f"x{i}.png" for i in range(6)}


def trusting(config: ExperimentConfig, source: Path, share: float) -> ExperimentConfig:
    return config.override(
        {
            "data.dataset": {"name": "folder", "source": str(source)},
            "contamination.max_share": share,
            "cross_fitting.folds": 2,
            "training.num_steps": 80,
            "training.checkpoint_every": 80,
            "training.validate_every": 80,
            "training.validation_images": 4,
            "scoring.pooling": "mean",
        }
    )


def test_anomalies_among_the_normals_are_found_named_and_left_out(
    tiny_config: ExperimentConfig, contaminated: tuple[Path, set[str]], tmp_path: Path
) -> None:
    source, bad = contaminated
    config = trusting(tiny_config, source, 0.15)
    shards = write_shards(config.data, str(tmp_path / "shards"))
    detector = fit_locally(config, tmp_path / "run", shards)
    there = {Path(i).name for split in ("train", "calibration") for i in ids_of(shards, split, config)} & bad
    suspects = {Path(image_id).name for image_id in detector.provenance["suspects"]}
    assert len(suspects & there) >= len(there) - 2
    assert len(suspects - bad) <= 3
    rows = list(csv.DictReader((tmp_path / "run" / "suspects.csv").read_text().splitlines()))
    assert len(rows) == shards.count("train") + shards.count("calibration")
    assert {Path(row["image_id"]).name for row in rows if row["suspect"] == "1"} == suspects
    assert {row["split"] for row in rows} == {"train", "calibration"}
    assert any("look anomalous" in note for note in detector.notes)
    left_out = read_weights(tmp_path / "run", shards.count("train")).left_out
    assert {Path(image_id).name for image_id in left_out} <= suspects
    assert detector.calibration is not None
    flagged = sum(row["split"] == "calibration" and row["suspect"] == "1" for row in rows)
    assert detector.calibration.threshold.num_images == shards.count("calibration") - flagged
    assert detector.calibration.threshold.num_removed == flagged
    public = describe(load_artifact(tmp_path / "run"))
    assert public["provenance"]["suspects"] == len(suspects)
    assert not any(name in json.dumps(public) for name in suspects)  # a service tells nobody what images are called
    knn = fit_baseline(config, shards, component_options("baselines", "knn"))
    assert {Path(image_id).name for image_id in knn.provenance["suspects"]} <= bad
    assert isinstance(knn, BaselineDetector)


def test_the_held_out_loss_is_not_measured_on_suspects(tiny_config: ExperimentConfig, digit_shards: ShardSet) -> None:
    config = tiny_config.override({"data.calibration_fraction": 0, "training.validation_images": 5})
    trusting = config.override({"contamination.max_share": 0.1})
    ids = image_ids(digit_shards, "train")
    assert held_out_images(config, digit_shards, ids[:3]).ids == ids[:3]  # of a fold
    assert held_out_images(trusting, digit_shards, ids[:3]).ids == ids[3:8]
    in_a_view = trusting.override({"augmentation.shift": 0.1})
    assert held_out_images(in_a_view, digit_shards, ids[:3]).ids == [f"{name} held out" for name in ids[3:8]]


def test_suspects_lie_far_above_the_median_and_are_few() -> None:
    contamination = (
        ExperimentConfig().override({"contamination.max_share": 0.2, "contamination.weight": 0.25}).contamination
    )
    scores = {f"n{i}": float(np.sin(i)) for i in range(18)} | {"far": 50.0, "farther": 60.0}
    found = suspicions(scores, contamination, "train")
    assert [one.image_id for one in found[:2]] == ["farther", "far"]
    assert [one.weight for one in found[:3]] == [0.25, 0.25, 1.0]
    few_allowed = replace_share(contamination, 0.05)
    assert [one.weight for one in suspicions(scores, few_allowed, "train")[:2]] == [0.25, 1.0]
    moved = suspicions({name: 3 * score + 7 for name, score in scores.items()}, contamination, "train")
    assert [one.deviation for one in moved] == pytest.approx([one.deviation for one in found])
    assert suspects_csv(found).decode().splitlines()[1].startswith("farther,train,60,")
    assert suspicions({}, contamination, "train") == []


def replace_share(contamination: object, share: float) -> object:
    return contamination.model_copy(update={"max_share": share})  # type: ignore[attr-defined]


def test_without_suspicion_nothing_is_trained_beside_and_no_digest_changes(
    tiny_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path
) -> None:
    assert fold_runs(tiny_config, tmp_path, digit_shards) == []
    spelled_out = tiny_config.override(
        {"cross_fitting.folds": 4, "contamination.max_share": 0, "augmentation.views": 16}
    )
    assert spelled_out.digest() == tiny_config.digest()
    assert tiny_config.override({"contamination.max_share": 0.1}).digest() != tiny_config.digest()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contamination.max_share": 0.1, "cross_fitting.folds": 0}, "set cross_fitting.folds to 2 or more"),
        ({"cross_fitting.folds": 1}, "one fold leaves nothing to train on"),
    ],
)
def test_folds_that_cannot_be_are_refused(
    tiny_config: ExperimentConfig, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config.override(changes)


def test_the_checkpoints_of_a_finished_run_go_with_those_of_its_folds(tmp_path: Path) -> None:
    for run in (".", "folds/0", "folds/1"):
        (tmp_path / run / "checkpoints" / "step-8").mkdir(parents=True)
        (tmp_path / run / "artifact").mkdir()
    remove_checkpoints(tmp_path)
    assert not list(tmp_path.rglob("checkpoints"))
    assert len(list(tmp_path.rglob("artifact"))) == 3


def test_weights_are_shares_of_the_loss(tiny_config: ExperimentConfig) -> None:
    from raydiff.shards import TrainingBatch
    from raydiff.weighting import Weights

    weights = Weights({"b": 0.0, "c": 0.5}, num_images=4)
    batch = TrainingBatch(list("abcd"), np.zeros(4, int), np.zeros((4, 8, 8, 1), np.uint8), np.zeros(4, int))
    kept, counted = weights.counted(batch)
    assert kept.ids == ["a", "c", "d"]
    losses = torch.tensor([1.0, 2.0, 3.0])
    assert float(weights.mean(losses, counted, 4)) == pytest.approx((1 + 0.5 * 2 + 3) / 4 / (2.5 / 4))
    alone, nothing = weights.counted(replace(batch, ids=["b"] * 4))
    assert alone.ids == ["b"]
    assert float(weights.mean(torch.tensor([7.0]), nothing, 4)) == 0.0


def test_balanced_classes_leave_the_mean_loss_what_it_is(
    uneven_config: ExperimentConfig, uneven_shards: ShardSet, tmp_path: Path
) -> None:
    """An image of the class that is seen four times as often counts as often in the mean."""
    few = [image_id for image_id in image_ids(uneven_shards, "train") if image_id.startswith("few/")]
    write_weights(tmp_path, {few[0]: 0.0, few[1]: 0.5})
    weights = weights_of(tmp_path, uneven_shards, balance=uneven_config.training.balance_classes)
    stream = cached(uneven_config.override({"training.batch_size": 30 + 4 * 7}), uneven_shards)(0)
    epoch = next(stream)
    _, counted = weights.counted(epoch)
    assert counted.sum() == 30 + 4 * 5.5
    assert float(weights.mean(torch.ones(len(counted)), counted, len(epoch.ids))) == pytest.approx(1)
