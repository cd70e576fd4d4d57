"""Densities against scipy and scikit-learn, and their differentiable twin."""

import tracemalloc

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from raydiff.core import density
from raydiff.core.density import differentiable_negative_log_density, fit_density, negative_log_density
from raydiff.errors import ConfigError

KINDS = ["mahalanobis", "gaussian_mixture", "kde"]


def vectors(n, seed=0):
    generator = np.random.default_rng(seed)
    return generator.normal(size=(n, 3)) * [1.0, 5.0, 0.1] + [0.0, 3.0, -1.0]


def test_one_gaussian_is_scipys():
    x, new = vectors(500), vectors(20, seed=1)
    state = fit_density("mahalanobis", x)
    roots = state["precision_roots"][0].numpy()
    z = (new - state["center"].numpy()) / state["scale"].numpy()
    exact = -multivariate_normal(state["means"][0].numpy(), np.linalg.inv(roots @ roots.T)).logpdf(z)
    np.testing.assert_allclose(negative_log_density(state, new) + 1.5 * np.log(2 * np.pi), exact, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_both_sides_are_unusual(kind):
    state = fit_density(kind, vectors(300))
    low, middle, high = negative_log_density(state, np.array([[0, 3, -1.6], [0, 3, -1.0], [0, 3, -0.4]]))
    assert low > middle + 5
    assert high > middle + 5


@pytest.mark.parametrize("kind", KINDS)
def test_the_differentiable_twin(kind):
    state, new = fit_density(kind, vectors(100)), vectors(20, seed=1) * 3
    x = torch.from_numpy(new).requires_grad_()
    result = differentiable_negative_log_density(state, x)
    np.testing.assert_allclose(result.detach().numpy(), negative_log_density(state, new), rtol=1e-9, atol=1e-9)
    assert torch.autograd.gradcheck(lambda v: differentiable_negative_log_density(state, v), (x,))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_evaluated_a_few_at_a_time(kind, monkeypatch):
    """Bit for bit the same, and the memory is that of a few; no rows give no numbers."""
    state, new = fit_density(kind, vectors(400)), vectors(403, seed=1) * 3
    whole = negative_log_density(state, new)
    for numbers in (1, 2000, 12345):
        monkeypatch.setattr(density, "_AT_ONCE", numbers)
        assert np.array_equal(negative_log_density(state, new), whole)
    tracemalloc.start()
    negative_log_density(state, new)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400 * 403 * 3 * 8 / 4
    assert negative_log_density(state, new[:0]).shape == (0,)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_that_are_all_the_same_have_no_density(kind):
    message = rf"scoring.density is {kind} and all 30 calibration images have the same statistics; set it to none"
    with pytest.raises(ConfigError, match=message):
        fit_density(kind, np.ones((30, 2)))
    one_constant = vectors(40) * [1, 1, 0]
    assert np.isfinite(negative_log_density(fit_density(kind, one_constant), one_constant)).all()
