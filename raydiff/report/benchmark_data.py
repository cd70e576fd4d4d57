"""The evaluations of a benchmark, arranged: data set, method, category, seed; and the draws its intervals come from.

Nothing depends on the order in which cells were finished: names are sorted, methods with a network first and the
classic ones last.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev

import numpy as np
from numpy.typing import NDArray

from raydiff.core.statistics import Difference, auroc_draws, hierarchical_difference, interval, num_draws_for
from raydiff.results import CLASSICS, Evaluation, Predictions, Result, latest

__all__ = ["Against", "Benchmark", "Planned", "Score", "natural"]

Draws = NDArray[np.float64]
Cells = Mapping[str, Mapping[int, Evaluation]]
Planned = tuple[str, str, str, int]
"""A cell of a plan: method, data set, category, seed."""

_Key = tuple[str, str, str, int]  # data set, method, category, seed


@dataclass(frozen=True)
class Score:
    """A metric of one method on one data set: mean over categories of the mean over seeds.

    ``spread`` is the standard deviation over seeds of the mean over categories; None for a single seed. ``num_cells``
    (a cell is a category with a seed) went in, of ``num_expected`` that there should be.
    """

    mean: float
    spread: float | None
    num_seeds: int
    num_cells: int
    num_expected: int

    @property
    def missing(self) -> str:
        """``5 of 6 cells``; empty where nothing is missing."""
        if self.num_cells == self.num_expected:
            return ""
        return f"{self.num_cells} of {self.num_expected} cell{'s' * (self.num_expected > 1)}"


@dataclass(frozen=True)
class Against:
    """A method minus the best classic one; ``references`` are those that were best in some cell.

    ``num_expected`` cells should have been compared.
    """

    method: str
    difference: Difference
    references: tuple[str, ...]
    num_expected: int

    @property
    def cells(self) -> str:
        """``6``, or ``5 of 6`` where some are missing."""
        found = self.difference.num_cells
        return str(found) if found == self.num_expected else f"{found} of {self.num_expected}"

    @property
    def is_complete(self) -> bool:
        """Whether every cell that should be was compared."""
        return self.difference.num_cells == self.num_expected


def natural(text: str) -> list[tuple[int, int, str]]:
    """A sorting key by which ``tile@64`` comes before ``tile@128``."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text) if part]


class Benchmark:
    """All cells, by data set, method, category and seed.

    Args:
        evaluations: of several runs of one cell the last counts.
        classics: names of the methods to hold the others against; by default those that begin with one of
            :data:`raydiff.results.CLASSICS`.
        planned: every cell there should be; by default what was measured, each method with each of its seeds on each
            category.
    """

    def __init__(
        self,
        evaluations: Iterable[Evaluation],
        classics: Sequence[str] | None = None,
        planned: Collection[Planned] | None = None,
    ) -> None:
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
        self.planned = None if planned is None else frozenset(planned)
        measured = frozenset(_planned(evaluation.rows[0]) for evaluation in self.evaluations)
        self.unmeasured = sorted(
            frozenset(planned or ()) - measured, key=lambda cell: (*map(natural, cell[:3]), cell[3])
        )
        self._categories: dict[str, set[str]] = {}
        self._seeds: dict[tuple[str, str], set[int]] = {}
        for method, dataset, category, seed in measured | frozenset(planned or ()):
            self._categories.setdefault(dataset, set()).add(category)
            self._seeds.setdefault((dataset, method), set()).add(seed)

    def of(self, dataset: str, method: str) -> Cells:
        """By category, by seed; empty where the method did not run."""
        return self._cells.get(dataset, {}).get(method, {})

    def methods_of(self, dataset: str) -> list[str]:
        """Methods with at least one cell of the data set."""
        return [method for method in self.methods if self.of(dataset, method)]

    def categories(self, dataset: str) -> list[str]:
        """Every category that is planned, or that some method ran on."""
        return sorted(self._categories[dataset], key=natural)

    def measured_categories(self, dataset: str) -> list[str]:
        """Every category that some method ran on."""
        return [c for c in self.categories(dataset) if any(c in cells for cells in self._cells[dataset].values())]

    @property
    def num_blocks(self) -> int:
        """How many categories there are in all data sets, measured or not."""
        return sum(map(len, self._categories.values()))

    def num_expected(self, dataset: str, method: str, category: str | None = None) -> int:
        """How many cells there should be: each of the method's seeds on each category, or on the one named."""
        categories = 1 if category is not None else len(self._categories.get(dataset, ()))
        return categories * len(self._seeds.get((dataset, method), ()))

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
        return _score(known, self.num_expected(dataset, method, category))

    def _chosen(self, dataset: str, method: str, category: str | None) -> Cells:
        cells = self.of(dataset, method)
        return cells if category is None else {c: seeds for c, seeds in cells.items() if c == category}

    @cached_property
    def _draws(self) -> dict[_Key, Draws]:
        """AUROC draws of every cell with predictions; those of one category are on the same draws of images."""
        groups: dict[tuple[str, str, tuple[str, ...], bytes], list[tuple[_Key, Predictions, NDArray[np.intp]]]] = {}
        for evaluation in self.evaluations:
            row, predictions = evaluation.rows[0], evaluation.predictions
            if predictions is not None:
                ids, order = _by_id(predictions)
                group = (row.dataset, row.category, ids, predictions.labels[order].tobytes())
                key = (row.dataset, row.detector, row.category, row.seed)
                groups.setdefault(group, []).append((key, predictions, order))
        found: dict[_Key, Draws] = {}
        for (dataset, category, *_), members in groups.items():
            _, first, order = members[0]
            number = num_draws_for(len(self._compared(dataset)))
            origin = zlib.crc32(f"{dataset}\0{category}".encode())
            drawn = auroc_draws([p.scores[o] for _, p, o in members], first.labels[order], number, (0, origin))
            found |= {key: row for (key, *_), row in zip(members, drawn, strict=True)}
        return found

    def interval(self, dataset: str, method: str, category: str | None = None) -> tuple[float, float] | None:
        """95 % interval of the mean AUROC over draws of test images alone: seeds and categories stay as they are."""
        cells = self._chosen(dataset, method, category)
        keys = {c: [(dataset, method, c, s) for s in seeds] for c, seeds in cells.items()}
        if not keys or any(key not in self._draws for part in keys.values() for key in part):
            return _own_interval([e for seeds in cells.values() for e in seeds.values()])
        means = [np.mean([self._draws[key] for key in part], axis=0) for part in keys.values()]
        return interval(np.mean(means, axis=0))

    def differences(self, dataset: str) -> list[Against]:
        """Every other method minus the best classic one of the same category and seed, on the same images.

        The classic with the highest test AUROC is taken, which favours it. Where no classic ran with a seed, those of
        the category's other seeds stand in. Methods without a comparable cell are left out.
        """
        found = [self._against(dataset, method) for method in self._compared(dataset)]
        return [against for against in found if against is not None]

    def _compared(self, dataset: str) -> list[str]:
        return [method for method in self.methods_of(dataset) if method not in self.classics]

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
                draws.append(drawn)
        if not values:
            return None
        difference = hierarchical_difference(values, draws)
        return Against(method, difference, tuple(references), self.num_expected(dataset, method))

    def _best_classic(self, dataset: str, category: str, seed: int, ours: Evaluation) -> Evaluation | None:
        of_all = [self.of(dataset, name).get(category, {}) for name in self.classics]
        same_seed = [seeds[seed] for seeds in of_all if seed in seeds]
        candidates = same_seed or [evaluation for seeds in of_all for evaluation in seeds.values()]
        usable = [e for e in candidates if _same_images(e, ours)]
        return max(usable, key=lambda e: e.rows[0].metrics["auroc"].value, default=None)


def _order(evaluation: Evaluation) -> tuple[object, ...]:
    row = evaluation.rows[0]
    return natural(row.dataset), natural(row.detector), natural(row.category), row.seed


def _planned(row: Result) -> Planned:
    return row.detector, row.dataset, row.category, row.seed


def _score(values: Mapping[str, Mapping[int, float]], num_expected: int) -> Score:
    shared = set.intersection(*(set(seeds) for seeds in values.values()))
    per_seed = [fmean(seeds[seed] for seeds in values.values()) for seed in sorted(shared)]
    mean = fmean(fmean(seeds.values()) for seeds in values.values())
    spread = stdev(per_seed) if len(per_seed) > 1 else None
    return Score(mean, spread, max(1, len(per_seed)), sum(map(len, values.values())), num_expected)


def _by_id(predictions: Predictions) -> tuple[tuple[str, ...], NDArray[np.intp]]:
    """Ids in order, and where each is, so that methods which read in another order are paired."""
    order = np.array(sorted(range(len(predictions)), key=predictions.ids.__getitem__), dtype=np.intp)
    return tuple(predictions.ids[i] for i in order), order


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
