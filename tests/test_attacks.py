"""An attack turns the detector's own scores round, and stays within its budget."""

import pytest
import torch

from raydiff import registry
from raydiff.attacks import pgd
from raydiff.config import component_options
from raydiff.detector import BaselineDetector, DiffusionDetector
from raydiff.errors import ConfigError, ShapeError
from raydiff.planting import TrainedScorer
from raydiff.testing import LatentExamples, planted_defect, small_images

ANOMALOUS = torch.tensor([True, False] * 5)


@pytest.mark.parametrize("random_start", [None, 3])
def test_it_lowers_anomalous_and_raises_normal_scores_within_the_budget(detector, digit_images, random_start):
    images = digit_images[:10]
    attacked = pgd(detector, images, ANOMALOUS, budget=0.25, random_start=random_start)
    assert float((attacked - images).abs().max()) <= 0.25 + 1e-6
    assert float((attacked - images).abs().max()) > 0.2
    assert float(attacked.abs().max()) <= 1
    before, after = detector.score(images).image, detector.score(attacked).image
    assert bool((after < before)[ANOMALOUS].all())
    assert bool((after > before)[~ANOMALOUS].all())


class Hill:
    """A detector whose score falls with every step away from one image; its gradient leads astray."""

    name = "hill"

    def __init__(self, top):
        self.top = top

    def surrogate(self, images):
        distance = (images - self.top).square().flatten(1).sum(1)
        return -distance.detach() + (distance - distance.detach())


@pytest.mark.parametrize("random_start", [None, 3])
def test_an_attack_is_never_worse_than_none(random_start):
    images = small_images(4) * 0.5
    attacked = pgd(Hill(images), images, torch.zeros(4, dtype=torch.bool), budget=0.1, random_start=random_start)
    assert torch.equal(attacked, images)


def test_a_larger_budget_goes_further(detector, digit_images):
    images = digit_images[:6]
    before = detector.score(images).image
    shifts = []
    for budget in (0.02, 0.1, 0.4):
        after = detector.score(pgd(detector, images, ANOMALOUS[:6], budget=budget)).image
        shifts.append(float((after - before)[~ANOMALOUS[:6]].mean()))
    assert 0 < shifts[0] < shifts[1] < shifts[2]


def test_it_beats_a_random_change_of_the_same_size(detector, digit_images):
    images = digit_images[:6]
    signs = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).sign()
    noisy = detector.score((images + 0.1 * signs).clamp(-1, 1)).image
    attacked = detector.score(pgd(detector, images, ANOMALOUS[:6], budget=0.1)).image
    assert bool((attacked < noisy)[ANOMALOUS[:6]].all())
    assert bool((attacked > noisy)[~ANOMALOUS[:6]].all())


def test_an_image_is_attacked_alone(detector, digit_images):
    """Batch-mates and the attack before it change no bit of it; the detector is as it was."""
    images = digit_images[:10]
    before = detector.score(images).image
    options = {"budget": 0.1, "num_steps": 3}
    attacked = pgd(detector, images, ANOMALOUS, **options)
    assert torch.equal(pgd(detector, images, ANOMALOUS, **options), attacked)
    assert torch.equal(pgd(detector, images[3:4], ANOMALOUS[3:4], **options), attacked[3:4])
    assert torch.equal(detector.score(images).image, before)
    assert all(parameter.grad is None for parameter in detector.network.parameters())


def test_the_surrogate_is_the_score_up_to_rounding(detector, digit_images):
    torch.testing.assert_close(detector.surrogate(digit_images).detach(), detector.score(digit_images).image)


@pytest.mark.parametrize("name", registry.names("scorers"))
def test_every_scorer_can_be_attacked(tiny_config, name):
    """With an untrained network and the condition it needs: its surrogate is the score, and has a gradient."""
    images = small_images(24)
    detector = untrained(tiny_config, name).calibrate(images[:20])
    surrogate, before = detector.surrogate(images[20:]).detach(), detector.score(images[20:]).image
    torch.testing.assert_close(surrogate, before, rtol=1e-3, atol=1e-3)
    attacked = pgd(detector, images[20:], ANOMALOUS[:4], budget=0.2, num_steps=2)
    shift = detector.score(attacked).image - before
    assert float(shift[ANOMALOUS[:4]].max()) < 1e-3
    assert float(shift[~ANOMALOUS[:4]].mean()) > 0.01


def untrained(config, scorer):
    """A detector whose network has every weight moved, so that none of its parts is silent."""
    for objective in ({}, {"condition": "rotation"}, {"prediction_type": "deviation"}):
        few = {"num_steps": 20, "width": 16} if scorer == "discriminative" else {}
        changed = {f"objective.{field}": value for field, value in objective.items()}
        changed |= {"scoring": {"name": scorer, **few}}
        try:
            detector = DiffusionDetector.create(config.override(changed), num_classes=1)
        except ConfigError:
            continue
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in detector.network.parameters():
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.05)
        if isinstance(detector.scorer, TrainedScorer):
            clean = small_images(16, seed=4)
            defective, masks = planted_defect(clean)
            examples = LatentExamples(torch.cat([clean, defective]), torch.cat([~masks & masks, masks]), 16)
            detector.scorer.train(detector.model, examples, lambda _: None)
        return detector
    raise AssertionError(f"{scorer} fits no objective")


@pytest.mark.parametrize("name", ["knn", "ocsvm"])
def test_baselines_with_a_gradient_are_attacked_too(tiny_config, digit_images, name):
    detector = BaselineDetector.fit(tiny_config, component_options("baselines", name), digit_images[10:])
    images = digit_images[:10]
    attacked = pgd(detector, images, ANOMALOUS, budget=0.2)
    before, after = detector.score(images).image, detector.score(attacked).image
    assert float((after - before)[ANOMALOUS].mean()) < 0
    assert float((after - before)[~ANOMALOUS].mean()) > 0


def test_a_detector_without_a_gradient_says_so(tiny_config, digit_images):
    options = component_options("baselines", "isolation_forest")
    detector = BaselineDetector.fit(tiny_config, options, digit_images)
    assert not detector.has_gradient
    with pytest.raises(ConfigError, match="isolation_forest has no gradient, so it cannot be attacked"):
        pgd(detector, digit_images[:2], torch.tensor([True, False]), budget=0.1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": 0.0}, ConfigError, r"attack budget is 0\.0; it must lie above 0 and not above 2"),
        ({"budget": 4.0}, ConfigError, r"attack budget is 4\.0; it must lie above 0 and not above 2"),
        ({"budget": 0.1, "num_steps": 0}, ConfigError, "attack num_steps is 0; it must be at least 1"),
        ({"budget": 0.1, "is_anomaly": torch.ones(3, dtype=torch.bool)}, ShapeError, r"is_anomaly is \(3,\)"),
    ],
)
def test_bad_arguments_are_refused(detector, digit_images, options, error, message):
    with pytest.raises(error, match=message):
        pgd(detector, digit_images[:2], **{"is_anomaly": torch.tensor([True, False]), **options})
