"""Does a sweep's search find more than chance, and what does the second level save? Replayed on a table of trainings.

    python -m benchmarks.sweep_search OUT [--seeds 5] [--trials 40]

Every training of a finite space (90 tiny networks on one digit) is done once and each of its 216 scorings measured, so
that a search can be repeated with many sampler seeds for nothing, and the best value that there is, is known (tabular
benchmarks: Klein and Hutter 2019, arXiv:1905.04970). The table is kept in ``OUT``; a rerun goes on with it. On it are
replayed: the sweep's two levels (``raydiff.distributed.second_level`` itself, on the table's values), and a flat search
in which every trial proposes a training and one scoring. Values are AUROC on the selection split; what the points that
were chosen are worth on test is looked up after all choices are made.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import optuna
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import stats

from benchmarks.sweep_table import Params, Table, text, the_config, the_space
from raydiff.core.metrics import image_auroc
from raydiff.detector import DiffusionDetector, load_detector
from raydiff.distributed.points import own_point
from raydiff.distributed.second_level import sampler_of, search_settings
from raydiff.experiment import ARTIFACT, calibrated
from raydiff.images import to_tensor
from raydiff.provenance import hardware, source_commit
from raydiff.search_space import LEVELS, Level, SearchSpace
from raydiff.shards import ShardSet, write_shards
from raydiff.sweep.jobs import TRAINING, Job, Networks, folder_of
from raydiff.sweep_records import Setting

SETTINGS_PER_TRAINING = 50
FLAT = 10  # trials of a flat search for each one of a search with two levels
DRAWN = 100
SHOWN, TOLERANCES = (5, 10, 20, 40), (0.03, 0.01, 0.005, 0.001)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Step:
    """What a trial came to: its training, the setting that it is worth, and the value of that."""

    training: str
    scoring: str
    value: float


@dataclass
class Replayed(Networks):
    """Networks whose values are looked up."""

    table: Mapping[str, float] = field(default_factory=dict)

    def measure(self, params: Params, *, varied: str | None = None) -> Setting:
        scoring = {path: value for path, value in params.items() if path.startswith("scoring.")}
        row = Setting(
            phase="search", trial=None, training="", params=dict(params), by_seed={}, num_normal=0, target_fpr=0.05,
            values={"selection_auroc": self.table[text(scoring)]}, varied=varied,
        )  # fmt: skip
        self.measured.append(row)
        return row

    def keep(self, rows: Sequence[Setting]) -> None:
        """They are in the table."""


@dataclass
class Searches:
    """Replays on a table; what the second level finds on a training with a sampler and seed is kept."""

    table: Table
    trials: int
    found: dict[tuple[str, str, int], list[Step]] = field(default_factory=dict)

    def settings(self, training: str, sampler: str, seed: int) -> list[Step]:
        """The second level on one training, as the sweep does it."""
        key = (training, sampler, seed)
        if key not in self.found:
            job = replace(self.table.jobs[training], space=the_space(sampler, seed))
            networks = Replayed(job, {}, {}, table=self.table.values[training])
            rows = search_settings(networks, SETTINGS_PER_TRAINING)
            self.found[key] = [
                Step(training, text(split(row.params, job.space)[1]), row.values["selection_auroc"]) for row in rows
            ]
        return self.found[key]

    def two_levels(self, outer: str, inner: str, seed: int) -> list[Step]:
        """Every trial opens a training and is worth the best of the settings tried on it."""
        space = the_space(outer, seed)
        study = self._study(space, seed, TRAINING)
        steps = []
        for _ in range(self.trials):
            trial = study.ask()
            training = text(space.suggest(trial, TRAINING))
            steps.append(max(self.settings(training, inner, seed), key=lambda step: step.value))
            study.tell(trial, steps[-1].value)
        return steps

    def flat(self, sampler: str, seed: int) -> list[Step]:
        """Every trial proposes a training and one scoring together."""
        space = the_space(sampler, seed)
        study = self._study(space, seed, LEVELS)
        steps = []
        for _ in range(FLAT * self.trials):
            trial = study.ask()
            training, scoring = map(text, split(space.suggest(trial, LEVELS), space))
            steps.append(Step(training, scoring, self.table.values[training][scoring]))
            study.tell(trial, steps[-1].value)
        return steps

    def _study(self, space: SearchSpace, seed: int, levels: Collection[Level]) -> optuna.Study:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(direction="maximize", sampler=sampler_of(space, seed))
        study.enqueue_trial(own_point(space, self.table.config, levels))  # as a sweep begins
        return study


def split(params: Params, space: SearchSpace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters of the training, and of the scoring."""
    first = space.paths(TRAINING)
    kept = {path: value for path, value in params.items() if path in first}
    return kept, {path: value for path, value in params.items() if path not in first}


def by_trial(steps: Sequence[Step]) -> Floats:
    """The best value after 1, 2, ... trials."""
    return np.maximum.accumulate([step.value for step in steps])


def by_training(steps: Sequence[Step]) -> Floats:
    """The best value with 1, 2, ... networks trained: a training that is proposed again costs nothing."""
    best: list[float] = []
    seen: set[str] = set()
    for step, value in zip(steps, by_trial(steps), strict=True):
        if step.training not in seen:
            seen.add(step.training)
            best.append(value)
        best[-1] = value
    return np.array(best)


def needed(curve: Floats, goal: float) -> float:
    """How many until the goal; infinite when it is not reached."""
    reached = np.flatnonzero(curve >= goal - 1e-12)
    return float(reached[0] + 1) if len(reached) else math.inf


def at(curve: Floats, count: int) -> float:
    """The best value after so many, or after all where there were fewer."""
    return float(curve[min(count, len(curve)) - 1])


def spread(values: Sequence[float], form: str = ".4f") -> str:
    """Median, the lower of two, with the lowest and the highest."""
    low, middle, high = (format(value, form) for value in np.quantile(values, (0, 0.5, 1), method="inverted_cdf"))
    return f"{middle} [{low}, {high}]".replace("inf", "never")


def paired(first: Sequence[float], second: Sequence[float]) -> str:
    """Mean difference with the t interval over seeds, 95 %."""
    difference = np.subtract(first, second)
    half = stats.t.ppf(0.975, len(difference) - 1) * difference.std(ddof=1) / math.sqrt(len(difference))
    return f"{difference.mean():+.4f} [{difference.mean() - half:+.4f}, {difference.mean() + half:+.4f}]"


Runs = dict[str, list[list[Step]]]
TWO, MIXED, CHANCE = "two levels, TPE", "two levels, random trainings, TPE settings", "two levels, random"
FLAT_TPE, FLAT_CHANCE = "flat, TPE", "flat, random"


def run_all(searches: Searches, seeds: int) -> Runs:
    """Every search with every sampler seed."""
    ways: dict[str, Callable[[int], list[Step]]] = {
        TWO: lambda seed: searches.two_levels("tpe", "tpe", seed),
        MIXED: lambda seed: searches.two_levels("random", "tpe", seed),
        CHANCE: lambda seed: searches.two_levels("random", "random", seed),
        FLAT_TPE: lambda seed: searches.flat("tpe", seed),
        FLAT_CHANCE: lambda seed: searches.flat("random", seed),
    }
    runs: Runs = {}
    for name, way in ways.items():
        runs[name] = [way(seed) for seed in range(seeds)]
        print(f"{name}: replayed", file=sys.stderr, flush=True)
    return runs


def describe(table: Table, best: float) -> None:
    """What there is to be found."""
    tops = np.array([max(values.values()) for values in table.values.values()])
    every = np.array([value for values in table.values.values() for value in values.values()])
    training, settings = np.array(table.seconds).T
    print(
        f"\n{len(tops)} trainings, {len(every)} settings. Best value {best:.4f}; of a training's best setting: median"
        f" {np.median(tops):.4f}, lowest {tops.min():.4f}; of all settings: median {np.median(every):.4f}, lowest"
        f" {every.min():.4f}. CPU seconds, median: a training {np.median(training):.2f}, {len(every) // len(tops)}"
        f" settings on it {np.median(settings):.2f}.\n"
    )
    for tolerance in TOLERANCES:
        print(
            f"- within {tolerance} of the best: {(tops >= best - tolerance).sum()} trainings,"
            f" {(every >= best - tolerance).sum()} settings"
        )


def report(runs: Runs, best: float, trials: int) -> None:
    """Tables of the searches; medians and ranges over sampler seeds."""
    shown = [count for count in SHOWN if count <= trials]
    head = " | ".join(map(str, shown))
    for what, curve in (("trials", by_trial), ("networks trained", by_training)):
        print(f"\nBest value so far, median [lowest, highest], after so many {what}:\n\n| | {head} |")
        print("|---" * (1 + len(shown)) + "|")
        for name, found in runs.items():
            print(f"| {name} | " + " | ".join(spread([at(curve(s), n) for s in found]) for n in shown) + " |")
    print("\nNetworks trained until within so much of the best value of the table, median [fewest, most]:\n")
    print("| | " + " | ".join(map(str, TOLERANCES)) + " |\n" + "|---" * (1 + len(TOLERANCES)) + "|")
    for name, found in runs.items():
        ways = [("", by_training)] + ([(", every trial trains", by_trial)] if name in (FLAT_TPE, FLAT_CHANCE) else [])
        for note, curve in ways:
            cells = [spread([needed(curve(s), best - gap) for s in found], ".0f") for gap in TOLERANCES]
            print(f"| {name}{note} | " + " | ".join(cells) + " |")
    print(f"\nDifferent networks in all trials ({trials}, flat {FLAT * trials}), median [fewest, most]:\n")
    for name, found in runs.items():
        print(f"- {name}: {spread([len(by_training(steps)) for steps in found], '.0f')}")
    same_value(runs, shown)
    print(f"\nDifference of the best value, mean over seeds with t interval:\n\n| after so many | {head} |")
    print("|---" * (1 + len(shown)) + "|")
    for first, second, what, curve in (
        (TWO, MIXED, "trials", by_trial), (TWO, CHANCE, "trials", by_trial),
        (FLAT_TPE, FLAT_CHANCE, "trials", by_trial),
        (TWO, FLAT_TPE, "networks trained", by_training), (CHANCE, FLAT_CHANCE, "networks trained", by_training),
    ):  # fmt: skip
        cells = [paired(*([at(curve(s), n) for s in runs[name]] for name in (first, second))) for n in shown]
        print(f"| {first}, minus {second}; {what} | " + " | ".join(cells) + " |")


def same_value(runs: Runs, shown: Sequence[int]) -> None:
    """What a flat search needs for what two levels reach, seed by seed."""
    print("\nNetworks that a flat search trains until it has what two levels have after so many, of the same seed:\n")
    print("| | " + " | ".join(map(str, shown)) + " |\n" + "|---" * (1 + len(shown)) + "|")
    for two, flat in ((TWO, FLAT_TPE), (CHANCE, FLAT_CHANCE)):
        for note, curve in (("", by_training), (", every trial trains", by_trial)):
            pairs = list(zip(runs[two], runs[flat], strict=True))
            cells = [spread([needed(curve(b), at(by_training(a), n)) for a, b in pairs], ".0f") for n in shown]
            print(f"| {flat}{note} | " + " | ".join(cells) + " |")


def second_level_alone(searches: Searches, seeds: int) -> dict[str, list[Floats]]:
    """How far below its training's best the second level is, per sampler a mean curve per seed; printed as well."""
    table = searches.table
    chosen = list(table.values)[:: max(1, len(table.values) // 10)]
    curves: dict[str, list[Floats]] = {}
    for sampler in ("tpe", "random"):
        curves[sampler] = [
            np.mean(
                [by_trial(searches.settings(one, sampler, seed)) - max(table.values[one].values()) for one in chosen],
                axis=0,
            )
            for seed in range(seeds)
        ]
    shown = (5, 10, 20, SETTINGS_PER_TRAINING)
    print(f"\nThe second level alone: best setting so far less the best there is, mean over {len(chosen)} trainings:\n")
    print("| after so many settings | " + " | ".join(map(str, shown)) + " |\n" + "|---" * (1 + len(shown)) + "|")
    for sampler, found in curves.items():
        print(f"| {sampler} | " + " | ".join(spread([at(curve, n) for curve in found]) for n in shown) + " |")
    cells = [paired(*([at(curve, n) for curve in curves[sampler]] for sampler in curves)) for n in shown]
    print("| TPE minus random | " + " | ".join(cells) + " |")
    return curves


def on_test(table: Table, runs: Runs, every: Sequence[Step], trials: int) -> None:
    """AUROC on test of the points that were chosen; nothing is chosen by it."""
    shards = ShardSet.open(table.shards)
    known: dict[tuple[str, str], float] = {}

    def look_up(step: Step) -> float:
        key = (step.training, step.scoring)
        if key not in known:
            known[key] = test_auroc(table.jobs[step.training], json.loads(step.scoring), shards)
        return known[key]

    print("\nAUROC on test of what was chosen, looked up at the end:\n\n| | selection | test |\n|---|---|---|")
    for name, found in runs.items():
        budget = trials if name in (TWO, MIXED, CHANCE) else FLAT * trials
        ends = [max(steps, key=lambda step: step.value) for steps in found]
        print(f"| {name}, {budget} trials | {spread([e.value for e in ends])} | {spread([*map(look_up, ends)])} |")
    start = runs[FLAT_TPE][0][0]
    some = [every[int(i)] for i in np.random.default_rng(0).choice(len(every), DRAWN, replace=False)]
    print(f"| where each search starts | {start.value:.4f} | {look_up(start):.4f} |")
    best = max(every, key=lambda step: step.value)
    print(f"| the best of the table | {best.value:.4f} | {look_up(best):.4f} |")
    print(f"\n{DRAWN} settings drawn from the table, medians, and the rank correlation of selection and test:\n")
    print("| | settings | selection | test | correlation |\n|---|---|---|---|---|")
    for pooling in (None, "mean", "max", "top_k"):
        those = [step for step in some if pooling in (None, json.loads(step.scoring)["scoring.pooling"])]
        ours, theirs = [step.value for step in those], [look_up(step) for step in those]
        rank = stats.spearmanr(ours, theirs)
        print(
            f"| {pooling or 'all'} | {len(those)} | {spread(ours)} | {spread(theirs)}"
            f" | {rank.statistic:+.2f}, p {rank.pvalue:.1g} |"
        )


def test_auroc(job: Job, scoring: Params, shards: ShardSet) -> float:
    detector = load_detector(folder_of(job.out, job.key) / "seed-0" / ARTIFACT)
    assert isinstance(detector, DiffusionDetector)
    judge = calibrated(detector.with_scoring(job.scored({**job.params, **scoring}, 0).scoring), shards)
    parts = list(shards.read("test", judge.image_spec))
    scores = np.concatenate([judge.score(to_tensor(part.images)).image.numpy() for part in parts])
    return image_auroc(scores, np.concatenate([part.is_anomaly for part in parts]))


def draw(out: Path, runs: Runs, alone: Mapping[str, list[Floats]], best: float, trials: int) -> None:
    """``searches.png`` and ``.svg``: medians with the range over seeds; level once a search has no more."""
    with mpl.rc_context({"svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(13, 4.2), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        for name, style in ((TWO, ("#0072B2", "-")), (MIXED, ("#009E73", "-.")), (CHANCE, ("#D55E00", "--"))):
            band(left, [by_trial(steps) for steps in runs[name]], trials, name, style)
        for name, style in ((TWO, ("#0072B2", "-")), (CHANCE, ("#D55E00", "--")), (FLAT_TPE, ("#CC79A7", "-.")),
                            (FLAT_CHANCE, ("#555555", ":"))):  # fmt: skip
            band(middle, [by_training(steps) for steps in runs[name]], trials, name, style)
        for name, style in (("tpe", ("#0072B2", "-")), ("random", ("#D55E00", "--"))):
            band(right, alone[name], SETTINGS_PER_TRAINING, {"tpe": "TPE"}.get(name, name), style)
        for axes in (left, middle):
            axes.axhline(best, color="0.6", linewidth=0.8)
            axes.set_ylabel("best selection AUROC so far")
        left.set(xlabel="trials", title="TPE against random search")
        middle.set(xlabel="networks trained", title="With and without the second level")
        right.set(xlabel="settings", ylabel="below the training's best setting", title="The second level alone")
        for axes in (left, middle, right):
            axes.legend(loc="lower right", frameon=False, fontsize=8)
        for ending in ("png", "svg"):
            figure.savefig(out / f"searches.{ending}", dpi=110)


def band(axes: Axes, curves: Sequence[Floats], length: int, name: str, style: tuple[str, str]) -> None:
    whole = np.array([[at(curve, n) for n in range(1, length + 1)] for curve in curves])
    x = np.arange(1, length + 1)
    axes.fill_between(x, whole.min(0), whole.max(0), color=style[0], alpha=0.12, linewidth=0, step="post")
    axes.step(x, np.median(whole, 0), color=style[0], linestyle=style[1], where="post", label=name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=5, help="of the sampler, at least 2")
    parser.add_argument("--trials", type=int, default=40, help="of a search with two levels")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = the_config()
    table = Table(arguments.out, write_shards(config.data, str(arguments.out / "shards")).uri, config)
    table.fill()
    searches = Searches(table, arguments.trials)
    every = [Step(one, scoring, v) for one, values in table.values.items() for scoring, v in values.items()]
    best = max(step.value for step in every)
    runs = run_all(searches, arguments.seeds)
    print(f"{hardware('cpu')}; commit {source_commit()}; {arguments.seeds} sampler seeds, {arguments.trials} trials")
    describe(table, best)
    report(runs, best, arguments.trials)
    alone = second_level_alone(searches, arguments.seeds)
    draw(arguments.out, runs, alone, best, arguments.trials)
    on_test(table, runs, every, arguments.trials)


if __name__ == "__main__":
    main()
