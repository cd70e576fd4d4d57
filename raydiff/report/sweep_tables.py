"""The tables of a sweep: what survives, importances, spreads, curves, cells, the front, trainings and settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from raydiff.core.metrics import Estimate
from raydiff.report.export import Heading, Table
from raydiff.report.sweep_data import Importance, Sweep, label_of, sign_of, value_name
from raydiff.report.sweep_figures import EVALUATOR_NAMES, number
from raydiff.report.sweep_statistics import Curve, Front, Grid, Spread, paired
from raydiff.report.sweep_words import mean_of
from raydiff.report.tables import Cell, Row, signed
from raydiff.sweep_records import Setting

__all__ = [
    "all_settings", "best_settings", "curve_points", "curve_summary", "front_table", "grid_table", "importance_table",
    "spread_table", "survival_table", "trainings_table",
]  # fmt: skip

_TEST = {"auroc": "AUROC", "average_precision": "AP", "realised_fpr": "FPR", "realised_tpr": "TPR"}
_NUM_BEST = 20


def _cell(value: float | None, detail: str = "", **more: Any) -> Cell:
    if value is None or not math.isfinite(value):
        return Cell()
    return Cell(number(value).replace("-", "−"), detail, value, **more)


def survival_table(sweep: Sweep) -> Table | None:
    """Promised against refitted, winner against start, selection against test."""
    final = sweep.final
    if final is None or not final.winner:
        return None
    metrics = [name for name in _TEST if any(name in refit.test for refit in (*final.winner, *final.start))]
    columns = [("selection", sweep.lead), *(("test", name) for name in metrics)]
    promised = [_cell(final.promised.get(sweep.lead)), *(Cell() for _ in metrics)]
    rows = [Row("promised by the search", promised)]
    for name, refits in (("winner, refitted", final.winner), ("start, refitted", final.start)):
        if refits:
            cells = [_mean_cell(mean_of(refits, split, metric)) for split, metric in columns]
            rows.append(Row(name, cells, note=f"n = {len(refits)} seeds"))
    rows.append(Row("winner − start", [_paired_cell(sweep, split, metric) for split, metric in columns], main=True))
    headings = [Heading(label_of(sweep.lead), "Selection"), *(Heading(_TEST[name], "Test") for name in metrics)]
    return Table(
        "survival", "Promised, refitted and tested", "Config", headings, rows,
        "Mean over fresh seeds ± one standard deviation; last row: paired by seed with its 95 % interval (Student's t),"
        " bold where it leaves out zero. The promise is the best of many, so it is too good.",
    )  # fmt: skip


def _mean_cell(estimate: Estimate | None) -> Cell:
    if estimate is None:
        return Cell()
    spread = None if estimate.high is None else estimate.high - estimate.value
    return _cell(estimate.value, "" if spread is None else f"± {number(spread)}", spread=spread)


def _paired_cell(sweep: Sweep, split: str, metric: str) -> Cell:
    assert sweep.final is not None  # noqa: S101 (asked by the caller)
    found = paired(sweep.final.winner, sweep.final.start, split, metric)
    return Cell() if found is None else signed(Estimate(found.mean, found.low, found.high))


def importance_table(importances: Sequence[Importance], order: Sequence[str], sweep: Sweep) -> Table:
    """A row per parameter, per evaluator its importance and what chance gives."""
    evaluators = list(dict.fromkeys(each.evaluator for each in importances))
    by = {(each.path, each.evaluator): each for each in importances}
    rows = []
    for path in order:
        found = [by.get((path, evaluator)) for evaluator in evaluators]
        known = [each for each in found if each is not None]
        if known:
            cells = [Cell(sweep.axis(path).level)]
            for each in found:
                cells += _importance_cells(each)
            note = f"{known[0].num_settings} settings of {known[0].num_trainings} trainings"
            rows.append(Row(path, cells, note=note))
    headings = [Heading("Changes")]
    for evaluator in evaluators:
        name = EVALUATOR_NAMES.get(evaluator, evaluator)
        headings += [Heading(name), Heading(f"{name}: chance")]
    return Table(
        "importances", "Importances", "Parameter", headings, rows,
        "Small figures: 95 % interval over bootstrap draws of trainings (with fewer than six, of settings). Bold: above"
        " its own shuffled values in 97.5 % of the draws. Conditional parameters are measured on the settings that have"
        " them. Settings that a sampler proposed lie closer where results are good.",
    )  # fmt: skip


def _importance_cells(each: Importance | None) -> list[Cell]:
    if each is None:
        return [Cell(), Cell()]
    ends = f"{each.low:.3f}–{each.high:.3f}"
    return [Cell(f"{each.value:.3f}", ends, each.value, best=each.is_clear, low=each.low, high=each.high),
            Cell(f"{each.chance:.3f}", "", each.chance)]  # fmt: skip


def spread_table(sweep: Sweep, spreads: Sequence[Spread]) -> Table | None:
    """Without a model: means over trainings by value."""
    if not spreads:
        return None
    rows = []
    for spread in spreads:
        order = sorted(range(len(spread.means)), key=lambda i: -sweep.sign * spread.means[i])
        ends = [f"{spread.groups[i]}: {number(spread.means[i])} (n = {spread.counts[i]})" for i in order]
        rows.append(Row(spread.path, [
            _cell(spread.value, best=spread.is_clear), _cell(spread.chance), Cell(ends[0]), Cell(ends[-1]),
        ]))  # fmt: skip
    headings = [Heading("Spread of means"), Heading("Chance"), Heading("Best value"), Heading("Worst value")]
    return Table(
        "spreads", "Without any model: mean over trainings by value", "Parameter", headings, rows,
        "Highest mean less the lowest, over trainings by their best setting; n trainings. Chance: 95th percentile over"
        " 1000 shuffles of the values among trainings; bold where it is exceeded. The other parameters are not held"
        " fixed.",
    )  # fmt: skip


def curve_summary(curves: Sequence[Curve]) -> Table | None:
    """Range of each curve against seed noise."""
    if not curves:
        return None
    ordered = sorted(curves, key=lambda curve: -curve.range)
    rows = [
        Row(curve.axis.path, [
            _cell(curve.range, best=curve.is_clear), _cell(curve.noise),
            Cell("not known" if curve.noise is None else "yes" if curve.is_clear else "no"),
            Cell(str(curve.num_seeds), "", curve.num_seeds),
        ])
        for curve in ordered
    ]  # fmt: skip
    headings = [Heading("Range of means"), Heading("Seed noise"), Heading("Beyond noise"), Heading("Seeds")]
    return Table(
        "curves", "Range of each curve against seed noise", "Parameter", headings, rows,
        "Seed noise: Tukey's honestly significant difference at 0.05, seeds as blocks. It needs two seeds.",
    )  # fmt: skip


def curve_points(curves: Sequence[Curve]) -> Table:
    """Every point of every curve; for the file."""
    rows = [
        Row(curve.axis.path, [Cell(value_name(point.value)), _cell(point.mean, spread=point.spread),
                              Cell(str(len(point.by_seed)), "", len(point.by_seed))])
        for curve in curves for point in curve.points
    ]  # fmt: skip
    headings = [Heading("Value"), Heading("Mean"), Heading("Seeds")]
    return Table("curve-points", "Points of the curves", "Parameter", headings, rows)


def grid_table(grid: Grid, at: int) -> Table:
    """Cells of an interaction map; for the file."""
    rows = [
        Row(name, [_cell(float(grid.means[i, j]), f"n = {grid.counts[i, j]}") for j in range(len(grid.across.bins))])
        for i, name in enumerate(grid.down.bins)
    ]
    headings = [Heading(f"{grid.across.path} {name}") for name in grid.across.bins]
    return Table(f"interaction-{at + 1}", f"{grid.down.path} by {grid.across.path}", grid.down.path, headings, rows)


def front_table(found: Front, sweep: Sweep) -> Table:
    """Members with their parameters."""
    caption = "No other measured setting is better in one objective without being worse in another."
    return _settings_table("front", "Settings on the front", sweep, found.members, found.objectives, caption)


def best_settings(sweep: Sweep) -> Table:
    """The first few of the search."""
    rows = sorted(sweep.search, key=sweep.worth, reverse=True)[:_NUM_BEST]
    names = tuple(dict.fromkeys([*(o.name for o in sweep.space.objectives), "detection_rate", "realised_fpr", "nfe"]))
    return _settings_table("best-settings", f"Best settings, {len(rows)} of {len(sweep.search):,}", sweep, rows, names,
                           "On selection, mean over the seeds of the training. The first is the best of many, so it"
                           " is too good.")  # fmt: skip


def all_settings(sweep: Sweep) -> Table:
    """Every row, both phases, in the order they were measured; for the file."""
    names = tuple(dict.fromkeys(name for row in sweep.settings for name in row.values))
    return _settings_table("settings", "Settings", sweep, sweep.settings, names, "", phases=True)


def _settings_table(
    name: str,
    title: str,
    sweep: Sweep,
    rows: Sequence[Setting],
    values: Sequence[str],
    caption: str,
    *,
    phases: bool = False,
) -> Table:
    shown = [
        Row(_training_name(row), [
            *([Cell(row.phase), Cell(row.varied or "")] if phases else []),
            *(_cell(row.values.get(each)) for each in values), *_params(row.params, sweep),
        ])
        for row in rows
    ]  # fmt: skip
    kinds = {each: sign_of(sweep.space, each) for each in values if each in {o.name for o in sweep.space.objectives}}
    headings = [
        *([Heading("Phase"), Heading("Varied")] if phases else []),
        *(Heading(label_of(each), better=kinds.get(each, 0)) for each in values), *map(Heading, sweep.axes),
    ]  # fmt: skip
    return Table(name, title, "Training", headings, shown, caption)


def _training_name(row: Setting) -> str:
    return row.training[:10] if row.trial is None else f"{row.trial}"


def _params(params: Mapping[str, Any], sweep: Sweep) -> list[Cell]:
    return [Cell(value_name(params[path])) if path in params else Cell() for path in sweep.axes]


def trainings_table(sweep: Sweep) -> Table:
    """Every network of the search."""
    values = {trial.key: sweep.value(trial) for trial in sweep.valued}
    paths = [path for path, axis in sweep.axes.items() if axis.level == "training"]
    rows = []
    for row in sweep.trainings:
        name = row.key[:10] if row.trial is None else str(row.trial)
        rows.append(Row(name, [
            Cell(row.phase), Cell(str(row.seed)), Cell(row.state), _cell(row.seconds), _cell(row.trial_seconds),
            Cell(str(row.steps), "", row.steps), _cell(row.loss),
            _cell(values.get(row.key) if row.phase == "search" else None),
            *(Cell(value_name(row.params[path])) if path in row.params else Cell() for path in paths),
            Cell(row.failure.strip().splitlines()[-1][:120] if row.failure.strip() else ""),
        ]))  # fmt: skip
    headings = [Heading("Phase"), Heading("Seed"), Heading("State"), Heading("Seconds"), Heading("Seconds of trial"),
                Heading("Steps"), Heading("Loss", better=-1), Heading(label_of(sweep.lead), better=sweep.sign),
                *map(Heading, paths), Heading("Failure")]  # fmt: skip
    return Table("trainings", f"Trainings ({len(rows)})", "Trial", headings, rows,
                 "Seconds: of the training alone, and of its whole trial. The value is that of the combination's best"
                 " setting, over its seeds.")  # fmt: skip
