"""Figures as inline SVG that takes the page's text colour, so that it reads on light and dark.

Colours are those of Okabe and Ito (2008), told apart by people with any colour vision; lines also differ in dashes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from raydiff.core.metrics import roc_curve
from raydiff.report.tables import Group, summarise
from raydiff.results import Predictions

__all__ = [
    "INK", "SETTINGS", "Style", "cost_figure", "histogram_figure", "roc_figure", "styles", "to_svg",
]  # fmt: skip

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("-", "--", "-.", ":")
_MARKERS = "osD^vP"
INK = "#010203"  # stands for the page's text colour
SETTINGS: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "raydiff", "font.family": "sans-serif", "font.size": 10,
    "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8, "axes.unicode_minus": True,
    "legend.frameon": False, "legend.fontsize": 9, "figure.facecolor": "none", "axes.facecolor": "none",
    "text.parse_math": False,  # a name may hold a dollar sign
}  # fmt: skip

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Style:
    """How one detector looks in every figure."""

    colour: str
    dashes: str
    marker: str
    width: float


def styles(detectors: Sequence[str], main: str) -> dict[str, Style]:
    """A look for each detector; the main one comes first and is drawn heavier."""
    ordered = sorted(detectors, key=lambda name: name != main)
    return {
        name: Style(
            _COLOURS[i % len(_COLOURS)], _DASHES[(i + i // len(_COLOURS)) % len(_DASHES)],
            _MARKERS[(i + i // len(_COLOURS)) % len(_MARKERS)], 2.4 if name == main else 1.4,
        )
        for i, name in enumerate(ordered)
    }  # fmt: skip


def roc_figure(groups: Sequence[Group], looks: dict[str, Style], name: str) -> str | None:
    """ROC of every detector; with several seeds the mean curve and a band of one standard deviation. None without data.

    Args:
        groups: of one data set.
        looks: from :func:`styles`.
        name: unique on the page; prefixes the ids inside the SVG.
    """
    grid = np.linspace(0, 1, 501)
    with mpl.rc_context(SETTINGS):
        figure, axes = _canvas(4.9, 4.2 + 0.19 * len(groups))
        for group in groups:
            curves = [_tpr_on(grid, e.predictions) for e in group.evaluations if e.predictions is not None]
            if curves:
                _draw_curve(axes, grid, np.stack(curves), group, looks[group.detector])
        if not axes.lines:
            return None
        axes.plot([0, 1], [0, 1], color=INK, linewidth=0.6, alpha=0.4)
        axes.set(xlim=(-0.01, 1), ylim=(0, 1.01), xlabel="False-positive rate", ylabel="True-positive rate")
        figure.legend(loc="outside lower center")
        return to_svg(figure, name)


def cost_figure(groups: Sequence[Group], looks: dict[str, Style], name: str) -> str:
    """AUROC against milliseconds per image in batches, with the AUROC's interval or spread."""
    with mpl.rc_context(SETTINGS):
        figure, axes = _canvas(4.9, 4.2 + 0.19 * len(groups))
        for group in groups:
            look = looks[group.detector]
            estimates = [row.metrics["auroc"] for row in group.rows]
            x = float(np.mean([row.ms_per_image for row in group.rows]))
            if len(estimates) > 1:
                spread = float(np.std([estimate.value for estimate in estimates], ddof=1))
                below, above = spread, spread
            else:
                below = max(0.0, estimates[0].value - (estimates[0].low or estimates[0].value))
                above = max(0.0, (estimates[0].high or estimates[0].value) - estimates[0].value)
            axes.errorbar(
                [x], [group.auroc], yerr=[[below], [above]], fmt=look.marker, color=look.colour, markersize=8,
                elinewidth=1.4, label=group.detector,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.margins(x=0.15, y=0.15)
        axes.set(xlabel="Milliseconds per image, in batches (log scale)", ylabel="AUROC")
        axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
        figure.legend(loc="outside lower center", ncols=2)
        return to_svg(figure, name)


def histogram_figure(predictions: Predictions, threshold: float, name: str) -> str:
    """Scores of normal and anomalous images, each as a share of its kind, with the threshold.

    The outermost bins also hold what lies beyond the 0.5th and 99th percentile.
    """
    scores = predictions.scores
    low, high = np.percentile(scores, [0.5, 99])
    low, high = min(low, threshold), max(high, threshold)
    margin = 0.02 * (high - low) or 0.5
    edges = np.linspace(low - margin, high + margin, 36)
    clipped = np.clip(scores, edges[0], edges[-1])
    with mpl.rc_context(SETTINGS):
        figure, axes = _canvas(3.6, 3.1)
        for label, kind, colour in ((False, "normal", "#0072B2"), (True, "anomalous", "#D55E00")):
            members = clipped[predictions.labels == label]
            axes.hist(
                members, bins=list(edges), weights=np.full(len(members), 100 / len(members)), color=(colour, 0.35),
                edgecolor=colour, histtype="stepfilled", linewidth=1.2,
                label=f"{kind} (n = {len(members)})",
            )  # fmt: skip
        axes.axvline(threshold, color=INK, linestyle="--", linewidth=1.2, label=f"threshold {threshold:.4g}")
        axes.set(xlabel="Raw anomaly score", ylabel="Share of images (%)", xlim=(edges[0], edges[-1]))
        figure.legend(loc="outside lower center", ncols=2, columnspacing=1, handlelength=1.4)
        return to_svg(figure, name)


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _tpr_on(grid: Floats, predictions: Predictions) -> Floats:
    """TPR of the last operating point whose FPR is at most each grid value: a staircase, never interpolated."""
    fpr, tpr = roc_curve(predictions.scores, predictions.labels)
    return np.asarray(tpr[np.searchsorted(fpr, grid + 1e-12, side="right") - 1])


def _draw_curve(axes: Axes, grid: Floats, curves: Floats, group: Group, look: Style) -> None:
    mean = curves.mean(axis=0)
    cell = summarise([row.metrics["auroc"] for row in group.rows])
    detail = f" ({cell.detail})" if cell.detail else ""
    axes.plot(
        np.r_[0, grid], np.r_[0, mean], color=look.colour, linestyle=look.dashes, linewidth=look.width,
        label=f"{group.detector}: {cell.text}{detail}", zorder=look.width,
    )  # fmt: skip
    if len(curves) > 1:
        spread = curves.std(axis=0, ddof=1)
        axes.fill_between(
            grid, np.maximum(mean - spread, 0), np.minimum(mean + spread, 1), color=look.colour, alpha=0.15, linewidth=0
        )


def to_svg(figure: Figure, name: str) -> str:
    """The drawing as an ``<svg>`` element without size, namespaces or metadata, its ids prefixed with ``name``."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\1{name}-", text)
    return text.replace(INK, "currentColor").replace("<svg", '<svg aria-hidden="true"', 1).strip()
