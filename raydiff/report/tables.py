"""Evaluations as the cells of tables.

With one seed a cell holds the value and its 95 % interval over test images; with several, the mean over seeds and its
standard deviation. The two are never mixed in one cell. A mark at a row's name says that it was fitted on other data.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

from pydantic import BaseModel

from raydiff.config import NO_EFFECT, ExperimentConfig
from raydiff.core.metrics import Estimate
from raydiff.results import Comparison, Evaluation, Result, latest

__all__ = [
    "COLUMNS",
    "Cell",
    "Column",
    "Group",
    "Row",
    "data_marks",
    "defect_table",
    "difference_table",
    "group",
    "main_table",
    "mark_best",
    "overview_table",
    "part_name",
    "signed",
    "summarise",
]


@dataclass(frozen=True)
class Cell:
    """What a table cell says; ``detail`` is its interval or spread, ``value`` the number behind it.

    ``has_width`` is False for an interval whose ends read the same. ``spread``, ``low`` and ``high`` are the numbers
    behind ``detail``. ``missing`` says ``5 of 6 cells`` of a mean over less than there should be, which is never best.
    """

    text: str = "–"
    detail: str = ""
    value: float | None = None
    best: bool = False
    has_width: bool = True
    spread: float | None = None
    low: float | None = None
    high: float | None = None
    missing: str = ""


@dataclass(frozen=True)
class Row:
    """A header and its cells; ``mark`` is set beside the name and leads to a footnote."""

    name: str
    cells: list[Cell]
    note: str = ""
    main: bool = False
    mark: str = ""


@dataclass(frozen=True)
class Group:
    """One detector on one data set: an evaluation per seed, in the order of seeds."""

    dataset: str
    detector: str
    evaluations: list[Evaluation]

    @property
    def rows(self) -> list[Result]:
        """The rows of all anomalies, one per seed."""
        return [evaluation.rows[0] for evaluation in self.evaluations]

    @property
    def auroc(self) -> float:
        """Mean over seeds."""
        return fmean(row.metrics["auroc"].value for row in self.rows)

    @property
    def has_network(self) -> bool:
        """Whether scoring evaluates a network; the classic detectors do not."""
        return self.rows[0].num_evaluations is not None

    @property
    def trained_on(self) -> tuple[str | None, ...]:
        """Digests of the data it was fitted on: one, if all seeds agree."""
        return tuple(dict.fromkeys(row.trained_on for row in self.rows))

    @property
    def unlike_fields(self) -> list[str]:
        """Config fields, by dotted path, that differ between the seeds although they can change a score."""
        configs = [dict(_fields(row.config)) for row in self.rows if row.config is not None]
        paths = dict.fromkeys(path for config in configs for path in config)
        return [path for path in paths if len({config.get(path) for config in configs}) > 1]


_EXPECTED_TO_DIFFER = {"seed", "execution"} | {
    f"{section}.{name}"
    for section, outer in ExperimentConfig.model_fields.items()
    if isinstance(outer.annotation, type) and issubclass(outer.annotation, BaseModel)
    for name, field in outer.annotation.model_fields.items()
    if field.json_schema_extra == NO_EFFECT
}


def _fields(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted path and value as JSON of what seeds should have in common."""
    for name, value in config.items():
        path = prefix + name
        if path in _EXPECTED_TO_DIFFER:
            continue
        if isinstance(value, Mapping):
            yield from _fields(value, f"{path}.")
        else:
            yield path, json.dumps(value)


def part_name(row: Result | Comparison) -> str:
    """The data set, and which part of it where a benchmark's cell is about one."""
    return f"{row.dataset}: {row.category}" if row.category else row.dataset


def group(evaluations: Sequence[Evaluation]) -> dict[str, list[Group]]:
    """Groups by data set (or a part of it, its category) in order of appearance; of several runs of a seed the last."""
    found: dict[tuple[str, str], list[Evaluation]] = {}
    for evaluation in latest(evaluations):
        row = evaluation.rows[0]
        found.setdefault((part_name(row), row.detector), []).append(evaluation)
    by_dataset: dict[str, list[Group]] = {}
    for (dataset, detector), members in found.items():
        ordered = sorted(members, key=lambda evaluation: evaluation.rows[0].seed)
        by_dataset.setdefault(dataset, []).append(Group(dataset, detector, ordered))
    return by_dataset


def data_marks(groups: Sequence[Group]) -> dict[str, str]:
    """By detector a number for the data it was fitted on; empty where all were fitted on the same."""
    origins = list(dict.fromkeys(group.trained_on for group in groups))
    if len({digest for origin in origins for digest in origin}) < 2:
        return {}
    return {group.detector: str(1 + origins.index(group.trained_on)) for group in groups}


def summarise(estimates: Sequence[Estimate | None]) -> Cell:
    """One value per seed as a cell; empty where a seed lacks it."""
    known = [estimate for estimate in estimates if estimate is not None]
    if not known or len(known) < len(estimates):
        return Cell()
    mean = fmean(estimate.value for estimate in known)
    if len(known) > 1:
        spread = stdev(estimate.value for estimate in known)
        return Cell(f"{mean:.3f}", f"± {spread:.3f}", mean, spread=spread)
    if known[0].low is None or known[0].high is None:
        return Cell(f"{mean:.3f}", "", mean)
    low, high = f"{known[0].low:.3f}", f"{known[0].high:.3f}"
    ends = known[0]
    return Cell(f"{mean:.3f}", f"{low}–{high}", mean, has_width=low != high, low=ends.low, high=ends.high)


@dataclass(frozen=True)
class Column:
    """A column of the main table. ``better`` is 1 where more is better, -1 where less is, 0 where neither is."""

    part: str
    name: str
    better: int
    read: Callable[[Group], Cell]


def _metric(name: str) -> Callable[[Group], Cell]:
    return lambda group: summarise([row.metrics.get(name) for row in group.rows])


def _milliseconds(field: str) -> Callable[[Group], Cell]:
    def read(group: Group) -> Cell:
        value = fmean(getattr(row, field) for row in group.rows)
        return Cell(f"{value:.3g}" if value < 100 else f"{value:.0f}", "", value)

    return read


def _evaluations(group: Group) -> Cell:
    number = group.rows[0].num_evaluations
    return Cell() if number is None else Cell(str(number), "", float(number))


COLUMNS = (
    Column("Ranking of images", "AUROC", 1, _metric("auroc")),
    Column("Ranking of images", "AP", 1, _metric("average_precision")),
    Column("Ranking of images", "F1\u2011max", 1, _metric("f1_max")),
    Column("Ranking of images", "FPR at 95\u00a0% TPR", -1, _metric("fpr_at_95_tpr")),
    Column("Ranking of images", "TPR at 5\u00a0% FPR", 1, _metric("tpr_at_5_fpr")),
    Column("At the threshold", "FPR", 0, lambda group: summarise([row.realised_fpr for row in group.rows])),
    Column("At the threshold", "TPR", 0, lambda group: summarise([row.realised_tpr for row in group.rows])),
    Column("Pixels", "AUROC", 1, _metric("pixel_auroc")),
    Column("Pixels", "AP", 1, _metric("pixel_average_precision")),
    Column("Pixels", "AUPRO", 1, _metric("aupro")),
    Column("Cost per image", "NFE", 0, _evaluations),
    Column("Cost per image", "ms, alone", -1, _milliseconds("ms_per_image_alone")),
    Column("Cost per image", "ms, in batches", -1, _milliseconds("ms_per_image")),
)


def main_table(groups: Sequence[Group], main: str) -> tuple[list[Column], list[Row]]:
    """Detectors by metrics; columns that nobody fills are left out."""
    cells = {column: [column.read(group) for group in groups] for column in COLUMNS}
    columns = [column for column in COLUMNS if any(cell.value is not None for cell in cells[column])]
    marked = [mark_best(cells[column], column.better) for column in columns]
    marks = data_marks(groups)
    return columns, [
        Row(name, [column[i] for column in marked], main=name == main, mark=marks.get(name, ""))
        for i, name in enumerate(group.detector for group in groups)
    ]


def defect_table(groups: Sequence[Group]) -> list[Row]:
    """AUROC per defect type and class against all normal images: a row each, a cell per detector."""
    subsets = dict.fromkeys(
        (row.subset_kind, row.subset) for group in groups for row in group.evaluations[0].rows[1:]
    )  # in order of appearance
    table = []
    for kind, name in subsets:
        found = [[_find(evaluation, kind, name) for evaluation in group.evaluations] for group in groups]
        example = next(row for rows in found for row in rows if row is not None)
        cells = [summarise([None if row is None else row.metrics["auroc"] for row in rows]) for rows in found]
        note = f"{example.num_anomalous} anomalous, {example.num_normal} normal"
        table.append(Row(f"{kind} {name}", mark_best(cells, 1), note))
    return table


def overview_table(datasets: dict[str, list[Group]]) -> tuple[list[str], list[Row]]:
    """AUROC, data sets by detectors, and below them the mean over data sets of those that ran on all."""
    detectors = list(dict.fromkeys(group.detector for groups in datasets.values() for group in groups))
    rows, values = [], []
    for dataset, groups in datasets.items():
        by_name = {group.detector: group for group in groups}
        cells = [_metric("auroc")(by_name[name]) if name in by_name else Cell() for name in detectors]
        values.append([cell.value for cell in cells])
        rows.append(Row(dataset, mark_best(cells, 1), mark="*" if data_marks(groups) else ""))
    means = []
    for column in zip(*values, strict=True):
        known = [value for value in column if value is not None]
        mean = fmean(known) if len(known) == len(column) else None
        means.append(Cell() if mean is None else Cell(f"{mean:.3f}", "", mean))
    return detectors, [*rows, Row(f"mean of {len(datasets)} data sets", mark_best(means, 1))]


def difference_table(comparisons: Sequence[Comparison]) -> list[Row]:
    """Per detector and seed: what it was held against, and how far it lies above it."""
    shown = ("auroc", "average_precision", "tpr_at_5_fpr")
    table: dict[tuple[str, int], dict[str, Comparison]] = {}
    order = list(dict.fromkeys(comparison.detector for comparison in comparisons))
    for comparison in comparisons:
        table.setdefault((comparison.detector, comparison.seed), {})[comparison.metric] = comparison
    return [
        Row(detector, [signed(found[metric].difference) for metric in shown],
            f"minus {found['auroc'].reference}, seed {seed}")
        for (detector, seed), found in sorted(table.items(), key=lambda item: order.index(item[0][0]))
    ]  # fmt: skip


def signed(difference: Estimate) -> Cell:
    """A difference with its sign; bold where its interval leaves out zero."""
    low, high = difference.low, difference.high
    if low is None or high is None:
        return Cell(_sign(difference.value), "", difference.value)
    detail, has_width = f"{_sign(low)} to {_sign(high)}", _sign(low) != _sign(high)
    return Cell(
        _sign(difference.value), detail, difference.value, best=low > 0 or high < 0, has_width=has_width, low=low,
        high=high,
    )  # fmt: skip


def _sign(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _find(evaluation: Evaluation, kind: str, name: str) -> Result | None:
    return next((row for row in evaluation.rows if (row.subset_kind, row.subset) == (kind, name)), None)


def mark_best(cells: Sequence[Cell], better: int) -> list[Cell]:
    """Bold the best and all that read the same; none where there is nothing to compare."""
    known = [cell for cell in cells if cell.value is not None and not cell.missing]
    if not better or len(known) < 2:
        return list(cells)
    best = max(known, key=lambda cell: better * (cell.value or 0.0))
    return [
        replace(cell, best=cell.value is not None and not cell.missing and cell.text == best.text) for cell in cells
    ]
