"""A detector beside the classic ones on the same test images: what ``raydiff evaluate`` measures and says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from raydiff.core.metrics import Estimate
from raydiff.detector import Detector
from raydiff.evaluation import evaluate
from raydiff.experiment import fit_baselines
from raydiff.results import Evaluation, Result, save_evaluations
from raydiff.shards import ShardSet

__all__ = ["BASELINES", "RESULTS", "compare", "table"]

BASELINES = ("isolation_forest", "ocsvm", "copod", "knn")
RESULTS = "results.jsonl"


def compare(
    detector: Detector,
    shards: ShardSet,
    place: Path,
    *,
    baselines_from: ShardSet | None,
    command: str,
    progress: Callable[[str], Callable[[int, int], None]],
) -> list[Evaluation]:
    """Evaluate on the test split and write ``place/results.jsonl``: the detector first, then the baselines.

    Args:
        detector: calibrated.
        shards: the test images.
        place: a folder; baselines are saved in its ``baselines/``.
        baselines_from: what the :data:`BASELINES` are fitted on; None for none of them.
        command: what the results say was typed.
        progress: for a line such as "scored knn", what is told images done and images in all.
    """
    evaluations: list[Evaluation] = []

    def add(one: Detector) -> None:
        evaluations.append(evaluate(one, shards, command=command, progress=progress(f"scored {one.name}")))

    add(detector)
    if baselines_from is not None:
        for baseline in fit_baselines(detector.config, baselines_from, BASELINES):
            add(baseline.save(place / "baselines" / baseline.name, overwrite=True))
    save_evaluations(place / RESULTS, evaluations)
    return evaluations


_COLUMNS: tuple[tuple[str, Callable[[Result], str]], ...] = (
    ("AUROC [95 %]", lambda row: _interval(row.metrics["auroc"])),
    ("AP", lambda row: f"{row.metrics['average_precision'].value:.3f}"),
    ("TPR@5%FPR", lambda row: f"{row.metrics['tpr_at_5_fpr'].value:.3f}"),
    ("FPR at threshold", lambda row: _interval(row.realised_fpr)),
    ("TPR at threshold", lambda row: _interval(row.realised_tpr)),
    ("NFE", lambda row: "-" if row.num_evaluations is None else str(row.num_evaluations)),
    ("ms/image", lambda row: f"{row.ms_per_image:.2f}"),
)


def table(evaluations: Sequence[Evaluation]) -> str:
    """The main figures as plain text, one line per detector."""
    row = evaluations[0].rows[0]
    head = ["detector", *(name for name, _ in _COLUMNS)]
    body = [[e.rows[0].detector, *(show(e.rows[0]) for _, show in _COLUMNS)] for e in evaluations]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in [head, *body]]
    title = f"{row.dataset}: {row.num_normal} normal and {row.num_anomalous} anomalous test images, seed {row.seed}"
    return "\n".join(["", title, *(line.rstrip() for line in lines), ""])


def _interval(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
