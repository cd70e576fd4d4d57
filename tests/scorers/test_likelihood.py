"""``likelihood`` against the variational bound over all steps, and against the entropy of Gaussian data."""

import math
from itertools import pairwise

import pytest
import torch

from raydiff.config import ExperimentConfig
from raydiff.core.objective import variational_bound
from raydiff.core.schedule import make_schedule
from raydiff.detector import DiffusionDetector
from raydiff.errors import ConfigError
from raydiff.scorers import likelihood
from raydiff.testing import OracleDenoiser

MEAN, STD = 0.1, 0.25
SCHEDULE = make_schedule("squaredcos_cap_v2", 60)
ORACLE = OracleDenoiser(SCHEDULE, mean=MEAN, std=STD, prediction_type="v_prediction")


def build(**fields):
    return likelihood.build(likelihood.Options(**fields))


@pytest.mark.parametrize(("decoder", "bin_width"), [("levels", 2 / 255), ("continuous", None)])
def test_every_step_gives_the_bound(decoder, bin_width):
    scorer, model, x = (
        build(num_inference_steps=59, top=1.0, decoder=decoder),
        ORACLE.model(seed=4),
        ORACLE.sample((5, 3, 8, 4)),
    )
    noise = torch.stack([model.noise((3, 8, 4), t) for t in range(60)])
    expected = variational_bound(model.predict_x0, SCHEDULE, x, noise, bin_width=bin_width)
    evidence = scorer.measure(model, x)
    torch.testing.assert_close(
        scorer.judge(evidence, scorer.fit(evidence), (8, 4)).image, expected.total, rtol=1e-4, atol=1e-4
    )
    per_term = evidence.mean((2, 3)) / evidence.shape[1]
    torch.testing.assert_close(per_term[:, 0], expected.decoder, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(per_term[:, 1:-1], expected.kl, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(per_term[:, -1], expected.prior, rtol=1e-4, atol=1e-5)


def expected_bound(schedule, steps):
    """Of Gaussian data with the best denoiser, bits per dimension: its squared error is the posterior variance."""
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    error = 1 / (1 / STD**2 + snr)
    kls = sum(0.5 * float((snr[s] - snr[t]) * error[t]) for s, t in pairwise(steps))
    abar, sigma2 = float(schedule.alphas_cumprod[steps[-1]]), float(1 - schedule.alphas_cumprod[0])
    prior = 0.5 * (abar * (MEAN**2 + STD**2 - 1) - math.log(1 - abar))
    decoder = 0.5 * (float(error[0]) / sigma2 + math.log(2 * math.pi * sigma2))
    return (kls + prior + decoder) / math.log(2)


def test_the_bound_of_gaussian_data_is_above_their_entropy_and_tightens_with_the_steps():
    entropy = 0.5 * math.log2(2 * math.pi * math.e * STD**2)
    schedule = make_schedule("linear", 1000)
    oracle = OracleDenoiser(schedule, mean=MEAN, std=STD)
    x, bounds = oracle.sample((4, 3, 32, 32), seed=1), []
    for count in (4, 16, 64):
        scorer = build(num_inference_steps=count, decoder="continuous")
        draws = [scorer.measure(oracle.model(seed=seed), x).mean() for seed in range(4)]
        bounds.append(float(sum(draws)) / 4)
        assert bounds[-1] == pytest.approx(expected_bound(schedule, scorer.timesteps(schedule)), rel=0.03, abs=0.05)
    assert bounds[0] > bounds[1] > bounds[2] > entropy


def test_a_flat_image_is_likelier_than_any_normal_one_and_a_density_minds():
    """Nalisnick et al. 2019: what is simpler than the data has a higher likelihood."""
    model, clean, flat = ORACLE.model(), ORACLE.sample((16, 1, 8, 8), seed=2), torch.full((16, 1, 8, 8), MEAN)
    for density, found in (("none", False), ("gaussian_mixture", True)):
        scorer = build(density=density)
        statistics = scorer.fit(scorer.measure(model, ORACLE.sample((200, 1, 8, 8), seed=1)))
        low, high = (scorer.judge(scorer.measure(model, x), statistics, (8, 8)).image for x in (clean, flat))
        assert bool((high > low).all()) is found, density


def test_gradients_are_finite_at_the_ends_of_the_grey_scale():
    x = torch.tensor([-1.0, -0.999, 0.0, 0.999, 1.0]).repeat(1, 1, 5, 1).requires_grad_()
    build().measure(ORACLE.model(differentiable=True), x).sum().backward()
    assert bool(x.grad.isfinite().all())
    assert bool((x.grad != 0).any())


def test_steps():
    assert build(num_inference_steps=59, top=1.0).timesteps(SCHEDULE) == list(range(60))
    steps = build(num_inference_steps=6, top=0.9).timesteps(make_schedule("linear", 1000))
    assert (steps[0], steps[-1]) == (0, 899)
    ratios = make_schedule("linear", 1000).snr(torch.tensor(steps)).log().diff()
    assert float(ratios.max() - ratios.min()) < 0.2 * abs(float(ratios.mean()))
    with pytest.raises(
        ConfigError, match=r"num_inference_steps is 60; up to scoring.top a schedule of 60 steps has only 47"
    ):
        build(num_inference_steps=60).timesteps(SCHEDULE)


def test_grey_levels_are_those_of_pixels():
    build(decoder="levels").check(None, "pixel")
    build(decoder="continuous").check(None, "feature")
    with pytest.raises(
        ConfigError, match=r"scoring.decoder is levels and space is feature.*set scoring.decoder to cont"
    ):
        build(decoder="levels").check(None, "feature")
    config = ExperimentConfig().override({"space": {"name": "feature"}, "scoring": {"name": "likelihood"}})
    with pytest.raises(ConfigError, match=r"scoring.decoder is levels"):
        DiffusionDetector.create(config, num_classes=1)
