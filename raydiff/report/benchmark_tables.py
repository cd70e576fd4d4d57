"""The tables of accuracy: overview; per data set the metrics, categories, kinds of anomaly, differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from raydiff.core.metrics import IMAGE_METRICS, PIXEL_METRICS, Estimate
from raydiff.core.statistics import holm
from raydiff.report.benchmark_data import Against, Benchmark, Score, natural
from raydiff.report.export import Heading, Table, slug
from raydiff.report.tables import Cell, Row, mark_best, signed, summarise
from raydiff.report.words import joined
from raydiff.results import Result

__all__ = [
    "METRICS",
    "Verdict",
    "categories_table",
    "defects_table",
    "differences_table",
    "interval_cell",
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
    """Methods by data sets, one table per leading metric that anything has; the first holds the costs too."""
    found: list[Table] = []
    for metric in metrics:
        if (table := _overview(benchmark, metric, with_costs=not found)) is not None:
            found.append(table)
    return found


def _overview(benchmark: Benchmark, metric: str, *, with_costs: bool) -> Table | None:
    name, better = METRICS.get(metric, (metric, 1))
    name = f"Pixel {name}" if metric.startswith("pixel_") else name
    columns: list[tuple[Heading, list[Cell]]] = []
    for dataset in benchmark.datasets:
        scores = [benchmark.score(dataset, method, metric) for method in benchmark.methods]
        if any(score is not None for score in scores):
            columns.append((Heading(dataset, "", better), _score_cells(scores, better)))
    if not columns:
        return None
    shown = [i for i in range(len(benchmark.methods)) if any(cells[i].value is not None for _, cells in columns)]
    if with_costs:
        for noun, read in (("NFE", _nfe), ("ms", _ms)):
            cells = [_over_datasets(benchmark, method, read) for method in benchmark.methods]
            columns.append((Heading(noun, "Cost per image"), cells))
    rows = [method_row(benchmark, benchmark.methods[i], [cells[i] for _, cells in columns]) for i in shown]
    several = any(len(benchmark.categories(dataset)) > 1 for dataset in benchmark.datasets)
    title = f"{name}, mean over categories" if several else name
    mean = "Mean over the categories of each data set, of the mean over seeds" if several else "Mean over seeds"
    without = len(benchmark.methods) - len(shown)
    caption = [
        f"{mean}. {_SMALL} Best of each column in bold.",
        *(["NFE: network evaluations per image; ms: per image, in batches; a range over data sets where they differ."]
          if with_costs else []),
        *([f"Without a row: {without} method{'s' * (without > 1)} that draw no maps, or were tested without masks."]
          if without and metric in PIXEL_METRICS else []),
    ]  # fmt: skip
    headings = [heading for heading, _ in columns]
    return Table(f"overview-{slug(metric)}", title, "Method", headings, rows, " ".join(caption))


_SMALL = (
    "Small figures: ± one standard deviation over seeds, with the number of seeds where methods differ in it; or how"
    " many cells (a category with a seed) are measured where some are missing: such a mean is never bold."
)


def _score_cells(scores: Sequence[Score | None], better: int) -> list[Cell]:
    """Cells of a column; a mean over less than there should be says so and cannot be the best."""
    most = max((score.num_seeds for score in scores if score is not None), default=1)
    return mark_best([_score_cell(score, most) for score in scores], better)


def _score_cell(score: Score | None, most_seeds: int) -> Cell:
    if score is None:
        return Cell()
    seeds = "" if score.num_seeds == most_seeds else f"{score.num_seeds} seed{'s' * (score.num_seeds > 1)}"
    spread = "" if score.spread is None else f"± {score.spread:.3f}"
    detail = score.missing or ", ".join(part for part in (spread, seeds) if part)
    return Cell(f"{score.mean:.3f}", detail, score.mean, spread=score.spread, missing=score.missing)


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
            columns.append((heading, _score_cells(scores, better)))
            if metric == "auroc":
                ends = [interval_cell(benchmark.interval(dataset, method)) for method in methods]
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
        f"{counted(benchmark, dataset)}; with several, means. {_SMALL} The interval is a stratified bootstrap over test"
        f" images and does not hold the spread over seeds. Thresholds aim at a false-positive rate of"
        f" {100 * target:.3g}\u00a0%. ms: per image in batches, from decoded pixels to verdict. Best of each column in"
        f" bold.{fitted_on(benchmark, dataset)}",
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


def fitted_on(benchmark: Benchmark, dataset: str) -> str:
    """Who was fitted on how many images, where methods differ in that; empty where they do not, or it is not known."""
    by_number: dict[tuple[tuple[str, int], ...], list[str]] = {}
    for method in benchmark.methods_of(dataset):
        known = {
            (row.category, n) for row in benchmark.rows(dataset, method) if (n := row.num_train_images) is not None
        }
        if known:
            by_number.setdefault(tuple(sorted(known)), []).append(method)
    categories = [dict(numbers) for numbers in by_number]
    if not any(a[c] != b[c] for a in categories for b in categories for c in a.keys() & b.keys()):
        return ""
    said = []
    for numbers, methods in by_number.items():
        low, high = min(n for _, n in numbers), max(n for _, n in numbers)
        said.append(f"{low}{f' to {high}' if high > low else ''} ({joined(methods)})")
    return f" Methods were fitted on different numbers of training images: {'; '.join(said)}."


def interval_cell(ends: tuple[float, float] | None) -> Cell:
    """Both ends, or nothing."""
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
    rows.append(Row("mean", _score_cells(means, 1), main=True))
    return Table(
        f"{slug(dataset)}-categories", "AUROC of every category", "Category", _headings(benchmark, methods),
        rows, f"{_SMALL_OF_ONE} Best of each row in bold.", scope=dataset,
    )  # fmt: skip


_SMALL_OF_ONE = (
    "Small figures: ± one standard deviation over seeds, or the 95\u00a0% interval over test images where there is one"
    " seed; or how many seeds or cells are measured where some are missing, and then never bold."
)


def _headings(benchmark: Benchmark, methods: Sequence[str]) -> list[Heading]:
    return [Heading(method + (DAGGER if method in benchmark.pretrained else "")) for method in methods]


def _category_cell(benchmark: Benchmark, dataset: str, method: str, category: str) -> Cell:
    seeds = benchmark.of(dataset, method).get(category, {})
    found = [evaluation.rows[0].metrics["auroc"] for evaluation in seeds.values()]
    return _over_seeds(found, benchmark.num_expected(dataset, method, category))


def _over_seeds(estimates: Sequence[Estimate], num_expected: int) -> Cell:
    cell = summarise(estimates)
    if cell.value is None or len(estimates) >= num_expected:
        return cell
    missing = f"{len(estimates)} of {num_expected} seeds"
    return replace(cell, detail=missing, missing=missing)


def _images_of(benchmark: Benchmark, dataset: str, category: str) -> str:
    rows = [r for m in benchmark.methods_of(dataset) for r in benchmark.rows(dataset, m) if r.category == category]
    counts = sorted({(row.num_normal, row.num_anomalous) for row in rows})
    return " or ".join(f"{normal} normal, {anomalous} anomalous" for normal, anomalous in counts) or "not measured yet"


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
        cells = [
            _over_seeds([row.metrics["auroc"] for row in of.get(m, [])], benchmark.num_expected(dataset, m, category))
            for m in methods
        ]
        example = next(iter(of.values()))[0]
        name = f"{category}: {kind} {subset}" if several and category else f"{kind} {subset}"
        rows.append(Row(name, mark_best(cells, 1), f"{example.num_anomalous} anomalous, {example.num_normal} normal"))
    if not rows:
        return None
    return Table(
        f"{slug(dataset)}-kinds", "AUROC of every kind of anomaly", "Kind", _headings(benchmark, methods),
        rows, f"Each kind against the normal test images of its category. {_SMALL_OF_ONE} Best of each row in bold.",
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
            replace(signed(difference.estimate), best=v.outcome != 0 and v.against.is_complete),
            _p_cell(difference.p_value), _p_cell(v.adjusted),
            Cell(v.against.cells, "", difference.num_cells, missing="" if v.against.is_complete else v.against.cells),
            Cell(said[v.outcome]),
        ]  # fmt: skip
        rows.append(method_row(benchmark, v.against.method, cells, note=f"minus {' or '.join(v.against.references)}"))
    headings = [Heading(name) for name in ("AUROC", "p", "p, Holm", "cells", "verdict")]
    return Table(
        f"{slug(dataset)}-differences", "Differences to the best classic method", "Method", headings, rows,
        "Mean over categories and seeds of the difference in AUROC on the same test images, with a 95\u00a0% bootstrap"
        " interval that resamples categories, seeds and images (small figures). p is two-sided, from the same draws;"
        f" Holm's correction is over the {len(rows)} comparison{'s' * (len(rows) > 1)} of this data set; the verdict is"
        " at 0.05 after it. In every category and seed the classic method with the highest test AUROC is taken, which"
        " favours it. A level with few members (two or three seeds, few categories) understates its spread. Bold: told"
        " apart, on every cell there should be.",
        scope=dataset,
    )  # fmt: skip


def _p_cell(p: float) -> Cell:
    return Cell("< 0.001" if p < 0.001 else f"{p:.3f}", "", p)
