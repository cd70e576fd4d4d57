"""The tables of direction: which scores run backwards, so that a higher one means less anomalous."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from raydiff.core.metrics import Estimate
from raydiff.report.benchmark_data import Benchmark
from raydiff.report.benchmark_tables import interval_cell, method_row
from raydiff.report.export import Heading, Table
from raydiff.report.tables import Cell, Row

__all__ = ["direction_tables"]


def direction_tables(benchmark: Benchmark) -> list[Table]:
    """Methods by data sets with AUROC below one half flagged, and each such category or kind of anomaly."""
    low = _reversed_cells(benchmark)
    rows = []
    for method in benchmark.methods:
        cells = [_direction_cell(benchmark, dataset, method) for dataset in benchmark.datasets]
        rows.append(method_row(benchmark, method, cells))
    tables = [Table(
        "direction", "Direction of the score", "Method", [Heading(dataset) for dataset in benchmark.datasets], rows,
        "Mean AUROC, with its 95\u00a0% interval over test images, and in how many categories it lies below one half."
        " ▼: below one half with the whole interval, so the score runs backwards there; ▽: below, but the interval"
        " holds one half. It is not turned round: which way it runs, only the test labels tell.",
    )]  # fmt: skip
    if low:
        headings = [Heading("AUROC"), Heading("95\u00a0% interval"), Heading("direction")]
        tables.append(Table(
            "direction-cells", "Every category and kind of anomaly with an AUROC below one half", "Method",
            headings, low, "Means over seeds; intervals are over test images, that of a kind of anomaly is the mean of"
            " its seeds' intervals.",
        ))  # fmt: skip
    return tables


def _direction_cell(benchmark: Benchmark, dataset: str, method: str) -> Cell:
    score = benchmark.score(dataset, method)
    if score is None:
        return Cell()
    ends = benchmark.interval(dataset, method)
    flag = _flag(score.mean, ends)
    by_category = [benchmark.score(dataset, method, category=c) for c in benchmark.of(dataset, method)]
    below = sum(s is not None and s.mean < 0.5 for s in by_category)
    parts = [] if ends is None else [f"{ends[0]:.3f}–{ends[1]:.3f}"]
    parts += [f"{below} of {len(by_category)} below"] if below and len(by_category) > 1 else []
    parts += [score.missing] if score.missing else []
    low, high = ends or (None, None)
    text = f"{flag} {score.mean:.3f}" if flag else f"{score.mean:.3f}"
    return Cell(text, "; ".join(parts), score.mean, best=bool(flag), low=low, high=high, missing=score.missing)


def _flag(value: float, ends: tuple[float, float] | None) -> str:
    if value >= 0.5:
        return ""
    return "▼" if ends is not None and ends[1] < 0.5 else "▽"


def _reversed_cells(benchmark: Benchmark) -> list[Row]:
    rows = []
    for dataset in benchmark.datasets:
        for method in benchmark.methods_of(dataset):
            for category, seeds in benchmark.of(dataset, method).items():
                name = f"{dataset}: {category}" if category else dataset
                score = benchmark.score(dataset, method, category=category)
                if score is not None and score.mean < 0.5:
                    ends = benchmark.interval(dataset, method, category)
                    rows.append((score.mean, _low_row(benchmark, method, name, score.mean, ends)))
                subsets: dict[tuple[str, str], list[Estimate]] = {}
                for row in (row for evaluation in seeds.values() for row in evaluation.rows[1:]):
                    subsets.setdefault((row.subset_kind, row.subset), []).append(row.metrics["auroc"])
                for (kind, subset), estimates in subsets.items():
                    mean = fmean(estimate.value for estimate in estimates)
                    if mean < 0.5:
                        ends = _mean_ends(estimates)
                        rows.append((mean, _low_row(benchmark, method, f"{name}, {kind} {subset}", mean, ends)))
    return [row for _, row in sorted(rows, key=lambda item: item[0])]


def _mean_ends(estimates: Sequence[Estimate]) -> tuple[float, float] | None:
    """The mean of the intervals of several seeds on the same images; None where one is missing."""
    ends = [(e.low, e.high) for e in estimates if e.low is not None and e.high is not None]
    if len(ends) < len(estimates):
        return None
    return fmean(low for low, _ in ends), fmean(high for _, high in ends)


def _low_row(
    benchmark: Benchmark, method: str, where: str, mean: float, ends: tuple[float, float] | None
) -> Row:  # fmt: skip
    unsure = "below, no interval" if ends is None else "not told apart from chance"
    says = "reversed" if _flag(mean, ends) == "▼" else unsure
    cells = [Cell(f"{mean:.3f}", "", mean), interval_cell(ends), Cell(says)]
    return method_row(benchmark, method, cells, note=where)
