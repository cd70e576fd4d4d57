"""``conditioned``: the steering in closed form, and what it leaves."""

import pytest
import torch

from raydiff.core.schedule import make_schedule
from raydiff.scorers import conditioned, reconstruction
from raydiff.testing import OracleDenoiser, planted_defect

MEAN, STD = 0.2, 0.3
SCHEDULE = make_schedule("squaredcos_cap_v2", 200)
ORACLE = OracleDenoiser(SCHEDULE, mean=MEAN, std=STD)


def build(**fields):
    return conditioned.build(conditioned.Options(**fields))


@pytest.mark.parametrize("start", ["noised", "clean"])
def test_without_steering_it_is_the_reconstruction(start):
    model, x = ORACLE.model(seed=3), ORACLE.sample((4, 3, 8, 8))
    plain = reconstruction.build(reconstruction.Options(start=start))
    torch.testing.assert_close(build(start=start, weight=0).measure(model, x), plain.measure(model, x))


def test_one_step_is_the_formula():
    scorer, model, x = build(num_inference_steps=1, weight=0.7), ORACLE.model(), ORACLE.sample((4, 1, 8, 8)) + 0.2
    (t,) = scorer.timesteps(SCHEDULE)
    abar = float(SCHEDULE.alphas_cumprod[t])
    signal, sigma = abar**0.5, (1 - abar) ** 0.5
    x_t = signal * x + sigma * model.noise((1, 8, 8), t)
    epsilon = sigma * (x_t - signal * MEAN) / (abar * STD**2 + 1 - abar)
    steered = epsilon - 0.7 * sigma * (signal * x + sigma * epsilon - x_t)
    torch.testing.assert_close(scorer.reconstruct(model, x), (x_t - sigma * steered) / signal, rtol=1e-4, atol=1e-5)


def test_steering_keeps_normal_detail():
    model, x = ORACLE.model(), ORACLE.sample((16, 1, 8, 8))
    errors = [float(build(weight=weight).measure(model, x).mean()) for weight in (0, 1, 2)]
    assert errors[0] > 1.1 * errors[1] > 1.1 * 1.1 * errors[2]


def test_the_map_is_highest_in_the_defect():
    scorer, model = build(), ORACLE.model()
    statistics = scorer.fit(scorer.measure(model, ORACLE.sample((200, 1, 16, 16), seed=1)))
    defective, masks = planted_defect(ORACLE.sample((12, 1, 16, 16), seed=2))
    maps = scorer.judge(scorer.measure(model, defective), statistics, (16, 16)).map
    assert bool(masks.flatten(1).gather(1, maps.flatten(1).argmax(1)[:, None]).all())
