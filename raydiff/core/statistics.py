"""Statistics of a benchmark: paired differences over categories, seeds and images, corrections, ranks over data sets.

=========  ============================================================================================
D          number of bootstrap draws
k, n       number of methods and of blocks; a block is what all methods were measured on once
draws      a statistic's value on each bootstrap draw; intervals are its 2.5th to 97.5th percentile
CD         critical difference: average ranks that lie closer cannot be told apart (Demsar 2006)
=========  ============================================================================================

Sources: Holm 1979 (Scandinavian Journal of Statistics 6); Demsar 2006 (JMLR 7, 1-30) for Friedman, Nemenyi and the
critical-difference diagram; Davison and Hinkley 1997, chapter 3.8 for resampling in a hierarchy, 4.4 for p-values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from raydiff.core.metrics import Estimate, check_scores
from raydiff.errors import DataError, ShapeError

__all__ = [
    "Difference",
    "Friedman",
    "auroc_draws",
    "average_ranks",
    "bootstrap_p_value",
    "cliques",
    "critical_difference",
    "friedman",
    "hierarchical_difference",
    "holm",
    "image_weights",
    "interval",
    "num_draws_for",
]

Floats = NDArray[np.float64]
Weights = NDArray[np.float32]

_NUM_DRAWS = 1000
_MAX_DRAWS = 4000
_BLOCK = 50  # draws at a time: 32 MB of weights for 160,000 images, and small ones stay in the processor's cache


def holm(p_values: ArrayLike) -> Floats:
    """Holm's step-down adjustment of (m,) p-values: reject below alpha and at most alpha of families err.

    Raises:
        DataError: a p-value lies outside [0, 1] or is NaN.
    """
    p = np.asarray(p_values, dtype=np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise DataError(f"p-values {p.tolist()} do not all lie in [0, 1]; correct the test they come from")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def bootstrap_p_value(draws: ArrayLike) -> float:
    """Two-sided p-value of "the difference is zero" from bootstrap draws of the difference, in (0, 1].

    Twice the smaller tail beyond zero, a draw of exactly zero counting on both sides, and one counted for the value
    itself so that it is never 0: with D draws it is at least 2 / (D + 1).
    """
    drawn = np.asarray(draws, dtype=np.float64)
    tail = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    return min(1.0, 2 * (tail + 1) / (len(drawn) + 1))


def interval(draws: ArrayLike) -> tuple[float, float]:
    """The middle 95 % of draws."""
    low, high = np.percentile(np.asarray(draws, dtype=np.float64), [2.5, 97.5])
    return float(low), float(high)


def num_draws_for(num_comparisons: int) -> int:
    """Draws of images for a family of comparisons: 1,000, and more where Holm's correction could else never reject.

    A p-value is at least 2 / (D + 1), and the smallest of m is multiplied by m: D = 100 m leaves 0.02 of 0.05. From 40
    comparisons on it stays 4,000, which is enough for 100 of them.
    """
    return min(max(_NUM_DRAWS, 100 * num_comparisons), _MAX_DRAWS)


def image_weights(labels: ArrayLike, num_draws: int = _NUM_DRAWS, seed: Sequence[int] = (0,)) -> Iterator[Weights]:
    """Blocks (at most 50, n): how often each draw takes each image; normal and anomalous images are drawn apart.

    Together the blocks hold ``num_draws`` draws, whatever the number of images; more draws begin with the same ones.
    """
    truth = np.asarray(labels, dtype=bool)
    rng = np.random.default_rng(list(seed))
    kinds = [members for members in (np.flatnonzero(~truth), np.flatnonzero(truth)) if len(members)]
    for start in range(0, num_draws, _BLOCK):
        weights = np.zeros((_BLOCK, len(truth)), dtype=np.float32)
        for members in kinds:
            picks = rng.integers(0, len(members), (_BLOCK, len(members))) + len(members) * np.arange(_BLOCK)[:, None]
            counts = np.bincount(picks.ravel(), minlength=_BLOCK * len(members))
            weights[:, members] = counts.reshape(_BLOCK, len(members))
        yield weights[: num_draws - start]


def auroc_draws(
    scores: Sequence[ArrayLike], labels: ArrayLike, num_draws: int = _NUM_DRAWS, seed: Sequence[int] = (0,)
) -> Floats:
    """AUROC (k, D) of k methods on each draw of images, ties counting half; the draws are shared, so rows are paired.

    Memory stays that of one block of draws and of k rankings, however many images there are.

    Args:
        scores: k times (n,), raw.
        labels: (n,), True is anomalous.
        num_draws: D.
        seed: of :func:`image_weights`.

    Raises:
        ScoreError, ShapeError, DataError: as :func:`raydiff.core.metrics.check_scores`.
    """
    ranked = [_Ranked.of(values, labels) for values in scores]
    out = np.empty((len(ranked), num_draws))
    start = 0
    for weights in image_weights(labels, num_draws, seed) if ranked else ():
        for row, order in zip(out, ranked, strict=True):
            row[start : start + len(weights)] = order.aurocs(weights)
        start += len(weights)
    return out


@dataclass(frozen=True)
class _Ranked:
    """Images in the order of their scores, so that look-ups are near each other.

    ``normal`` and ``anomalous`` are positions, ``first`` and ``past`` how many normals lie below each anomalous image
    and how many at most at it.
    """

    normal: NDArray[np.intp]
    anomalous: NDArray[np.intp]
    first: NDArray[np.intp]
    past: NDArray[np.intp]

    @staticmethod
    def of(scores: ArrayLike, labels: ArrayLike) -> _Ranked:
        values, truth = check_scores(scores, labels)
        normal, anomalous = np.flatnonzero(~truth), np.flatnonzero(truth)
        normal = normal[np.argsort(values[normal], kind="stable")]
        anomalous = anomalous[np.argsort(values[anomalous], kind="stable")]
        first = np.searchsorted(values[normal], values[anomalous], side="left")
        past = np.searchsorted(values[normal], values[anomalous], side="right")
        return _Ranked(normal, anomalous, first, past)

    def aurocs(self, weights: Weights) -> Floats:
        """(D,) from (D, n)."""
        below = np.zeros((len(weights), len(self.normal) + 1), dtype=np.float32)  # normals drawn below; exact to 2^24
        np.cumsum(weights[:, self.normal], axis=1, out=below[:, 1:])
        hits = weights[:, self.anomalous]
        wins = below[:, self.first] + below[:, self.past]  # twice, for ties count half
        won = np.einsum("da,da->d", hits, wins, dtype=np.float64)
        return np.asarray(won / (2.0 * hits.sum(axis=1, dtype=np.float64) * below[:, -1]))


@dataclass(frozen=True)
class Difference:
    """A mean difference with its 95 % interval, its two-sided p-value, and how many cells went in."""

    estimate: Estimate
    p_value: float
    num_cells: int


def hierarchical_difference(
    values: Sequence[Sequence[float]],
    draws: Sequence[Sequence[Floats]],
    *,
    num_draws: int = 10_000,
    seed: int = 0,
) -> Difference:
    """The mean over categories of the mean over seeds of a difference, resampled at three levels.

    Each draw takes categories with replacement, in each of them seeds with replacement, and for each category taken one
    of its draws of images, shared by its seeds, which were measured on the same images. A level with one member adds
    nothing; one with two or three understates its spread. One cell alone gives the draws of its images.

    Args:
        values: per category, per seed: the difference measured.
        draws: per category, per seed: (D,) differences over draws of images, the same draws for all its seeds.
        num_draws, seed: of the resampling.

    Raises:
        ShapeError: there is no category, one without seeds, or values and draws do not match.
    """
    sizes = [len(seeds) for seeds in values]
    if not sizes or min(sizes) == 0 or sizes != [len(seeds) for seeds in draws]:
        raise ShapeError(f"categories hold {sizes} values and {[len(s) for s in draws]} draws; give one of each a seed")
    point = float(np.mean([np.mean(seeds) for seeds in values]))
    num_cells = sum(sizes)
    if num_cells == 1:
        drawn = np.asarray(draws[0][0], dtype=np.float64)
    else:
        drawn = _resample([np.stack(seeds) for seeds in draws], num_draws, np.random.default_rng(seed))
    low, high = interval(drawn)
    return Difference(Estimate(point, low, high), bootstrap_p_value(drawn), num_cells)


def _resample(categories: Sequence[Floats], num_draws: int, rng: np.random.Generator) -> Floats:
    """Means (num_draws,) over categories drawn with replacement; each category is (number of seeds, D)."""
    chosen = rng.integers(0, len(categories), (num_draws, len(categories)))
    means = np.empty(chosen.shape)
    for c, cells in enumerate(categories):
        where = chosen == c
        count, (num_seeds, d) = int(where.sum()), cells.shape
        seeds, images = rng.integers(0, num_seeds, (count, num_seeds)), rng.integers(0, d, (count, 1))
        means[where] = cells[seeds, images].mean(axis=1)
    return np.asarray(means.mean(axis=1))


def average_ranks(values: ArrayLike) -> Floats:
    """Mean rank (k,) of each method over blocks; rank 1 is the highest value, ties share the mean of their ranks.

    Args:
        values: (n, k), one row per block; higher is better.

    Raises:
        ShapeError: not (n, k) with at least one block.
    """
    return np.asarray(stats.rankdata(-_blocks(values), axis=1).mean(axis=0))


@dataclass(frozen=True)
class Friedman:
    """Friedman's chi-square with k - 1 degrees of freedom, corrected for ties, and its p-value."""

    statistic: float
    p_value: float


def friedman(values: ArrayLike) -> Friedman:
    """Whether the k methods differ at all over n blocks.

    Args:
        values: (n, k), one row per block.

    Raises:
        ShapeError: fewer than two blocks or three methods.
    """
    blocks = _blocks(values)
    if blocks.shape[0] < 2 or blocks.shape[1] < 3:
        raise ShapeError(f"values are {blocks.shape}; Friedman's test needs at least 2 blocks and 3 methods")
    if (blocks == blocks[:, :1]).all():
        return Friedman(0.0, 1.0)
    found = stats.friedmanchisquare(*blocks.T)
    return Friedman(float(found.statistic), float(found.pvalue))


def critical_difference(num_methods: int, num_blocks: int, alpha: float = 0.05) -> float:
    """Nemenyi's critical difference of average ranks: q_alpha sqrt(k (k + 1) / (6 n)), Demsar 2006, section 3.2.2.

    q_alpha is the quantile of the studentised range for k groups and infinite degrees of freedom, over sqrt(2).

    Raises:
        ShapeError: fewer than two methods or no block.
    """
    if num_methods < 2 or num_blocks < 1:
        raise ShapeError(f"{num_methods} methods on {num_blocks} blocks; ranks need at least 2 methods and 1 block")
    q = float(stats.studentized_range.ppf(1 - alpha, num_methods, np.inf)) / np.sqrt(2)
    return float(q * np.sqrt(num_methods * (num_methods + 1) / (6 * num_blocks)))


def cliques(ranks: ArrayLike, difference: float) -> list[tuple[int, ...]]:
    """Largest groups of methods, best rank first, whose ranks all lie within ``difference``; groups of one left out."""
    values = np.asarray(ranks, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    found, reached = [], -1
    for start in range(len(order)):
        end = int(np.searchsorted(values[order], values[order[start]] + difference, side="right")) - 1
        if end > start and end > reached:
            found.append(tuple(int(i) for i in order[start : end + 1]))
            reached = end
    return found


def _blocks(values: ArrayLike) -> Floats:
    blocks = np.asarray(values, dtype=np.float64)
    if blocks.ndim != 2 or not len(blocks):
        raise ShapeError(f"values are {blocks.shape}; they must be (n, k), a row per block")
    return blocks
