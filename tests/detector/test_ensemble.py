"""Several detectors as one: what their scores mean is learnt from calibration normals alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from raydiff.artifact import read_folder
from raydiff.config import ExperimentConfig, component_options
from raydiff.detector import Combine, Detector, DiffusionDetector, EnsembleDetector, load_detector
from raydiff.ensembling import ensemble_of
from raydiff.errors import ArtifactError, ConfigError, DataError, NotCalibratedError
from raydiff.experiment import fit_baselines, split_batches
from raydiff.images import to_tensor
from raydiff.service.artifacts import load_artifact
from raydiff.shards import ShardSet
from raydiff.splits import labelled_batches

ALL: list[Combine] = ["mean", "max", "fisher"]


@pytest.fixture(scope="module")
def members(run_dir: Path, tiny_config: ExperimentConfig, digit_shards: ShardSet) -> list[Detector]:
    """A diffusion model, and a baseline without maps."""
    return [load_detector(run_dir / "artifact"), *fit_baselines(tiny_config, digit_shards, ["knn"])]


@pytest.fixture(scope="module")
def test_images(tiny_config: ExperimentConfig, digit_shards: ShardSet) -> Tensor:
    return next(split_batches(digit_shards, "test", tiny_config))[:12]


@pytest.mark.parametrize("combine", ALL)
def test_a_score_is_a_function_of_image_and_artefact(
    members: list[Detector], digit_shards: ShardSet, test_images: Tensor, tmp_path: Path, combine: Combine
) -> None:
    saved = ensemble_of(members, digit_shards, combine=combine).save(tmp_path / "artifact")
    loaded = load_detector(tmp_path / "artifact")
    assert isinstance(loaded, EnsembleDetector)
    assert (loaded.name, loaded.artifact_digest) == (saved.name, saved.artifact_digest)
    assert loaded.num_evaluations == members[0].num_evaluations
    together, alone = saved.predict(test_images), loaded.predict(test_images[5:6])
    assert torch.equal(together.pred_score[5:6], alone.pred_score)
    assert together.anomaly_map is not None
    assert alone.anomaly_map is not None
    assert torch.equal(together.anomaly_map[5:6], alone.anomaly_map)
    assert together.anomaly_map.shape == (12, 1, 8, 8)
    assert saved.files() == {name: (tmp_path / "artifact" / name).read_bytes() for name in saved.files()}
    assert saved.explain(test_images[:2]).reconstruction is not None


def test_it_is_better_than_a_member_that_knows_nothing(members: list[Detector], digit_shards: ShardSet) -> None:
    """And as good as its best one, nearly: digits that are not 8, by a network of 24 steps and by neighbours."""
    alone = [_auroc(member, digit_shards) for member in members]
    for combine in ALL:
        assert _auroc(ensemble_of(members, digit_shards, combine=combine), digit_shards) > min(alone)


def test_the_threshold_keeps_its_promise_and_rests_on_normals_alone(
    members: list[Detector], digit_shards: ShardSet
) -> None:
    ensemble = ensemble_of(members, digit_shards, target_fpr=0.1)
    assert ensemble.calibration is not None
    assert ensemble.calibration.threshold.num_images == digit_shards.count("calibration")
    assert ensemble.calibration.threshold.target_fpr == 0.1
    assert ensemble.calibration.mask_threshold is not None
    images, labels = _some(digit_shards, ensemble.config)
    assert float(ensemble.predict(images[~labels]).pred_label.double().mean()) < 0.35
    for member in ensemble.members:
        assert member.calibration is not None


def test_the_scale_of_a_members_scores_does_not_matter(
    members: list[Detector], digit_shards: ShardSet, test_images: Tensor
) -> None:
    """Judged by another unit, the same ensemble: here a scorer whose evidence is in units a hundred times as small."""
    first = members[0]
    assert isinstance(first, DiffusionDetector)
    plain = first.with_scoring(first.config.scoring.model_copy(update={"normalise": "none"}))

    class Scaled(type(plain.scorer)):  # type: ignore[misc]
        def measure(self, model: object, x: Tensor) -> Tensor:
            return 128 * super().measure(model, x)  # a power of two, so that nothing is rounded

    scaled = replace(plain, scorer=Scaled(plain.scorer.options))  # type: ignore[attr-defined]
    for combine in ALL:
        one = ensemble_of([plain, members[1]], digit_shards, combine=combine).score(test_images)
        other = ensemble_of([scaled, members[1]], digit_shards, combine=combine).score(test_images)
        assert torch.allclose(one.image, other.image)


def test_members_may_see_images_at_other_sizes_and_in_grey(
    members: list[Detector], tiny_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path
) -> None:
    large = tiny_config.override({"data.image_size": [16, 16], "data.channels": 3})
    knn = next(iter(fit_baselines(large, digit_shards, ["isolation_forest"])))
    ensemble = ensemble_of([members[0], knn], digit_shards)
    assert ensemble.config.data.image_size == (16, 16)
    assert ensemble.config.data.channels == 3
    images = next(split_batches(digit_shards, "test", ensemble.config))[:5]
    scores = ensemble.score(images)
    assert scores.map is not None
    assert scores.map.shape == (5, 1, 16, 16)
    assert torch.equal(ensemble.score(images[2:3]).image, scores.image[2:3])
    ensemble.save(tmp_path / "artifact")
    assert load_artifact(tmp_path / "artifact").has_reconstruction  # serves: warmed up with a batch of its own


@pytest.mark.parametrize("name", ["member-0.weights.safetensors", "member-1.config.json", "statistics.safetensors"])
def test_a_changed_part_does_not_load(
    members: list[Detector], digit_shards: ShardSet, tmp_path: Path, name: str
) -> None:
    ensemble_of(members, digit_shards).save(tmp_path / "artifact")
    file = tmp_path / "artifact" / name
    assert name in read_folder(tmp_path / "artifact").files
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError, match="altered"):
        load_detector(tmp_path / "artifact")


def test_what_cannot_be_put_together_is_refused(
    members: list[Detector], tiny_config: ExperimentConfig, digit_shards: ShardSet
) -> None:
    with pytest.raises(ConfigError, match="two or more"):
        ensemble_of(members[:1], digit_shards)
    with pytest.raises(ConfigError, match="single detectors"):
        ensemble_of([members[0], ensemble_of(members, digit_shards)], digit_shards)
    elsewhere = replace(members[1], provenance={**members[1].provenance, "data_digest": "f" * 64})
    with pytest.raises(DataError, match="other images"):
        ensemble_of([members[0], elsewhere], digit_shards)
    padded = replace(members[1], config=tiny_config.override({"data.resize": "pad"}))
    with pytest.raises(ConfigError, match=r"data\.resize is pad and stretch"):
        ensemble_of([members[0], padded], digit_shards)
    fresh = EnsembleDetector.create(members, "mean", {})
    with pytest.raises(NotCalibratedError):
        fresh.predict(torch.zeros(1, 1, 8, 8))
    with pytest.raises(NotCalibratedError):
        fresh.score(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ConfigError, match="at least 4"):
        fresh.calibrate(torch.zeros(3, 1, 8, 8))


def _some(shards: ShardSet, config: ExperimentConfig) -> tuple[Tensor, np.ndarray]:
    """The first 120 test images, and which of them are anomalous."""
    parts = list(islice(labelled_batches(shards, "test", config.override({"execution.scoring_batch_size": 60})), 2))
    return torch.cat([to_tensor(part.images) for part in parts]), np.concatenate([part.is_anomaly for part in parts])


def _auroc(detector: Detector, shards: ShardSet) -> float:
    images, labels = _some(shards, detector.config)
    return float(roc_auc_score(labels, detector.score(images).image.numpy()))


def test_options_of_a_member_travel(members: list[Detector], digit_shards: ShardSet, tmp_path: Path) -> None:
    first = members[0]
    assert isinstance(first, DiffusionDetector)
    other = first.with_scoring(component_options("scorers", {"name": "inversion", "num_inference_steps": 2}))
    ensemble_of([other, members[1]], digit_shards).save(tmp_path / "artifact")
    loaded = load_detector(tmp_path / "artifact")
    assert isinstance(loaded, EnsembleDetector)
    assert loaded.members[0].config.scoring == other.config.scoring
    assert "inversion" in loaded.name
