"""What a sweep found, in sentences: what matters, what does not, and what is left of the gain."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from statistics import fmean, median, stdev
from typing import Any

from raydiff.core.metrics import Estimate
from raydiff.report.benchmark_words import listed
from raydiff.report.sweep_data import Importance, Sweep, label_of, value_name
from raydiff.report.sweep_figures import EVALUATOR_NAMES, number
from raydiff.report.sweep_statistics import Curve, Paired, Spread, paired
from raydiff.report.words import count
from raydiff.sweep_records import Refit

__all__ = ["GLOSSARY", "TEST_METRIC", "fate", "gap", "lead", "matters", "mean_of", "proxy", "setting_name", "survival"]

TEST_METRIC = {"selection_average_precision": "average_precision", "detection_rate": "realised_tpr"}
"""What test says of an objective; of all others ``auroc``."""

_POINTS = {"selection_auroc": "AUROC", "selection_average_precision": "AP", "detection_rate": "the detection rate",
           "fpr_gap": "the false-positive rate"}  # fmt: skip
_MAX_NAMED = 6
_SMALL = 0.01

GLOSSARY = {
    "Selection": "normal calibration images and synthetic anomalies made of them; all that the search looks at",
    "Test": "real anomalies; read after the winner was chosen",
    "Training": "one combination of the parameters that change weights, over its seeds; its value is that of its best"
    " setting",
    "Setting": "one combination of all parameters, measured on a training that is there already",
    "fANOVA": "a forest is fitted to the objective; the share of its variance over the whole space that a parameter"
    " explains alone (Hutter et al. 2014). What interactions explain belongs to none",
    "Impurity": "mean decrease in impurity: the share of the variance among the settings that were tried which the"
    " forest's splits on a parameter take away, interactions included (Breiman 2001)",
    "Interval of an importance": "2.5th to 97.5th percentile over draws of trainings with replacement, each with its"
    " settings",
    "Chance": "what the same parameter gets with its values shuffled; a full bar beats its shuffled copy in 97.5 % of"
    " the draws",
    "Seed noise": "Tukey's honestly significant difference at 0.05, seeds as blocks: means closer than that are not"
    " told apart",
    "Pruned": "stopped early on its held-out loss; it has no value and is not on the front",
}


def lead(sweep: Sweep, importances: Sequence[Importance], curves: Sequence[Curve], spreads: Sequence[Spread]) -> str:
    """The first paragraph: what was searched, best against worst, what matters and what does not."""
    clear = [each.path for each in importances if each.is_clear]
    return " ".join([
        *_searched(sweep), *_extremes(sweep, clear), *matters(sweep, importances, curves, spreads)
    ])  # fmt: skip


def gap(objective: str, difference: float) -> str:
    """``3.4 points of AUROC`` of shares, else the number and its name."""
    if objective in _POINTS:
        return f"{100 * difference:.1f} points of {_POINTS[objective]}"
    return f"{number(difference)} ({label_of(objective).lower()})"


def setting_name(params: Mapping[str, Any], paths: Collection[str] | None = None) -> str:
    """``schedule.beta_schedule linear, training.num_steps 300``; only these paths where given."""
    kept = [f"{path} {value_name(value)}" for path, value in params.items() if paths is None or path in paths]
    more = [f"{len(kept) - _MAX_NAMED} more"] if len(kept) > _MAX_NAMED else []
    return ", ".join([*kept[:_MAX_NAMED], *more])


def _searched(sweep: Sweep) -> list[str]:
    levels = [axis.level for axis in sweep.axes.values()]
    weights = levels.count("training")
    of = f", {weights} of which change{'s' * (weights == 1)} the weights" if weights else ", none of which changes the"
    of += "" if weights else " weights"
    settings = f"{count(len(sweep.search), 'setting')} of {count(len(sweep.valued), 'training')}"
    return [f"{count(len(levels), 'parameter')}{of}; {settings} were measured on selection by {label_of(sweep.lead)}."
            .replace("by AUROC on selection", "by AUROC")]  # fmt: skip


def fate(sweep: Sweep) -> str:
    """The second: what is left of the gain, and what the search cost."""
    return " ".join([*survival(sweep), *_spared(sweep), *_overhead(sweep), *_stopped(sweep)])


def _extremes(sweep: Sweep, clear: Collection[str]) -> list[str]:
    valued = sorted(sweep.valued, key=lambda trial: sweep.sign * sweep.value(trial))
    if len(valued) < 2:
        values = [row.values[sweep.lead] for row in sorted(sweep.search, key=sweep.worth)]
        said = gap(sweep.lead, abs(values[-1] - values[0])) if values else ""
        return [
            f"Between the best setting ({number(values[-1])}) and the worst ({number(values[0])}) lie {said}."
        ] if values else []  # fmt: skip
    worst, best = valued[0], valued[-1]
    said = gap(sweep.lead, abs(sweep.value(best) - sweep.value(worst)))
    named = {path for path in {**best.params, **worst.params} if path in clear} or None
    ends = [f"{number(sweep.value(trial))} with {setting_name(trial.params, named)}" for trial in (best, worst)]
    return [f"Between the best training and the worst, each by its best setting, lie {said}: {ends[0]}, and {ends[1]}."]


def matters(
    sweep: Sweep, importances: Sequence[Importance], curves: Sequence[Curve], spreads: Sequence[Spread]
) -> list[str]:
    """Which parameters matter and which do not; by the first evaluator, then by the curves."""
    if not importances:
        return [
            f"{count(len(sweep.valued), 'training')} with a value {'is' if len(sweep.valued) == 1 else 'are'} too few"
            " for importances with an interval.", *_by_curves(sweep, curves), *_by_spreads(sweep, spreads),
        ]  # fmt: skip
    first = [each for each in importances if each.evaluator == importances[0].evaluator]
    clear = [each for each in first if each.is_clear]
    few = ["There are too few trainings to say what weights do; on these:"] if _only_scoring(sweep, first) else []
    said = _first_of(sweep, clear, first) if clear else [
        f"No parameter is told from chance by {_name(first[0])} over this many trainings."
    ]  # fmt: skip
    rest = [each.path for each in first if not each.is_clear]
    return [*few, *said, *_without_effect(sweep, rest, importances, curves), *_by_spreads(sweep, spreads)]


def _only_scoring(sweep: Sweep, first: Sequence[Importance]) -> bool:
    """Whether parameters that change weights were searched, but none could be measured."""
    levels = {sweep.axis(each.path).level for each in first}
    return "training" not in levels and any(axis.level == "training" for axis in sweep.axes.values())


def _first_of(sweep: Sweep, clear: Sequence[Importance], first: Sequence[Importance]) -> list[str]:
    """The share of a conditional parameter is one of a smaller variance, so it leads only where no other is clear."""
    when = {path for path, parameter in sweep.space.parameters.items() if parameter.when}
    top, *others = sorted(clear, key=lambda each: each.path in when)
    rivals = [each.path for each in first if each is not top and each.high >= top.low and each.path not in when]
    beyond = f"; its interval overlaps that of {listed(rivals)}" if rivals else "; its interval is clear of all others"
    where = " among the settings that have it" if top.path in when else ""
    said = [
        f"{top.path} matters most: {_name(top)} gives it {top.value:.2f} of the variance{where}"
        f" (95 % interval {top.low:.2f} to {top.high:.2f}){beyond}."
    ]
    large = [each for each in others if each.value >= _SMALL]
    if named := [f"{each.path} ({each.value:.2f}{', where it applies' * (each.path in when)})" for each in large]:
        said.append(f"{_series(named)} matter{'s' * (len(named) == 1)} too.")
    if small := [each.path for each in others if each.value < _SMALL]:
        verbs = "is told from chance, but gives" if len(small) == 1 else "are told from chance, but give"
        said.append(f"{listed(small)} {verbs} less than 1 %.")
    return said


def _series(names: Sequence[str]) -> str:
    """``a, b and c``, whether or not a name holds a comma."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _name(importance: Importance) -> str:
    return EVALUATOR_NAMES.get(importance.evaluator, importance.evaluator)


def _without_effect(
    sweep: Sweep, paths: Sequence[str], importances: Sequence[Importance], curves: Sequence[Curve]
) -> list[str]:
    """Those that are not told from chance, apart by what the other evaluator and their own curve say."""
    clear_elsewhere = {each.path for each in importances if each.is_clear}
    by_path = {curve.axis.path: curve for curve in curves}
    known = _flat(curves)
    flat = [path for path in paths if path in known and path not in clear_elsewhere]
    moved = [path for path in paths if path in by_path and by_path[path].is_clear]
    elsewhere = [path for path in paths if path in clear_elsewhere and path not in moved]
    rest = [path for path in paths if path not in (*flat, *moved, *elsewhere)]
    said = []
    if flat:
        said.append(
            f"{listed(flat)} {_do(flat)} not matter here: no more important than shuffled values, and around the best"
            " point the objective moves by no more than seed noise."
        )
    if rest:
        said.append(f"{listed(rest)} cannot be told from chance.")
    if elsewhere:
        said.append(f"The evaluators disagree about {listed(elsewhere)}.")
    if moved:
        named = [f"{path} ({gap(sweep.lead, by_path[path].range)})" for path in moved]
        said.append(
            f"Not told from chance over the whole space, yet beyond seed noise around the best point: {listed(named)}."
        )
    return said


def _do(paths: Sequence[str]) -> str:
    return "does" if len(paths) == 1 else "do"


def _flat(curves: Sequence[Curve]) -> list[str]:
    """Curves within seed noise, where that noise is smaller than what some parameter does: else they say nothing."""
    most = max((curve.range for curve in curves if curve.is_clear), default=0.0)
    return [c.axis.path for c in curves if c.noise is not None and not c.is_clear and c.noise < most]


def _by_curves(sweep: Sweep, curves: Sequence[Curve]) -> list[str]:
    clear = sorted((curve for curve in curves if curve.is_clear), key=lambda curve: -curve.range)
    flat = _flat(curves)
    open_still = [c.axis.path for c in curves if c.noise is not None and not c.is_clear and c.axis.path not in flat]
    said = []
    if clear:
        named = [f"{curve.axis.path} ({gap(sweep.lead, curve.range)})" for curve in clear]
        said.append(f"Around the best point more than seed noise is moved by {listed(named)}.")
    if flat:
        said.append(f"{listed(flat)} {_do(flat)} not matter there: the objective moves by no more than seed noise.")
    if open_still:
        noise = max(curve.noise or 0.0 for curve in curves if curve.axis.path in open_still)
        said.append(
            f"Of {listed(open_still)} nothing can be said: seed noise reaches {gap(sweep.lead, noise)}; more seeds"
            " would tell."
        )
    return said


def _by_spreads(sweep: Sweep, spreads: Sequence[Spread]) -> list[str]:
    """The widest of those that no chance explains, without any model."""
    clear = [spread for spread in spreads if spread.is_clear]
    if not clear:
        return []
    top = clear[0]
    best = max(range(len(top.groups)), key=lambda i: sweep.sign * top.means[i])
    worst = min(range(len(top.groups)), key=lambda i: sweep.sign * top.means[i])
    return [
        f"Without any model: trainings with {top.path} {top.groups[best]} lie on average"
        f" {gap(sweep.lead, top.value)} from those with {top.groups[worst]}; shuffled, 95 % lie within"
        f" {gap(sweep.lead, top.chance)}."
    ]


def mean_of(refits: Sequence[Refit], split: str, metric: str) -> Estimate | None:
    """Mean over seeds; ``low`` and ``high`` lie one standard deviation off. None where a seed lacks it."""
    values = [getattr(refit, split).get(metric) for refit in refits]
    if not values or any(value is None for value in values):
        return None
    mean = fmean(values)
    spread = stdev(values) if len(values) > 1 else None
    return Estimate(mean) if spread is None else Estimate(mean, mean - spread, mean + spread)


def survival(sweep: Sweep) -> list[str]:
    """How much of what the search promised is left with fresh seeds, and on test."""
    final = sweep.final
    if final is None or not final.winner:
        return ["The winner was not refitted with fresh seeds, so how much of the gain survives is not known."]
    promised, here = final.promised.get(sweep.lead), mean_of(final.winner, "selection", sweep.lead)
    start = mean_of(final.start, "selection", sweep.lead)
    said = []
    if promised is not None and here is not None:
        said.append(f"The search promised {number(promised)} of its winner; {count(len(final.winner), 'fresh seed')}"
                    f" give{'s' * (len(final.winner) == 1)} {_with_spread(here)} on selection.")  # fmt: skip
        if start is not None:
            said += _share_left(sweep, promised, here.value, start.value)
    return [*said, *_on_test(sweep)]


def _share_left(sweep: Sweep, promised: float, here: float, start: float) -> list[str]:
    hoped, left = sweep.sign * (promised - start), sweep.sign * (here - start)
    if hoped <= 0:
        return [f"The start, refitted too, gives {number(start)}: no gain was promised."]
    found = sweep.final and paired(sweep.final.winner, sweep.final.start, "selection", sweep.lead)
    ends = sorted((sweep.sign * found.low, sweep.sign * found.high)) if found and found.low and found.high else []
    interval = f"; paired 95 % interval {' to '.join(_points(sweep.lead, end) for end in ends)}" if ends else ""
    return [
        f"The start, refitted too, gives {number(start)}: of a promised gain of {gap(sweep.lead, hoped)},"
        f" {_points(sweep.lead, left)} survive ({100 * left / hoped:.0f} %{interval}).".replace("(-", "(−")
    ]


def _points(objective: str, difference: float) -> str:
    return gap(objective, difference).split(" ")[0].replace("-", "−")


def _with_spread(estimate: Estimate) -> str:
    return number(estimate.value) + (
        "" if estimate.high is None else f" ± {number(estimate.high - estimate.value)}"
    )  # fmt: skip


def _on_test(sweep: Sweep) -> list[str]:
    final = sweep.final
    metric = TEST_METRIC.get(sweep.lead, "auroc")
    if final is None or (won := mean_of(final.winner, "test", metric)) is None:
        return ["Test was not read."]
    name = {"auroc": "AUROC", "average_precision": "AP", "realised_tpr": "detection rate"}[metric]
    times = len(final.extra.get("tested", ())) or 1
    read = "read once" if times == 1 else f"read for the {times} winners that this sweep has had, so seen before"
    said = f"On test, {read}, its {name} is {_with_spread(won)}"
    if (start := mean_of(final.start, "test", metric)) is None:
        return [f"{said}."]
    difference = paired(final.winner, final.start, "test", metric)
    return [f"{said}, and the start's {_with_spread(start)}{_verdict(difference)}."]


def _verdict(difference: Paired | None) -> str:
    if difference is None:
        return ""
    mean = f"{difference.mean:+.3f}".replace("-", "−")
    if difference.low is None or difference.high is None:
        return f": a difference of {mean}, with one seed and so without interval"
    low, high = (f"{end:+.3f}".replace("-", "−") for end in (difference.low, difference.high))
    clear = (
        "the winner is better" if difference.low > 0 else "the winner is worse" if difference.high < 0
        else "the two cannot be told apart"
    )  # fmt: skip
    return f": paired by seed {mean} (95 % interval {low} to {high}), so {clear}"


def _spared(sweep: Sweep) -> list[str]:
    settings, trials = len(sweep.search), len(sweep.valued)
    spared = settings - trials
    if spared <= 0:
        return []
    return [
        f"With one training per setting there would have been {settings:,} of them; the second level spared {spared:,}"
        f" ({settings / max(1, trials):.0f} settings per training)."
    ]


def _overhead(sweep: Sweep) -> list[str]:
    """Wall time of a trial over its training; only where every trial's time is known to hold its training's."""
    rows = [row for row in sweep.trainings if row.phase == "search" and row.state == "complete"]
    shares = [(row.trial_seconds or 0.0) / row.seconds for row in rows if row.seconds > 0]
    if not shares or len(shares) < len(rows) or min(shares) < 1:
        return []
    return [
        f"Half of the trials took less than {median([row.trial_seconds or 0.0 for row in rows]):.3g} s,"
        f" {100 * (median(shares) - 1):.0f} % more than their training alone, with the scoring of its settings."
    ]


def _stopped(sweep: Sweep) -> list[str]:
    pruned, failed = sweep.states["pruned"], sweep.states["failed"]
    parts = [f"{number} {'was' if number == 1 else 'were'} {state}" for number, state in
             ((pruned, "pruned"), (failed, "marked failed")) if number]  # fmt: skip
    if not parts:
        return []
    return [f"Of {count(len(sweep.trials), 'training')}, {listed(parts)}."]


def proxy(sweep: Sweep, rank: tuple[Estimate, int] | None) -> str:
    """Whether the held-out loss tells which training will be good."""
    if rank is None:
        return "Too few trainings with a loss and a value to say whether the loss is a good proxy."
    estimate, trainings = rank
    # a lower loss should go with a better objective
    low, high = sorted((-sweep.sign * (estimate.low or 0.0), -sweep.sign * (estimate.high or 0.0)))
    if low > 0:
        verdict = "a lower loss goes with a better training" + (
            ", so the loss is a good proxy here"
            if low > 0.5
            else ", but loosely: stopping by the loss can lose good ones"
        )
    elif high < 0:
        verdict = "a lower loss goes with a worse training, so stopping by the loss misleads"
    else:
        verdict = "whether a lower loss goes with a better training cannot be told: the loss is no proven proxy"
    shown = f"{estimate.value:.2f} (95 % interval {estimate.low:.2f} to {estimate.high:.2f})".replace("-", "−")
    return (
        f"Rank correlation of held-out loss and {label_of(sweep.lead)} over {trainings} trainings: {shown};"
        f" {verdict}. The loss of different prediction types and schedules has different units."
    )
