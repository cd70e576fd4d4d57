"""The tables of accuracy: overview; per data set the metrics, categories, kinds of anomaly, differences; direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from raydiff.core.metrics import IMAGE_METRICS, PIXEL_METRICS, Estimate
from raydiff.core.statistics import holm
from raydiff.report.benchmark_data import Against, Benchmark, Score, natural
from raydiff.report.export import Heading, Table, slug
from raydiff.report.tables import Cell, Row, mark_best, signed, summarise
from raydiff.results import Result

__all__ = [
    "METRICS",
    "Verdict",
    "categories_table",
    "defects_table",
    "differences_table",
    "direction_tables",
    "method_row",
    "metrics_table",
    "overview_tables",
    "range_of",
    "verdicts",
]

DAGGER = "†"
METRICS = {
    "auroc": ("AUROC", 1), "average_precision": ("AP", 1), "f1_max": ("F1\u2011max", 1),
    "fpr_at_95_tpr": ("FPR at 95\u00a0% TPR", -1), "tpr_at_5_fpr": ("TPR at 5\u00a0% FPR", 1),
    "pixel_auroc": ("AUROC", 1), "pixel_average_precision": ("AP", 1), "aupro": ("AUPRO", 1),
}  # fmt: skip
"""Short name, and whether more (1) or less (-1) is better."""


def method_row(benchmark: Benchmark, method: str, cells: Sequence[Cell], note: str = "") -> Row:
    """A row with the mark of pretrained weights."""
    return Row(method, list(cells), note=note, mark=DAGGER if method in benchmark.pretrained else "")


def overview_tables(benchmark: Benchmark, metrics: Sequence[str]) -> list[Table]:
    """Methods by data sets, one table per leading metric that anything has."""
    return [table for metric in metrics if (table := _overview(benchmark, metric)) is not None]


def _overview(benchmark: Benchmark, metric: str) -> Table | None:
    name, better = METRICS.get(metric, (metric, 1))
    name = f"pixel {name}" if metric.startswith("pixel_") else name
    columns = []
    for dataset in benchmark.datasets:
        scores = [benchmark.score(dataset, method, metric) for method in benchmark.methods]
        if any(score is not None for score in scores):
            columns.append((Heading(dataset, "", better), _complete(benchmark, dataset, scores, better)))
    if not columns:
        return None
    columns.append((Heading("NFE", "Cost per image"), [_over_datasets(benchmark, m, _nfe) for m in benchmark.methods]))
    columns.append((Heading("ms", "Cost per image"), [_over_datasets(benchmark, m, _ms) for m in benchmark.methods]))
    rows = [
        method_row(benchmark, method, [cells[i] for _, cells in columns]) for i, method in enumerate(benchmark.methods)
    ]
    return Table(
        f"overview-{slug(metric)}", f"{name}, mean over categories", "Method", [heading for heading, _ in columns],
        [row for row in rows if any(cell.value is not None for cell in row.cells[:-2])],
        "Mean over the categories of each data set, of the mean over seeds; small figures: ± one standard deviation"
        " over seeds of the mean over categories, and how many categories where some are missing (such a mean is never"
        " bold, for it is of other tasks). Best of each column in bold. NFE: network evaluations per image; ms: per"
        " image, in batches; a range over data sets where they differ.",
    )  # fmt: skip


def _complete(benchmark: Benchmark, dataset: str, scores: Sequence[Score | None], better: int) -> list[Cell]:
    """Cells of a column; a mean over fewer categories says so and cannot be the best."""
    expected = len(benchmark.categories(dataset))
    whole = [None if s is None or s.num_categories < expected else s for s in scores]
    marked = mark_best([_score_cell(score) for score in whole], better)
    return [
        cell if score is None or score.num_categories == expected
        else replace(_score_cell(score), detail=f"{score.num_categories} of {expected} cat.")
        for cell, score in zip(marked, scores, strict=True)
    ]  # fmt: skip


def _score_cell(score: Score | None) -> Cell:
    if score is None:
        return Cell()
    if score.spread is None:
        return Cell(f"{score.mean:.3f}", "", score.mean)
    return Cell(f"{score.mean:.3f}", f"± {score.spread:.3f}", score.mean, spread=score.spread)


def _nfe(row: Result) -> float | None:
    return row.num_evaluations


def _ms(row: Result) -> float | None:
    return row.ms_per_image


def _over_datasets(benchmark: Benchmark, method: str, read: Callable[[Result], float | None]) -> Cell:
    means = []
    for dataset in benchmark.datasets:
        found = [value for row in benchmark.rows(dataset, method) if (value := read(row)) is not None]
        if found:
            means.append(fmean(found))
    return range_of(means)


def _mean_of(values: Sequence[float | None]) -> Cell:
    known = [value for value in values if value is not None]
    return range_of([fmean(known)]) if known else Cell()


def range_of(values: Sequence[float]) -> Cell:
    """One number, or the least and the greatest."""
    if not values:
        return Cell()
    low, high = short(min(values)), short(max(values))
    if low == high:
        return Cell(low, "", fmean(values))
    return Cell(f"{low}–{high}", "", fmean(values), low=min(values), high=max(values))


def short(value: float) -> str:
    """Three significant digits without an exponent: 0.0123, 1.23, 123, 4568."""
    return (
        f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) >= 1e-3 or not value else f"{value:.5f}"
    )


def metrics_table(benchmark: Benchmark, dataset: str) -> Table:
    """Methods by metrics, with the interval over test images apart from the spread over seeds."""
    methods = benchmark.methods_of(dataset)
    columns: list[tuple[Heading, list[Cell]]] = []
    for metric in (*IMAGE_METRICS, *PIXEL_METRICS):
        scores = [benchmark.score(dataset, method, metric) for method in methods]
        if any(score is not None for score in scores):
            name, better = METRICS[metric]
            heading = Heading(name, "Pixels" if metric in PIXEL_METRICS else "Ranking of images", better)
            columns.append((heading, _complete(benchmark, dataset, scores, better)))
            if metric == "auroc":
                ends = [_interval_cell(benchmark.interval(dataset, method)) for method in methods]
                columns.append((Heading("95\u00a0% interval over images", "Ranking of images"), ends))
    for name, field in (("FPR", "realised_fpr"), ("TPR", "realised_tpr")):
        columns.append((Heading(name, "At the threshold"), [_rate(benchmark, dataset, m, field) for m in methods]))
    for name, read in (("NFE", _nfe), ("ms", _ms)):
        cells = [_mean_of([read(row) for row in benchmark.rows(dataset, m)]) for m in methods]
        columns.append((Heading(name, "Cost per image"), cells))
    target = benchmark.rows(dataset, methods[0])[0].target_fpr
    rows = [method_row(benchmark, method, [cells[i] for _, cells in columns]) for i, method in enumerate(methods)]
    return Table(
        f"{slug(dataset)}-metrics", "Methods and metrics", "Method", [heading for heading, _ in columns],
        rows,
        f"{counted(benchmark, dataset)}; with several, means. Small figures: ± one standard deviation over seeds. The"
        f" interval is a stratified bootstrap over test images and does not hold the spread over seeds. Thresholds aim"
        f" at a false-positive rate of {100 * target:.3g}\u00a0%. ms: per image in batches, from decoded pixels to"
        f" verdict. Best of each column in bold.",
        scope=dataset,
    )  # fmt: skip


def counted(benchmark: Benchmark, dataset: str) -> str:
    """``10 categories and 3 seeds``; ranges where methods differ."""
    methods = benchmark.methods_of(dataset)
    numbers = [(len(benchmark.of(dataset, m)), len({row.seed for row in benchmark.rows(dataset, m)})) for m in methods]
    said = []
    for noun, values in zip((("category", "categories"), ("seed", "seeds")), zip(*numbers, strict=True), strict=True):
        low, high = min(values), max(values)
        said.append(f"{low if low == high else f'{low} to {high}'} {noun[high > 1]}")
    return " and ".join(said)


def _interval_cell(ends: tuple[float, float] | None) -> Cell:
    if ends is None:
        return Cell()
    return Cell(f"{ends[0]:.3f}–{ends[1]:.3f}", low=ends[0], high=ends[1])


def _rate(benchmark: Benchmark, dataset: str, method: str, field: str) -> Cell:
    values = [getattr(row, field).value for row in benchmark.rows(dataset, method)]
    return Cell(f"{fmean(values):.3f}", "", fmean(values))


def categories_table(benchmark: Benchmark, dataset: str) -> Table | None:
    """AUROC, every category by methods, and the mean; None where there are no categories."""
    categories, methods = benchmark.categories(dataset), benchmark.methods_of(dataset)
    if len(categories) < 2:
        return None
    rows = []
    for category in categories:
        cells = [_category_cell(benchmark, dataset, method, category) for method in methods]
        rows.append(Row(category or "(whole)", mark_best(cells, 1), note=_images_of(benchmark, dataset, category)))
    means = [benchmark.score(dataset, method) for method in methods]
    rows.append(Row("mean", _complete(benchmark, dataset, means, 1), main=True))
    return Table(
        f"{slug(dataset)}-categories", "AUROC of every category", "Category", _headings(benchmark, methods),
        rows, "Small figures: ± one standard deviation over seeds, or the 95\u00a0% interval over test images where"
        " there is one seed. Best of each row in bold.", scope=dataset,
    )  # fmt: skip


def _headings(benchmark: Benchmark, methods: Sequence[str]) -> list[Heading]:
    return [Heading(method + (DAGGER if method in benchmark.pretrained else "")) for method in methods]


def _category_cell(benchmark: Benchmark, dataset: str, method: str, category: str) -> Cell:
    seeds = benchmark.of(dataset, method).get(category)
    return Cell() if not seeds else summarise([e.rows[0].metrics["auroc"] for e in seeds.values()])


def _images_of(benchmark: Benchmark, dataset: str, category: str) -> str:
    rows = [r for m in benchmark.methods_of(dataset) for r in benchmark.rows(dataset, m) if r.category == category]
    counts = sorted({(row.num_normal, row.num_anomalous) for row in rows})
    return " or ".join(f"{normal} normal, {anomalous} anomalous" for normal, anomalous in counts)


def defects_table(benchmark: Benchmark, dataset: str) -> Table | None:
    """AUROC of every kind of anomaly against the normal images, by methods; None where none is told apart."""
    methods = benchmark.methods_of(dataset)
    found: dict[tuple[str, str, str], dict[str, list[Result]]] = {}
    for method in methods:
        for category, seeds in benchmark.of(dataset, method).items():
            for row in (row for evaluation in seeds.values() for row in evaluation.rows[1:]):
                found.setdefault((category, row.subset_kind, row.subset), {}).setdefault(method, []).append(row)
    several = len(benchmark.categories(dataset)) > 1
    rows = []
    for key in sorted(found, key=lambda k: [natural(part) for part in k]):
        of, (category, kind, subset) = found[key], key
        cells = [summarise([row.metrics["auroc"] for row in of.get(method, [])]) for method in methods]
        example = next(iter(of.values()))[0]
        name = f"{category}: {kind} {subset}" if several and category else f"{kind} {subset}"
        rows.append(Row(name, mark_best(cells, 1), f"{example.num_anomalous} anomalous, {example.num_normal} normal"))
    if not rows:
        return None
    return Table(
        f"{slug(dataset)}-kinds", "AUROC of every kind of anomaly", "Kind", _headings(benchmark, methods),
        rows, "Each kind against the normal test images of its category. Small figures: ± one standard deviation over"
        " seeds, or the 95\u00a0% interval over test images where there is one seed. Best of each row in bold.",
        scope=dataset,
    )  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """A method against the best classic one; ``outcome`` is 1 above, -1 below, 0 not told apart."""

    against: Against
    adjusted: float
    outcome: int


def verdicts(benchmark: Benchmark, dataset: str, alpha: float = 0.05) -> list[Verdict]:
    """Every comparison of a data set, p-values corrected over all of them (Holm)."""
    found = benchmark.differences(dataset)
    adjusted = holm([against.difference.p_value for against in found])
    return [
        Verdict(a, float(p), 0 if p >= alpha else 1 if a.difference.estimate.value > 0 else -1)
        for a, p in zip(found, adjusted, strict=True)
    ]


def differences_table(benchmark: Benchmark, dataset: str, found: Sequence[Verdict]) -> Table | None:
    """AUROC of each method minus that of the best classic one; None without comparisons."""
    if not found:
        return None
    said = {1: "above", 0: "not told apart", -1: "below"}
    rows = []
    for v in sorted(found, key=lambda v: -v.against.difference.estimate.value):
        difference = v.against.difference
        cells = [
            replace(signed(difference.estimate), best=v.outcome != 0), _p_cell(difference.p_value), _p_cell(v.adjusted),
            Cell(str(difference.num_cells), "", difference.num_cells), Cell(said[v.outcome]),
        ]  # fmt: skip
        rows.append(method_row(benchmark, v.against.method, cells, note=f"minus {' or '.join(v.against.references)}"))
    headings = [Heading(name) for name in ("AUROC", "p", "p, Holm", "cells", "verdict")]
    return Table(
        f"{slug(dataset)}-differences", "Differences to the best classic method", "Method", headings, rows,
        "Mean over categories and seeds of the difference in AUROC on the same test images, with a 95\u00a0% bootstrap"
        " interval that resamples categories, seeds and images (small figures). p is two-sided, from the same draws;"
        f" Holm's correction is over the {len(rows)} comparison{'s' * (len(rows) > 1)} of this data set; the verdict is"
        " at 0.05 after it. In every category and seed the classic method with the highest test AUROC is taken, which"
        " favours it. A level with few members (two or three seeds, few categories) understates its spread.",
        scope=dataset,
    )  # fmt: skip


def _p_cell(p: float) -> Cell:
    return Cell("< 0.001" if p < 0.001 else f"{p:.3f}", "", p)


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
        " holds one half.",
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
    low, high = ends or (None, None)
    text = f"{flag} {score.mean:.3f}" if flag else f"{score.mean:.3f}"
    return Cell(text, "; ".join(parts), score.mean, best=bool(flag), low=low, high=high)


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
    cells = [Cell(f"{mean:.3f}", "", mean), _interval_cell(ends), Cell(says)]
    return method_row(benchmark, method, cells, note=where)
