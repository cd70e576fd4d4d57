"""``score_norms`` against the known score of Gaussian data."""

import pytest
import torch

from raydiff.core.schedule import make_schedule
from raydiff.scorers import score_norms
from raydiff.testing import OracleDenoiser

MEAN, STD = 0.2, 0.3
SCHEDULE = make_schedule("squaredcos_cap_v2", 200)
ORACLE = OracleDenoiser(SCHEDULE, mean=MEAN, std=STD, prediction_type="sample")


def build(**fields):
    return score_norms.build(score_norms.Options(**fields))


@pytest.mark.parametrize("start_from", ["clean", "noised"])
def test_normal_images_have_the_expected_norms(start_from):
    """E |eps*|^2 is (1 - abar) / v of noised images, and (1 - abar) abar std^2 / v^2 of scaled ones."""
    scorer, model = build(start_from=start_from), ORACLE.model()
    evidence = scorer.measure(model, ORACLE.sample((32, 3, 16, 16), seed=1))
    abar = SCHEDULE.alphas_cumprod[scorer.timesteps(SCHEDULE)]
    v = abar * STD**2 + 1 - abar
    expected = (1 - abar) / v if start_from == "noised" else (1 - abar) * abar * STD**2 / v**2
    # Of a shared noise draw there are 768 numbers, of images 32 times as many.
    torch.testing.assert_close(
        evidence.double().mean((0, 2, 3)), expected, rtol=0.15 if start_from == "noised" else 0.05, atol=0
    )


def test_each_pixel_has_its_share():
    scorer, x = build(num_inference_steps=3), ORACLE.sample((4, 2, 8, 4)) + 0.4
    for k, t in enumerate(scorer.timesteps(SCHEDULE)):
        abar = float(SCHEDULE.alphas_cumprod[t])
        score = -(abar**0.5) * (x - MEAN) / (abar * STD**2 + 1 - abar)
        expected = (1 - abar) * score.square().mean(1)
        torch.testing.assert_close(scorer.measure(ORACLE.model(), x)[:, k], expected, rtol=1e-3, atol=1e-6)


def test_clean_images_need_no_noise_and_norms_are_two_sided():
    scorer, x = build(), ORACLE.sample((16, 1, 8, 8), seed=2)
    assert torch.equal(scorer.measure(ORACLE.model(seed=0), x), scorer.measure(ORACLE.model(seed=1), x))
    model, flat = ORACLE.model(), torch.full((16, 1, 8, 8), MEAN)
    statistics = scorer.fit(scorer.measure(model, ORACLE.sample((200, 1, 8, 8), seed=1)))
    assert statistics["density.center"].shape == (10,)  # the norms alone
    low, high = (scorer.judge(scorer.measure(model, images), statistics, (8, 8)).image for images in (x, flat))
    assert bool((high > low).all())
