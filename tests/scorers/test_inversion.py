"""``inversion`` where the whole path is known in closed form, and what its two sides find."""

from dataclasses import replace

import pytest
import torch

from raydiff.config import ExperimentConfig
from raydiff.core.schedule import make_schedule
from raydiff.detector.building import build_scorer
from raydiff.errors import ConfigError
from raydiff.scorers import inversion
from raydiff.testing import OracleDenoiser

MEAN, STD = 0.2, 0.3
SCHEDULE = make_schedule("linear", 1000)
ORACLE = OracleDenoiser(SCHEDULE, mean=MEAN, std=STD)


def build(**fields):
    return inversion.build(inversion.Options(**fields))


def test_gaussian_data_become_a_standard_normal_latent():
    """The exact flow of Gaussian data is x -> (x - mean) / std; many steps come close to it."""
    x = ORACLE.sample((16, 3, 8, 8))
    latent = build(num_inference_steps=200, statistic="latent").measure(ORACLE.model(), x)
    torch.testing.assert_close(latent, ((x - MEAN) / STD).square().mean(1, keepdim=True), rtol=0.05, atol=0.02)
    assert float(latent.mean()) == pytest.approx(1, abs=0.08)


def test_the_path_is_what_was_read_on_the_way():
    steps, abar = SCHEDULE.timesteps(999, 3), SCHEDULE.alphas_cumprod
    x = ORACLE.sample((2, 1, 4, 4)).double()

    def epsilon(x_t, t):
        return (1 - abar[t]).sqrt() * (x_t - abar[t].sqrt() * MEAN) / (abar[t] * STD**2 + 1 - abar[t])

    high, middle, low = steps
    first = epsilon(x, low)
    x_low = abar[low].sqrt() * x + (1 - abar[low]).sqrt() * first
    second = epsilon(x_low, low)
    guess = (x_low - (1 - abar[low]).sqrt() * second) / abar[low].sqrt()
    third = epsilon(abar[middle].sqrt() * guess + (1 - abar[middle]).sqrt() * second, middle)
    rates = (second - first) / ((low + 1) / 1000), (third - second) / ((middle - low) / 1000)
    bend = (rates[1] - rates[0]) / ((middle + 1) / 2 / 1000)
    expected = torch.cat([first, second, third, *rates, bend], 1).square().float()
    evidence = build(num_inference_steps=3, statistic="path").measure(ORACLE.model(), x.float())
    torch.testing.assert_close(evidence, expected, rtol=2e-3, atol=1e-5)
    both = build(num_inference_steps=3).measure(ORACLE.model(), x.float())
    assert torch.equal(both[:, :-1], evidence)
    assert high == 999


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_steps_looked_at_are_those_that_the_network_is_asked_at(count):
    """The latent's own step needs no training, unless it is the only one."""
    scorer, asked = build(num_inference_steps=count, top=0.5), set()

    def watching(x_t, t, condition=None):
        asked.update(t.tolist())
        return ORACLE(x_t, t, condition)

    scorer.measure(replace(ORACLE.model(), denoiser=watching, chunk_size=2), ORACLE.sample((2, 1, 8, 8)))
    assert asked == set(scorer.timesteps(SCHEDULE))
    scoring = {"name": "inversion", "top": 0.5, "num_inference_steps": count}
    config = ExperimentConfig().override({"objective.step_range": [0.0, 0.45], "scoring": scoring})
    if count == 1:
        with pytest.raises(ConfigError, match="scoring inversion looks at step"):
            build_scorer(config, 1)
    else:
        build_scorer(config, 1)


@pytest.mark.parametrize(("statistic", "maps"), [("path", 12), ("latent", 1), ("both", 13)])
def test_maps_and_cost(statistic, maps):
    scorer = build(statistic=statistic)
    assert scorer.measure(ORACLE.model(), ORACLE.sample((2, 1, 8, 8))).shape == (2, maps, 8, 8)
    assert scorer.num_evaluations(ORACLE.model()) == 5


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"density": "mahalanobis"}, True),
        ({"density": "gaussian_mixture"}, True),
        ({"density": "none", "sided": "high", "pooling": "mean"}, False),
    ],
)
def test_what_is_too_ordinary_is_found_from_both_sides(fields, found):
    model, scorer = ORACLE.model(), build(**fields)
    statistics = scorer.fit(scorer.measure(model, ORACLE.sample((200, 1, 8, 8), seed=1)))
    clean, flat = ORACLE.sample((16, 1, 8, 8), seed=2), torch.full((16, 1, 8, 8), MEAN)
    low, high = (scorer.judge(scorer.measure(model, x), statistics, (8, 8)).image for x in (clean, flat))
    assert bool((high > low).all()) is found


def test_a_flat_patch_stands_out_of_the_map_from_both_sides():
    model, images = ORACLE.model(), ORACLE.sample((16, 1, 16, 16), seed=2)
    images[..., 4:12, 4:12] = MEAN
    contrast = {}
    for sided in ("high", "both"):
        scorer = build(statistic="latent", density="none", sided=sided, blur=0)
        statistics = scorer.fit(scorer.measure(model, ORACLE.sample((200, 1, 16, 16), seed=1)))
        maps = scorer.judge(scorer.measure(model, images), statistics, (16, 16)).map
        contrast[sided] = float(maps[..., 4:12, 4:12].mean() - maps[..., :4, :].mean())
    assert contrast["high"] < -0.5  # z^2 of 0 is 0.7 deviations below its mean of 1
    assert contrast["both"] > contrast["high"] + 0.5
