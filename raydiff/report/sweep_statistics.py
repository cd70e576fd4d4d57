"""What a sweep's numbers support: group means against chance, curves against seed noise, ranks, pairs, the front.

* Spread of means: a parameter's trainings in groups by its value, the highest group's mean less the lowest's; what
  chance gives is the 95th percentile over shuffles of the values among trainings (a permutation test).
* One-at-a-time curves: the range of the means over seeds against Tukey's studentised range at 0.05, with seeds as
  blocks (Montgomery 2017, section 4.1), so that what a seed adds to every value is no noise.
* Intervals resample trainings, never settings: the settings of one training are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from raydiff.core.metrics import Estimate
from raydiff.report.sweep_data import Axis, Sweep, Trial, sign_of
from raydiff.sweep_records import Refit, Setting

__all__ = [
    "Curve", "Front", "Grid", "Paired", "Point", "Spread", "curves", "front", "grids", "loss_rank", "paired", "spreads",
]  # fmt: skip

_NUM_SHUFFLES = 1000
_NUM_DRAWS = 1000

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Spread:
    """The mean value of trainings by a parameter's value; ``counts`` are trainings, ``chance`` what shuffling gives."""

    path: str
    groups: tuple[str, ...]
    means: tuple[float, ...]
    counts: tuple[int, ...]
    value: float
    chance: float

    @property
    def is_clear(self) -> bool:
        """Whether the means lie further apart than chance would put them in 95 % of shuffles."""
        return self.value > self.chance

    @property
    def best(self) -> int:
        """Number of the group with the highest mean."""
        return int(np.argmax(self.means))


def spreads(sweep: Sweep) -> list[Spread]:
    """Of each parameter that changes weights and has two values in the search, the widest first. Needs no model."""
    rng = np.random.default_rng(0)
    found = []
    for path, axis in sweep.axes.items():
        having = [trial for trial in sweep.valued if path in trial.params]
        if axis.level != "training" or len(having) < 3:
            continue
        bins = np.array([axis.bin_of(trial.params[path]) for trial in having])
        values = np.array([sweep.value(trial) for trial in having])
        present = np.unique(bins)
        if len(present) > 1:
            shuffled = [_range(_means(values, rng.permutation(bins), present)) for _ in range(_NUM_SHUFFLES)]
            means = _means(values, bins, present)
            counts = tuple(int((bins == i).sum()) for i in present)
            found.append(Spread(
                path, tuple(axis.bins[i] for i in present), tuple(means), counts,
                _range(means), float(np.percentile(shuffled, 95)),
            ))  # fmt: skip
    return sorted(found, key=lambda spread: -spread.value)


def _means(values: Floats, bins: NDArray[np.int64], present: NDArray[np.int64]) -> list[float]:
    return [float(values[bins == i].mean()) for i in present]


def _range(values: Sequence[float]) -> float:
    return max(values) - min(values)


@dataclass(frozen=True)
class Point:
    """One value of a curve: the objective of each seed."""

    value: Any
    by_seed: Mapping[int, float]
    is_best_point: bool = False

    @property
    def mean(self) -> float:
        """Over seeds."""
        return fmean(self.by_seed.values())

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None with one."""
        return stdev(self.by_seed.values()) if len(self.by_seed) > 1 else None


@dataclass(frozen=True)
class Curve:
    """One parameter changed around the best point; ``noise`` is the range of means that seeds alone explain.

    ``noise`` is None where it cannot be known: fewer than two seeds that all values share.
    """

    axis: Axis
    points: tuple[Point, ...]
    noise: float | None

    @property
    def range(self) -> float:
        """The highest mean less the lowest."""
        return _range([point.mean for point in self.points])

    @property
    def is_clear(self) -> bool:
        """Whether the range is more than seed noise."""
        return self.noise is not None and self.range > self.noise

    @property
    def num_seeds(self) -> int:
        """The fewest of any value."""
        return min(len(point.by_seed) for point in self.points)


def curves(sweep: Sweep) -> list[Curve]:
    """One-at-a-time curves of the lead objective; parameters with one value are left out."""
    centre = next((row for row in sweep.around if row.varied is None), None)
    found = []
    for path, axis in sweep.axes.items():
        points: dict[str, Point] = {}
        for row in sweep.around:
            own = row is centre
            if path in row.params and (row.varied == path or own):
                seeds = {s: v[sweep.lead] for s, v in row.by_seed.items() if math.isfinite(v.get(sweep.lead, math.nan))}
                key = repr(row.params[path])
                if seeds and (key not in points or own):
                    points[key] = Point(row.params[path], seeds, own)
        if len(points) > 1:
            ordered = tuple(sorted(points.values(), key=lambda point: axis.place(point.value)))
            found.append(Curve(axis, ordered, _seed_noise(ordered)))
    return found


def _seed_noise(points: Sequence[Point]) -> float | None:
    """Tukey's honestly significant difference at 0.05, seeds as blocks."""
    shared = sorted(set.intersection(*(set(point.by_seed) for point in points)))
    k, n = len(points), len(shared)
    if n < 2:
        return None
    table = np.array([[point.by_seed[seed] for seed in shared] for point in points])
    rest = table - table.mean(axis=0) - table.mean(axis=1, keepdims=True) + table.mean()
    freedom = (k - 1) * (n - 1)
    deviation = math.sqrt(float((rest**2).sum()) / freedom)
    return float(stats.studentized_range.ppf(0.95, k, freedom)) * deviation / math.sqrt(n)


@dataclass(frozen=True)
class Grid:
    """The mean objective by the values of two parameters, (rows of ``down``, columns of ``across``); NaN where empty.

    ``counts`` are trainings (each by its best setting) where both parameters change weights, else settings.
    """

    across: Axis
    down: Axis
    means: Floats
    counts: NDArray[np.int64]
    noun: str


def grids(sweep: Sweep, ranked: Sequence[str], limit: int = 3) -> list[Grid]:
    """Of each pair among the first ``limit`` parameters."""
    found = []
    for one, two in combinations([path for path in ranked if path in sweep.axes][:limit], 2):
        across, down = sweep.axis(one), sweep.axis(two)
        of_trainings = across.level == down.level == "training"
        rows = [t.best for t in sweep.valued if t.best is not None] if of_trainings else list(sweep.search)
        sums, counts = np.zeros((len(down.bins), len(across.bins))), np.zeros((len(down.bins), len(across.bins)), int)
        for row in rows:
            if one in row.params and two in row.params:
                at = down.bin_of(row.params[two]), across.bin_of(row.params[one])
                sums[at] += row.values[sweep.lead]
                counts[at] += 1
        if (counts > 0).sum() > 1:
            means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
            found.append(Grid(across, down, means, counts, "training" if of_trainings else "setting"))
    return found


def loss_rank(sweep: Sweep) -> tuple[Estimate, int] | None:
    """Spearman's rank correlation of the held-out loss with the lead objective over trainings, and their number.

    The interval is the 2.5th to 97.5th percentile over draws of trainings with replacement. None with fewer than six
    trainings, or where either never varies.
    """
    pairs = [(loss, sweep.value(trial)) for trial in sweep.valued if (loss := mean_loss(trial)) is not None]
    table = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    value = _spearman(table)
    if len(table) < 6 or math.isnan(value):
        return None
    rng = np.random.default_rng(0)
    draws = [_spearman(table[rng.integers(len(table), size=len(table))]) for _ in range(_NUM_DRAWS)]
    known = [draw for draw in draws if math.isfinite(draw)]
    low, high = np.percentile(known, [2.5, 97.5])
    return Estimate(value, float(low), float(high)), len(table)


def mean_loss(trial: Trial) -> float | None:
    """The held-out loss over the seeds of a training; None if any lacks it."""
    losses = [row.loss for row in trial.rows]
    known = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    return fmean(known) if known and len(known) == len(losses) else None


def _spearman(table: Floats) -> float:
    ranks = [stats.rankdata(column) for column in table.T]
    if any(len(np.unique(column)) < 2 for column in ranks):
        return math.nan
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


@dataclass(frozen=True)
class Paired:
    """Winner less start over the seeds that both were refitted with; ``low`` and ``high`` by Student's t."""

    mean: float
    low: float | None
    high: float | None
    num_seeds: int


def paired(winner: Sequence[Refit], start: Sequence[Refit], split: str, metric: str) -> Paired | None:
    """The mean difference of a metric on ``selection`` or ``test``; None where no seed has both."""
    read = [{refit.seed: getattr(refit, split).get(metric) for refit in refits} for refits in (winner, start)]
    shared = [seed for seed, value in read[0].items() if value is not None and read[1].get(seed) is not None]
    if not shared:
        return None
    differences = [float(read[0][seed]) - float(read[1][seed]) for seed in shared]
    mean, n = fmean(differences), len(differences)
    if n < 2:
        return Paired(mean, None, None, n)
    half = float(stats.t.ppf(0.975, n - 1)) * stdev(differences) / math.sqrt(n)
    return Paired(mean, mean - half, mean + half, n)


@dataclass(frozen=True)
class Front:
    """Settings that no other beats in one objective without losing in another, by the first objective."""

    objectives: tuple[str, ...]
    members: tuple[Setting, ...]
    others: tuple[Setting, ...]


def front(sweep: Sweep) -> Front | None:
    """The Pareto front of all objectives over the settings of the search on complete trainings; None with one."""
    names = tuple(objective.name for objective in sweep.space.objectives)
    rows = [row for row in sweep.search if all(math.isfinite(row.values.get(name, math.nan)) for name in names)]
    if len(names) < 2 or not rows:
        return None
    table = np.array([[sign_of(sweep.space, name) * row.values[name] for name in names] for row in rows])
    kept: list[int] = []
    for i in np.lexsort(table.T[::-1])[::-1]:  # best in the first objective first: nothing later can beat it
        if not any((table[j] >= table[i]).all() for j in kept):
            kept.append(int(i))
    chosen = set(kept)
    return Front(names, tuple(rows[i] for i in kept), tuple(row for i, row in enumerate(rows) if i not in chosen))
