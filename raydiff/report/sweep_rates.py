"""Thresholds: false alarms and detections that were realised, against the rate that was asked for.

A threshold is set on normal images for a target rate; on the selection split the rates are measured on normals that it
was not taken from and on synthetic anomalies, on test once, on real ones. Intervals are exact binomial ones over the
images of one split (:func:`raydiff.core.metrics.proportion`); with several seeds the mean rate, as the images are the
same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from raydiff.core.metrics import Estimate, proportion
from raydiff.report.export import Heading, Table
from raydiff.report.figures import INK, SETTINGS, to_svg
from raydiff.report.sweep_data import Sweep
from raydiff.report.tables import Cell, Row
from raydiff.sweep_records import Setting

__all__ = ["Rate", "rates", "rates_figure", "rates_sentence", "rates_table"]

_TARGET = "calibration.target_fpr"


@dataclass(frozen=True)
class Rate:
    """Realised rates at one target on one split, with the number of seeds behind the mean."""

    split: str
    target: float
    fpr: Estimate
    tpr: Estimate | None
    num_normal: int
    num_seeds: int

    @property
    def holds(self) -> bool:
        """Whether the target lies in the interval of the false-positive rate."""
        return self.fpr.low is None or self.fpr.high is None or self.fpr.low <= self.target <= self.fpr.high


def rates(sweep: Sweep) -> list[Rate]:
    """Of the best point: on selection at each target that was tried around it, on test at the refits' targets."""
    return [*_on_selection(sweep), *_on_test(sweep)]


def _on_selection(sweep: Sweep) -> list[Rate]:
    rows = [row for row in sweep.around if row.varied in (None, _TARGET)] or ([sweep.best] if sweep.best else [])
    by_target: dict[float, Setting] = {}
    for row in rows:
        by_target.setdefault(row.target_fpr, row)
    found = []
    for target, row in sorted(by_target.items()):
        fpr, tpr = row.values.get("realised_fpr"), row.values.get("detection_rate")
        if fpr is not None and math.isfinite(fpr) and row.num_normal > 0:
            detected = None if tpr is None else _share([tpr], row.num_normal)
            found.append(Rate("selection", target, _share([fpr], row.num_normal), detected, row.num_normal,
                              len(row.by_seed)))  # fmt: skip
    return found


def _on_test(sweep: Sweep) -> list[Rate]:
    refits = sweep.final.winner if sweep.final else ()
    read = [(rate, refit.test) for refit in refits for rate in refit.rates if refit.test.get("num_test_normal", 0) > 0]
    found = []
    for target in sorted({rate["target_fpr"] for rate, _ in read}):
        here = [(rate, test) for rate, test in read if rate["target_fpr"] == target]
        normal, anomalous = (int(here[0][1].get(name, 0)) for name in ("num_test_normal", "num_test_anomalous"))
        tpr = _share([rate["realised_tpr"] for rate, _ in here], anomalous) if anomalous else None
        fpr = _share([rate["realised_fpr"] for rate, _ in here], normal)
        found.append(Rate("test", target, fpr, tpr, normal, len(here)))
    return found


def _share(values: Iterable[float], total: int) -> Estimate:
    """The mean of rates over the same images, and the interval of as many images as that is."""
    mean = fmean(values)
    interval = proportion(min(total, max(0, round(mean * total))), total)
    return Estimate(mean, interval.low, interval.high)


def rates_figure(found: Sequence[Rate], kind: str, name: str) -> str:
    """Realised against target rate; ``kind`` is ``fpr`` or ``tpr``. The diagonal is a promise that is kept."""
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(4.4, 3.5), layout="constrained")
        axes = figure.add_subplot()
        top = max(rate.target for rate in found)
        for split, colour, marker, shift in (("selection", "#0072B2", "o", -0.006), ("test", "#D55E00", "s", 0.006)):
            here = [(rate.target, estimate) for rate in found if rate.split == split
                    and (estimate := getattr(rate, kind)) is not None]  # fmt: skip
            if here:
                values = [estimate.value for _, estimate in here]
                below = [max(0.0, e.value - (e.low or 0.0)) for _, e in here]
                above = [max(0.0, (e.high or e.value) - e.value) for _, e in here]
                axes.errorbar([target + shift * top for target, _ in here], values, yerr=[below, above], fmt=marker,
                              color=colour, markersize=5, capsize=3, linewidth=1.3, label=split)  # fmt: skip
        if kind == "fpr":
            axes.plot([0, 1.05 * top], [0, 1.05 * top], color=INK, linewidth=0.7, alpha=0.5)
        else:
            axes.set_ylim(0, 1.02)
        axes.set(xlabel="Target false-positive rate", xlim=(0, 1.08 * top),
                 ylabel="Realised false-positive rate" if kind == "fpr" else "Detection rate")  # fmt: skip
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
        figure.legend(loc="outside lower center", ncols=2)
        return to_svg(figure, name)


def rates_table(found: Sequence[Rate]) -> Table:
    """Of both splits, a row per target."""
    rows = [
        Row(f"{rate.split}, {100 * rate.target:.3g} %", [
            Cell(f"{rate.target:.3g}", "", rate.target), _cell(rate.fpr), _cell(rate.tpr),
            Cell(str(rate.num_normal), "", rate.num_normal), Cell(str(rate.num_seeds), "", rate.num_seeds),
        ])
        for rate in found
    ]  # fmt: skip
    headings = [Heading("Target"), Heading("FPR"), Heading("Detection rate", better=1), Heading("Normal images"),
                Heading("Seeds")]  # fmt: skip
    return Table(
        "thresholds", "Realised against target rate", "Split", headings, rows,
        "Small figures: exact 95 % binomial interval over the images of the split, of the mean over seeds.",
    )  # fmt: skip


def _cell(estimate: Estimate | None) -> Cell:
    if estimate is None:
        return Cell()
    low, high = f"{estimate.low:.3f}", f"{estimate.high:.3f}"
    return Cell(f"{estimate.value:.3f}", f"{low}–{high}", estimate.value, low=estimate.low, high=estimate.high)


def rates_sentence(found: Sequence[Rate]) -> str:
    """At how many targets the promise is kept, on each split."""
    said = []
    for split in ("selection", "test"):
        here = [rate for rate in found if rate.split == split]
        if here:
            held = sum(rate.holds for rate in here)
            said.append(f"on {split} at {held} of {len(here)} targets")
    return f"The target lies within the interval of the realised false-positive rate {' and '.join(said)}."
