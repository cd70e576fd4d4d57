"""What all baselines on rows share: down-sampling, features, the kept sample, surrogates, and messages."""

import pytest
import torch

from raydiff import backbone, registry
from raydiff.errors import ArtifactError, ConfigError, DataError, RaydiffError, ShapeError
from raydiff.testing import small_images

NAMES = ["copod", "isolation_forest", "knn", "ocsvm"]


def build(name, seed=0, **fields):
    module = registry.component("baselines", name)
    return module.build(module.Options(**fields), seed=seed)


@pytest.fixture(scope="module", params=NAMES)
def fitted(request):
    baseline = build(request.param)
    baseline.fit(small_images(40))
    return baseline


@pytest.mark.parametrize("size", [(64, 64), (64, 32), (50, 20), (33, 8)])
def test_large_images_are_averaged_down_and_keep_their_shape(size):
    baseline = build("knn", max_side=16)
    baseline.fit(small_images(8, size, 3))
    factor = 16 / max(size)
    height, width = round(size[0] * factor), round(size[1] * factor)
    assert baseline.state()["sample"].shape == (8, 3 * height * width)


def test_down_sampling_is_an_area_average():
    images = small_images(8, (8, 8))
    baseline = build("knn", max_side=4)
    baseline.fit(images)
    blocks = images.reshape(8, 4, 2, 4, 2).mean((2, 4)).flatten(1)
    torch.testing.assert_close(baseline.state()["sample"], blocks)


def test_small_images_are_taken_as_they_are():
    baseline = build("knn")
    baseline.fit(small_images(8))
    assert torch.equal(baseline.state()["sample"], small_images(8).flatten(1))


def test_of_very_many_images_a_seeded_sample_is_kept():
    images = small_images(100)
    first, same, other = (build("knn", seed=seed, max_train_images=20) for seed in (1, 1, 2))
    for baseline in (first, same, other):
        baseline.fit(images)
    assert first.state()["sample"].shape == (20, 64)
    assert torch.equal(first.state()["sample"], same.state()["sample"])
    assert not torch.equal(first.state()["sample"], other.state()["sample"])


def test_no_images_have_no_scores(fitted):
    assert fitted.score(torch.empty(0, 1, 8, 8)).image.shape == (0,)


@pytest.mark.parametrize("shape", [(2, 1, 8, 9), (2, 3, 8, 8), (1, 8, 8)])
def test_images_of_another_shape_are_refused(fitted, shape):
    with pytest.raises(ShapeError, match=r"they must be \(B, 1, 8, 8\)"):
        fitted.score(torch.zeros(shape))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_learnt_yet(name):
    with pytest.raises(RaydiffError, match=f"{name} has learnt nothing yet; call fit or load_state first"):
        build(name).score(torch.zeros(1, 1, 8, 8))
    with pytest.raises(RaydiffError, match="call fit or load_state first"):
        build(name).state()


@pytest.mark.parametrize("name", NAMES)
def test_too_few_training_images(name):
    baseline = build(name)
    with pytest.raises(DataError, match=rf"{name} got 1 training images and needs at least [26]; add more"):
        baseline.fit(small_images(1))
    with pytest.raises(ShapeError, match=r"they must be \(n, C, H, W\)"):
        baseline.fit(torch.zeros(4, 64))
    least = small_images(baseline.min_images)
    baseline.fit(least)
    assert bool(baseline.score(least).image.isfinite().all())


def test_a_state_with_a_part_missing(fitted):
    for part in fitted.state():
        state = fitted.state()
        del state[part]
        with pytest.raises(ArtifactError, match=f"has no '{part}'; fit it again"):
            build(fitted._options.name).load_state(state)


@pytest.mark.parametrize("name", NAMES)
def test_identical_training_images_are_no_hazard(name):
    baseline = build(name)
    baseline.fit(torch.full((12, 1, 8, 8), -0.87))
    images = torch.stack([torch.full((1, 8, 8), -0.87), torch.full((1, 8, 8), 0.5)])
    scores = baseline.score(images).image
    assert bool(scores.isfinite().all())
    assert scores[1] >= scores[0]


@pytest.fixture(scope="module", params=NAMES)
def on_features(request):
    baseline = build(request.param, features="backbone", levels=(0, 2))
    baseline.fit(small_images(40, (32, 32)))
    return baseline


def test_features_are_scored_as_they_are_after_a_restart(on_features, monkeypatch):
    images, name = small_images(5, (32, 32), seed=1), on_features._options.name
    expected = on_features.score(images).image
    assert torch.equal(torch.cat([on_features.score(image[None]).image for image in images]), expected)
    monkeypatch.setattr(backbone, "_weights_path", lambda _: pytest.fail("a file is read"))
    restored = build(name, features="backbone", levels=(0, 2))
    restored.load_state(on_features.state())
    assert torch.equal(restored.score(images).image, expected)
    assert restored.pretrained == "tf_efficientnet_lite0"
    assert build(name).pretrained is None


def test_rows_of_features_are_z_scored():
    baseline = build("knn", features="backbone")
    baseline.fit(small_images(40, (32, 32)))
    sample = baseline.state()["sample"]
    assert sample.shape == (40, 24 + 40 + 112)
    torch.testing.assert_close(sample.mean(0), torch.zeros(176), rtol=0, atol=1e-4)
    torch.testing.assert_close(sample.std(0, correction=0), torch.ones(176), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "fields"),
    [("knn", {"method": "mean"}), ("knn", {"method": "largest"}), ("knn", {"method": "median", "n_neighbors": 4}),
     ("knn", {"features": "backbone"}), ("ocsvm", {}), ("ocsvm", {"features": "backbone", "standardize": True})],
)  # fmt: skip
def test_a_surrogate_is_the_score_with_gradients(name, fields):
    baseline = build(name, **fields)
    baseline.fit(small_images(40, (32, 32)))
    images = small_images(3, (32, 32), seed=1).requires_grad_()
    surrogate = baseline.surrogate(images)
    torch.testing.assert_close(surrogate.double(), baseline.score(images).image, rtol=1e-3, atol=1e-3)
    (gradient,) = torch.autograd.grad(surrogate[0], images)
    assert bool(gradient[0].any())
    assert not bool(gradient[1:].any())


@pytest.mark.parametrize("name", [*NAMES, "patch_knn"])
def test_what_the_features_need_is_looked_at_before_fitting(name, tmp_path):
    features = {} if name == "patch_knn" else {"features": "backbone"}
    for fields, message in (
        ({"weights": str(tmp_path / "gone.safetensors")}, "gone.safetensors: cannot be read"),
        ({"backbone": "resnet18x"}, "backbone is 'resnet18x'; timm has no such model"),
        ({"backbone": "tf_efficientnet_lite0", "levels": (1, 9)}, r"levels is \(1, 9\); backbone .* has 5 levels"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(name, **features, **fields).check()
    if features:
        build(name, weights=str(tmp_path / "gone.safetensors")).check()
