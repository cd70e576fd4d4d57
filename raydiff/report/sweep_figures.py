"""The figures of a sweep as inline SVG, in the style of :mod:`raydiff.report.figures`.

Dense ones are thinned: no figure draws more than a few hundred marks, whatever the number of settings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from raydiff.report.figures import INK, SETTINGS, to_svg
from raydiff.report.sweep_data import Axis, Importance, Sweep, label_of, sign_of, value_name
from raydiff.report.sweep_statistics import Curve, Front, Grid, mean_loss
from raydiff.sweep_records import Setting

__all__ = [
    "curve_figure", "front_figure", "grid_figure", "history_figure", "importance_figure", "loss_figure",
    "number", "parallel_figure", "strip_figure", "thinned",
]  # fmt: skip

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
_MAP = "cividis"  # even in lightness, and seen alike with any colour vision
_MAX_POINTS = 300
_MAX_LINES = 120
_MAX_AXES = 5


def number(value: float) -> str:
    """Three decimals within [-1, 1], where shares and AUROC lie; else three figures."""
    return f"{value:.3f}" if abs(value) <= 1 else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def wrapped(path: str, width: int = 16) -> str:
    """A dotted path over several lines, each at most about ``width`` long."""
    lines = [""]
    for part in path.replace(".", ".\0").replace("_", "_\0").split("\0"):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def thinned(rows: Sequence[Setting], limit: int = _MAX_POINTS) -> list[Setting]:
    """At most ``limit``, evenly spaced in the order they were measured."""
    if len(rows) <= limit:
        return list(rows)
    return [rows[int(i)] for i in np.linspace(0, len(rows) - 1, limit)]


def importance_figure(importances: Sequence[Importance], order: Sequence[str], name: str) -> str:
    """Bars with bootstrap intervals, an evaluator beside the other; ticks show what shuffled values get."""
    evaluators = list(dict.fromkeys(each.evaluator for each in importances))
    paths = [path for path in order if any(each.path == path for each in importances)]
    thick = 0.8 / len(evaluators)
    with mpl.rc_context(SETTINGS):
        figure, axes = _canvas(5.2, 1.0 + 0.46 * len(paths))
        for k, (evaluator, colour) in enumerate(zip(evaluators, (BLUE, ORANGE, GREEN), strict=False)):
            for each in importances:
                if each.evaluator != evaluator:
                    continue
                y = paths.index(each.path) - 0.4 + thick * (k + 0.5)
                axes.barh(y, each.value, 0.86 * thick, color=colour if each.is_clear else (colour, 0.18),
                          edgecolor=colour, linewidth=0.8)  # fmt: skip
                axes.plot([each.low, each.high], [y, y], color=INK, linewidth=1.2)
                axes.plot([each.chance] * 2, [y - 0.45 * thick, y + 0.45 * thick], color=INK, linewidth=1.2,
                          linestyle=(0, (1, 1)))  # fmt: skip
        axes.set(yticks=range(len(paths)), yticklabels=[wrapped(path, 24) for path in paths], xlim=(0, None))
        axes.set(ylim=(len(paths) - 0.5, -0.5), xlabel="Importance (share)")
        axes.tick_params(axis="y", length=0, labelsize=9)
        handles = [
            *(Patch(facecolor=c, label=EVALUATOR_NAMES.get(e, e)) for e, c in zip(evaluators, (BLUE, ORANGE, GREEN),
                                                                                strict=False)),
            Line2D([], [], color=INK, linewidth=1.2, label="95 % interval"),
            Line2D([], [], color=INK, linewidth=1.2, linestyle=(0, (1, 1)), label="chance (shuffled)"),
        ]  # fmt: skip
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
        return to_svg(figure, name)


EVALUATOR_NAMES = {"fanova": "fANOVA", "mean_decrease_impurity": "Impurity"}


def curve_figure(curve: Curve, objective: str, limits: tuple[float, float], name: str) -> str:
    """The objective against one parameter around the best point: mean, one standard deviation, each seed."""
    axis = curve.axis
    places = [axis.place(point.value) for point in curve.points]
    means = [point.mean for point in curve.points]
    spreads = [point.spread or 0.0 for point in curve.points]
    with mpl.rc_context(SETTINGS):
        figure, axes = _canvas(3.3, 2.7)
        if axis.choices:
            axes.errorbar(places, means, yerr=spreads, fmt="o", color=BLUE, markersize=5, capsize=3, linewidth=1.4)
        else:
            axes.fill_between(places, np.subtract(means, spreads), np.add(means, spreads), color=BLUE, alpha=0.18,
                              linewidth=0)  # fmt: skip
            axes.plot(places, means, "-o", color=BLUE, markersize=4, linewidth=1.6)
        for place, point in zip(places, curve.points, strict=True):
            axes.plot([place] * len(point.by_seed), list(point.by_seed.values()), linestyle="none", marker="_",
                      color=INK, markersize=6, markeredgewidth=0.8, alpha=0.55)  # fmt: skip
            if point.is_best_point:
                axes.plot([place], [point.mean], "D", color=ORANGE, markersize=6, zorder=4)
        _parameter_ticks(axes, axis, [point.value for point in curve.points])
        axes.set(ylabel=label_of(objective), ylim=limits)
        axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
        return to_svg(figure, name)


def grid_figure(grid: Grid, name: str) -> str:
    """Mean objective per cell with the count below it; empty cells are crossed out."""
    rows, columns = grid.means.shape
    with mpl.rc_context(SETTINGS):
        figure, axes = _canvas(4.9, 1.7 + 0.5 * rows)
        known = grid.means[np.isfinite(grid.means)]
        scale, colours = Normalize(known.min(), max(known.max(), known.min() + 1e-9)), mpl.colormaps[_MAP]
        for i in range(rows):
            for j in range(columns):
                value = float(grid.means[i, j])
                if math.isnan(value):
                    axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor="none", edgecolor=INK, alpha=0.2,
                                             hatch="///", linewidth=0.5))  # fmt: skip
                    continue
                axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=colours(scale(value)), linewidth=0))
                ink = "#ffffff" if scale(value) < 0.5 else "#000000"
                axes.text(j, i - 0.08, number(value), ha="center", va="center", color=ink, fontsize=9)
                axes.text(j, i + 0.28, f"n = {grid.counts[i, j]}", ha="center", va="center", color=ink, fontsize=7)
        axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5), xlabel=grid.across.path, ylabel=grid.down.path)
        axes.set_xticks(range(columns), _bin_names(grid.across, 9), fontsize=8)
        axes.set_yticks(range(rows), _bin_names(grid.down, 12), fontsize=8)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        return to_svg(figure, name)


def _bin_names(axis: Axis, width: int) -> list[str]:
    return [wrapped(text, width) if axis.choices else text.replace("– ", "–\n") for text in axis.bins]


def strip_figure(sweep: Sweep, path: str, name: str) -> str | None:
    """The objective against one parameter over the search, a mark for each; a bar is the mean of its group.

    Marks are trainings (by their best setting) where the parameter changes weights, else settings. None without data.
    """
    axis = sweep.axis(path)
    if axis.level == "training":
        rows = [trial.best for trial in sweep.valued if trial.best is not None]
    else:
        rows = thinned(sweep.search)
    rows = [row for row in rows if path in row.params]
    if len({repr(row.params[path]) for row in rows}) < 2:
        return None
    rng = np.random.default_rng(0)
    width = 0.5 if axis.choices else 0.0
    places = np.array([axis.place(row.params[path]) for row in rows])
    values = np.array([row.values[sweep.lead] for row in rows])
    with mpl.rc_context(SETTINGS):
        figure, axes = _canvas(3.3, 2.9)
        axes.plot(places + width * (rng.random(len(rows)) - 0.5), values, "o", color=BLUE, alpha=0.4, markersize=4,
                  markeredgewidth=0)  # fmt: skip
        bins = np.array([axis.bin_of(row.params[path]) for row in rows])
        low, high = axis.ends
        for i in np.unique(bins):
            left, right = (i - 0.35, i + 0.35) if axis.choices else (
                low + (high - low) * i / len(axis.bins), low + (high - low) * (i + 1) / len(axis.bins))  # fmt: skip
            axes.plot([left, right], [values[bins == i].mean()] * 2, color=ORANGE, linewidth=2.2)
        _parameter_ticks(axes, axis, [])
        axes.set(ylabel=label_of(sweep.lead))
        axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
        return to_svg(figure, name)


def loss_figure(sweep: Sweep, name: str) -> str:
    """The lead objective of each training against its held-out loss."""
    pairs = [(loss, sweep.value(t)) for t in sweep.valued if (loss := mean_loss(t)) is not None]
    with mpl.rc_context(SETTINGS):
        figure, axes = _canvas(4.4, 3.3)
        losses, values = zip(*pairs, strict=True)
        axes.plot(losses, values, "o", color=BLUE, alpha=0.6, markersize=5, markeredgewidth=0)
        if min(losses) > 0 and max(losses) > 8 * min(losses):
            _log_x(axes)
        axes.set(xlabel=label_of("loss"), ylabel=label_of(sweep.lead))
        axes.grid(color=INK, alpha=0.12, linewidth=0.6)
        return to_svg(figure, name)


def history_figure(sweep: Sweep, name: str) -> str | None:
    """Values in order and the best so far; pruned and failed trainings along the bottom. None without a value.

    Marks are trainings; where there is one, its settings.
    """
    units = sweep.units
    if not units:
        return None
    order = {trial.key: i for i, trial in enumerate(sweep.trials)}
    alone = len(sweep.valued) < 2
    places = list(range(len(units))) if alone else [order[row.training] for row in units]
    values = np.array([row.values[sweep.lead] for row in units])
    best = sweep.sign * np.maximum.accumulate(sweep.sign * values)
    steps = [i for i in range(len(units)) if not i or best[i] != best[i - 1]]
    shown = np.unique(np.linspace(0, len(units) - 1, min(len(units), _MAX_POINTS)).round().astype(int))
    with mpl.rc_context(SETTINGS):
        figure, axes = _canvas(5.0, 3.4)
        axes.plot([places[i] for i in shown], values[shown], "o", color=BLUE, alpha=0.6, markersize=4.5,
                  markeredgewidth=0, label="setting" if alone else "training")  # fmt: skip
        last = places[-1] if alone else len(order) - 1
        axes.step([*(places[i] for i in steps), last], [*best[steps], best[-1]], where="post", color=ORANGE,
                  linewidth=1.8, label="best so far")  # fmt: skip
        bottom = values.min() - (0.08 * np.ptp(values) or 0.01)
        for state, marker in (("pruned", "|"), ("failed", "x")):
            stopped = [order[trial.key] for trial in sweep.trials if trial.state == state]
            if stopped and not alone:
                axes.plot(stopped, [bottom] * len(stopped), marker, color=INK, markersize=6, linestyle="none",
                          label=f"{state} (no value)")  # fmt: skip
        axes.set(xlabel="Setting, in the order measured" if alone else "Training, in the order proposed",
                 ylabel=label_of(sweep.lead))  # fmt: skip
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
        figure.legend(loc="outside lower center", ncols=2)
        return to_svg(figure, name)


def parallel_figure(sweep: Sweep, ranked: Sequence[str], name: str) -> str | None:
    """Best setting of each training across the first few parameters, coloured by the objective. None without data.

    With one training the lines are its settings. A parameter that a setting does not have, as its condition does not
    hold, interrupts its line.
    """
    rows = sorted(sweep.units, key=sweep.worth)
    kept = [path for path in ranked if path in sweep.axes and 2 * sum(path in row.params for row in rows) >= len(rows)]
    axes_of = [axis for path, axis in sweep.axes.items() if path in kept[:_MAX_AXES]]
    if len(rows) < 2 or not axes_of:
        return None
    rows = [*thinned(rows[:-1], _MAX_LINES), rows[-1]]
    values = [row.values[sweep.lead] for row in rows]
    scale = Normalize(min(values), max(max(values), min(values) + 1e-9))
    with mpl.rc_context(SETTINGS):
        figure, axes = _canvas(5.2, 3.8)
        for row, value in zip(rows, values, strict=True):
            heights = [axis.share(row.params[axis.path]) if axis.path in row.params else math.nan for axis in axes_of]
            best = row is rows[-1]
            colour = ORANGE if best else mpl.colormaps[_MAP](scale(value))
            axes.plot(range(len(heights) + 1), [*heights, scale(value)], linewidth=2.6 if best else 1.0, color=colour,
                      alpha=1.0 if best else 0.6)  # fmt: skip
        for i, axis in enumerate(axes_of):
            _upright(axes, i, _marks(axis))
        _upright(axes, len(axes_of), [(0.0, number(min(values))), (1.0, number(max(values)))])
        names = [wrapped(axis.path, 11) for axis in axes_of] + [wrapped(label_of(sweep.lead).replace(" ", "_"), 10)
                                                                .replace("_", " ")]  # fmt: skip
        axes.set_xticks(range(len(names)), names, fontsize=8)
        axes.set(yticks=[], ylim=(-0.04, 1.06), xlim=(-0.1, len(axes_of) + 0.65))
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        return to_svg(figure, name)


def _marks(axis: Axis) -> list[tuple[float, str]]:
    if axis.choices:
        return [(i / max(1, len(axis.choices) - 1), wrapped(text, 12)) for i, text in enumerate(axis.choices)]
    return [(0.0, value_name(axis.bounds[0])), (1.0, value_name(axis.bounds[1]))]


def _upright(axes: Axes, x: float, marks: Sequence[tuple[float, str]]) -> None:
    axes.plot([x, x], [0, 1], color=INK, linewidth=0.8)
    for y, text in marks:
        axes.text(x + 0.05, y, text, fontsize=8, va="center", ha="left")


def front_figure(found: Front, sweep: Sweep, objective: str, name: str) -> str:
    """The first objective against another; with two objectives the front as steps."""
    lead, cheap = found.objectives[0], sign_of(sweep.space, objective) < 0
    with mpl.rc_context(SETTINGS):
        figure, axes = _canvas(4.9, 3.8)
        others = thinned(found.others)
        axes.plot([row.values[objective] for row in others], [row.values[lead] for row in others], "o", color=INK,
                  alpha=0.25, markersize=3.5, markeredgewidth=0, label="setting")  # fmt: skip
        members = sorted(found.members, key=lambda row: row.values[objective])
        xs, ys = [row.values[objective] for row in members], [row.values[lead] for row in members]
        if len(found.objectives) == 2:
            axes.step(xs, ys, where="post" if cheap else "pre", color=ORANGE, linewidth=1.4)
        axes.plot(xs, ys, "D", color=ORANGE, markersize=5, label="on the front")
        known = [row.values[objective] for row in (*others, *members)]
        if min(known) > 0 and max(known) > 8 * min(known):
            _log_x(axes)
        axes.set(xlabel=label_of(objective), ylabel=label_of(lead))
        axes.grid(color=INK, alpha=0.12, linewidth=0.6)
        figure.legend(loc="outside lower center", ncols=2)
        return to_svg(figure, name)


def _log_x(axes: Axes) -> None:
    """A logarithmic x axis with plain numbers at 1, 2 and 5."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _parameter_ticks(axes: Axes, axis: Axis, values: Sequence[object]) -> None:
    """The parameter below the figure: its choices, or numbers on its own scale."""
    if axis.choices:
        shown = sorted({axis.bin_of(value) for value in values}) or list(range(len(axis.choices)))
        axes.set_xticks(shown, [wrapped(axis.choices[i], 10) for i in shown], fontsize=8)
        axes.set_xlim(min(shown) - 0.6, max(shown) + 0.6)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4))
        if axis.log and len(axis.ticks) > 1:
            axes.set_xticks([math.log10(tick) for tick in axis.ticks])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: value_name(10**x if axis.log else float(x))))
    axes.set_xlabel(axis.path + (" (log scale)" if axis.log else ""))


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()
