"""The figures of a benchmark as inline SVG, in the style of :mod:`raydiff.report.figures`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator
from matplotlib.transforms import Bbox

from raydiff.report.benchmark_costs import Growth, Robustness
from raydiff.report.benchmark_data import Benchmark
from raydiff.report.benchmark_ranks import Ranking
from raydiff.report.figures import INK, SETTINGS, Style, styles, to_svg

__all__ = ["Point", "growth_figure", "legend_figure", "looks_of", "points_of", "rank_figure", "robustness_figure",
           "scatter_figure"]  # fmt: skip


def looks_of(benchmark: Benchmark) -> dict[str, Style]:
    """One look for each method, the same in every figure of the page."""
    return styles(benchmark.methods, benchmark.methods[0])


def rank_figure(ranking: Ranking, name: str) -> str:
    """Critical-difference diagram (Demsar 2006, figure 1): bars join methods that cannot be told apart."""
    k = len(ranking.methods)
    half = (k + 1) // 2
    first_row = 0.55 + 0.22 * len(ranking.groups)
    height = first_row + 0.34 * half
    low, high = 1.0, float(k)
    with mpl.rc_context(SETTINGS):
        margin = 0.7 + 0.08 * max(map(len, ranking.methods))  # inches for a name and its rank
        width = max(7.6, 2 * margin + 3.4)
        beside = (high - low) * margin / (width - 2 * margin)
        figure = Figure(figsize=(width, 0.9 + 0.72 * height))
        axes = figure.add_axes((0, 0.02, 1, 0.96))
        axes.set(xlim=(low - beside, high + beside), ylim=(height, -0.95))
        axes.axis("off")
        axes.plot([low, high], [0, 0], color=INK, linewidth=1)
        for tick in range(1, k + 1):
            axes.plot([tick, tick], [-0.09, 0], color=INK, linewidth=1)
            if k <= 15 or tick % 2:
                axes.text(tick, -0.14, str(tick), ha="center", va="bottom", fontsize=9)
        shown = min(ranking.critical, high - low)
        axes.plot([low, low + shown], [-0.62, -0.62], color=INK, linewidth=1.4)
        for end in (low, low + shown):
            axes.plot([end, end], [-0.68, -0.56], color=INK, linewidth=1.4)
        beyond = "" if shown == ranking.critical else " (longer than the axis)"
        axes.text(low + shown / 2, -0.7, f"critical difference {ranking.critical:.2f}{beyond}", ha="center",
                  va="bottom", fontsize=9)  # fmt: skip
        for i, (method, rank) in enumerate(zip(ranking.methods, ranking.ranks, strict=True)):
            left = i < half
            y = first_row + 0.34 * (i if left else k - 1 - i)
            x = low - 0.02 * (high - low) if left else high + 0.02 * (high - low)
            axes.plot([rank, rank, x], [0, y, y], color=INK, linewidth=0.7, alpha=0.7)
            label = f"{method}  {rank:.2f}" if left else f"{rank:.2f}  {method}"
            axes.annotate(label, (x, y), xytext=(-4 if left else 4, 0), textcoords="offset points",
                          ha="right" if left else "left", va="center", fontsize=9)  # fmt: skip
        for i, group in enumerate(ranking.groups):
            ends = [ranking.ranks[ranking.methods.index(method)] for method in (group[0], group[-1])]
            y = 0.24 + 0.22 * i
            axes.plot([ends[0] - 0.02, ends[1] + 0.02], [y, y], color="#0072B2", linewidth=4, solid_capstyle="butt")
        return to_svg(figure, name)


@dataclass(frozen=True)
class Point:
    """A scorer in a figure of accuracy and cost; scorers of one ``checkpoint`` share its colour."""

    method: str
    checkpoint: int
    cost: float
    auroc: float
    below: float
    above: float


def points_of(benchmark: Benchmark, dataset: str, cost: str) -> list[Point]:
    """Every method with a network: ``cost`` is ``num_evaluations`` or ``ms_per_image``.

    A checkpoint is told by the config without what scoring, calibration and execution add, on the methods' first cell.
    A method that lacks cells says so beside its name. One that asks its network nothing has no place on a log scale of
    evaluations.
    """
    found, checkpoints = [], dict[str, int]()
    for method in benchmark.methods_of(dataset):
        rows, score = benchmark.rows(dataset, method), benchmark.score(dataset, method)
        if score is None or rows[0].num_evaluations is None:
            continue
        number = checkpoints.setdefault(_training_of(rows[0].config, method), len(checkpoints))
        ends = benchmark.interval(dataset, method)
        below, above = (score.spread or 0.0,) * 2
        if score.spread is None and ends is not None:
            below, above = max(0.0, score.mean - ends[0]), max(0.0, ends[1] - score.mean)
        value = fmean(float(getattr(row, cost)) for row in rows)
        if not value:
            continue
        name = f"{method} ({score.num_cells} of {score.num_expected})" if score.missing else method
        found.append(Point(name, number, value, score.mean, below, above))
    return found


def _training_of(config: Mapping[str, Any] | None, method: str) -> str:
    if config is None:
        return method
    return json.dumps({k: v for k, v in config.items() if k not in ("scoring", "calibration", "execution")})


def scatter_figure(points: Sequence[Point], xlabel: str, name: str) -> str:
    """AUROC against a cost on a log scale, every point named beside it without names crossing."""
    looks = styles([str(c) for c in sorted({p.checkpoint for p in points})], "0")
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(5.4, 4.4), layout="constrained", dpi=72)  # dpi of an SVG, so that names stay put
        axes = figure.add_subplot()
        for point in points:
            look = looks[str(point.checkpoint)]
            axes.errorbar([point.cost], [point.auroc], yerr=[[point.below], [point.above]], fmt=look.marker,
                          color=look.colour, markersize=7, elinewidth=0.8)  # fmt: skip
        _log_axis(axes, [point.cost for point in points])
        axes.margins(y=0.12)
        axes.set_yticks([tick for tick in axes.get_yticks() if tick < 1 + 1e-9])  # names may stand above, AUROCs cannot
        axes.set(xlabel=xlabel, ylabel="AUROC")
        axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
        _name_points(figure, axes, points)
        return to_svg(figure, name)


def _log_axis(axes: Axes, values: Sequence[float]) -> None:
    """A log scale wide enough for names, with at least two labelled ticks."""
    low, high = np.log10(min(values)), np.log10(max(values))
    pad = max(0.3 * (high - low), 0.35)
    axes.set_xscale("log")
    axes.set_xlim(10 ** (low - pad), 10 ** (high + pad))
    ticks = [m * 10.0**e for e in range(int(low - pad) - 2, int(high + pad) + 2) for m in (1, 2, 5)]
    inside = [t for t in ticks if low - pad <= np.log10(t) <= high + pad]
    if len(inside) > 6:
        inside = [t for t in inside if f"{t:e}".startswith("1")]
    axes.xaxis.set_major_locator(FixedLocator(inside))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _name_points(figure: Figure, axes: Axes, points: Sequence[Point]) -> None:
    """Set each name at the best place near its point, with a thin line where that is not beside it."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    renderer = canvas.get_renderer()  # type: ignore[no-untyped-call]
    scale = figure.dpi / 72
    at = [tuple(float(v) for v in axes.transData.transform((point.cost, point.auroc))) for point in points]
    taken = [Bbox.from_bounds(x - 5 * scale, y - 5 * scale, 10 * scale, 10 * scale) for x, y in at]
    bars = [axes.transData.transform([(p.cost, p.auroc - p.below), (p.cost, p.auroc + p.above)]) for p in points]
    place = _Place(
        axes.get_window_extent(renderer), taken, [Bbox(bar + np.array([(-1, 0), (1, 0)])) for bar in bars], scale
    )
    line = {"arrowstyle": "-", "color": INK, "linewidth": 0.5, "alpha": 0.5, "shrinkA": 0, "shrinkB": 3}
    for point, (x, y) in sorted(zip(points, at, strict=True), key=lambda item: -item[1][1]):
        text = axes.annotate(point.method, (0, 0), xycoords="figure pixels", fontsize=8.5, annotation_clip=False)
        size = text.get_window_extent(renderer)
        text.remove()
        box, lift = place.best(x, y, 1.02 * size.width, size.height)
        axes.annotate(
            point.method, (point.cost, point.auroc), xytext=((box.x0 - x) / scale, ((box.y0 + box.y1) / 2 - y) / scale),
            textcoords="offset points", fontsize=8.5, va="center", annotation_clip=False,
            arrowprops=line if lift > 18 else None,
        )  # fmt: skip


@dataclass(frozen=True)
class _Place:
    """Where names can go: inside ``frame``, off what is ``taken`` (points and names), rather off ``bars`` too."""

    frame: Bbox
    taken: list[Bbox]
    bars: list[Bbox]
    scale: float

    def best(self, x: float, y: float, width: float, height: float) -> tuple[Bbox, float]:
        """The cheapest box for a name of this size, then taken; and how far above or below its point it is."""
        near = 8 * self.scale
        found = [
            (self._cost(box) + abs(lift) + 0.5 * side, box, abs(lift))
            for lift in np.arange(-150.0, 151.0, 5.0)
            for side, left in enumerate((x + near, x - near - width, x - width / 2))
            for box in [Bbox.from_bounds(left, y + lift * self.scale - height / 2, width, height)]
        ]
        _, box, lift = min(found, key=lambda item: item[0])
        self.taken.append(box)
        return box, float(lift)

    def _cost(self, box: Bbox) -> float:
        frame = self.frame
        outside = max(0.0, frame.x0 - box.x0) + max(0.0, box.x1 - frame.x1)
        outside += max(0.0, frame.y0 - box.y0) + max(0.0, box.y1 - frame.y1)
        crossed = sum(_overlap(box, other) for other in self.taken)
        return float(1000 * (outside + crossed) + 25 * sum(_overlap(box, bar) > 0 for bar in self.bars))


def _overlap(a: Bbox, b: Bbox) -> float:
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return float(width * height) if width > 0 and height > 0 else 0.0


def growth_figure(growth: Growth, looks: Mapping[str, Style], name: str) -> str:
    """Cost against the side of an image, both on log scales."""
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(5.4, 4.0 + 0.1 * len(growth.points)), layout="constrained")
        axes = figure.add_subplot()
        for method, points in growth.points.items():
            look, (sides, costs) = looks[method], zip(*points, strict=True)
            power = growth.power(method)
            label = method if power is None else f"{method}: power {power:.1f}"
            axes.plot(sides, costs, color=look.colour, linestyle=look.dashes, marker=look.marker, markersize=5,
                      linewidth=1.4, label=label)  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="Side of the image (px, log scale)",
                 ylabel=f"{growth.unit} (log scale)".capitalize())  # fmt: skip
        ticks = sorted({side for points in growth.points.values() for side, _ in points})
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(color=INK, alpha=0.12, linewidth=0.6)
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
        return to_svg(figure, name)


def robustness_figure(panel: Robustness, looks: Mapping[str, Style], bottom: float, name: str) -> str:
    """AUROC against strength; ``bottom`` is the lower end of the axis, the same for all panels of a row."""
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(3.2, 2.5), layout="constrained")
        axes = figure.add_subplot()
        for method, points in panel.curves.items():
            look, known = looks[method], [(at, cell.value) for at, cell in points if cell.value is not None]
            if known:
                xs, ys = zip(*known, strict=True)
                axes.plot(xs, ys, color=look.colour, linestyle=look.dashes, marker=look.marker, markersize=4,
                          linewidth=1.4)  # fmt: skip
        if bottom < 0.5:
            axes.axhline(0.5, color=INK, linewidth=0.6, alpha=0.4)
        axes.set(xlabel=panel.axis, ylabel="AUROC", ylim=(bottom, 1.01))
        strengths = sorted({at for points in panel.curves.values() for at, _ in points})
        axes.set_xticks(strengths if len(strengths) <= 6 else strengths[::2])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
        return to_svg(figure, name)


def legend_figure(methods: Sequence[str], looks: Mapping[str, Style], name: str) -> str:
    """What the lines of several panels are."""
    handles = [
        Line2D([], [], color=looks[m].colour, ls=looks[m].dashes, marker=looks[m].marker, markersize=4, label=m)
        for m in methods
    ]
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(3.2, 0.25 + 0.21 * len(handles)))
        figure.legend(handles=handles, loc="upper left", fontsize=9, borderaxespad=0.2, handlelength=2.6)
        return to_svg(figure, name)
