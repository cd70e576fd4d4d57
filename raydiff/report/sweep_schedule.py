"""What the noise schedule does: how well networks denoise at each step, grouped by how they were trained.

The loss of what a network predicts has another unit for each prediction type; the error of the clean image that follows
from it, at equal signal-to-noise ratio, can be compared between schedules and prediction types.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from raydiff.report.figures import INK, SETTINGS, Style, styles, to_svg
from raydiff.report.sweep_data import Sweep
from raydiff.sweep_records import StepLoss, TrainingRow

__all__ = ["Family", "error_figure", "families", "family_path", "step_figure", "strip_paths"]

_MAX_LINES = 60
_MAX_FAMILIES = 6
_TOP = 10.0  # an error above that of any sensible guess; networks that predict epsilon reach 1e8 where nothing is left
_FAMILY = "schedule.beta_schedule"
_STEPS = (
    _FAMILY, "schedule", "schedule.num_train_timesteps", "scoring.start_step", "scoring.start", "scoring.stop",
    "scoring.top", "scoring.num_inference_steps",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """Trainings that share a value, or a range of values, of the parameter that colours the figures."""

    name: str
    rows: tuple[TrainingRow, ...]


def family_path(sweep: Sweep, ranked: Sequence[str]) -> str | None:
    """The schedule's family if the search varied it, else the most important parameter that changes weights."""
    varied = [path for path, axis in sweep.axes.items() if axis.level == "training"]
    return next((path for path in (_FAMILY, *ranked, *varied) if path in varied), None)


def strip_paths(sweep: Sweep) -> list[str]:
    """Parameters of the schedule, T and t* that the search varied."""
    return [path for path in _STEPS if path in sweep.axes]


def families(sweep: Sweep, path: str | None) -> list[Family]:
    """Complete trainings of the search whose error at each step is known, by the value of ``path``."""
    rows = [row for row in sweep.trainings if row.phase == "search" and row.state == "complete" and row.by_step]
    if path is None:
        return [Family("all trainings", tuple(rows))] if rows else []
    axis, grouped = sweep.axis(path), dict[int, list[TrainingRow]]()
    for row in rows:
        if path in row.params:
            grouped.setdefault(axis.bin_of(row.params[path]), []).append(row)
    return [Family(axis.bins[i], tuple(grouped[i])) for i in sorted(grouped)][:_MAX_FAMILIES]


def error_figure(found: Sequence[Family], name: str) -> str:
    """Error of the clean image against log SNR: a thin line per training, a heavy one for the median of a family.

    It is drawn times 1 + SNR, as the error of v is: alone it spans many decades, in which no two networks differ.
    """
    return _figure(
        found, lambda step: step.log_snr, lambda step: step.x0_error * (1 + math.exp(min(step.log_snr, 300.0))), name,
        xlabel="log SNR (left: noise, right: almost clean)", ylabel="Error of the clean image × (1 + SNR)", top=_TOP,
    )  # fmt: skip


def step_figure(found: Sequence[Family], name: str) -> str:
    """Loss of what the network predicts against the step as a share of T."""
    return _figure(
        found, lambda step: step.t, lambda step: step.loss, name,
        xlabel="t / T (left: almost clean, right: noise)", ylabel="Loss of the prediction",
    )  # fmt: skip


def _figure(
    found: Sequence[Family],
    x: Callable[[StepLoss], float],
    y: Callable[[StepLoss], float],
    name: str,
    *,
    xlabel: str,
    ylabel: str,
    top: float | None = None,
) -> str:
    looks = styles([family.name for family in found], "")
    share = min(1.0, _MAX_LINES / sum(len(family.rows) for family in found))
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(4.9, 3.7 + 0.12 * len(found)), layout="constrained")
        axes = figure.add_subplot()
        for family in found:
            look, curves = looks[family.name], [_curve(row, x, y) for row in family.rows]
            curves = [curve for curve in curves if len(curve) > 1]
            for curve in curves[: max(1, round(share * len(curves)))]:
                axes.plot(curve[:, 0], curve[:, 1], color=look.colour, linewidth=0.7, alpha=0.3)
            if curves:
                _median(curves, look, f"{family.name} ({len(curves)})", axes)
        axes.set(yscale="log", xlabel=xlabel, ylabel=f"{ylabel} (log scale)")
        low, high = axes.get_ylim()
        if top is not None and high > top:
            high = top
            axes.set_ylim(top=top)
            axes.set_xlim(left=_first_below(axes, top))
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(color=INK, alpha=0.12, linewidth=0.6)
        figure.legend(loc="outside lower center", ncols=2)
        return to_svg(figure, name)


def _first_below(axes: Axes, top: float) -> float:
    """Where the first of the drawn lines comes into view, less a little."""
    points = np.concatenate([np.column_stack([*line.get_data()]) for line in axes.lines])
    seen = points[points[:, 1] <= top, 0]
    return float(seen.min() - 0.03 * np.ptp(points[:, 0])) if len(seen) else float(points[:, 0].min())


def _curve(row: TrainingRow, x: Callable[[StepLoss], float], y: Callable[[StepLoss], float]) -> NDArray[np.float64]:
    points = sorted((x(step), y(step)) for step in row.by_step)
    return np.array([p for p in points if all(map(math.isfinite, p)) and p[1] > 0]).reshape(-1, 2)


def _median(curves: Sequence[NDArray[np.float64]], look: Style, label: str, axes: Axes) -> None:
    """Where at least half of the trainings have been measured; between steps their logarithms are joined straight."""
    low, high = min(curve[0, 0] for curve in curves), max(curve[-1, 0] for curve in curves)
    grid = np.linspace(low, high, 60)
    table = np.stack([np.interp(grid, c[:, 0], np.log(c[:, 1]), left=np.nan, right=np.nan) for c in curves])
    known = np.isfinite(table).sum(axis=0) * 2 >= len(curves)
    known &= np.isfinite(table).any(axis=0)
    medians = np.exp([float(np.median(column[np.isfinite(column)])) for column in table[:, known].T])
    axes.plot(grid[known], medians, color=look.colour, linestyle=look.dashes, linewidth=2.2, label=label)
