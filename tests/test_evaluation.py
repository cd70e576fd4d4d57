"""Evaluation on real small images: a folder in MVTec layout with planted defects, and the digits."""

import io
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from raydiff.config import ExperimentConfig
from raydiff.contracts import Scores
from raydiff.core.metrics import IMAGE_METRICS, PIXEL_METRICS, image_metrics, pixel_metrics, proportion
from raydiff.detector import Detector
from raydiff.errors import DataError, NotCalibratedError, ScoreError, StorageError
from raydiff.evaluation import dataset_name, evaluate
from raydiff.experiment import fit_baselines, split_batches
from raydiff.images import ImageSpec, encode_png, to_tensor, to_uint8
from raydiff.results import compare
from raydiff.shards import write_shards
from raydiff.testing import planted_defect, small_images

SIZE = (16, 16)


@dataclass(frozen=True, eq=False, kw_only=True)
class MeanDetector(Detector):
    """Distance to the mean normal image, per pixel; the reconstruction is that mean."""

    mean: Tensor
    poison: float | None = None  # images with this first pixel score NaN
    num_evaluations = 1

    @property
    def name(self) -> str:
        return "mean"

    def _score(self, images: Tensor) -> Scores:
        maps = (images - self.mean).square().mean(1, keepdim=True)
        scores = maps.flatten(1).amax(1)
        if self.poison is not None:
            scores = torch.where(images[:, 0, 0, 0] == self.poison, torch.nan, scores)
        return Scores(scores, maps)

    def _reconstruct(self, images: Tensor) -> Tensor:
        return self.mean.expand_as(images)

    def calibrate(self, images, *, data_digest=None):
        scores = Scores.concatenate([self.score(batch) for batch in images])
        return replace(self, calibration=self._make_calibration(scores, data_digest))

    def _describe(self):
        return {"kind": "mean"}

    def _weights(self):
        return {"mean": self.mean}


def write_images(folder: Path, images: Tensor, masks: Tensor | None = None, mask_folder: Path | None = None) -> None:
    folder.mkdir(parents=True)
    for i, pixels in enumerate(to_uint8(images)):
        (folder / f"{i:03d}.png").write_bytes(encode_png(pixels))
    if masks is not None:
        mask_folder.mkdir(parents=True)
        for i, mask in enumerate(masks[:, 0].numpy()):
            (mask_folder / f"{i:03d}_mask.png").write_bytes(encode_png(mask))


def write_tiles(root: Path, *, masked: bool = True) -> None:
    """Digits as tiles: 40 to train on, 12 good, 9 with a patch, 7 with a patch whose mask is left empty."""
    images = small_images(68, SIZE)
    write_images(root / "train" / "good", images[:40])
    write_images(root / "test" / "good", images[40:52])
    for defect, part in (("patch", images[52:61]), ("unmarked", images[61:])):
        broken, masks = planted_defect(part)
        marked = masks if defect == "patch" else torch.zeros_like(masks)
        write_images(root / "test" / defect, broken, marked if masked else None, root / "ground_truth" / defect)


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiles")
    write_tiles(root / "tile")
    config = ExperimentConfig().override(
        {
            "data.dataset": {"name": "folder", "source": str(root / "tile")},
            "data.image_size": list(SIZE),
            "data.calibration_fraction": 0.5,
            "calibration.target_fpr": 0.2,
        }
    )
    shards = write_shards(config.data, str(root / "shards"))
    return config, shards


@pytest.fixture(scope="module")
def detector(tiles):
    config, shards = tiles
    mean = torch.cat(list(split_batches(shards, "train", config))).mean(0)
    untrained = MeanDetector(config=config, mean=mean)
    return untrained.calibrate(split_batches(shards, "calibration", config), data_digest=shards.digest)


@pytest.fixture(scope="module")
def evaluation(tiles, detector):
    return evaluate(detector, tiles[1], num_draws=100, num_pictures=2, command="raydiff evaluate here")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    config = ExperimentConfig().override({"data.dataset": {"name": "digits", "normal": ["0", "1"]}})
    shards = write_shards(config.data, str(tmp_path_factory.mktemp("digits")))
    return config, shards


def all_tests(tiles):
    """The whole test split at once: images, labels, defects, masks, ids."""
    batches = list(tiles[1].read("test", ImageSpec.of(tiles[0].data)))
    return (
        to_tensor(np.concatenate([b.images for b in batches])),
        np.concatenate([b.is_anomaly for b in batches]),
        [defect for b in batches for defect in b.defects],
        np.concatenate([b.masks for b in batches]),
        [image_id for b in batches for image_id in b.ids],
    )


def test_rows_hold_the_metrics_of_all_anomalies_and_of_each_defect(tiles, detector, evaluation):
    images, labels, defects, _, ids = all_tests(tiles)
    scores = detector.score(images)
    assert evaluation.predictions.ids == ids
    assert np.array_equal(evaluation.predictions.scores, scores.image.double().numpy())
    assert np.array_equal(evaluation.predictions.labels, labels)
    rows = {row.subset: row for row in evaluation.rows}
    assert list(rows) == ["all", "patch", "unmarked"]
    assert [row.subset_kind for row in evaluation.rows] == ["all", "defect", "defect"]
    assert [(row.num_normal, row.num_anomalous) for row in evaluation.rows] == [(12, 16), (12, 9), (12, 7)]
    for name, row in rows.items():
        chosen = np.array([name in ("all", defect) or defect == "good" for defect in defects])
        expected = image_metrics(scores.image[chosen].double(), labels[chosen], num_draws=100)
        assert {k: row.metrics[k] for k in IMAGE_METRICS} == expected


def test_pixel_metrics_leave_out_anomalies_without_a_marked_pixel(tiles, detector, evaluation):
    images, _, defects, masks, _ = all_tests(tiles)
    maps = detector.score(images).map[:, 0].numpy()
    marked = [i for i, defect in enumerate(defects) if defect != "unmarked"]
    expected = pixel_metrics(maps[marked], masks[marked], num_draws=100)
    rows = {row.subset: row.metrics for row in evaluation.rows}
    for name in PIXEL_METRICS:
        assert rows["all"][name] == rows["patch"][name] == expected[name]
        assert name not in rows["unmarked"]


def test_verdicts_are_those_of_the_calibrated_threshold(detector, evaluation):
    row, found = evaluation.rows[0], evaluation.predictions
    assert row.threshold == detector.calibration.threshold.value
    assert row.target_fpr == 0.2
    assert np.array_equal(found.verdicts, found.scores > row.threshold)
    assert row.realised_fpr == proportion(int((found.verdicts & ~found.labels).sum()), 12)
    assert row.realised_tpr == proportion(int((found.verdicts & found.labels).sum()), 16)
    assert np.array_equal(found.p_values, detector.calibration.p_value(torch.tensor(found.scores)).numpy())


def test_a_row_says_where_it_comes_from(tiles, evaluation):
    config, shards = tiles
    row = evaluation.rows[0]
    assert (row.detector, row.dataset, row.seed) == ("mean", "tile", 0)
    assert (row.config_digest, row.data_digest) == (config.digest(), shards.digest)
    assert row.config == config.to_dict()
    assert all(other.config is None for other in evaluation.rows[1:])
    assert row.command == "raydiff evaluate here"
    assert row.num_evaluations == 1
    assert row.ms_per_image > 0
    assert row.ms_per_image_alone > 0
    assert row.versions["torch"] == torch.__version__
    assert "core" in row.hardware
    assert {other.run for other in evaluation.rows} == {row.run}
    assert row.trained_on is None  # this detector says nothing of its origin


def test_rows_name_the_tested_data_and_the_data_the_detector_was_fitted_on(tiles, detector):
    elsewhere = detector.config.override({"data.dataset": {"name": "digits", "normal": ["3"]}})
    foreign = replace(detector, config=elsewhere, provenance={"data_digest": "d161", "num_train_images": 7})
    rows = evaluate(foreign, tiles[1], num_draws=10, num_pictures=0).rows
    assert {(row.dataset, row.trained_on, row.num_train_images) for row in rows} == {("tile", "d161", 7)}


@pytest.mark.parametrize(
    ("dataset", "normal", "name"),
    [
        ({"name": "folder", "source": "/data/magnetic_tile", "category": None}, "magnetic_tile", "magnetic_tile"),
        ({"name": "folder", "source": "mvtec/", "category": "bottle"}, "bottle", "mvtec/bottle"),
        ({"name": "folder", "source": ".", "category": None}, "tile", "tile"),
        ({"name": "folder", "source": ".", "category": "bottle"}, "bottle", "bottle"),
        ({"name": "cifar10", "source": "/data/cifar", "normal": ["cat"]}, "cat", "cifar10 (cat)"),
    ],
)
def test_a_data_set_has_a_short_name(tiles, dataset, normal, name):
    shards = replace(tiles[1], data=tiles[1].data | {"dataset": dataset}, normal_classes=(normal,))
    assert dataset_name(shards) == name


def test_the_batch_size_changes_no_score_and_no_metric(tiles, detector, evaluation):
    seen = []
    again = evaluate(
        detector, tiles[1], batch_size=5, num_draws=100, num_pictures=0, progress=lambda *at: seen.append(at)
    )
    assert np.array_equal(again.predictions.scores, evaluation.predictions.scores)
    assert [row.metrics for row in again.rows] == [row.metrics for row in evaluation.rows]
    assert again.rows[0].run == evaluation.rows[0].run
    assert again.pictures == []
    assert seen == [(done, 28) for done in (5, 10, 15, 20, 25, 28)]


def test_pictures_are_the_worst_of_each_kind_with_all_their_views(detector, evaluation):
    found = evaluation.predictions
    groups = {"miss": found.labels & ~found.verdicts, "false_alarm": ~found.labels & found.verdicts}
    groups["hit"] = found.labels & found.verdicts
    for kind, members in groups.items():
        ranked = sorted(np.flatnonzero(members), key=lambda i: found.scores[i], reverse=kind != "miss")
        assert [picture.index for picture in evaluation.pictures if picture.kind == kind] == ranked[:2]
    assert {picture.kind for picture in evaluation.pictures} >= {"hit"}
    for picture in evaluation.pictures:
        assert picture.mask is not None
        for data in (picture.image, picture.reconstruction, picture.heat_map, picture.mask):
            assert Image.open(io.BytesIO(data)).size == SIZE


def test_a_score_that_is_not_finite_names_its_image(tiles, detector):
    images, _, _, _, ids = all_tests(tiles)
    poison = float(images[13, 0, 0, 0])
    first = next(i for i, image in enumerate(images) if float(image[0, 0, 0]) == poison)
    with pytest.raises(ScoreError, match=f"{ids[first]}: its score is not finite"):
        evaluate(replace(detector, poison=poison), tiles[1])


def test_an_uncalibrated_detector_is_refused(tiles, detector):
    with pytest.raises(NotCalibratedError, match="mean has no threshold"):
        evaluate(replace(detector, calibration=None), tiles[1])


def test_a_test_split_of_one_kind_is_refused(tmp_path, detector):
    write_images(tmp_path / "plain", small_images(20, SIZE))
    data = detector.config.override(
        {"data.dataset": {"name": "folder", "source": str(tmp_path / "plain"), "test_fraction": 0.4}}
    ).data
    shards = write_shards(data, str(tmp_path / "shards"))
    with pytest.raises(DataError, match=r"the test split has 8 normal and 0 anomalous images"):
        evaluate(detector, shards)


def test_no_room_for_the_maps_is_an_error_that_names_the_place(tiles, detector, monkeypatch):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    monkeypatch.setattr(tempfile, "TemporaryFile", partial(Path("/dev/full").open, "wb", 0))
    with pytest.raises(StorageError, match=r"cannot keep the anomaly maps \(No space left on device\); set TMPDIR"):
        evaluate(detector, tiles[1])


def test_baselines_without_maps_and_data_without_masks_have_image_metrics_only(digits):
    config, shards = digits
    evaluations = [evaluate(found, shards, num_draws=50) for found in fit_baselines(config, shards, ["copod", "knn"])]
    row = evaluations[0].rows[0]
    assert set(row.metrics) == set(IMAGE_METRICS)
    assert row.num_evaluations is None
    assert (row.dataset, row.trained_on) == ("digits (0, 1)", shards.normal_digest)
    assert all(picture.heat_map is None and picture.mask is None for picture in evaluations[0].pictures)
    differences = compare(evaluations, num_draws=50)
    assert [(c.detector, c.reference) for c in differences] == [("knn", "copod")] * len(IMAGE_METRICS)
    gained = evaluations[1].rows[0].metrics["auroc"].value - row.metrics["auroc"].value
    assert differences[0].difference.value == pytest.approx(gained)


def test_classes_have_rows_only_where_they_add_to_those_of_the_defects(digits):
    config, shards = digits
    evaluation = evaluate(next(iter(fit_baselines(config, shards, ["copod"]))), shards, num_draws=10)
    assert [(row.subset_kind, row.subset) for row in evaluation.rows[1:]] == [("defect", str(d)) for d in range(2, 10)]
