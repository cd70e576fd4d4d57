"""Evidence is measured once, is what the detector itself measures, and comes from calibration images alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from raydiff import registry
from raydiff.config import ExperimentConfig
from raydiff.detector import DiffusionDetector
from raydiff.errors import ConfigError, DataError, ShapeError
from raydiff.experiment import split_batches
from raydiff.images import to_tensor, to_uint8
from raydiff.selection import selection_set
from raydiff.shards import ShardSet
from raydiff.sweep import EvidenceCache, measure_setting
from raydiff.testing import small_images

FEW = {"scoring.start": 0.2, "scoring.stop": 0.4, "scoring.num_inference_steps": 3}
MANY = {"scoring.start": 0.1, "scoring.stop": 0.5, "scoring.num_inference_steps": 5}  # three of them are FEW's

TOLD_OR_TAUGHT = ("contrast", "deviation_correction", "discriminative")  # the last one in tests/test_heads.py
UNCONDITIONAL = [name for name in registry.names("scorers") if name not in TOLD_OR_TAUGHT]


@pytest.fixture(scope="module")
def cache(detector: DiffusionDetector, digit_shards: ShardSet) -> EvidenceCache:
    return EvidenceCache.of(detector, digit_shards)


def untrained(config: ExperimentConfig, limit_mb: int = 2048, **fields: object) -> EvidenceCache:
    """On nine images and as many others; the weights are random."""
    changed = config.override({"scoring.name": "denoising_error", **fields})
    pixels = to_uint8(small_images(18, changed.data.image_size))
    detector = DiffusionDetector.create(changed, num_classes=3)
    return EvidenceCache(detector, pixels[:9], pixels[9:], limit_mb=limit_mb)


def measured(cache: EvidenceCache, config: ExperimentConfig, images: np.ndarray) -> Tensor:
    """By the detector itself, in one batch."""
    return cache.detector.with_scoring(config.scoring).measure(to_tensor(images))


@pytest.mark.parametrize("name", UNCONDITIONAL)
def test_evidence_is_what_the_detector_measures(name: str, cache: EvidenceCache, tiny_config: ExperimentConfig) -> None:
    plain = tiny_config.override({"scoring.name": name})
    known = type(plain.scoring).model_fields
    settings = [{k: v for k, v in each.items() if k.split(".")[1] in known} for each in (FEW, MANY, FEW)]
    if known.get("start") is not None and known["start"].annotation is not float:
        settings = [{"scoring.start": start} for start in ("clean", "noised", "clean")]
    for assignments in settings:
        config = plain.override(assignments)
        evidence = cache.evidence(config)
        assert torch.equal(evidence.normals, measured(cache, config, cache.normals))
        assert torch.equal(evidence.twins, measured(cache, config, cache.twins))


@pytest.mark.parametrize(
    ("condition", "scoring"),
    [
        ("rotation", {"scoring.name": "contrast", "scoring.rotations": 4}),
        ("class", {"scoring.name": "contrast", "scoring.condition": "class"}),
        ("class", {"scoring.classes": "minimum"}),
        ("class", {"scoring.classes": "unlabelled"}),
    ],
)
def test_of_conditional_networks_too(tiny_config: ExperimentConfig, condition: str, scoring: dict[str, object]) -> None:
    cache = untrained(tiny_config, **{"objective.condition": condition})
    for steps in (FEW, MANY, FEW):
        config = cache.detector.config.override({**scoring, **steps})
        assert torch.equal(cache.evidence(config).normals, measured(cache, config, cache.normals))


@pytest.mark.parametrize(
    ("scoring", "of_few", "more_of_many"),
    [
        ({}, 3, 2),  # by step
        ({"scoring.num_repeats": 2}, 6, 4),
        ({"scoring.name": "score_norms"}, 3, 2),
        ({"scoring.name": "curvature"}, 6, 10),  # its probe is the first step's: all anew
    ],
)
def test_a_step_is_measured_once(
    tiny_config: ExperimentConfig, scoring: dict[str, object], of_few: int, more_of_many: int
) -> None:
    cache, calls = untrained(tiny_config), []
    cache.detector.network.register_forward_hook(lambda *_: calls.append(1))
    few, many = (tiny_config.override({**scoring, **steps}) for steps in (FEW, MANY))
    counts = []
    for config in (
        few,
        many,
        few,
        many.override({"scoring.pooling": "max", "scoring.blur": 3, "scoring.shrinkage": 1}),
    ):
        before = len(calls)
        cache.evidence(config)
        counts.append((cache.num_measured, cache.num_measured + cache.num_reused, len(calls) > before))
    asked = [nfe(cache, config) for config in (few, many, few, many)]
    whole = of_few + more_of_many
    assert [measured for measured, _, _ in counts] == [of_few, whole, whole, whole]
    assert [total for _, total, _ in counts] == np.cumsum(asked).tolist()
    assert [called for _, _, called in counts] == [True, True, False, False]


def test_scores_of_a_setting_are_remembered(tiny_config: ExperimentConfig) -> None:
    cache = untrained(tiny_config)
    low, _ = cache.judged(tiny_config)
    assert cache.judged(tiny_config.override({"calibration.target_fpr": 0.2}))[0] is low
    assert cache.judged(tiny_config.override({"scoring.blur": 2}))[0] is not low
    assert cache.judged(tiny_config.override({"calibration.folds": 3}))[0] is not low
    assert (cache.num_measured, cache.num_reused) == (8, 24)


def test_what_is_remembered_is_what_would_be_measured(tiny_config: ExperimentConfig) -> None:
    """Settings drawn at random, each also with nothing remembered."""
    cache = untrained(tiny_config)
    random = np.random.default_rng(0)
    choices = {
        "scoring.normalise": ["none", "step", "pixel"], "scoring.sided": ["high", "both"], "scoring.blur": [0, 1],
        "scoring.pooling": ["mean", "top_k"], "scoring.pooling_share": [0.02, 0.3], "scoring.shrinkage": [1, 20],
        "scoring.density": ["none", "none", "mahalanobis", "kde"], "scoring.density_on": ["mean", "mean_and_top"],
        "calibration.max_images": [None, 6], "calibration.folds": [3, 5], "calibration.target_fpr": [0.05, 0.2],
        "scoring.num_repeats": [1, 2],
    }  # fmt: skip
    seen = set()
    for _ in range(30):
        drawn = {path: values[random.integers(len(values))] for path, values in choices.items()}
        config = tiny_config.override({**drawn, **(FEW if random.integers(2) else MANY)})
        values = measure_setting(cache, config)
        seen.add(values["selection_auroc"])
        assert values == measure_setting(EvidenceCache(cache.detector, cache.normals, cache.twins), config), drawn
    assert len(seen) > 10


def test_what_was_not_used_for_longest_is_dropped_first(tiny_config: ExperimentConfig) -> None:
    """A step takes 18 x 8 x 8 x 4 bytes, 4.6 kB, so that one MB holds 217: nearly seven settings of 32 steps."""
    cache = untrained(tiny_config, limit_mb=1)
    blocks = [
        tiny_config.override({"scoring.start": i / 8, "scoring.stop": (i + 0.9) / 8, "scoring.num_inference_steps": 32})
        for i in range(8)
    ]
    for config in blocks[:6]:
        cache.evidence(config)
    assert cache.num_measured == 6 * 32
    assert torch.equal(cache.evidence(blocks[0]).normals, measured(cache, blocks[0], cache.normals))
    cache.evidence(blocks[6])
    assert cache.num_measured == 7 * 32
    assert cache.num_reused == 32
    cache.evidence(blocks[0])  # used more lately than the second
    assert cache.num_measured == 7 * 32
    cache.evidence(blocks[1])
    assert 7 * 32 < cache.num_measured <= 8 * 32
    assert torch.equal(cache.evidence(blocks[1]).normals, measured(cache, blocks[1], cache.normals))


@pytest.mark.parametrize("limit", [None, 11])
@pytest.mark.parametrize("density", ["none", "kde"])
def test_scores_of_normals_are_those_of_the_calibration(
    cache: EvidenceCache, detector: DiffusionDetector, limit: int | None, density: str
) -> None:
    config = detector.config.override({"calibration.max_images": limit, "scoring.density": density})
    own = DiffusionDetector.create(config, num_classes=10)
    own.network.load_state_dict(detector.network.state_dict())
    calibrated = own.calibrate(to_tensor(cache.normals))
    low, high = cache.judged(config)
    assert calibrated.calibration is not None
    assert np.array_equal(np.sort(low[:limit]), calibrated.calibration.scores.numpy())
    assert len(low) == len(high) == cache.num_normal
    assert calibrated.files() == own.calibrate_measured(cache.evidence(config).normals).files()


def test_a_limit_leaves_the_other_normals_out_of_the_statistics(cache: EvidenceCache) -> None:
    config = cache.detector.config.override({"calibration.max_images": 10})
    scorer, evidence = cache.detector.scorer, cache.evidence(config)
    low, high = cache.judged(config)
    for row in (3, 12):
        rest = [i for i in range(10) if i % 5 != row % 5]
        statistics = scorer.fit(evidence.normals[rest])
        for scores, maps in ((low, evidence.normals), (high, evidence.twins)):
            assert scores[row] == float(scorer.judge(maps[row : row + 1], statistics, (8, 8)).image)


def test_the_test_split_is_not_opened(
    tiny_config: ExperimentConfig, detector: DiffusionDetector, digit_shards: ShardSet, tmp_path: Path
) -> None:
    expected = measure_setting(EvidenceCache.of(detector, digit_shards), tiny_config)
    place = tmp_path / "shards"
    shutil.copytree(digit_shards.uri, place)
    for name in digit_shards.shard_names("test"):
        (place / name).write_bytes(b"\0" * (place / name).stat().st_size)
    shards = ShardSet.open(str(place))
    with pytest.raises(DataError, match="cannot be read"):
        next(split_batches(shards, "test", tiny_config))
    assert measure_setting(EvidenceCache.of(detector, shards), tiny_config) == expected
    for name in digit_shards.shard_names("test"):
        (place / name).unlink()
    assert measure_setting(EvidenceCache.of(detector, shards), tiny_config) == expected


@pytest.mark.parametrize("limit", [None, 7])
def test_images_are_the_selection_split(detector: DiffusionDetector, digit_shards: ShardSet, limit: int | None) -> None:
    stored = next(digit_shards.read("calibration", detector.image_spec, batch_size=1000))
    made = selection_set(stored.images[:limit], stored.ids[:limit], seed=3, severity=2)
    cache = EvidenceCache.of(detector, digit_shards, seed=3, severity=2, max_images=limit)
    assert np.array_equal(np.concatenate([cache.normals, cache.twins]), made.images)


def test_what_is_refused(tiny_config: ExperimentConfig, detector: DiffusionDetector) -> None:
    pixels = to_uint8(small_images(9, (8, 8)))
    with pytest.raises(ShapeError, match="give one twin each"):
        EvidenceCache(detector, pixels[:5], pixels[5:])
    with pytest.raises(ConfigError, match=r"^3 calibration image\(s\); a sweep needs at least 4.*calibration_fraction"):
        EvidenceCache(detector, pixels[:3], pixels[3:6])
    cache = EvidenceCache(detector, pixels[:4], pixels[4:8])
    with pytest.raises(ConfigError, match=r"^scoring\.num_inference_steps is 2000"):
        cache.evidence(tiny_config.override({"scoring.num_inference_steps": 2000}))
    with pytest.raises(ConfigError, match=r"^objective\.condition is none; scoring contrast"):
        cache.judged(tiny_config.override({"scoring.name": "contrast"}))
    assert cache.num_measured == cache.num_reused == 0


def nfe(cache: EvidenceCache, config: ExperimentConfig) -> int:
    evaluations = cache.detector.with_scoring(config.scoring).num_evaluations
    assert evaluations is not None
    return evaluations
