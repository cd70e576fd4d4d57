"""Each baseline's numbers are those of the library, or of the definition."""

import warnings

import numpy as np
import pytest
import torch

from raydiff.baselines import copod, isolation_forest, knn, ocsvm
from raydiff.testing import small_images


def rows(images):
    return images.flatten(1).double().numpy()


@pytest.fixture(scope="module")
def images():
    return small_images(60, seed=1), small_images(25, seed=2)


def test_isolation_forest_is_pyods(images):
    from pyod.models.iforest import IForest

    train, test = images
    baseline = isolation_forest.build(isolation_forest.Options(), seed=7)
    baseline.fit(train)
    expected = IForest(max_samples=60, random_state=7).fit(rows(train)).decision_function(rows(test))
    assert np.array_equal(baseline.score(test).image.numpy(), expected)


def test_another_seed_grows_another_forest(images):
    first, second = (isolation_forest.build(isolation_forest.Options(), seed=seed) for seed in (0, 1))
    first.fit(images[0])
    second.fit(images[0])
    assert not torch.equal(first.score(images[1]).image, second.score(images[1]).image)


def test_ocsvm_is_pyods_and_scale_follows_the_data(images):
    from pyod.models.ocsvm import OCSVM

    train, test = images
    baseline = ocsvm.build(ocsvm.Options(), seed=0)
    baseline.fit(train)
    gamma = 1 / (64 * rows(train).var())
    expected = OCSVM(gamma=gamma).fit(rows(train)).decision_function(rows(test))
    np.testing.assert_allclose(baseline.score(test).image.numpy(), expected.ravel(), rtol=1e-9, atol=1e-9)
    dark = ocsvm.build(ocsvm.Options(), seed=0)
    dark.fit(train * 0.1)
    torch.testing.assert_close(dark.score(test * 0.1).image, baseline.score(test).image, rtol=1e-3, atol=1e-3)


def test_ocsvm_standardised_is_blind_to_a_pixels_scale(images):
    """A pixel that varies a hundred times less counts as much; the constant ones are left as they are."""
    train, test = (x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3)) for x in images)
    scale = torch.ones(1, 8, 8)
    scale[:, ::2] = 0.01
    first, second = (ocsvm.build(ocsvm.Options(standardize=True), seed=0) for _ in range(2))
    first.fit(train)
    second.fit(train * scale)
    torch.testing.assert_close(first.score(test).image, second.score(test * scale).image, rtol=1e-3, atol=1e-3)


def test_knn_is_the_mean_distance_to_the_nearest(images):
    train, test = images
    distances = torch.cdist(
        test.flatten(1).double(), train.flatten(1).double(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    nearest = distances.sort(dim=1).values[:, :3]
    for method, expected in {
        "mean": nearest.mean(1), "largest": nearest[:, 2], "median": nearest.median(1).values,
    }.items():  # fmt: skip
        baseline = knn.build(knn.Options(n_neighbors=3, method=method), seed=0)
        baseline.fit(train)
        torch.testing.assert_close(baseline.score(test).image, expected, rtol=1e-6, atol=1e-6)


def pyod_copod_one_at_a_time(train, test):
    from pyod.models.copod import COPOD

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # scipy's skewness of constant pixels
        model = COPOD().fit(rows(train))
        return np.concatenate([model.decision_function(rows(image[None])) for image in test])


@pytest.mark.parametrize("n", [2, 3, 10, 60])
def test_copod_is_pyods_with_each_image_pooled_alone(images, n):
    train, test = images[0][:n], torch.cat([images[1], images[0][:3]])
    if n < 10:  # so few make columns of two levels, equally often: of skewness 0, where PyOD takes the rounding's sign
        train = train + torch.randn(train.shape, generator=torch.Generator().manual_seed(0)) * 0.01
    baseline = copod.build(copod.Options(), seed=0)
    baseline.fit(train)
    np.testing.assert_allclose(baseline.score(test).image.numpy(), pyod_copod_one_at_a_time(train, test), rtol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_copod_is_pyods_on_skewed_and_tied_columns(seed):
    """Columns of every kind: skewed left and right, symmetric, of two values, constant at a number with a long tail."""
    rng = np.random.default_rng(seed)
    columns = [rng.exponential(size=30) - 1, -rng.exponential(size=30), rng.normal(size=30),
               rng.integers(0, 2, 30), np.full(30, -0.8712), rng.integers(-3, 3, 30) / 7]  # fmt: skip
    table = torch.tensor(np.stack(columns, 1), dtype=torch.float32).reshape(30, 1, 2, 3)
    train, test = table[:22], table[22:]
    test = torch.cat([test, test + 0.3])
    baseline = copod.build(copod.Options(), seed=0)
    baseline.fit(train)
    np.testing.assert_allclose(baseline.score(test).image.numpy(), pyod_copod_one_at_a_time(train, test), rtol=1e-9)


def test_copod_of_a_symmetric_pixel_adds_both_tails():
    """-0.3 and 0.7, twice each with the image: log 2 from the left or the right, nothing from the other."""
    baseline = copod.build(copod.Options(), seed=0)
    baseline.fit(torch.tensor([-0.3, -0.3, 0.7]).reshape(3, 1, 1, 1))
    assert float(baseline.score(torch.tensor(0.7).reshape(1, 1, 1, 1)).image) == pytest.approx(np.log(2))


def test_pyods_own_batch_would_break_contract_one(images):
    """Why copod is not simply PyOD's decision_function: the neighbours' pixels enter the ranks."""
    from pyod.models.copod import COPOD

    train, test = images
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        pooled = COPOD().fit(rows(train)).decision_function(rows(test))
    assert not np.allclose(pooled, pyod_copod_one_at_a_time(train, test))
