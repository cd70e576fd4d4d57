"""The tables of cost, of its growth with resolution, and of robustness."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from raydiff.report.benchmark_data import Benchmark, natural
from raydiff.report.benchmark_tables import method_row, range_of
from raydiff.report.export import Heading, Table, slug
from raydiff.report.tables import Cell, Row, mark_best, summarise
from raydiff.results import Result, RobustnessRow

__all__ = ["Growth", "Robustness", "cost_table", "growth_tables", "growths", "robustness", "robustness_tables"]

_COSTS: tuple[tuple[str, str, Callable[[Result], float | None]], ...] = (
    ("training, s", "", lambda row: row.training_seconds),
    ("alone", "ms per image", lambda row: row.ms_per_image_alone),
    ("in batches", "ms per image", lambda row: row.ms_per_image),
    ("at the best batch", "ms per image", lambda row: row.ms_per_image_best),
    ("best batch", "ms per image", lambda row: row.best_batch_size),
    ("NFE", "", lambda row: row.num_evaluations),
    ("peak memory, MB", "", lambda row: row.peak_memory_mb),
    ("model, MB", "", lambda row: row.model_mb),
)


def cost_table(benchmark: Benchmark, dataset: str) -> Table:
    """Methods by costs; a method measured on several machines has a row for each."""
    found = []
    hardware = sorted({row.hardware for m in benchmark.methods_of(dataset) for row in benchmark.rows(dataset, m)})
    for method in benchmark.methods_of(dataset):
        for machine in hardware:
            rows = [row for row in benchmark.rows(dataset, method) if row.hardware == machine]
            if rows:
                found.append((method, machine, rows))
    columns = [(Heading(name, part), [_mean(rows, read) for _, _, rows in found]) for name, part, read in _COSTS]
    shown = [(heading, cells) for heading, cells in columns if any(cell.value is not None for cell in cells)]
    rows_ = [
        method_row(benchmark, method, [cells[i] for _, cells in shown], note=machine if len(hardware) > 1 else "")
        for i, (method, machine, _) in enumerate(found)
    ]
    where = f" On {hardware[0]}." if len(hardware) == 1 else ""
    return Table(
        f"{slug(dataset)}-cost", "Cost", "Method", [heading for heading, _ in shown], rows_,
        "Means over categories and seeds. Times run from decoded pixels to verdict, feature network included; other"
        " tasks may have run on the machine at the same time, so they are what this run took, not the least they can"
        f" be. Peak memory is that of the process while it scored, of the GPU on a GPU.{where}",
        scope=dataset,
    )  # fmt: skip


def _mean(rows: Sequence[Result], read: Callable[[Result], float | None]) -> Cell:
    values = [value for row in rows if (value := read(row)) is not None]
    return range_of([fmean(values)]) if values else Cell()


@dataclass(frozen=True)
class Growth:
    """How one cost of every method grows with the side of an image: (pixels, cost) in order.

    ``hardware`` lists the machines where they were several; empty for one.
    """

    stem: str
    noun: str
    unit: str
    points: dict[str, list[tuple[int, float]]]
    hardware: str = ""

    def power(self, method: str) -> float | None:
        """The slope of a straight line through log cost over log side; None for a single resolution."""
        sides, costs = zip(*self.points[method], strict=True)
        if len(sides) < 2 or min(costs) <= 0:
            return None
        return float(np.polyfit(np.log(sides), np.log(costs), 1)[0])


_AT = re.compile(r"(?P<stem>.+)@(?P<side>\d+)")


def growths(benchmark: Benchmark) -> list[Growth]:
    """For data sets named ``stem@side`` of which at least two resolutions were run: scoring and training time."""
    stems: dict[str, list[tuple[int, str]]] = {}
    for dataset in benchmark.datasets:
        if match := _AT.fullmatch(dataset):
            stems.setdefault(match["stem"], []).append((int(match["side"]), dataset))
    found = []
    for stem, members in stems.items():
        for noun, unit, read in (
            ("time per image", "ms per image, in batches", lambda row: row.ms_per_image),
            ("training time", "seconds of training", lambda row: row.training_seconds),
        ):
            points = {method: _points(benchmark, sorted(members), method, read) for method in benchmark.methods}
            kept = {method: at for method, at in points.items() if at}
            if len(members) > 1 and kept:
                found.append(Growth(stem, noun, unit, kept, _machines(benchmark, [name for _, name in members])))
    return found


def _machines(benchmark: Benchmark, datasets: Sequence[str]) -> str:
    found = {row.hardware for dataset in datasets for m in benchmark.methods for row in benchmark.rows(dataset, m)}
    return " and ".join(sorted(found)) if len(found) > 1 else ""


def _points(
    benchmark: Benchmark, members: Sequence[tuple[int, str]], method: str, read: Callable[[Result], float | None]
) -> list[tuple[int, float]]:
    points = []
    for side, dataset in members:
        values = [value for row in benchmark.rows(dataset, method) if (value := read(row)) is not None]
        if values:
            points.append((side, fmean(values)))
    return points


def growth_tables(benchmark: Benchmark, found: Sequence[Growth]) -> list[Table]:
    """Methods by resolutions, and the power of the side that the cost grows with."""
    tables = []
    for growth in found:
        sides = sorted({side for points in growth.points.values() for side, _ in points})
        rows = []
        for method, points in growth.points.items():
            at, power = dict(points), growth.power(method)
            cells = [range_of([at[side]]) if side in at else Cell() for side in sides]
            cells.append(Cell() if power is None else Cell(f"{power:.2f}", "", power))
            rows.append(method_row(benchmark, method, cells))
        headings = [Heading(f"{side} px", growth.unit) for side in sides]
        tables.append(Table(
            f"{slug(growth.stem)}-growth-{slug(growth.noun)}", f"{growth.noun.capitalize()} against resolution",
            "Method", [*headings, Heading("power")], rows,
            "Power: the slope in log-log; 2 grows with the number of pixels, 4 with its square."
            + (f" Warning: measured on different hardware, {growth.hardware}, so the power is not one of resolution"
               " alone." if growth.hardware else ""), scope=growth.stem,
        ))  # fmt: skip
    return tables


@dataclass(frozen=True)
class Robustness:
    """One perturbation on one data set: by method, (strength, AUROC, low, high) in order of strength.

    ``strength`` is the severity of a corruption, and of an attack the budget in grey levels of 255. ``low`` and
    ``high`` are None for a mean over several cells.
    """

    dataset: str
    kind: str
    perturbation: str
    curves: dict[str, list[tuple[float, Cell]]]

    @property
    def axis(self) -> str:
        """What strength is."""
        return "Severity" if self.kind == "corruption" else "Budget (grey levels of 255)"


def robustness(benchmark: Benchmark, rows: Sequence[RobustnessRow]) -> list[Robustness]:
    """Means over the cells of a data set; rows of unchanged images (severity 0) are strength 0 of every change."""
    order = {name: i for i, name in enumerate(benchmark.methods)}
    clean: dict[tuple[str, str], list[RobustnessRow]] = {}
    found: dict[tuple[str, bool, str], dict[str, dict[float, list[RobustnessRow]]]] = {}
    for row in rows:
        if row.severity == 0:
            clean.setdefault((row.dataset, row.detector), []).append(row)
        else:
            curves = found.setdefault((row.dataset, row.kind == "attack", row.perturbation), {})
            curves.setdefault(row.detector, {}).setdefault(_strength(row), []).append(row)
    panels = []
    for (dataset, is_attack, perturbation), curves in sorted(found.items(), key=lambda i: (natural(i[0][0]), *i[0])):
        lines = {}
        for method in sorted(curves, key=lambda name: (order.get(name, len(order)), natural(name))):
            by_strength = curves[method] | {0.0: clean.get((dataset, method), [])}
            points = [(at, _over_cells(benchmark, dataset, method, by_strength[at])) for at in sorted(by_strength)]
            lines[method] = [(at, cell) for at, cell in points if cell.value is not None]
        panels.append(Robustness(dataset, "attack" if is_attack else "corruption", perturbation, lines))
    return panels


def _over_cells(benchmark: Benchmark, dataset: str, method: str, rows: Sequence[RobustnessRow]) -> Cell:
    """Marked where the plan has more cells than these."""
    cell, expected = summarise([row.auroc for row in rows]), benchmark.num_expected(dataset, method)
    if benchmark.planned is None or cell.value is None or len(rows) >= expected:
        return cell
    missing = f"{len(rows)} of {expected} cells"
    return replace(cell, detail=missing, missing=missing)


def _strength(row: RobustnessRow) -> float:
    return float(row.severity) if row.budget is None else round(row.budget * 127.5, 1)


def robustness_tables(panels: Sequence[Robustness]) -> list[Table]:
    """Per data set and kind: perturbation and strength by methods."""
    tables = []
    for dataset, kind in dict.fromkeys((panel.dataset, panel.kind) for panel in panels):
        chosen = [panel for panel in panels if (panel.dataset, panel.kind) == (dataset, kind)]
        methods = list(dict.fromkeys(method for panel in chosen for method in panel.curves))
        rows = []
        for panel in chosen:
            curves = {method: dict(points) for method, points in panel.curves.items()}
            for at in sorted({strength for points in curves.values() for strength in points}):
                cells = [curves.get(method, {}).get(at, Cell()) for method in methods]
                rows.append(Row(f"{panel.perturbation} {at:g}", mark_best(cells, 1)))
        noun = "changes of the images" if kind == "corruption" else "attacks"
        strength = "severity (0: unchanged)" if kind == "corruption" else "budget in grey levels of 255"
        changed = (
            "Normal and anomalous images are changed alike." if kind == "corruption" else
            "The attack lowers the scores of anomalous images and raises those of normal ones."
        )  # fmt: skip
        tables.append(Table(
            f"{slug(dataset)}-robustness-{kind}", f"AUROC under {noun}", f"{kind.capitalize()}, {strength}",
            [Heading(method) for method in methods], rows,
            f"{changed} Small figures: ± one standard deviation over cells (categories and seeds), or the 95\u00a0%"
            " interval over test images of a single one. Best of each row in bold. The test images are a subset, the"
            " same for every method.", scope=dataset,
        ))  # fmt: skip
    return tables
