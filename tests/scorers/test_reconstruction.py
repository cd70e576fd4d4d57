"""``reconstruction`` against its closed form on Gaussian data, and the choices it offers."""

import pytest
import torch

from raydiff.core.schedule import make_schedule
from raydiff.errors import ConfigError
from raydiff.scorers import reconstruction
from raydiff.testing import OracleDenoiser, planted_defect

MEAN, STD = 0.2, 0.3
SCHEDULE = make_schedule("squaredcos_cap_v2", 200)
ORACLE = OracleDenoiser(SCHEDULE, mean=MEAN, std=STD)


def build(**fields):
    return reconstruction.build(reconstruction.Options(**fields))


def closed_form(x, steps, noise):
    """DDIM with the exact denoiser is linear: each step multiplies x_t - sqrt(abar) mean by a number."""
    table = [float(v) for v in SCHEDULE.alphas_cumprod] + [1.0]  # table[-1] is abar_{-1}
    value = table[steps[0]] ** 0.5 * (x - MEAN) + (1 - table[steps[0]]) ** 0.5 * noise
    for t, t_prev in zip(steps, [*steps[1:], -1], strict=True):
        now, then = table[t], table[t_prev]
        value = value * ((then * now) ** 0.5 * STD**2 + ((1 - then) * (1 - now)) ** 0.5) / (now * STD**2 + 1 - now)
    return MEAN + value


@pytest.mark.parametrize("error", ["squared", "absolute"])
@pytest.mark.parametrize("start", ["noised", "clean"])
def test_evidence_is_the_closed_form(start, error):
    scorer, model = build(start=start, error=error, num_repeats=2), ORACLE.model(seed=3)
    x = ORACLE.sample((5, 3, 8, 4)) + 0.3
    steps = scorer.timesteps(SCHEDULE)
    noises = [model.noise((3, 8, 4), steps[0], repeat) for repeat in range(2)] if start == "noised" else [0 * x[0]]
    differences = torch.stack([closed_form(x, steps, noise) - x for noise in noises])
    errors = differences.square() if error == "squared" else differences.abs()
    torch.testing.assert_close(scorer.measure(model, x), errors.mean(0).mean(1, keepdim=True), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scorer.reconstruct(model, x), closed_form(x, steps, noises[0]), rtol=1e-4, atol=1e-4)


def test_steps_go_from_the_start_down():
    assert build(start_step=0.5, num_inference_steps=1).timesteps(SCHEDULE) == [100]
    steps = build(start_step=1.0, num_inference_steps=200).timesteps(SCHEDULE)
    assert steps == list(range(199, -1, -1))


@pytest.mark.parametrize(
    ("fields", "evaluations"), [({}, 5), ({"num_repeats": 3}, 15), ({"start": "clean", "num_repeats": 3}, 5)]
)
def test_evaluations(fields, evaluations):
    assert build(**fields).num_evaluations(ORACLE.model()) == evaluations


def test_the_map_is_highest_in_the_defect():
    scorer, model = build(), ORACLE.model()
    statistics = scorer.fit(scorer.measure(model, ORACLE.sample((200, 1, 16, 16), seed=1)))
    defective, masks = planted_defect(ORACLE.sample((12, 1, 16, 16), seed=2))
    maps = scorer.judge(scorer.measure(model, defective), statistics, (16, 16)).map
    assert bool(masks.flatten(1).gather(1, maps.flatten(1).argmax(1)[:, None]).all())


def test_the_map_comes_at_the_size_asked_for():
    scorer, model = build(), ORACLE.model()
    evidence = scorer.measure(model, ORACLE.sample((3, 1, 8, 8)))
    scores = scorer.judge(evidence, scorer.fit(evidence), (32, 16))
    assert scores.map.shape == (3, 1, 32, 16)
    assert torch.equal(scores.image, scorer.judge(evidence, scorer.fit(evidence), (8, 8)).image)


def test_more_steps_than_there_are():
    with pytest.raises(ConfigError, match="5 inference steps from step 2; ask for 1 to 3"):
        build(start_step=0.01).measure(ORACLE.model(), ORACLE.sample((1, 1, 8, 8)))
