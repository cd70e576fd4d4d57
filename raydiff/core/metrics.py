"""Image and pixel metrics on raw scores, with bootstrap intervals.

Only the order of scores matters: nothing is scaled, clamped or binned before a metric, and ties count half. NaN and
infinite scores are errors.

=========  ============================================================================================
n          number of images; D: number of bootstrap draws; K: number of distinct thresholds, descending
tp, fp     (D, K) anomalous and normal images (or pixels) with a score of at least threshold k
TPR, FPR   tp / number anomalous, fp / number normal
interval   2.5th to 97.5th percentile over draws of images with replacement, normal and anomalous drawn
           apart (stratified), so it holds the spread over test images, not over training seeds
=========  ============================================================================================

An operating point is one a threshold can realise; ``fpr_at_95_tpr`` and ``tpr_at_5_fpr`` take the best such point that
keeps the promise and never interpolate between two, so they err on the cautious side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage, stats

from raydiff.errors import DataError, ScoreError, ShapeError

__all__ = [
    "IMAGE_METRICS",
    "NUM_DRAWS",
    "PIXEL_METRICS",
    "Estimate",
    "average_precision",
    "check_scores",
    "f1_max",
    "fpr_at_tpr",
    "image_auroc",
    "image_metrics",
    "paired_differences",
    "pixel_metrics",
    "proportion",
    "roc_curve",
    "tpr_at_fpr",
]

IMAGE_METRICS = ("auroc", "average_precision", "f1_max", "fpr_at_95_tpr", "tpr_at_5_fpr")
PIXEL_METRICS = ("pixel_auroc", "pixel_average_precision", "aupro")
NUM_DRAWS = 2000

_BLOCK = 2_000_000  # numbers per (D, n) block of draws: 16 MB each
_NUM_EDGES = 512  # thresholds at which the draws of pixel metrics are evaluated
_AUPRO_LIMIT = 0.3

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Arrays = dict[str, Floats]


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; the interval is None where none was asked for."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        return f"{self.value:.3f}" + ("" if self.low is None else f" ({self.low:.3f} to {self.high:.3f})")


def check_scores(scores: ArrayLike, labels: ArrayLike, ids: Sequence[str] | None = None) -> tuple[Floats, Bools]:
    """Scores as float64 (n,) and labels as bool (n,), True is anomalous.

    Raises:
        ShapeError: the two are not of one length.
        ScoreError: a score is NaN or infinite; names the first image by its id, or by its index without ``ids``.
        DataError: there is no normal or no anomalous image, so no ranking metric is defined.
    """
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=bool)
    if values.ndim != 1 or values.shape != truth.shape:
        raise ShapeError(f"scores are {values.shape} and labels {truth.shape}; both must be (n,), one per image")
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        name = ids[bad[0]] if ids is not None else f"index {bad[0]}"
        more = f" (and {len(bad) - 1} more images)" if len(bad) > 1 else ""
        raise ScoreError(
            f"image {name}: its score is {values[bad[0]]}{more}; look at the image, or retrain if many are affected"
        )
    if truth.all() or not truth.any():
        raise DataError(
            f"the images hold {int((~truth).sum())} normal and {int(truth.sum())} anomalous; a metric needs both kinds"
        )
    return values, truth


def image_auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Chance that an anomalous image scores above a normal one, ties counting half. Raises as :func:`check_scores`."""
    return float(_curve_metrics(*_once(scores, labels))["auroc"][0])


def average_precision(scores: ArrayLike, labels: ArrayLike) -> float:
    """Sum over thresholds of precision times the step in recall. Raises as :func:`check_scores`."""
    return float(_curve_metrics(*_once(scores, labels))["average_precision"][0])


def f1_max(scores: ArrayLike, labels: ArrayLike) -> float:
    """The best F1 of any threshold. Chosen on test labels, so a ceiling: it is never a verdict's quality."""
    return float(_curve_metrics(*_once(scores, labels))["f1_max"][0])


def fpr_at_tpr(scores: ArrayLike, labels: ArrayLike, tpr: float = 0.95) -> float:
    """The smallest FPR of a threshold whose TPR is at least ``tpr``; no interpolation."""
    return float(_fpr_at(*_once(scores, labels), tpr)[0])


def tpr_at_fpr(scores: ArrayLike, labels: ArrayLike, fpr: float = 0.05) -> float:
    """Detection rate: the largest TPR of a threshold whose FPR is at most ``fpr``; no interpolation."""
    return float(_tpr_at(*_once(scores, labels), fpr)[0])


def roc_curve(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, Floats]:
    """FPR and TPR (K + 1,) from (0, 0) to (1, 1), one point per distinct score."""
    tp, fp = (_from_zero(counts)[0] for counts in _once(scores, labels))
    return fp / fp[-1], tp / tp[-1]


def proportion(successes: int, total: int, confidence: float = 0.95) -> Estimate:
    """A share with its exact binomial interval (Clopper and Pearson 1934); DataError if ``total`` is 0."""
    if total < 1 or not 0 <= successes <= total:
        raise DataError(f"{successes} of {total} is no share; give at least one image")
    tail = (1 - confidence) / 2
    low = float(stats.beta.ppf(tail, successes, total - successes + 1)) if successes else 0.0
    high = float(stats.beta.ppf(1 - tail, successes + 1, total - successes)) if successes < total else 1.0
    return Estimate(successes / total, low, high)


def image_metrics(
    scores: ArrayLike, labels: ArrayLike, *, ids: Sequence[str] | None = None, num_draws: int = NUM_DRAWS, seed: int = 0
) -> dict[str, Estimate]:
    """Every name in ``IMAGE_METRICS`` with its interval; the same seed gives the same interval.

    Raises:
        ScoreError, ShapeError, DataError: as :func:`check_scores`.
    """
    values, truth = check_scores(scores, labels, ids)
    point = _curve_metrics(*_counts(values, truth, np.ones((1, len(values)))))
    blocks = [_curve_metrics(*_counts(values, truth, drawn)) for drawn in _draws(truth, num_draws, seed)]
    return {name: _estimate(point[name][0], [block[name] for block in blocks]) for name in IMAGE_METRICS}


def paired_differences(
    scores: ArrayLike, reference: ArrayLike, labels: ArrayLike, *, num_draws: int = NUM_DRAWS, seed: int = 0
) -> dict[str, Estimate]:
    """Every image metric of ``scores`` minus that of ``reference``, both on the same drawn images each time.

    Args:
        scores: (n,), of the detector in question.
        reference: (n,), of the one it is held against, the same images in the same order.
        labels: (n,), True is anomalous.
        num_draws, seed: of the bootstrap over images.

    Raises:
        ScoreError, ShapeError, DataError: as :func:`check_scores`.
    """
    (ours, truth), (theirs, _) = check_scores(scores, labels), check_scores(reference, labels)

    def difference(weights: Floats) -> Arrays:
        a, b = (_curve_metrics(*_counts(values, truth, weights)) for values in (ours, theirs))
        return {name: a[name] - b[name] for name in IMAGE_METRICS}

    point = difference(np.ones((1, len(truth))))
    blocks = [difference(drawn) for drawn in _draws(truth, num_draws, seed)]
    return {name: _estimate(point[name][0], [block[name] for block in blocks]) for name in IMAGE_METRICS}


def pixel_metrics(
    maps: NDArray[np.floating], masks: Bools, *, images: Sequence[int] | None = None,
    num_draws: int = NUM_DRAWS, seed: int = 0, chunk: int = 32,
) -> dict[str, Estimate]:  # fmt: skip
    """Every name in ``PIXEL_METRICS``, exact on all distinct scores, with intervals over drawn images.

    ``aupro`` is the per-region overlap (Bergmann et al. 2021, doi:10.1007/s11263-020-01400-4, section 5.2): the mean
    over ground-truth regions (8-connected) of the share of the region found, integrated over pixel FPR up to 0.3 by
    trapezoids and divided by 0.3. The draws are evaluated at 512 thresholds, evenly spaced in the rank of anomalous
    pixels, and centred on the exact value. Memory: the anomalous pixels, plus ``chunk`` maps at a time.

    Args:
        maps: (n, H, W); may be a ``numpy.memmap``.
        masks: (n, H, W), True is anomalous; all False for a normal image. May be a ``numpy.memmap``.
        images: indices of the maps to measure on; all of them by default.
        num_draws, seed: of the bootstrap over images, those with and without anomalous pixels drawn apart.
        chunk: maps held in memory at a time.

    Raises:
        ShapeError: maps and masks differ in shape.
        ScoreError: a map holds NaN or an infinite value.
        DataError: there is no anomalous or no normal pixel.
    """
    if maps.ndim != 3 or maps.shape != masks.shape:
        raise ShapeError(f"maps are {maps.shape} and masks {masks.shape}; both must be (n, H, W)")
    images = range(len(maps)) if images is None else images
    found = _Anomalous.collect(maps, masks, images)
    thresholds, tp, overlap = found.cumulate()
    edges = thresholds[np.linspace(0, len(thresholds) - 1, min(_NUM_EDGES, len(thresholds))).round().astype(int)]
    at_least, above, binned_fp = _count_normal(maps, masks, images, thresholds, edges, chunk)
    # Two points per threshold: before and after its own pixels, so that a tie is a slope and not a step.
    fp = np.stack([above, at_least], axis=1).reshape(1, -1)
    tp, overlap = (np.stack([np.r_[0.0, y[:-1]], y], axis=1).reshape(1, -1) for y in (tp, overlap))
    fp, tp, overlap = (np.c_[y, [[end]]] for y, end in ((fp, found.num_normal), (tp, tp[0, -1]), (overlap, 1.0)))
    point = _pixel_curve_metrics(tp, fp, overlap)
    blocks = _pixel_draws(found, edges, binned_fp, num_draws, seed)
    return {name: _estimate(point[name][0], blocks[name], centre=True) for name in PIXEL_METRICS}


def _once(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, Floats]:
    values, truth = check_scores(scores, labels)
    return _counts(values, truth, np.ones((1, len(values))))


def _draws(labels: Bools, num_draws: int, seed: int) -> Iterator[Floats]:
    """Blocks of (d, n) counts: how often each image was drawn; each stratum keeps its size."""
    rng = np.random.default_rng(seed)
    strata = [np.flatnonzero(~labels), np.flatnonzero(labels)]
    block = max(1, _BLOCK // len(labels))
    for start in range(0, num_draws, block):
        d = min(block, num_draws - start)
        counts = np.zeros((d, len(labels)))
        for members in strata:
            if len(members):
                picks = rng.integers(0, len(members), (d, len(members))) + len(members) * np.arange(d)[:, None]
                flat = np.bincount(picks.ravel(), minlength=d * len(members))
                counts[:, members] = flat.reshape(d, len(members))
        yield counts


def _counts(scores: Floats, labels: Bools, weights: Floats) -> tuple[Floats, Floats]:
    """Counts tp and fp (D, K) when image i is counted ``weights[:, i]`` times."""
    order = np.argsort(-scores, kind="stable")
    last = _last_of_tie(scores[order])
    total = np.cumsum(weights[:, order], axis=1)[:, last]
    tp = np.cumsum(weights[:, order] * labels[order], axis=1)[:, last]
    return tp, total - tp


def _last_of_tie(ranked: NDArray[np.floating]) -> NDArray[np.int64]:
    return np.flatnonzero(np.r_[ranked[1:] != ranked[:-1], True])


def _curve_metrics(tp: Floats, fp: Floats) -> Arrays:
    return {
        "auroc": _area(tp, fp),
        "average_precision": _average_precision(tp, fp),
        "f1_max": (2 * tp / (tp + fp + tp[:, -1:])).max(axis=1),
        "fpr_at_95_tpr": _fpr_at(tp, fp, 0.95),
        "tpr_at_5_fpr": _tpr_at(tp, fp, 0.05),
    }


def _pixel_curve_metrics(tp: Floats, fp: Floats, overlap: Floats) -> Arrays:
    fpr = _from_zero(fp / fp[:, -1:])
    return {
        "pixel_auroc": _area(tp, fp),
        "pixel_average_precision": _average_precision(tp, fp),
        "aupro": _area_up_to(fpr, _from_zero(overlap), _AUPRO_LIMIT) / _AUPRO_LIMIT,
    }


def _from_zero(y: Floats) -> Floats:
    return np.concatenate([np.zeros((len(y), 1)), y], axis=1)


def _area(tp: Floats, fp: Floats) -> Floats:
    x, y = _from_zero(fp), _from_zero(tp)
    doubled = (np.diff(x, axis=1) * (y[:, 1:] + y[:, :-1])).sum(axis=1)  # whole numbers, hence exact
    return np.asarray(doubled / (2 * fp[:, -1] * tp[:, -1]))


def _average_precision(tp: Floats, fp: Floats) -> Floats:
    precision = np.divide(tp, tp + fp, out=np.zeros_like(tp), where=tp > 0)
    return np.asarray((np.diff(_from_zero(tp), axis=1) * precision).sum(axis=1) / tp[:, -1])


def _fpr_at(tp: Floats, fp: Floats, tpr: float) -> Floats:
    needed = np.ceil(tpr * tp[:, -1:] - 1e-9)
    first = (tp >= needed).argmax(axis=1)
    return np.asarray(np.take_along_axis(fp, first[:, None], axis=1)[:, 0] / fp[:, -1])


def _tpr_at(tp: Floats, fp: Floats, fpr: float) -> Floats:
    allowed = np.floor(fpr * fp[:, -1:] + 1e-9)
    kept = (fp <= allowed).sum(axis=1)
    return np.asarray(np.take_along_axis(_from_zero(tp), kept[:, None], axis=1)[:, 0] / tp[:, -1])


def _area_up_to(x: Floats, y: Floats, limit: float) -> Floats:
    """Trapezoids below the curve from x = 0 to ``limit``, the last one cut at the limit."""
    x0, width = np.minimum(x[:, :-1], limit), np.diff(x, axis=1)
    cut = np.minimum(x[:, 1:], limit) - x0
    share = np.divide(cut, width, out=np.zeros_like(width), where=width > 0)
    return np.asarray((cut * (y[:, :-1] + 0.5 * share * np.diff(y, axis=1))).sum(axis=1))


def _estimate(value: float, draws: Sequence[Floats], *, centre: bool = False) -> Estimate:
    """The middle 95 % of the draws; centred: moved by how far their binned point lies from the exact value."""
    if not draws:
        return Estimate(float(value))
    binned, drawn = (draws[0][0], np.concatenate(draws)[1:]) if centre else (value, np.concatenate(draws))
    if len(drawn) == 0:
        return Estimate(float(value))
    low, high = np.percentile(drawn, [2.5, 97.5]) + (value - binned)
    return Estimate(float(value), float(low), float(min(high, 1.0) if centre else high))


@dataclass(frozen=True)
class _Anomalous:
    """The anomalous pixels of all maps: score, image and 1 / size of the region each lies in."""

    scores: NDArray[np.floating]
    row: NDArray[np.int64]
    weight: Floats
    num_regions: NDArray[np.int64]  # (n,)
    num_normal: int

    @staticmethod
    def collect(maps: NDArray[np.floating], masks: Bools, images: Sequence[int]) -> _Anomalous:
        scores, row, weight = [], [], []
        num_regions, size = np.zeros(len(images), dtype=np.int64), len(images) * masks[0].size
        for k, i in enumerate(images):
            if (mask := np.asarray(masks[i])).any():
                regions, num_regions[k] = ndimage.label(mask, structure=np.ones((3, 3)))
                region = regions[mask]
                scores.append(np.asarray(maps[i])[mask])
                weight.append(1.0 / np.bincount(region)[region])
                row.append(np.full(len(region), k))
        num_anomalous = sum(len(part) for part in scores)
        if num_anomalous in (0, size):
            raise DataError(f"{num_anomalous} of {size} pixels are anomalous; a pixel metric needs both kinds")
        pixels, rows, weights = (np.concatenate(part) for part in (scores, row, weight))
        return _Anomalous(pixels, rows, weights, num_regions, size - num_anomalous)

    def cumulate(self) -> tuple[NDArray[np.floating], Floats, Floats]:
        """Distinct thresholds (K,), descending; anomalous pixels and mean region overlap (K,) at or above each."""
        order = np.argsort(-self.scores, kind="stable")
        ranked = self.scores[order]
        last = _last_of_tie(ranked)
        overlap = np.cumsum(self.weight[order])[last] / self.num_regions.sum()
        return ranked[last], (last + 1).astype(np.float64), overlap

    def per_image(self, edges: NDArray[np.floating]) -> tuple[Floats, Floats]:
        """Anomalous pixels and summed region overlap (n, Q) at or above each edge."""
        shape = (len(self.num_regions), len(edges))
        first_edge = len(edges) - np.searchsorted(edges[::-1], self.scores, side="right")
        cell = self.row * (len(edges) + 1) + first_edge
        tallies = (np.bincount(cell, weights, minlength=shape[0] * (shape[1] + 1)) for weights in (None, self.weight))
        counts = [np.cumsum(t.reshape(shape[0], -1)[:, :-1], axis=1, dtype=np.float64) for t in tallies]
        return counts[0], counts[1]


def _count_normal(
    maps: NDArray[np.floating], masks: Bools, images: Sequence[int],
    thresholds: NDArray[np.floating], edges: NDArray[np.floating], chunk: int,
) -> tuple[Floats, Floats, Floats]:  # fmt: skip
    """Normal pixels at or above, and above, each threshold (K,); and at or above each edge, per image (n, Q)."""
    at_least, above = np.zeros(len(thresholds)), np.zeros(len(thresholds))
    per_image = np.zeros((len(images), len(edges) + 1))
    for start in range(0, len(images), chunk):
        pixels = []
        for k, i in enumerate(images[start : start + chunk], start):
            normal = np.sort(np.asarray(maps[i])[~masks[i]])
            if not np.isfinite(maps[i]).all():
                raise ScoreError(f"map {i} holds NaN or an infinite value; look at the image it belongs to")
            per_image[k, :-1] = len(normal) - np.searchsorted(normal, edges, side="left")
            per_image[k, -1] = len(normal)
            pixels.append(normal)
        ranked = np.sort(np.concatenate(pixels))
        at_least += len(ranked) - np.searchsorted(ranked, thresholds, side="left")
        above += len(ranked) - np.searchsorted(ranked, thresholds, side="right")
    return at_least, above, per_image


def _pixel_draws(
    found: _Anomalous, edges: NDArray[np.floating], fp: Floats, num_draws: int, seed: int
) -> dict[str, list[Floats]]:
    """Metrics over draws of images; the first entry of all is that of the images as they are."""
    tp, overlap = found.per_image(edges)
    tp, overlap = (np.concatenate([y, y[:, -1:]], axis=1) for y in (tp, overlap))
    out: dict[str, list[Floats]] = {name: [] for name in PIXEL_METRICS}
    counts = _draws(found.num_regions > 0, num_draws, seed)
    for weights in (np.ones((1, len(fp))), *counts):
        regions = weights @ found.num_regions
        block = _pixel_curve_metrics(weights @ tp, weights @ fp, weights @ overlap / regions[:, None])
        for name, values in block.items():
            out[name].append(values)
    return out
