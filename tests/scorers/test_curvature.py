"""``curvature`` against the trace and the score of Gaussian data, and on a network without closed form."""

import pytest
import torch
from torch import nn

from raydiff.core.diffusion import Diffusion
from raydiff.core.schedule import make_schedule
from raydiff.scorers import curvature
from raydiff.testing import OracleDenoiser

MEAN, STD = 0.2, 0.3
SCHEDULE = make_schedule("squaredcos_cap_v2", 200)
ORACLE = OracleDenoiser(SCHEDULE, mean=MEAN, std=STD)


def build(**fields):
    return curvature.build(curvature.Options(**fields))


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_ratio_is_the_closed_form(prediction_type):
    """tr(ds/dx) is -D / v and s is -(x_t - sqrt(abar) mean) / v: the ratio is |x_t - sqrt(abar) mean|^2 / (D v)."""
    model = OracleDenoiser(SCHEDULE, mean=MEAN, std=STD, prediction_type=prediction_type).model()
    scorer, x = build(maps=False), ORACLE.sample((6, 3, 8, 4)) + 0.3
    evidence = scorer.measure(model, x)
    assert evidence.shape == (6, 2, 1, 1)
    for k, t in enumerate(scorer.timesteps(SCHEDULE)):
        abar = float(SCHEDULE.alphas_cumprod[t])
        expected = abar * (x - MEAN).square().mean((1, 2, 3)) / (abar * STD**2 + 1 - abar)
        torch.testing.assert_close(evidence[:, k, 0, 0], expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(build().measure(model, x).mean((2, 3)), evidence[..., 0, 0], rtol=1e-5, atol=0)


def test_noised_normal_images_have_a_ratio_of_one():
    evidence = build(maps=False, start_from="noised").measure(ORACLE.model(), ORACLE.sample((64, 3, 16, 16)))
    torch.testing.assert_close(evidence.mean(0), torch.ones(2, 1, 1), rtol=0, atol=0.1)


def test_the_trace_of_a_network():
    """A Jacobian without cross terms: the probe misses nothing."""

    class Cubic(nn.Module):
        def forward(self, x_t, t, condition):
            return x_t + 0.2 * x_t**3

    model, x, scorer = (
        Diffusion(Cubic(), SCHEDULE, "epsilon"),
        ORACLE.sample((3, 1, 4, 4)),
        build(maps=False, probe_size=1e-3),
    )
    for k, t in enumerate(scorer.timesteps(SCHEDULE)):
        abar = float(SCHEDULE.alphas_cumprod[t])
        x_t = abar**0.5 * x
        squares = (x_t + 0.2 * x_t**3).square().sum((1, 2, 3))
        trace = (1 + 0.6 * x_t**2).sum((1, 2, 3))
        expected = squares / ((1 - abar) ** 0.5 * trace)
        torch.testing.assert_close(scorer.measure(model, x)[:, k, 0, 0], expected, rtol=2e-3, atol=0)


def test_a_network_that_ignores_the_image_gives_finite_numbers():
    model = Diffusion(lambda x, t, condition: torch.ones_like(x), SCHEDULE, "epsilon")
    assert bool(build().measure(model, ORACLE.sample((2, 1, 4, 4))).isfinite().all())


def test_two_sides_and_the_cost():
    scorer, model = build(), ORACLE.model()
    assert scorer.num_evaluations(model) == 4
    clean, flat = ORACLE.sample((16, 1, 8, 8), seed=2), torch.full((16, 1, 8, 8), MEAN)
    statistics = scorer.fit(scorer.measure(model, ORACLE.sample((200, 1, 8, 8), seed=1)))
    low, high = (scorer.judge(scorer.measure(model, x), statistics, (8, 8)).image for x in (clean, flat))
    assert bool((high > low).all())
