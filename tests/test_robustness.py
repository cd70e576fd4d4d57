"""The robustness table: what changed images do to a detector's figures."""

import numpy as np
import pytest
import torch

from raydiff import registry
from raydiff.config import component_options
from raydiff.core.metrics import image_auroc
from raydiff.detector import BaselineDetector
from raydiff.errors import ConfigError, NotCalibratedError
from raydiff.experiment import fit_baselines
from raydiff.results import append_robustness, read_robustness
from raydiff.robustness import PERTURBATIONS, robustness

NAMES = {"cell": "c", "detector_name": "d", "dataset": "digits", "category": "0"}


@pytest.fixture(scope="module")
def knn(tiny_config, digit_shards):
    (detector,) = fit_baselines(tiny_config, digit_shards, ["knn"])
    return detector


@pytest.fixture(scope="module")
def rows(knn, digit_shards):
    """kNN under all corruptions at two strengths and one attack."""
    return list(robustness(knn, digit_shards, **NAMES, severities=(1, 5), attacks=(0.4,), max_images=60))


def test_one_row_for_each_change_the_unchanged_images_first(rows):
    expected = [("none", 0)] + [(name, severity) for name in PERTURBATIONS for severity in (1, 5)] + [("pgd", 1)]
    assert [(row.perturbation, row.severity) for row in rows] == expected
    assert {(row.num_normal, row.num_anomalous) for row in rows} == {(30, 30)}
    assert [row.kind for row in rows] == ["corruption"] * 11 + ["attack"]
    assert [row.budget for row in rows] == [None] * 11 + [0.4]
    assert rows[0].score_shift_normal == rows[0].score_shift_anomalous == 0


def test_heavy_noise_and_attacks_cost_accuracy(rows):
    by_name = {(row.perturbation, row.severity): row for row in rows}
    clean = by_name["none", 0]
    for name in ("gaussian_noise", "shot_noise"):
        assert by_name[name, 5].auroc.value < by_name[name, 1].auroc.value <= clean.auroc.value + 0.01
        assert by_name[name, 5].score_shift_normal > by_name[name, 1].score_shift_normal > 0
        assert by_name[name, 5].realised_fpr.value > 0.5  # nobody calibrated again
    attack = by_name["pgd", 1]
    assert attack.auroc.value < clean.auroc.value
    assert attack.score_shift_normal > 0 > attack.score_shift_anomalous


def test_the_row_is_what_plain_scoring_gives(knn, digit_shards):
    """With all images in the subset it is the AUROC of the test split, changed image by image."""
    options = {"perturbations": {"noise": "gaussian_noise"}, "severities": (5,), "max_images": 10_000}
    _, row = robustness(knn, digit_shards, **NAMES, **options)
    noise = registry.build("perturbations", component_options("perturbations", "gaussian_noise"))
    scores, labels = [], []
    for batch in digit_shards.read("test", knn.image_spec):
        pixels = noise.apply(batch.images, severity=5, ids=batch.ids).images
        scores.append(knn.score(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1).image.numpy())
        labels.append(batch.is_anomaly)
    assert row.num_normal + row.num_anomalous == digit_shards.count("test")
    assert row.auroc.value == pytest.approx(image_auroc(np.concatenate(scores), np.concatenate(labels)), abs=1e-4)
    assert row.auroc.value < 0.99


def test_rows_are_the_same_whatever_the_batch(detector, digit_shards):
    options = {"perturbations": {"noise": "gaussian_noise"}, "severities": (3,), "attacks": (0.1,), "max_images": 12}
    first = list(robustness(detector, digit_shards, **NAMES, **options))
    assert list(robustness(detector, digit_shards, **NAMES, **options)) == first
    assert list(robustness(detector, digit_shards, **NAMES, **options, batch_size=7)) == first
    assert [row.perturbation for row in first] == ["none", "noise", "pgd"]


def test_where_one_kind_is_rare_the_other_fills_up(knn, digit_shards):
    (row,) = robustness(knn, digit_shards, **NAMES, perturbations={}, max_images=400)
    assert row.num_normal + row.num_anomalous == 400
    assert row.num_normal < 200  # all there are


def test_progress_counts_images_of_all_rows(knn, digit_shards):
    seen = []
    options = {"perturbations": {"jpeg": "jpeg"}, "severities": (2,), "max_images": 20, "batch_size": 8}
    list(robustness(knn, digit_shards, **NAMES, **options, progress=lambda done, total: seen.append((done, total))))
    assert seen == [(8, 40), (16, 40), (20, 40), (28, 40), (36, 40), (40, 40)]


def test_a_detector_without_a_gradient_has_no_attack_rows(tiny_config, digit_shards):
    (forest,) = fit_baselines(tiny_config, digit_shards, ["isolation_forest"])
    found = robustness(forest, digit_shards, **NAMES, perturbations={}, attacks=(0.1,), max_images=20)
    assert [row.perturbation for row in found] == ["none"]


def test_rows_survive_a_file(rows, tmp_path):
    append_robustness(tmp_path / "robustness.jsonl", rows)
    assert read_robustness(tmp_path / "robustness.jsonl") == rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"perturbations": {"x": "gausian_noise"}}, "no perturbation is called 'gausian_noise'; did you mean"),
        ({"perturbations": {"x": "cut_paste"}}, r"perturbations\.x is cut_paste, which makes an image anomalous"),
        ({"severities": (1, 7)}, "severities hold 7; each must be a whole number from 1 to 5"),
        ({"max_images": 1}, "max_images is 1; a robustness table needs a normal and an anomalous one at least"),
        ({"attacks": (0.1, -1.0)}, r"attacks hold the budget -1\.0; it must lie above 0"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(knn, digit_shards, options, message):
    with pytest.raises(ConfigError, match=message):
        robustness(knn, digit_shards, **NAMES, **options)


def test_a_detector_without_a_threshold_is_refused(tiny_config, digit_images, digit_shards):
    bare = BaselineDetector.fit(tiny_config, component_options("baselines", "knn"), digit_images)
    with pytest.raises(NotCalibratedError, match="knn has no threshold"):
        robustness(bare, digit_shards, **NAMES)
