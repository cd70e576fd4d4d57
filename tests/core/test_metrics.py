"""Metrics against scikit-learn, against brute force from the definitions, and against cases worked by hand."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.stats import binomtest
from sklearn import metrics as sk

from raydiff.core import metrics
from raydiff.errors import DataError, ScoreError, ShapeError

cases = st.lists(st.tuples(st.integers(-5, 5), st.booleans()), min_size=2, max_size=40).filter(
    lambda rows: len({label for _, label in rows}) == 2
)


def split(rows):
    return np.array([s for s, _ in rows], dtype=float), np.array([label for _, label in rows])


def brute_operating_points(scores, labels):
    """(FPR, TPR) of every threshold and of the one above all scores."""
    points = [(0.0, 0.0)]
    for cut in np.unique(scores):
        verdict = scores >= cut
        points.append((verdict[~labels].mean(), verdict[labels].mean()))
    return points


@given(cases)
def test_image_metrics_agree_with_sklearn_and_with_their_definitions(rows):
    scores, labels = split(rows)
    assert metrics.image_auroc(scores, labels) == pytest.approx(sk.roc_auc_score(labels, scores))
    assert metrics.average_precision(scores, labels) == pytest.approx(sk.average_precision_score(labels, scores))
    best = max(sk.f1_score(labels, scores >= cut) for cut in scores)
    assert metrics.f1_max(scores, labels) == pytest.approx(best)
    points = brute_operating_points(scores, labels)
    assert metrics.fpr_at_tpr(scores, labels) == pytest.approx(min(f for f, t in points if t >= 0.95 - 1e-9))
    assert metrics.tpr_at_fpr(scores, labels, 0.25) == pytest.approx(max(t for f, t in points if f <= 0.25 + 1e-9))


@pytest.mark.parametrize("levels", [3, 40, 10**9])
def test_auroc_and_ap_agree_with_sklearn_on_many_images_with_few_and_many_ties(levels):
    rng = np.random.default_rng(levels)
    labels = rng.random(3000) < 0.1
    scores = np.round((rng.normal(size=3000) + labels) * levels) / levels
    assert metrics.image_auroc(scores, labels) == pytest.approx(sk.roc_auc_score(labels, scores), abs=1e-12)
    assert metrics.average_precision(scores, labels) == pytest.approx(sk.average_precision_score(labels, scores))


@given(cases)
def test_only_the_order_of_scores_matters_and_reversal_mirrors_the_auroc(rows):
    scores, labels = split(rows)
    auroc = metrics.image_auroc(scores, labels)
    for changed in (scores * 100, np.exp(scores), scores + 1e6):
        assert metrics.image_auroc(changed, labels) == auroc
    assert metrics.image_auroc(-scores, labels) == pytest.approx(1 - auroc)


def test_every_metric_and_interval_survives_a_monotone_change():
    rng = np.random.default_rng(3)
    labels = rng.random(60) < 0.4
    scores = rng.normal(size=60) + labels
    base = metrics.image_metrics(scores, labels, num_draws=200, seed=5)
    for changed in (scores * 100, np.exp(scores), scores + 1e6):
        assert metrics.image_metrics(changed, labels, num_draws=200, seed=5) == base


def test_ties_count_half():
    assert metrics.image_auroc([1, 1, 1, 1], [0, 0, 1, 1]) == 0.5
    assert metrics.image_auroc([0, 1, 1, 2], [0, 0, 1, 1]) == 0.875


def test_operating_points_are_real_and_cautious():
    normal, anomalous = np.arange(100), np.array([94.5, 95.5, 200, 300])
    scores, labels = np.r_[normal, anomalous], np.r_[np.zeros(100), np.ones(4)]
    assert metrics.tpr_at_fpr(scores, labels, 0.05) == 1.0  # 95..99 lie above 94.5: exactly 5 of 100
    assert metrics.tpr_at_fpr(scores, labels, 0.049) == 0.75
    assert metrics.fpr_at_tpr(scores, labels, 0.75) == 0.04
    assert metrics.fpr_at_tpr(scores, labels, 0.76) == 0.05


def test_roc_curve_starts_at_the_origin_and_holds_the_auroc():
    scores, labels = np.array([3.0, 1, 1, 2, 0]), np.array([1, 1, 0, 0, 0], dtype=bool)
    fpr, tpr = metrics.roc_curve(scores, labels)
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(tpr, fpr) == pytest.approx(metrics.image_auroc(scores, labels))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_names_its_image(bad):
    with pytest.raises(ScoreError, match=r"image test/crack/007\.png: its score is -?(nan|inf)"):
        metrics.image_metrics([0.0, bad], [0, 1], ids=["test/good/000.png", "test/crack/007.png"])
    with pytest.raises(ScoreError, match="image index 1"):
        metrics.image_auroc([0.0, bad], [0, 1])


def test_one_kind_of_image_is_an_error_that_counts_them():
    with pytest.raises(DataError, match="3 normal and 0 anomalous"):
        metrics.image_auroc([1, 2, 3], [0, 0, 0])
    with pytest.raises(ShapeError, match="one per image"):
        metrics.image_auroc([1, 2, 3], [0, 1])


def test_proportion_is_clopper_pearson():
    for successes, total in ((0, 7), (3, 20), (20, 20)):
        expected = binomtest(successes, total).proportion_ci(method="exact")
        estimate = metrics.proportion(successes, total)
        assert (estimate.value, estimate.low, estimate.high) == pytest.approx(
            (successes / total, expected.low, expected.high)
        )
    with pytest.raises(DataError, match="0 of 0"):
        metrics.proportion(0, 0)


def test_bootstrap_is_reproducible_stratified_and_near_the_known_spread():
    rng = np.random.default_rng(0)
    labels = np.r_[np.zeros(300, bool), np.ones(300, bool)]
    scores = rng.normal(size=600) + labels
    first = metrics.image_metrics(scores, labels, seed=1)
    assert first == metrics.image_metrics(scores, labels, seed=1)
    assert first != metrics.image_metrics(scores, labels, seed=2)
    # Hanley and McNeil 1982: standard error of the AUROC from the AUROC and the two counts.
    a = first["auroc"].value
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    error = np.sqrt((a * (1 - a) + 299 * (q1 - a * a) + 299 * (q2 - a * a)) / 300**2)
    assert first["auroc"].high - first["auroc"].low == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert all(e.low <= e.value <= e.high for e in first.values())


def test_bootstrap_equals_resampling_image_by_image():
    rng = np.random.default_rng(1)
    labels = rng.random(30) < 0.5
    scores = rng.integers(0, 8, 30) + 2.0 * labels
    weights = next(metrics._draws(labels, 20, 4))
    assert (weights[:, labels].sum(1) == labels.sum()).all()
    drawn = metrics._curve_metrics(*metrics._counts(scores, labels, weights))
    for d in range(20):
        again = np.repeat(np.arange(30), weights[d].astype(int))
        assert drawn["auroc"][d] == pytest.approx(sk.roc_auc_score(labels[again], scores[again]))
        assert drawn["average_precision"][d] == pytest.approx(sk.average_precision_score(labels[again], scores[again]))


def test_paired_differences_see_what_unpaired_intervals_hide():
    rng = np.random.default_rng(2)
    labels = np.r_[np.zeros(100, bool), np.ones(100, bool)]
    weak = rng.normal(size=200) + labels
    strong = weak + 0.3 * labels
    difference = metrics.paired_differences(strong, weak, labels)["auroc"]
    assert difference.value == pytest.approx(metrics.image_auroc(strong, labels) - metrics.image_auroc(weak, labels))
    assert difference.low > 0
    alone = metrics.image_metrics(weak, labels)["auroc"]
    assert difference.high - difference.low < 0.5 * (alone.high - alone.low)
    same = metrics.paired_differences(weak, weak * 3, labels, num_draws=50)["f1_max"]
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_two_thousand_draws_on_six_hundred_images_take_about_a_second():
    rng = np.random.default_rng(0)
    labels = rng.random(600) < 0.5
    start = time.process_time()
    metrics.image_metrics(rng.normal(size=600), labels)
    assert time.process_time() - start < 5  # about 0.3


# --- pixels


def brute_pixels(maps, masks):
    """Pixel AUROC, AP and AUPRO straight from their definitions, one threshold at a time."""
    normal = maps[~masks]
    regions = []
    for score_map, mask in zip(maps, masks, strict=True):
        labelled, count = ndimage.label(mask, structure=np.ones((3, 3)))
        regions += [score_map[labelled == r] for r in range(1, count + 1)]
    fpr, pro = [0.0], [0.0]
    for cut in np.unique(maps)[::-1]:
        fpr.append((normal >= cut).mean())
        pro.append(np.mean([(region >= cut).mean() for region in regions]))
    grid = np.array([x for x in fpr if x < 0.3] + [0.3])
    heights = np.array([y for x, y in zip(fpr, pro, strict=True) if x < 0.3] + [_at(0.3, fpr, pro)])
    flat, truth = maps.ravel(), masks.ravel()
    return {
        "pixel_auroc": sk.roc_auc_score(truth, flat),
        "pixel_average_precision": sk.average_precision_score(truth, flat),
        "aupro": np.trapezoid(heights, grid) / 0.3,
    }


def _at(x, xs, ys):
    k = next(k for k, value in enumerate(xs) if value >= x)
    return ys[k - 1] + (ys[k] - ys[k - 1]) * (x - xs[k - 1]) / (xs[k] - xs[k - 1])


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 12))
def test_pixel_metrics_agree_with_brute_force_also_on_ties(seed, levels):
    rng = np.random.default_rng(seed)
    masks = rng.random((4, 7, 6)) < 0.2
    masks[0] = False
    masks[1, 2:4, 2:5] = True
    maps = rng.integers(0, levels, masks.shape).astype(np.float32) + rng.integers(0, 2) * masks
    found = metrics.pixel_metrics(maps, masks, num_draws=0, chunk=3)
    assert {k: v.value for k, v in found.items()} == pytest.approx(brute_pixels(maps, masks), abs=1e-9)


def test_aupro_of_two_regions_worked_by_hand():
    # One 1 x 16 map: region A of one pixel (score 9), region B of four (8, 1, 1, 1), eleven normal pixels.
    # Descending: A at 9 (PRO 1/2); B's first at 8 (PRO 1/2 + 1/8); two normals at 5 (FPR 2/11); the rest at 1, tied.
    # The tie runs from (2/11, 5/8) to (1, 1); at FPR 0.3 the height is 5/8 + 3/8 (0.3 - 2/11) / (9/11).
    maps = np.array([[[9, 5, 5, 1, 1, 1, 1, 1, 1, 1, 1, 1, 8, 1, 1, 1]]], dtype=np.float32)
    masks = np.zeros((1, 1, 16), dtype=bool)
    masks[0, 0, 0] = True
    masks[0, 0, 12:] = True
    height = 5 / 8 + 3 / 8 * (0.3 - 2 / 11) / (9 / 11)
    area = 2 / 11 * 5 / 8 + (0.3 - 2 / 11) * (5 / 8 + height) / 2
    assert metrics.pixel_metrics(maps, masks, num_draws=0)["aupro"].value == pytest.approx(area / 0.3)


def test_regions_touching_at_a_corner_are_one():
    masks = np.zeros((1, 4, 4), dtype=bool)
    masks[0, 0, 0] = masks[0, 1, 1] = True
    maps = np.zeros((1, 4, 4))
    maps[0, 0, 0] = 1  # half of the one region found at FPR 0, the rest only at FPR 1
    assert metrics.pixel_metrics(maps, masks, num_draws=0)["aupro"].value == pytest.approx(0.5 + 0.5 * 0.15)


def test_pixel_intervals_hold_the_value_and_match_resampling_whole_images():
    rng = np.random.default_rng(0)
    masks = np.zeros((40, 12, 12), dtype=bool)
    for i in range(20):
        r, c = rng.integers(0, 8, 2)
        masks[i, r : r + 4, c : c + 3] = True
    maps = (rng.normal(size=masks.shape) + masks * rng.uniform(0, 2, (40, 1, 1))).astype(np.float32)
    found = metrics.pixel_metrics(maps, masks, num_draws=300, seed=1)
    assert found == metrics.pixel_metrics(maps, masks, num_draws=300, seed=1, chunk=7)
    few = metrics.pixel_metrics(maps, masks, num_draws=60, seed=1)
    weights = next(metrics._draws(masks.any((1, 2)), 60, 1)).astype(int)
    picks = [np.repeat(np.arange(40), row) for row in weights]
    brute = [metrics.pixel_metrics(maps[p], masks[p], num_draws=0) for p in picks]
    for name in metrics.PIXEL_METRICS:
        # The same draws, so only the 512 thresholds and the shift to the exact value differ.
        low, high = np.percentile([b[name].value for b in brute], [2.5, 97.5])
        assert found[name].low <= found[name].value <= found[name].high
        assert (few[name].low, few[name].high) == pytest.approx((low, high), abs=0.01)


@pytest.mark.parametrize("change", [lambda m: m * 100, np.exp, lambda m: m + 1e6])
def test_pixel_metrics_depend_on_order_only(change):
    rng = np.random.default_rng(4)
    masks = rng.random((5, 8, 8)) < 0.1
    maps = rng.normal(size=masks.shape) + masks
    first, second = (metrics.pixel_metrics(m, masks, num_draws=20) for m in (maps, change(maps)))
    for name in metrics.PIXEL_METRICS:
        assert second[name].value == pytest.approx(first[name].value, abs=1e-12)


def test_pixel_metrics_refuse_what_they_cannot_measure():
    maps, masks = np.zeros((2, 3, 3)), np.zeros((2, 3, 3), dtype=bool)
    with pytest.raises(DataError, match="0 of 18 pixels are anomalous"):
        metrics.pixel_metrics(maps, masks)
    with pytest.raises(ShapeError, match=r"\(n, H, W\)"):
        metrics.pixel_metrics(maps, masks[:1])
    masks[0, 0, 0], maps[1, 2, 2] = True, np.nan
    with pytest.raises(ScoreError, match="map 1"):
        metrics.pixel_metrics(maps, masks)


def test_pixel_metrics_on_chosen_images_are_those_of_these_images_alone():
    rng = np.random.default_rng(5)
    masks = rng.random((6, 8, 8)) < 0.1
    maps = rng.normal(size=masks.shape) + masks
    chosen = [4, 1, 2]
    alone = metrics.pixel_metrics(maps[chosen], masks[chosen], num_draws=30)
    assert metrics.pixel_metrics(maps, masks, images=chosen, num_draws=30) == alone
