"""Contracts 1 to 4 on a trained diffusion detector and on baselines."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from raydiff import registry
from raydiff.config import ExperimentConfig, component_options
from raydiff.contracts import Scores
from raydiff.core.calibration import conformal_quantile
from raydiff.detector import BaselineDetector, Detector, DiffusionDetector, load_detector
from raydiff.detector.contract import with_peaks
from raydiff.errors import ConfigError, NotCalibratedError, ScoreError, ShapeError
from raydiff.experiment import fit_baselines
from raydiff.shards import ShardSet


def same(left: Scores, right: Scores) -> bool:
    """Bit for bit."""
    maps = (left.map is None and right.map is None) or (
        left.map is not None and right.map is not None and torch.equal(left.map, right.map)
    )
    return maps and torch.equal(left.image, right.image)


@pytest.fixture(scope="module", params=["diffusion", "reconstruction", *registry.names("baselines")])
def any_detector(
    request: pytest.FixtureRequest, detector: DiffusionDetector, tiny_config: ExperimentConfig, digit_shards: ShardSet
) -> Detector:
    from raydiff.experiment import calibrated

    if request.param == "diffusion":
        return detector
    if request.param == "reconstruction":
        return calibrated(detector.with_scoring(component_options("scorers", "reconstruction")), digit_shards)
    return next(fit_baselines(tiny_config, digit_shards, [request.param]))


def test_a_score_is_a_function_of_the_image(any_detector: Detector, digit_images: Tensor) -> None:
    whole = any_detector.score(digit_images)
    for size in (1, 2, 3, 7):
        parts = Scores.concatenate([any_detector.score(part) for part in digit_images.split(size)])
        assert same(whole, parts), f"batches of {size}"
    backwards = any_detector.score(digit_images.flip(0))
    assert torch.equal(backwards.image.flip(0), whole.image)
    neighbours = digit_images.clone()
    neighbours[1:] = neighbours[1:].flip(0).neg()
    assert torch.equal(any_detector.score(neighbours).image[0], whole.image[0])


def test_shards_of_ten_images(any_detector: Detector, digit_images: Tensor) -> None:
    ten = digit_images[:10]
    serial = any_detector.score(ten)
    for count in (1, 2, 3, 7):
        assert same(serial, Scores.concatenate([any_detector.score(part) for part in ten.tensor_split(count)]))


def test_threads_share_a_detector(any_detector: Detector, digit_images: Tensor) -> None:
    expected = any_detector.score(digit_images)
    with ThreadPoolExecutor(4) as pool:
        assert all(same(expected, got) for got in pool.map(any_detector.score, [digit_images] * 4))


def test_torch_threads_do_not_matter(any_detector: Detector, digit_images: Tensor) -> None:
    expected = any_detector.score(digit_images)
    try:
        torch.set_num_threads(2)
        assert same(expected, any_detector.score(digit_images))
    finally:
        torch.set_num_threads(1)


def test_save_and_load_are_exact(any_detector: Detector, digit_images: Tensor, tmp_path: Path) -> None:
    saved = any_detector.save(tmp_path / "a")
    loaded = load_detector(tmp_path / "a")
    assert loaded.artifact_digest == saved.artifact_digest
    assert loaded.config == any_detector.config
    assert same(any_detector.score(digit_images), loaded.score(digit_images))
    assert torch.equal(any_detector.predict(digit_images).p_value, loaded.predict(digit_images).p_value)
    assert loaded.save(tmp_path / "b").artifact_digest == saved.artifact_digest, "saving again gives the same bytes"


def test_another_process_gives_the_same_scores(
    run_dir: Path, detector: DiffusionDetector, digit_images: Tensor
) -> None:
    script = f"""
import json, torch
from raydiff import load_detector
images = torch.tensor(json.loads(input()))
print(json.dumps(load_detector({str(run_dir / "artifact")!r}).score(images).image.tolist()))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(digit_images.tolist()),
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == detector.score(digit_images).image.tolist()


def test_verdicts(any_detector: Detector, digit_images: Tensor) -> None:
    prediction = any_detector.explain(digit_images)
    calibration = any_detector.calibration
    assert calibration is not None
    assert torch.equal(prediction.pred_label, prediction.pred_score.double() > calibration.threshold.value)
    assert bool(((prediction.p_value > 0) & (prediction.p_value <= 1)).all())
    by_score = prediction.pred_score.argsort()
    assert bool((prediction.p_value[by_score].diff() <= 0).all()), "a higher score has a lower p-value"
    if prediction.anomaly_map is not None:
        assert prediction.anomaly_map.shape == (20, 1, 8, 8)
        assert prediction.pred_mask is not None
        assert prediction.pred_mask.dtype == torch.bool
    if isinstance(any_detector, DiffusionDetector):
        assert prediction.reconstruction is not None
        assert prediction.reconstruction.shape == digit_images.shape
        assert float(prediction.reconstruction.abs().max()) <= 1


def test_without_a_threshold_there_is_no_verdict(detector: DiffusionDetector, digit_images: Tensor) -> None:
    bare = replace(detector, calibration=None, statistics={})
    for call in (bare.predict, bare.explain, bare.score):
        with pytest.raises(NotCalibratedError, match=r"calibrate\(\)"):
            call(digit_images)
    raw = bare.with_scoring(component_options("scorers", {"name": "denoising_error", "normalise": "none"}))
    assert raw.score(digit_images).image.shape == (20,), "a scorer without statistics can score, but gives no verdict"
    with pytest.raises(NotCalibratedError, match="has no threshold"):
        raw.predict(digit_images)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 8, 8), r"takes torch.float32 \(B, 1, 8, 8\)"),
        (torch.zeros(2, 1, 16, 16), r"takes torch.float32 \(B, 1, 8, 8\)"),
        (torch.zeros(1, 8, 8), r"takes torch.float32 \(B, 1, 8, 8\)"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.float64), r"images are torch.float64"),
        (torch.full((2, 1, 8, 8), 255.0), r"must lie in \[-1, 1\]"),
    ],
)
def test_wrong_images_are_refused(detector: DiffusionDetector, images: Tensor, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        detector.score(images)


def test_a_score_that_is_not_a_number_is_an_error(detector: DiffusionDetector, digit_images: Tensor) -> None:
    broken = {name: value.clone() for name, value in detector.statistics.items()}
    broken["mean"][:] = float("nan")
    with pytest.raises(ScoreError, match="image 0 in the batch is not finite"):
        replace(detector, statistics=broken).score(digit_images)


def test_calibration_scores_are_cross_fitted(detector: DiffusionDetector, digit_images: Tensor) -> None:
    """Scored with statistics that an image helped to fit, it looks more normal than it is: here that is not so."""
    calibrated = detector.calibrate(digit_images)
    assert calibrated.calibration is not None
    in_sample = calibrated.score(digit_images).image.double().sort().values
    assert float(calibrated.calibration.scores.mean()) > float(in_sample.mean())


def test_calibration_takes_batches(detector: DiffusionDetector, digit_images: Tensor) -> None:
    whole, parts = detector.calibrate(digit_images), detector.calibrate(digit_images.split(7))
    assert whole.files()["calibration.json"] == parts.files()["calibration.json"]
    assert whole.files()["statistics.safetensors"] == parts.files()["statistics.safetensors"]


def test_calibration_keeps_no_map(detector: DiffusionDetector, digit_images: Tensor) -> None:
    """Of each held-out map its peak alone: no more memory than the evidence and one fold's maps."""
    kept = with_peaks(detector.score(digit_images))
    assert kept.map is not None
    assert kept.map.untyped_storage().nbytes() == 4 * len(digit_images)
    twice = torch.cat([digit_images, digit_images.flip(-1)])
    calibration, target = detector.calibrate(twice).calibration, detector.config.calibration.target_fpr
    folds, evidence = detector.config.calibration.folds, detector.measure(twice)
    peaks = []
    for row in range(len(twice)):
        rest = torch.arange(len(twice)) % folds != row % folds
        statistics = detector.scorer.fit(evidence[rest])
        held_out = detector.scorer.judge(evidence[row : row + 1], statistics, detector.config.data.image_size)
        assert held_out.map is not None
        peaks.append(float(held_out.map.max()))
    assert calibration is not None
    assert calibration.mask_threshold == conformal_quantile(np.array(peaks), target)[0]


def test_three_images_are_no_calibration(detector: DiffusionDetector, digit_images: Tensor) -> None:
    with pytest.raises(ConfigError, match="needs at least 4"):
        detector.calibrate(digit_images[:3])


@pytest.mark.parametrize("kind", ["diffusion", "knn"])
def test_calibration_may_be_limited_to_the_first_images(
    kind: str, tiny_config: ExperimentConfig, detector: DiffusionDetector, digit_shards: ShardSet, digit_images: Tensor
) -> None:
    limited = tiny_config.override({"calibration.max_images": 11})
    whole: Detector = detector if kind == "diffusion" else next(fit_baselines(tiny_config, digit_shards, [kind]))
    few = replace(whole, config=limited).calibrate(_no_more_than(digit_images, 12, batch=4))
    expected = whole.calibrate(digit_images[:11])
    assert few.files()["calibration.json"] == expected.files()["calibration.json"]
    assert few.files()["statistics.safetensors"] == expected.files()["statistics.safetensors"]
    assert few.calibration is not None
    assert few.calibration.threshold.num_images == 11


def _no_more_than(images: Tensor, limit: int, batch: int) -> Iterator[Tensor]:
    """Batches; that more than ``limit`` images are asked for is an error."""
    yield from images[:limit].split(batch)
    raise AssertionError("a batch that is not needed was asked for")


def test_another_target_rate_needs_no_scoring(detector: DiffusionDetector) -> None:
    loose, strict = detector.with_target_fpr(0.4), detector.with_target_fpr(0.05)
    assert loose.calibration is not None
    assert strict.calibration is not None
    assert loose.calibration.threshold.value < strict.calibration.threshold.value


def test_a_gpu_that_is_not_there(run_dir: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match="no such GPU here"):
        load_detector(run_dir / "artifact", device="cuda")


@pytest.mark.parametrize("device", ["tpu", "mps", "gpu"])
def test_a_device_that_is_none(run_dir: Path, device: str) -> None:
    with pytest.raises(ConfigError, match=f"device is '{device}'; use cpu or cuda"):
        load_detector(run_dir / "artifact", device=device)


def test_weights_follow_from_the_seed_alone(tiny_config: ExperimentConfig) -> None:
    first = DiffusionDetector.create(tiny_config, num_classes=1).files()["weights.safetensors"]
    torch.rand(1000)
    assert DiffusionDetector.create(tiny_config, num_classes=1).files()["weights.safetensors"] == first
    other = DiffusionDetector.create(tiny_config.override({"seed": 1}), num_classes=1)
    assert other.files()["weights.safetensors"] != first


def test_baselines_check_images_too(tiny_config: ExperimentConfig) -> None:
    with pytest.raises(ShapeError):
        BaselineDetector.fit(tiny_config, component_options("baselines", "knn"), torch.zeros(20, 3, 8, 8))
