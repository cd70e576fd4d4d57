"""Statistics against scipy, against published tables, and against cases worked by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from raydiff.core import statistics
from raydiff.core.metrics import paired_differences
from raydiff.errors import DataError, ShapeError


def test_holm_worked_by_hand():
    # Sorted .005, .01, .03, .04 times 4, 3, 2, 1: .02, .03, .06, .04, the last lifted to .06.
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.8]).tolist() == [1.0, 1.0]
    assert statistics.holm([]).tolist() == []
    with pytest.raises(DataError, match="do not all lie in"):
        statistics.holm([0.1, float("nan")])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_the_order_and_lies_between_the_raw_and_bonferroni(p):
    raw, adjusted = np.array(p), statistics.holm(p)
    assert (adjusted >= raw).all()
    assert (adjusted <= np.minimum(1, len(p) * raw) + 1e-12).all()
    order = np.argsort(raw, kind="stable")
    assert (np.diff(adjusted[order]) >= 0).all()


def test_a_bootstrap_p_value_counts_the_smaller_tail_twice():
    assert statistics.bootstrap_p_value(np.r_[-np.ones(4), np.ones(95)]) == pytest.approx(2 * 5 / 100)
    assert statistics.bootstrap_p_value(np.r_[np.ones(4), -np.ones(95)]) == pytest.approx(2 * 5 / 100)
    assert statistics.bootstrap_p_value(np.ones(999)) == pytest.approx(2 / 1000)
    assert statistics.bootstrap_p_value(np.zeros(99)) == 1.0


def test_a_bootstrap_p_value_agrees_with_a_t_test_on_a_mean():
    rng = np.random.default_rng(0)
    sample = rng.normal(0.25, 1, 80)
    draws = sample[rng.integers(0, 80, (20_000, 80))].mean(1)
    assert statistics.bootstrap_p_value(draws) == pytest.approx(stats.ttest_1samp(sample, 0).pvalue, abs=0.01)


@given(st.integers(0, 10_000), st.integers(1, 9))
def test_drawn_aurocs_are_those_of_the_drawn_images(seed, levels):
    rng = np.random.default_rng(seed)
    labels = np.arange(23) < 9
    scores = rng.integers(0, levels, 23).astype(float)
    (weights,) = statistics.image_weights(labels, 5, (seed, 1))
    assert weights.shape == (5, 23)
    assert (weights[:, labels].sum(1) == 9).all()
    assert (weights[:, ~labels].sum(1) == 14).all()
    drawn = statistics.auroc_draws([scores, -scores], labels, 5, (seed, 1))
    for row, (ours, turned) in zip(weights, drawn.T, strict=True):
        again = np.repeat(np.arange(23), row.astype(int))
        assert ours == pytest.approx(roc_auc_score(labels[again], scores[again]))
        assert ours + turned == pytest.approx(1)
    with pytest.raises(ShapeError):
        statistics.auroc_draws([scores[1:]], labels, 5)


def test_one_cell_has_the_interval_of_the_paired_bootstrap():
    rng = np.random.default_rng(2)
    labels = np.arange(200) < 100
    theirs = rng.normal(size=200) + labels
    ours = theirs + 0.5 * rng.normal(size=200) + 0.4 * labels
    a, b = statistics.auroc_draws([ours, theirs], labels, 4000)
    assert np.array_equal(b, statistics.auroc_draws([theirs], labels, 4000)[0])
    drawn = a - b
    point = roc_auc_score(labels, ours) - roc_auc_score(labels, theirs)
    found = statistics.hierarchical_difference([[point]], [[drawn]])
    expected = paired_differences(ours, theirs, labels)["auroc"]
    assert found.estimate.value == pytest.approx(expected.value)
    assert (found.estimate.low, found.estimate.high) == pytest.approx((expected.low, expected.high), abs=0.006)
    assert found.num_cells == 1


def test_draws_come_in_blocks_and_are_as_many_as_asked_for_however_many_images():
    labels = np.arange(30_000) < 10_000
    sizes = [weights.shape for weights in statistics.image_weights(labels, 120)]
    assert sizes == [(50, 30_000), (50, 30_000), (20, 30_000)]
    scores = np.random.default_rng(0).normal(size=30_000) + labels
    drawn = statistics.auroc_draws([scores], labels, 120)
    assert drawn.shape == (1, 120)
    assert np.array_equal(drawn[:, :70], statistics.auroc_draws([scores], labels, 70))
    assert statistics.auroc_draws([], labels, 120).shape == (0, 120)


@pytest.mark.parametrize("number", [1, 5, 10, 25, 99])
def test_there_are_enough_draws_for_holm_to_reject(number):
    draws = statistics.num_draws_for(number)
    assert 1000 <= draws <= 4000
    smallest = statistics.bootstrap_p_value(np.ones(draws))
    assert statistics.holm([smallest] * number)[0] < 0.05


def test_the_hierarchy_adds_the_spread_of_each_level():
    # Cells without spread over images: categories differ (0 and 0.2), the seeds of each by 0.1.
    values = [[0.0, 0.1], [0.2, 0.3]]
    still = [[np.full(50, value) for value in seeds] for seeds in values]
    found = statistics.hierarchical_difference(values, still, num_draws=40_000)
    assert found.estimate.value == pytest.approx(0.15)
    assert found.num_cells == 4
    # Variance of the mean of two categories drawn: (0.1^2 + the mean of 0.05^2 / 2 within one) / 2.
    sd = np.sqrt((0.01 + 0.05**2 / 2) / 2)
    drawn = statistics._resample([np.stack(s) for s in still], 40_000, np.random.default_rng(0))
    assert drawn.std() == pytest.approx(sd, rel=0.02)
    assert drawn.mean() == pytest.approx(0.15, abs=0.002)
    assert (found.estimate.low, found.estimate.high) == pytest.approx((0.0, 0.3), abs=0.03)


def test_seeds_share_their_draws_of_images():
    images = np.random.default_rng(0).normal(0, 1, 4000)
    one = statistics._resample([images[None]] * 1, 40_000, np.random.default_rng(1))
    three = statistics._resample([np.stack([images] * 3)], 40_000, np.random.default_rng(1))
    assert three.std() == pytest.approx(one.std(), rel=0.03)  # three seeds on the same images are no more images


def test_categories_weigh_the_same_whatever_the_number_of_their_seeds():
    values = [[1.0, 1.0, 1.0], [0.0]]
    draws = [[np.ones(3)] * 3, [np.zeros(3)]]
    assert statistics.hierarchical_difference(values, draws).estimate.value == 0.5
    for bad in ([], [[]], [[1.0], []]):
        with pytest.raises(ShapeError, match="give one of each a seed"):
            statistics.hierarchical_difference(bad, [[np.ones(2)] for _ in bad])


def test_average_ranks_share_ties():
    assert statistics.average_ranks([[0.9, 0.8, 0.8], [0.5, 0.7, 0.6]]).tolist() == [2.0, 1.75, 2.25]
    with pytest.raises(ShapeError, match="a row per block"):
        statistics.average_ranks([0.9, 0.8])


# Demsar 2006, table 6: AUC of four C4.5 variants on fourteen data sets.
DEMSAR = np.array([
    [.763, .768, .771, .798], [.599, .591, .590, .569], [.954, .971, .968, .967], [.628, .661, .654, .657],
    [.882, .888, .886, .898], [.936, .931, .916, .931], [.661, .668, .609, .685], [.583, .583, .563, .625],
    [.775, .838, .866, .875], [1.000, 1.000, 1.000, 1.000], [.940, .962, .965, .962], [.619, .666, .614, .669],
    [.972, .981, .9751, .975], [.957, .978, .946, .970],
])  # fmt: skip


def test_friedman_and_ranks_of_demsars_example():
    assert statistics.average_ranks(DEMSAR) == pytest.approx([3.143, 2.000, 2.893, 1.964], abs=0.001)
    found = statistics.friedman(DEMSAR)
    # His 9.28 leaves out the correction for ties: one block of four equals (4^3 - 4) and three pairs (2^3 - 2 each).
    assert found.statistic == pytest.approx(9.28 / (1 - (60 + 3 * 6) / (14 * (4**3 - 4))), abs=0.02)
    assert found.p_value == pytest.approx(stats.chi2.sf(found.statistic, 3))
    assert statistics.critical_difference(4, 14, alpha=0.1) == pytest.approx(1.12, abs=0.005)


def test_friedman_needs_something_to_compare():
    assert statistics.friedman(np.ones((4, 3))) == statistics.Friedman(0.0, 1.0)
    with pytest.raises(ShapeError, match="at least 2 blocks and 3 methods"):
        statistics.friedman(np.ones((1, 3)))
    with pytest.raises(ShapeError, match="at least 2 blocks and 3 methods"):
        statistics.friedman(np.ones((5, 2)))


def test_nemenyis_quantiles_are_demsars():
    published = dict(zip(range(2, 11), (1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164), strict=True))
    for k, q in published.items():
        # One unit: sqrt(k (k + 1) / 6 n) is taken out.
        assert statistics.critical_difference(k, 6) / np.sqrt(k * (k + 1) / 36) == pytest.approx(q, abs=0.001)
    with pytest.raises(ShapeError, match="at least 2 methods"):
        statistics.critical_difference(1, 6)


def test_cliques_are_the_largest_groups_within_reach():
    assert statistics.cliques([1.0, 1.5, 2.4, 4.0], 1.0) == [(0, 1), (1, 2)]
    assert statistics.cliques([3.0, 1.0, 2.0], 5.0) == [(1, 2, 0)]
    assert statistics.cliques([1.0, 3.0, 5.0], 1.0) == []
