"""What a benchmark found, in sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from raydiff.report import words
from raydiff.report.benchmark_data import Benchmark, Planned
from raydiff.report.benchmark_tables import Verdict

__all__ = ["GLOSSARY", "lead", "listed", "pretrained_notes", "summary", "verdict"]

GLOSSARY = {
    name: words.GLOSSARY[name]
    for name in ("AUROC", "AP", "F1-max", "FPR at 95 % TPR", "TPR at 5 % FPR", "FPR and TPR at the threshold", "AUPRO",
                 "NFE")
} | {
    "p, Holm": "the p-value times a factor that keeps the chance of any false claim in the table below 5 %"
    " (Holm 1979)",
    "Average rank": "methods are ranked on each block, 1 is best, and the ranks averaged (Demsar 2006)",
    "Critical difference": "average ranks that lie closer cannot be told apart by Nemenyi's test at 0.05",
    "Seed": "a training from other random weights, order and noise; the test images stay the same",
    "p": words.GLOSSARY["p"],
    "Heat map": words.GLOSSARY["Heat map"],
}  # fmt: skip


def listed(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``; with semicolons alone where a name holds a comma."""
    if any("," in name for name in names):
        return words.joined(names)
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def lead(benchmark: Benchmark) -> str:
    """What was run, and what is missing of what was planned."""
    rows = [evaluation.rows[0] for evaluation in benchmark.evaluations]
    cells = {(row.dataset, row.category) for row in rows}
    seeds = sorted({row.seed for row in rows})
    counts = [
        words.count(len(benchmark.methods), "method"), words.count(len(benchmark.datasets), "data set"),
        *([f"{len(cells)} categories"] if len(cells) > len(benchmark.datasets) else []),
        words.count(len(seeds), "seed"),
    ]  # fmt: skip
    networks = words.count(len(benchmark.diffusion), "method")
    against = (
        f"the classic methods the others are held against: {listed(benchmark.classics)}" if benchmark.classics
        else "there is no classic method to hold them against, so no differences are given"
    )  # fmt: skip
    said = (
        f"{listed(counts)}: {words.count(len(rows), 'measured cell')}. {networks} evaluate a network; {against}."
    ).replace("1 method evaluate a", "1 method evaluates a")
    return " ".join([said, *progress(benchmark)])


def progress(benchmark: Benchmark) -> list[str]:
    """How much of the plan is measured; nothing where all is, or without a plan."""
    if not benchmark.unmeasured or benchmark.planned is None:
        return []
    total, groups = len(benchmark.planned), _grouped(benchmark.planned, benchmark.unmeasured)
    named = [f"{name} ({number})" for name, number in groups[:_MAX_NAMED]]
    if rest := sum(number for _, number in groups[_MAX_NAMED:]):
        named.append(f"{rest} more")
    measured = total - len(benchmark.unmeasured)
    return [
        f"{measured} of {total} planned cells are measured; missing: {words.joined(named)}. Means over less than was"
        " planned say so, and are never bold."
    ]


_MAX_NAMED = 8
_WHOLE: tuple[Callable[[Planned], str], ...] = (
    lambda cell: f"all of {cell[1]}", lambda cell: f"all of {cell[0]}", lambda cell: f"all of {cell[1]}: {cell[2]}",
)  # fmt: skip


def _grouped(planned: frozenset[Planned], missing: Sequence[Planned]) -> list[tuple[str, int]]:
    """What is missing as whole data sets first, then methods, then categories, then what is left of each method."""
    found: list[tuple[str, int]] = []
    asked, left = list(planned), list(missing)
    for names in _WHOLE:
        expected, gone = Counter(map(names, asked)), Counter(map(names, left))
        whole = {name for name, number in gone.items() if number == expected[name]}
        found += [(name, gone[name]) for name in gone if name in whole]
        asked, left = ([cell for cell in cells if names(cell) not in whole] for cells in (asked, left))
    return [*found, *Counter(f"{cell[0]} on {cell[1]}" for cell in left).most_common()]


def summary(benchmark: Benchmark, dataset: str, found: Sequence[Verdict]) -> str:
    """Who leads, and who wins, loses or cannot be told apart from the best classic method."""
    scores = [(m, benchmark.score(dataset, m)) for m in benchmark.methods_of(dataset)]
    whole = [(s.mean, s, m) for m, s in scores if s is not None and not s.missing]
    sentences = [] if whole else ["No method has all its cells yet."]
    if whole and len(whole) < len(scores):
        sentences.append(f"{len(whole)} of {words.count(len(scores), 'method')} have all their cells.")
    if whole:
        mean, score, best = max(whole, key=lambda item: item[0])
        spread = "" if score.spread is None else f", ± {score.spread:.3f} over {score.num_seeds} seeds"
        marked = ", which uses pretrained weights" if best in benchmark.pretrained else ""
        sentences.append(f"The highest mean AUROC is that of {best}{marked}: {mean:.3f}{spread}.")
        scratch = [item for item in whole if item[2] not in benchmark.pretrained]
        if marked and scratch:
            mean, _, name = max(scratch, key=lambda item: item[0])
            sentences.append(f"The highest without pretrained weights is that of {name}: {mean:.3f}.")
    return " ".join([*sentences, *verdict(benchmark, found), *_below_chance(benchmark, dataset)])


def verdict(benchmark: Benchmark, found: Sequence[Verdict]) -> list[str]:
    """One sentence for each outcome, or why there is none."""
    if not found:
        why = "no classic method ran on the same images" if benchmark.classics else "no classic method is among them"
        return [f"No comparison with a classic method: {why}."]
    said = {
        1: "Above the best classic method of each category and seed",
        -1: "Below it"
        if any(v.outcome == 1 for v in found)
        else "Below the best classic method of each category and seed",
        0: "Not told apart from it",
    }
    if all(v.outcome == 0 for v in found):
        said[0] = "Not told apart from the best classic method of each category and seed"
    sentences = []
    for outcome, beginning in said.items():
        members = sorted((v for v in found if v.outcome == outcome), key=lambda v: -v.against.difference.estimate.value)
        if members:
            sentences.append(f"{beginning}: {listed([_named(v) for v in members])}.".replace("(-", "(−"))
    return sentences


def _below_chance(benchmark: Benchmark, dataset: str) -> list[str]:
    """A warning where every classic method is worse than guessing."""
    scores = [score.mean for name in benchmark.classics if (score := benchmark.score(dataset, name)) is not None]
    if not scores or max(scores) >= 0.5:
        return []
    return [
        f"No classic method reaches an AUROC of one half here (the highest mean is {max(scores):.3f}), so to be above"
        " them is not yet to be good."
    ]


def _named(verdict: Verdict) -> str:
    against = verdict.against
    cells = "" if against.is_complete else f", {against.cells} cells"
    return f"{against.method} ({against.difference.estimate.value:+.3f}{cells})"


def pretrained_notes(benchmark: Benchmark) -> list[str]:
    """The footnotes of the dagger: which weights, used by whom."""
    by_weights: dict[tuple[str, ...], list[str]] = {}
    for method in benchmark.methods:
        if method in benchmark.pretrained:
            by_weights.setdefault(benchmark.pretrained[method], []).append(method)
    return [
        f"† uses pretrained weights {listed(weights)}: {listed(methods)}." for weights, methods in by_weights.items()
    ]
