"""Methods across data sets: average ranks, Friedman's test, Nemenyi's critical difference; or why there are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raydiff.core.statistics import Friedman, average_ranks, cliques, critical_difference, friedman
from raydiff.report.benchmark_data import Benchmark
from raydiff.report.benchmark_tables import method_row
from raydiff.report.export import Heading, Table
from raydiff.report.tables import Cell
from raydiff.report.words import joined

__all__ = ["Ranking", "rank", "ranking_table"]

_ALPHA = 0.05


@dataclass(frozen=True)
class Ranking:
    """``methods`` from the best average rank to the worst; ``groups`` are those that cannot be told apart.

    ``missing`` ran on some blocks only and are left out. ``by_dataset`` holds ranks of the means over categories, None
    for a single data set. There should be ``num_expected`` blocks; ``uneven`` methods lack seeds on some.
    """

    methods: list[str]
    ranks: list[float]
    by_dataset: list[float] | None
    groups: list[tuple[str, ...]]
    test: Friedman
    critical: float
    num_blocks: int
    num_datasets: int
    missing: list[str]
    num_expected: int = 0
    uneven: Sequence[str] = ()

    @property
    def sentences(self) -> list[str]:
        """What the ranks say, and what weakens them."""
        k, n = len(self.methods), self.num_blocks
        verdict = (
            f"so the {k} methods are not all alike" if self.test.p_value < _ALPHA
            else f"so the {k} methods cannot be told apart, and neither can any two of them"
        )  # fmt: skip
        p = "< 0.001" if self.test.p_value < 0.001 else f"= {self.test.p_value:.3f}"
        said = [
            f"Friedman's test over {n} blocks (a data set's category, the mean over seeds): chi-square"
            f" {self.test.statistic:.2f} with {k - 1} degrees of freedom, p {p}, {verdict}.",
            f"By Nemenyi's test at 0.05, average ranks less than {self.critical:.2f} apart cannot be told apart.",
        ]
        if n > self.num_datasets:
            noun = "data set" if self.num_datasets == 1 else "data sets"
            said.append(
                f"Warning: the blocks are categories of {self.num_datasets} {noun}. Categories of one data set are not"
                f" independent, so the p-value is too small and the critical difference too short."
            )
        if n < self.num_expected:
            said.append(
                f"Only {n} of {self.num_expected} planned blocks are measured, so these are not yet the suite's ranks."
            )
        if self.uneven:
            said.append(f"Some seeds are still missing of {joined(self.uneven)}.")
        if self.missing:
            said.append(f"Left out, for they did not run on every block: {joined(self.missing)}.")
        return said


def rank(benchmark: Benchmark) -> Ranking | str:
    """The ranking over (data set, category) blocks of the methods that ran on all; a sentence where there is none."""
    blocks = [(d, category) for d in benchmark.datasets for category in benchmark.measured_categories(d)]
    methods = [
        m for m in benchmark.methods if all(category in benchmark.of(dataset, m) for dataset, category in blocks)
    ]
    if len(blocks) < 2 or len(methods) < 3:
        common = f"{len(methods)} method{'s' * (len(methods) != 1)}"
        noun = f"{len(blocks)} block{'s' * (len(blocks) != 1)} (a data set's category each)"
        return (
            f"No ranking: {common} ran on all of the {noun}; ranks need at least 3 methods common to at least 2 blocks."
        )
    values = np.array([[_mean(benchmark, d, m, c) for m in methods] for d, c in blocks])
    ranks = average_ranks(values)
    critical = critical_difference(len(methods), len(blocks), _ALPHA)
    order = np.argsort(ranks, kind="stable")
    means = np.array([[_mean(benchmark, d, m, None) for m in methods] for d in benchmark.datasets])
    several = average_ranks(means) if len(means) > 1 else None
    return Ranking(
        [methods[i] for i in order], [float(ranks[i]) for i in order],
        None if several is None else [float(several[i]) for i in order],
        [tuple(methods[i] for i in group) for group in cliques(ranks, critical)],
        friedman(values), critical, len(blocks), len(benchmark.datasets),
        [method for method in benchmark.methods if method not in methods], benchmark.num_blocks,
        [m for m in methods if any(len(benchmark.of(d, m)[c]) < benchmark.num_expected(d, m, c) for d, c in blocks)],
    )  # fmt: skip


def _mean(benchmark: Benchmark, dataset: str, method: str, category: str | None) -> float:
    score = benchmark.score(dataset, method, category=category)
    if score is None:
        raise AssertionError((dataset, method, category))  # every method here ran on every block
    return score.mean


def ranking_table(benchmark: Benchmark, ranking: Ranking) -> Table:
    """Methods by average rank."""
    columns: list[tuple[str, Sequence[float]]] = [("Average rank", ranking.ranks)]
    if ranking.by_dataset is not None:
        columns.append(("Average rank over data sets", ranking.by_dataset))
    rows = [
        method_row(benchmark, method, [Cell(f"{values[i]:.2f}", "", values[i]) for _, values in columns])
        for i, method in enumerate(ranking.methods)
    ]
    return Table(
        "ranks", "Average ranks by AUROC", "Method", [Heading(name, "", -1) for name, _ in columns], rows,
        f"Rank 1 is the highest AUROC; ties share the mean of their ranks. Over {ranking.num_blocks} blocks;"
        f" critical difference {ranking.critical:.2f}.",
    )  # fmt: skip
