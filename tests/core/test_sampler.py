"""Sampling steps against diffusers' schedulers, and whole trajectories against closed forms on Gaussian data."""

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, DDPMScheduler

from raydiff.core.sampler import ddim_invert, ddim_sample, ddim_step, ddpm_step, reconstruct
from raydiff.core.schedule import make_schedule
from raydiff.errors import ShapeError
from raydiff.testing import OracleDenoiser

PREDICTION_TYPES = ["epsilon", "sample", "v_prediction"]
SETTINGS = {"num_train_timesteps": 100, "beta_schedule": "linear", "clip_sample": False}
SHAPE = (2, 3, 4, 4)


def ours():
    return make_schedule("linear", 100)


def tensors(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator) for _ in range(count)]


def at(step, like=SHAPE[0]):
    return torch.full((like,), int(step))


def pairs(timesteps):
    steps = [int(t) for t in timesteps]
    return list(zip(steps, [*steps[1:], -1], strict=True))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("num_inference_steps", [100, 10])
def test_ddpm_steps_are_those_of_diffusers(prediction_type, num_inference_steps):
    theirs = DDPMScheduler(**SETTINGS, prediction_type=prediction_type, variance_type="fixed_small")
    theirs.set_timesteps(num_inference_steps)
    output, x_t = tensors(2)
    for t, t_prev in pairs(theirs.timesteps)[num_inference_steps % 9 :: 9]:  # some of them, the last included
        expected = theirs.step(output, t, x_t, generator=torch.Generator().manual_seed(t)).prev_sample
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(t))
        stepped = ddpm_step(ours(), output, x_t, at(t), at(t_prev), prediction_type, noise)
        torch.testing.assert_close(stepped, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_steps_are_those_of_diffusers(prediction_type, eta):
    theirs = DDIMScheduler(**SETTINGS, prediction_type=prediction_type)
    theirs.set_timesteps(10)
    output, x_t, noise = tensors(3)
    for t, t_prev in pairs(theirs.timesteps):
        expected = theirs.step(output, t, x_t, eta=eta, variance_noise=noise if eta else None).prev_sample
        stepped = ddim_step(ours(), output, x_t, at(t), at(t_prev), prediction_type, eta, noise if eta else None)
        torch.testing.assert_close(stepped, expected, rtol=2e-4, atol=2e-5)


def test_ddim_with_full_noise_is_ddpm():
    """Song et al. 2021: eta = 1 has DDPM's marginals; with one step at a time it is the same step."""
    output, x_t, noise = tensors(3)
    arguments = (ours(), output.double(), x_t.double(), at(40), at(39), "epsilon")
    torch.testing.assert_close(ddim_step(*arguments, eta=1.0, noise=noise), ddpm_step(*arguments, noise=noise))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_upward_ddim_steps_are_those_of_diffusers_inverse_scheduler(prediction_type):
    """diffusers calls the step by the noise level it arrives at: its timestep t goes from t - T / k to t."""
    theirs = DDIMInverseScheduler(**SETTINGS, prediction_type=prediction_type)
    theirs.set_timesteps(10)
    output, x_t = tensors(2)
    ascending = theirs.timesteps.tolist()
    for t in ascending[1:]:
        expected = theirs.step(output, t, x_t).prev_sample
        stepped = ddim_step(ours(), output, x_t, at(t - 10), at(t), prediction_type)
        torch.testing.assert_close(stepped, expected, rtol=2e-4, atol=2e-5)


def test_inversion_is_diffusers_inverse_scheduler_fed_with_the_same_predictions():
    theirs = DDIMInverseScheduler(**SETTINGS)
    theirs.set_timesteps(10)
    model = OracleDenoiser(ours(), mean=0.2, std=0.5).model()
    ascending = theirs.timesteps.tolist()  # 0, 10, ..., 90
    x = OracleDenoiser(ours(), mean=0.2, std=0.5).sample(SHAPE)
    path = ddim_invert(model.predict, ours(), x, ascending[::-1], "epsilon").path
    assert len(path) == 10
    for t, ours_next in zip(ascending, path, strict=True):
        x = theirs.step(model.predict(x, at(max(t - 10, 0))), t, x).prev_sample
        torch.testing.assert_close(ours_next, x, rtol=1e-3, atol=1e-4)


def test_a_stochastic_step_needs_noise():
    output, x_t = tensors(2)
    with pytest.raises(ShapeError, match=r"eta is 0.5; a stochastic DDIM step needs noise"):
        ddim_step(ours(), output, x_t, at(40), at(30), "epsilon", eta=0.5)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
@pytest.mark.parametrize("step", [ddpm_step, ddim_step])
def test_the_first_step_from_pure_noise(step, prediction_type):
    """Zero terminal SNR: abar is 0 at T - 1, and neither step divides by it."""
    schedule = make_schedule("linear", 50, rescale_to_zero_terminal_snr=True)
    output, x_t = tensors(2)
    assert bool(step(schedule, output, x_t, at(49), at(40), prediction_type).isfinite().all())


# --- Gaussian data: every DDIM step with the exact denoiser is linear, so trajectories are products of numbers --------

MEAN, STD = 0.3, 0.4


def gaussian(prediction_type="epsilon", num_steps=400):
    schedule = make_schedule("squaredcos_cap_v2", num_steps)
    oracle = OracleDenoiser(schedule, mean=MEAN, std=STD, prediction_type=prediction_type)
    return schedule, oracle, oracle.model()


def ddim_gain(schedule, t, t_prev):
    """d x_prev / d x_t of one step: (sqrt(a_prev a_t) s^2 + sqrt((1 - a_prev)(1 - a_t))) / (a_t s^2 + 1 - a_t)."""
    now = float(schedule.alphas_cumprod[t])
    then = 1.0 if t_prev < 0 else float(schedule.alphas_cumprod[t_prev])
    return ((then * now) ** 0.5 * STD**2 + ((1 - then) * (1 - now)) ** 0.5) / (now * STD**2 + 1 - now)


def product_of_gains(schedule, steps):
    gain = 1.0
    for t, t_prev in pairs(steps):
        gain *= ddim_gain(schedule, t, t_prev)
    return gain


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(("start", "count"), [(120, 1), (120, 5), (250, 25)])
@pytest.mark.parametrize("noised", [True, False])
def test_partial_reconstruction_is_its_closed_form(prediction_type, start, count, noised):
    schedule, oracle, model = gaussian(prediction_type)
    x0 = oracle.sample((4, 1, 8, 8)) + 0.5  # anything, not only data
    noise = model.noise((1, 8, 8), start)
    steps = schedule.timesteps(start, count)
    result = reconstruct(model.predict, schedule, x0, steps, prediction_type, noise if noised else None)
    abar = float(schedule.alphas_cumprod[start])
    surprise = abar**0.5 * (x0 - MEAN) + (noise * (1 - abar) ** 0.5 if noised else 0)  # x_t - sqrt(abar) mean
    torch.testing.assert_close(result, MEAN + product_of_gains(schedule, steps) * surprise, rtol=1e-4, atol=1e-4)


def test_many_ddim_steps_follow_the_probability_flow():
    """In the limit (x_t - sqrt(abar) mean) / sqrt(abar s^2 + 1 - abar) is constant along the path."""
    schedule, _, model = gaussian()
    x_t = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    start = 390
    abar = float(schedule.alphas_cumprod[start])
    exact = MEAN + STD / (abar * STD**2 + 1 - abar) ** 0.5 * (x_t - abar**0.5 * MEAN)
    errors = []
    for count in (10, 50, start + 1):
        result = ddim_sample(model.predict, schedule, x_t, schedule.timesteps(start, count), "epsilon")
        errors.append(float((result - exact).abs().max()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_inversion_then_sampling_comes_back(prediction_type):
    schedule, oracle, model = gaussian(prediction_type)
    x0 = oracle.sample((4, 1, 8, 8))
    errors = []
    for count in (20, 100, 380):
        steps = schedule.timesteps(379, count)
        latent = ddim_invert(model.predict, schedule, x0, steps, prediction_type).path[-1]
        back = ddim_sample(model.predict, schedule, latent, steps, prediction_type)
        errors.append(float((back - x0).abs().max()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02


def test_inversion_of_gaussian_data_is_standard_normal():
    """Per pixel (x - sqrt(abar) mean) / sqrt(abar s^2 + 1 - abar) of the latent equals (x_0 - mean) / s."""
    schedule, oracle, model = gaussian()
    x0 = oracle.sample((4, 1, 8, 8))
    path = ddim_invert(model.predict, schedule, x0, schedule.timesteps(379, 380), "epsilon").path
    for t, x_t in ((50, path[50]), (379, path[379])):
        abar = float(schedule.alphas_cumprod[t])
        z = (x_t - abar**0.5 * MEAN) / (abar * STD**2 + 1 - abar) ** 0.5
        torch.testing.assert_close(z, (x0 - MEAN) / STD, rtol=0.03, atol=0.03)


def test_ancestral_sampling_has_the_mean_and_deviation_of_the_data():
    schedule, _, model = gaussian(num_steps=200)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 1, 32, 32, generator=generator)
    for t, t_prev in pairs(range(199, -1, -1)):
        noise = torch.randn(x.shape, generator=generator)
        x = ddpm_step(schedule, model.predict(x, at(t, 16)), x, at(t, 16), at(t_prev, 16), "epsilon", noise)
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.015)
    assert float(x.std()) == pytest.approx(STD, abs=0.015)


def test_a_step_depends_on_its_own_row():
    schedule, _, model = gaussian()
    x0 = torch.randn(7, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    steps = schedule.timesteps(200, 4)
    whole = reconstruct(model.predict, schedule, x0, steps, "epsilon", model.noise((1, 4, 4), 200))
    alone = [reconstruct(model.predict, schedule, x[None], steps, "epsilon", model.noise((1, 4, 4), 200)) for x in x0]
    assert torch.equal(torch.cat(alone), whole)
