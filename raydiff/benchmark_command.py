"""What ``raydiff benchmark`` says: the plan, a line per task, the table at the end. All of it plain text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raydiff.benchmark import RESULTS, ROBUSTNESS, Benchmark, finished_cells, is_trained
from raydiff.plan import Plan
from raydiff.results import Evaluation, load_evaluations, read_robustness
from raydiff.tasks import Progress
from raydiff.tracking import clock

if TYPE_CHECKING:
    from raydiff.report.benchmark_data import Score

__all__ = ["failures", "listing", "progress_line", "redraw", "table", "write_report"]

_MAX_NAMED = 20


def listing(plan: Plan, out: Path) -> str:
    """Cells and trainings, each with whether it is done."""
    done = finished_cells(out)
    lines = [f"{plan.suite.title}: {len(plan.cells)} cells, {len(plan.trainings)} trainings, {len(plan.shards)} data"]
    lines += [
        f"  {_mark(is_trained(training, out))}  training {training.key}  {training.name}"
        for training in plan.trainings.values()
    ]
    lines += [f"  {_mark(cell.cell_id in done)}  cell {cell.cell_id}  {cell.name}" for cell in plan.cells]
    return "\n".join([*lines, f"{sum(cell.cell_id in done for cell in plan.cells)} of {len(plan.cells)} cells done"])


def progress_line(progress: Progress) -> str:
    """One task that has ended, and how far everything is."""
    outcome = progress.outcome
    counts = [f"{progress.num_done + progress.num_failed}/{progress.num_tasks}"]
    if progress.num_failed:
        counts.append(f"{progress.num_failed} failed")
    if progress.seconds_left:
        counts.append(f"about {clock(progress.seconds_left)} left")
    if outcome.failure is not None:
        said = f"FAILED ({outcome.failure.type}: {outcome.failure.message[:200]})"
    elif isinstance(outcome.value, Evaluation):
        said = f"AUROC {outcome.value.rows[0].metrics['auroc']}"
    else:
        said = outcome.value if isinstance(outcome.value, str) else "done"
    return f"[{', '.join(counts)}] {progress.task.name}: {said}, {outcome.seconds:.1f} s"


def failures(benchmark: Benchmark) -> list[str]:
    """One line for each task that failed, up to twenty."""
    named = list(benchmark.failed.items())[:_MAX_NAMED]
    lines = [f"failed: {name}: {failure.type}: {failure.message[:300]}" for name, failure in named]
    more = len(benchmark.failed) - len(named)
    return [*lines, f"... and {more} more"] if more else lines


def table(plan: Plan, evaluations: Sequence[Evaluation]) -> str:
    """Methods by data sets: the leading metrics, mean over categories, ± the sd over seeds of that mean.

    The figures are the report's. A mean over less than was planned says over how many cells.
    """
    from raydiff.report.benchmark_data import Benchmark as Arranged

    found = Arranged(evaluations, _classics(plan, evaluations), _planned(plan))
    names = list(dict.fromkeys(cell.dataset for cell in plan.cells))
    columns = [(name, metric) for name in names for metric in plan.suite.leading_metrics(name)]
    head = ["method", *(f"{name}: {metric}" for name, metric in columns)]
    body = [
        [method, *(_figure(found.score(name, method, metric)) for name, metric in columns)]
        for method in plan.suite.methods
    ]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = ["  ".join(item.ljust(width) for item, width in zip(line, widths, strict=True)) for line in [head, *body]]
    done = f"{len(evaluations)} of {len(plan.cells)} cells; mean over categories, ± sd over seeds"
    return "\n".join(["", f"{plan.suite.title}: {done}", *(line.rstrip() for line in lines), ""])


def write_report(plan: Plan, out: Path) -> tuple[list[Evaluation], Path] | None:
    """Write ``report.html`` from the finished cells of a plan; gives them too. None when there are none."""
    from raydiff.report import write_benchmark_report

    if not finished_cells(out):
        return None
    cells = {cell.cell_id for cell in plan.cells}
    evaluations = load_evaluations(out / RESULTS, cells=cells)
    if not evaluations:
        return None
    found = read_robustness(out / ROBUSTNESS) if (out / ROBUSTNESS).exists() else []
    metrics = [metric for name in plan.suite.datasets for metric in plan.suite.leading_metrics(name)]
    path = write_benchmark_report(
        evaluations, [row for row in found if row.cell in cells], out / "report.html", title=plan.suite.title,
        classics=_classics(plan, evaluations), lead_metrics=tuple(dict.fromkeys(metrics)), planned=_planned(plan),
    )  # fmt: skip
    return evaluations, path


def redraw(evaluations: Sequence[Evaluation], out: Path, target: Path, *, title: str) -> Path:
    """Write the report of a benchmark's rows without its suite: all that was measured, with the default metrics."""
    from raydiff.report import write_benchmark_report

    found = read_robustness(out / ROBUSTNESS) if (out / ROBUSTNESS).exists() else []
    return write_benchmark_report(evaluations, found, target, title=title)


def _planned(plan: Plan) -> set[tuple[str, str, str, int]]:
    """The whole suite's cells, also where the plan is a part of it."""
    return {(cell.method, cell.dataset, cell.category, cell.seed) for cell in plan.whole}


def _classics(plan: Plan, evaluations: Sequence[Evaluation]) -> list[str]:
    """The suite's classic methods that were measured; perhaps none."""
    present = {evaluation.rows[0].detector for evaluation in evaluations}
    return [name for name in plan.suite.classic_methods() if name in present]


def _figure(score: Score | None) -> str:
    if score is None:
        return "-"
    spread = "" if score.spread is None else f" ± {score.spread:.3f}"
    return f"{score.mean:.3f}{spread}" + (f" ({score.missing})" if score.missing else "")


def _mark(done: bool) -> str:
    return "done" if done else "-   "
