"""``conditioned``: the steering in closed form, and what it leaves."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from raydiff.artifact import read_folder
from raydiff.config import ExperimentConfig
from raydiff.core.schedule import make_schedule
from raydiff.detector import DiffusionDetector, load_detector
from raydiff.errors import ConfigError
from raydiff.experiment import fit_locally
from raydiff.scorers import conditioned, reconstruction
from raydiff.testing import OracleDenoiser, check_scorer, planted_defect, small_images

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


def test_above_one_over_its_variance_steering_overshoots():
    """At the first step the expected image moves by w (1 - abar) of the way to the image."""
    model, x = ORACLE.model(), ORACLE.sample((4, 1, 8, 8))
    (t,) = build(num_inference_steps=1).timesteps(SCHEDULE)
    weight = 1 / (1 - float(SCHEDULE.alphas_cumprod[t]))
    free, exact, beyond = (
        build(num_inference_steps=1, weight=w).reconstruct(model, x) - x for w in (0, weight, 1.5 * weight)
    )
    torch.testing.assert_close(exact, torch.zeros_like(x), rtol=0, atol=1e-4)
    torch.testing.assert_close(beyond, -0.5 * free, rtol=1e-3, atol=1e-4)


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


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """A small timm network with random weights, as options."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(timm.create_model("test_efficientnet").state_dict(), path)
    return {"feature_backbone": "test_efficientnet", "feature_weights": str(path), "feature_levels": (0, 1)}


def test_features_pass_the_checks(features):
    check_scorer("conditioned", **features)


def test_features_are_a_second_map(features):
    scorer, model, x = build(**features), ORACLE.model(), ORACLE.sample((3, 3, 16, 16))
    evidence = scorer.measure(model, x)
    assert torch.equal(evidence[:, :1], build().measure(model, x))
    source = {"file": features["feature_weights"]}
    network = timm.create_model(
        "test_efficientnet", features_only=True, out_indices=(0,), pretrained=True, pretrained_cfg_overlay=source
    ).eval()
    settings = timm.create_model("test_efficientnet").default_cfg
    mean, std = (torch.tensor(settings[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        left, right = (network(((image + 1) / 2 - mean) / std)[0] for image in (x, scorer.reconstruct(model, x)))
    cosine = torch.nn.functional.cosine_similarity(left, right)[:, None]
    expected = torch.nn.functional.interpolate(1 - cosine, (16, 16), mode="bilinear")
    one = build(**features | {"feature_levels": (0,)}).measure(model, x)[:, 1:]
    torch.testing.assert_close(one, expected, rtol=1e-3, atol=1e-5)


def test_the_network_travels_with_the_artefact(features, tmp_path):
    config = ExperimentConfig(scoring={"name": "conditioned", **features})
    detector = DiffusionDetector.create(config, num_classes=1).calibrate(small_images(20))
    assert detector.pretrained == "test_efficientnet (tiny.safetensors)"
    detector.save(tmp_path / "artefact")
    weights, hidden = Path(features["feature_weights"]), tmp_path / "hidden"
    weights.rename(hidden)
    try:
        loaded = load_detector(tmp_path / "artefact")
        images = small_images(4, seed=2)
        assert torch.equal(loaded.score(images).image, detector.score(images).image)
        with pytest.raises(ConfigError, match=r"tiny.safetensors: cannot be read"):
            build(**features).state()
    finally:
        hidden.rename(weights)


def test_a_run_is_fitted_with_it(features, tiny_config, digit_shards, tmp_path):
    """A checkpoint holds no feature network; the artefact of the run does."""
    scoring = {"name": "conditioned", "num_inference_steps": 2, **features}
    fields = {"scoring": scoring, "training.num_steps": 2, "training.warmup_steps": 0}
    detector = fit_locally(tiny_config.override(fields), tmp_path, digit_shards)
    assert detector.calibration is not None
    tensors = read_folder(tmp_path / "artifact").tensors("weights.safetensors")
    network = load_file(features["feature_weights"])
    kept = {name.removeprefix("scorer.model."): v for name, v in tensors.items() if name.startswith("scorer.")}
    assert kept
    assert all(torch.equal(value, network[name]) for name, value in kept.items())
    images = small_images(3)
    assert torch.equal(load_detector(tmp_path / "artifact").score(images).image, detector.score(images).image)


def test_features_compare_images(features):
    with pytest.raises(ConfigError, match="'test_efficientnet', which compares images, and space is feature; leave it"):
        build(**features).check(None, "feature")
    build().check(None, "feature")
    with pytest.raises(ConfigError, match="what is diffused has 5 channels; it compares images"):
        build(**features).measure(ORACLE.model(), ORACLE.sample((1, 5, 8, 8)))
