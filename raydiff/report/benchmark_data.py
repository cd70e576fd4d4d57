"""The evaluations of a benchmark, arranged: data set, method, category, seed; and the draws its intervals come from.

Nothing depends on the order in which cells were finished: names are sorted, methods with a network first and the
classic ones last.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev

import numpy as np
from numpy.typing import NDArray

from raydiff.core.statistics import Difference, auroc_draws, hierarchical_difference, image_weights, interval
from raydiff.results import CLASSICS, Evaluation, Predictions, Result, latest

__all__ = ["Against", "Benchmark", "Score", "natural"]

Draws = NDArray[np.float64]
Cells = Mapping[str, Mapping[int, Evaluation]]

_NUM_DRAWS = 1000


@dataclass(frozen=True)
class Score:
    """A metric of one method on one data set: mean over categories of the mean over seeds.

    ``spread`` is the standard deviation over seeds of the mean over categories; None for a single seed.
    """

    mean: float
    spread: float | None
    num_seeds: int
    num_categories: int


@dataclass(frozen=True)
class Against:
    """A method minus the best classic one; ``references`` are those that were best in some cell."""

    method: str
    difference: Difference
    references: tuple[str, ...]


def natural(text: str) -> list[tuple[int, int, str]]:
    """A sorting key by which ``tile@64`` comes before ``tile@128``."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text) if part]


class Benchmark:
    """All cells, by data set, method, category and seed.

    Args:
        evaluations: of several runs of one cell the last counts.
        classics: names of the methods to hold the others against; by default those that begin with one of
            :data:`raydiff.results.CLASSICS`.
    """

    def __init__(self, evaluations: Iterable[Evaluation], classics: Sequence[str] | None = None) -> None:
        self.evaluations = sorted(latest(evaluations), key=_order)
        self._cells: dict[str, dict[str, dict[str, dict[int, Evaluation]]]] = {}
        for evaluation in self.evaluations:
            row = evaluation.rows[0]
            methods = self._cells.setdefault(row.dataset, {})
            methods.setdefault(row.detector, {}).setdefault(row.category, {})[row.seed] = evaluation
        names = dict.fromkeys(e.rows[0].detector for e in self.evaluations)
        chosen = classics if classics is not None else [n for n in names if n.startswith(CLASSICS)]
        self.classics = [name for name in names if name in chosen]
        networks = {e.rows[0].detector for e in self.evaluations if e.rows[0].num_evaluations is not None}
        self.methods = sorted(names, key=lambda n: (n in self.classics, n not in networks, natural(n)))
        self.diffusion = [name for name in self.methods if name in networks]
        self.datasets = list(self._cells)

    def of(self, dataset: str, method: str) -> Cells:
        """By category, by seed; empty where the method did not run."""
        return self._cells[dataset].get(method, {})

    def methods_of(self, dataset: str) -> list[str]:
        """Methods with at least one cell of the data set."""
        return [method for method in self.methods if self.of(dataset, method)]

    def categories(self, dataset: str) -> list[str]:
        """Every category that some method ran on."""
        found = {category for cells in self._cells[dataset].values() for category in cells}
        return sorted(found, key=natural)

    def rows(self, dataset: str, method: str) -> list[Result]:
        """The rows of subset ``all``, by category and seed."""
        return [e.rows[0] for seeds in self.of(dataset, method).values() for e in seeds.values()]

    @cached_property
    def pretrained(self) -> dict[str, tuple[str, ...]]:
        """By method the names of the pretrained weights it used anywhere."""
        found: dict[str, dict[str, None]] = {}
        for evaluation in self.evaluations:
            if (weights := evaluation.rows[0].pretrained) is not None:
                found.setdefault(evaluation.rows[0].detector, {})[weights] = None
        return {method: tuple(names) for method, names in found.items()}

    def score(self, dataset: str, method: str, metric: str = "auroc", category: str | None = None) -> Score | None:
        """None where the method did not run, or a cell lacks the metric."""
        cells = self._chosen(dataset, method, category)
        values = {c: {s: e.rows[0].metrics.get(metric) for s, e in seeds.items()} for c, seeds in cells.items()}
        known = {c: {s: v.value for s, v in seeds.items() if v is not None} for c, seeds in values.items()}
        if not known or any(len(known[c]) < len(seeds) for c, seeds in values.items()):
            return None
        return _score(known)

    def _chosen(self, dataset: str, method: str, category: str | None) -> Cells:
        cells = self.of(dataset, method)
        return cells if category is None else {c: seeds for c, seeds in cells.items() if c == category}

    @cached_property
    def _draws(self) -> dict[tuple[str, str, str, int], Draws]:
        """AUROC draws of every cell with predictions; those of one category are on the same draws of images."""
        by_category: dict[tuple[str, str], list[Evaluation]] = {}
        for evaluation in self.evaluations:
            row = evaluation.rows[0]
            by_category.setdefault((row.dataset, row.category), []).append(evaluation)
        found = {}
        for (dataset, category), members in by_category.items():
            weights: dict[tuple[str, ...], NDArray[np.float32]] = {}
            for evaluation in members:
                if evaluation.predictions is None:
                    continue
                ids, labels, scores = _by_id(evaluation.predictions)
                if ids not in weights:
                    origin = zlib.crc32(f"{dataset}\0{category}".encode())
                    weights[ids] = image_weights(labels, _NUM_DRAWS, (0, origin))
                row = evaluation.rows[0]
                found[dataset, row.detector, category, row.seed] = auroc_draws(scores, labels, weights[ids])
        return found

    def interval(self, dataset: str, method: str, category: str | None = None) -> tuple[float, float] | None:
        """95 % interval of the mean AUROC over draws of test images alone: seeds and categories stay as they are."""
        cells = self._chosen(dataset, method, category)
        keys = {c: [(dataset, method, c, s) for s in seeds] for c, seeds in cells.items()}
        if not keys or any(key not in self._draws for part in keys.values() for key in part):
            return _own_interval([e for seeds in cells.values() for e in seeds.values()])
        means = [np.mean([self._draws[key] for key in part], axis=0) for part in keys.values()]
        shortest = min(len(mean) for mean in means)
        return interval(np.mean([mean[:shortest] for mean in means], axis=0))

    def differences(self, dataset: str) -> list[Against]:
        """Every other method minus the best classic one of the same category and seed, on the same images.

        The classic with the highest test AUROC is taken, which favours it. Where no classic ran with a seed, those of
        the category's other seeds stand in. Methods without a comparable cell are left out.
        """
        others = [method for method in self.methods_of(dataset) if method not in self.classics]
        found = [self._against(dataset, method) for method in others]
        return [against for against in found if against is not None]

    def _against(self, dataset: str, method: str) -> Against | None:
        values, draws, references = [], [], dict[str, None]()
        for category, seeds in self.of(dataset, method).items():
            mine, drawn = [], []
            for seed, ours in seeds.items():
                theirs = self._best_classic(dataset, category, seed, ours)
                if theirs is None:
                    continue
                a, b = ours.rows[0], theirs.rows[0]
                mine.append(a.metrics["auroc"].value - b.metrics["auroc"].value)
                drawn.append(
                    self._draws[dataset, method, category, seed] - self._draws[dataset, b.detector, category, b.seed]
                )
                references[b.detector] = None
            if mine:
                values.append(mine)
                draws.append([part[: min(map(len, drawn))] for part in drawn])
        if not values:
            return None
        return Against(method, hierarchical_difference(values, draws), tuple(references))

    def _best_classic(self, dataset: str, category: str, seed: int, ours: Evaluation) -> Evaluation | None:
        of_all = [self.of(dataset, name).get(category, {}) for name in self.classics]
        same_seed = [seeds[seed] for seeds in of_all if seed in seeds]
        candidates = same_seed or [evaluation for seeds in of_all for evaluation in seeds.values()]
        usable = [e for e in candidates if _same_images(e, ours)]
        return max(usable, key=lambda e: e.rows[0].metrics["auroc"].value, default=None)


def _order(evaluation: Evaluation) -> tuple[object, ...]:
    row = evaluation.rows[0]
    return natural(row.dataset), natural(row.detector), natural(row.category), row.seed


def _score(values: Mapping[str, Mapping[int, float]]) -> Score:
    shared = set.intersection(*(set(seeds) for seeds in values.values()))
    per_seed = [fmean(seeds[seed] for seeds in values.values()) for seed in sorted(shared)]
    mean = fmean(fmean(seeds.values()) for seeds in values.values())
    return Score(mean, stdev(per_seed) if len(per_seed) > 1 else None, max(1, len(per_seed)), len(values))


def _by_id(predictions: Predictions) -> tuple[tuple[str, ...], NDArray[np.bool_], Draws]:
    """Ids, labels and scores in the order of ids, so that methods which read in another order are paired."""
    order = sorted(range(len(predictions)), key=predictions.ids.__getitem__)
    return tuple(predictions.ids[i] for i in order), predictions.labels[order], predictions.scores[order]


def _same_images(a: Evaluation, b: Evaluation) -> bool:
    if a.predictions is None or b.predictions is None:
        return False
    return a.predictions.ids == b.predictions.ids or sorted(a.predictions.ids) == sorted(b.predictions.ids)


def _own_interval(evaluations: Sequence[Evaluation]) -> tuple[float, float] | None:
    """That of the only cell's row."""
    if len(evaluations) != 1:
        return None
    auroc = evaluations[0].rows[0].metrics["auroc"]
    return None if auroc.low is None or auroc.high is None else (auroc.low, auroc.high)
