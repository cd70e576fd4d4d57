"""``contrast`` with a denoiser that knows exactly what each quarter turn does."""

import math

import pytest
import torch

from raydiff.config import ExperimentConfig
from raydiff.core.schedule import make_schedule
from raydiff.detector import DiffusionDetector
from raydiff.errors import ConfigError, ShapeError
from raydiff.scorers import contrast
from raydiff.testing import TurnedOracle, small_images

SCHEDULE = make_schedule("squaredcos_cap_v2", 100)
DIGIT = small_images(1)[0] * 0.5
ORACLE = TurnedOracle(SCHEDULE, mean=DIGIT, std=0.2)
MODEL = ORACLE.model()
PAIRINGS = ["difference", "log_ratio", "softmax"]


def build(**fields):
    return contrast.build(contrast.Options(**fields))


def score(scorer, x):
    """Plain means: no statistics."""
    return scorer.measure(MODEL, x).mean((1, 2, 3))


@pytest.mark.parametrize("rotations", [1, 4])
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_the_sign(pairing, rotations):
    """The truth helps a normal image; it helps less where the image is not what it says."""
    scorer, x = build(pairing=pairing, rotations=rotations), ORACLE.sample((8, 1, 8, 8))
    normal = score(scorer, x)
    neutral = math.log(4) if pairing == "softmax" else 0
    assert bool((normal < neutral).all())
    for turn in (1, 2, 3):
        assert bool((score(scorer, torch.rot90(x, turn, (-2, -1))) > normal.max()).all())


@pytest.mark.parametrize(("pairing", "neutral"), [("difference", 0), ("log_ratio", 0), ("softmax", math.log(4))])
def test_a_condition_that_says_nothing_has_no_contrast(pairing, neutral):
    deaf = TurnedOracle(SCHEDULE, mean=torch.full((1, 8, 8), 0.3), std=0.2).model()
    evidence = build(pairing=pairing, rotations=4).measure(deaf, ORACLE.sample((3, 1, 8, 8)) + 0.5)
    assert evidence.shape == (3, 4, 8, 8) if pairing == "difference" else (3, 4, 1, 1)
    torch.testing.assert_close(evidence, torch.full_like(evidence, neutral), rtol=0, atol=1e-6)


def test_the_difference_is_the_closed_form():
    scorer, x = build(num_inference_steps=1, start=0.3), ORACLE.sample((4, 1, 8, 8))
    (t,) = scorer.timesteps(SCHEDULE)
    abar = float(SCHEDULE.alphas_cumprod[t])
    x_t = abar**0.5 * x + (1 - abar) ** 0.5 * MODEL.noise((1, 8, 8), t)
    gain = abar**0.5 * 0.04 / (abar * 0.04 + 1 - abar)
    means = [torch.rot90(DIGIT, k, (-2, -1)) for k in range(4)]
    errors = [(mean + gain * (x_t - abar**0.5 * mean) - x).square() for mean in means]
    torch.testing.assert_close(scorer.measure(MODEL, x), errors[0] - sum(errors[1:]) / 3, rtol=1e-4, atol=1e-6)


def test_turned_maps_are_turned_back():
    """An image that is upside down in one corner is found in that corner, however it was turned for a look."""
    x = ORACLE.sample((8, 1, 8, 8))
    x[..., :4, :4] = torch.rot90(ORACLE.sample((8, 1, 8, 8), seed=1), 2, (-2, -1))[..., :4, :4]
    maps = build(rotations=4).measure(MODEL, x).mean((0, 1))
    means = [float(quarter.mean()) for half in maps.chunk(2, 0) for quarter in half.chunk(2, 1)]
    assert means[0] == max(means)
    assert means[0] > 0


def test_the_class_that_fits_best_is_the_true_one():
    scorer = build(condition="class", pairing="log_ratio")
    x = torch.cat([torch.rot90(ORACLE.sample((3, 1, 8, 8)), k, (-2, -1)) for k in range(4)])
    assert bool((score(scorer, x) < -0.5).all())
    assert bool((score(scorer, ORACLE.sample((3, 1, 8, 8)).flip(-1)) > score(scorer, x).max()).all())


@pytest.mark.parametrize(("fields", "evaluations"), [({}, 16), ({"rotations": 4}, 64), ({"num_inference_steps": 2}, 8)])
def test_evaluations(fields, evaluations):
    assert build(**fields).num_evaluations(MODEL) == evaluations


@pytest.mark.parametrize(
    ("fields", "num_conditions", "message"),
    [
        ({}, None, "objective.condition is none; scoring contrast tells conditions apart: set it to rotation"),
        ({"condition": "class"}, None, "objective.condition is none; .* set it to class"),
        ({}, 10, "scoring.condition is rotation and the denoiser knows 10 labels"),
        ({"condition": "class"}, 1, "scoring.condition is class and there is one class"),
        ({"condition": "class", "rotations": 4}, 10, "scoring.rotations is 4 and scoring.condition class"),
    ],
)
def test_without_conditions_to_tell_apart(fields, num_conditions, message):
    with pytest.raises(ConfigError, match=message):
        build(**fields).check(num_conditions, "pixel")


def test_only_images_can_be_turned():
    """A grid of features of a turned image is not the turned grid."""
    build(rotations=4).check(4, "pixel")
    build(rotations=1).check(4, "feature")
    with pytest.raises(
        ConfigError, match=r"scoring.rotations is 4 and space is feature, .* set scoring.rotations to 1"
    ):
        build(rotations=4).check(4, "feature")


def test_it_is_refused_before_training():
    config = ExperimentConfig(scoring={"name": "contrast"})
    with pytest.raises(ConfigError, match=r"objective.condition is none"):
        DiffusionDetector.create(config, num_classes=10)
    plain = DiffusionDetector.create(config.override(["scoring.name=denoising_error"]), num_classes=10)
    with pytest.raises(ConfigError, match=r"objective.condition is none"):
        plain.with_scoring(contrast.Options())
    DiffusionDetector.create(config.override(["objective.condition=rotation"]), num_classes=10)


def test_turned_images_must_be_square():
    with pytest.raises(ShapeError, match=r"images are 8 x 4; scoring.rotations 4 needs square ones"):
        build(rotations=4).measure(MODEL, torch.zeros(1, 1, 8, 4))
