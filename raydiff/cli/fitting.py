"""What ``fit``, ``distill`` and ``demo`` share: training a run with Ray Train, and saying so."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from raydiff.cli.options import shards_of

if TYPE_CHECKING:
    from raydiff.config import ExperimentConfig
    from raydiff.detector import Detector
    from raydiff.storage import Storage

__all__ = ["first_free", "fitted", "say_fitted"]


def fitted(config: ExperimentConfig, run_dir: Path | Storage) -> Detector:
    """Train with Ray Train, with a line of progress now and then, calibrate and save; Ctrl-C says how to go on."""
    from raydiff.crossfit import fold_runs
    from raydiff.distributed.cluster import connect
    from raydiff.distributed.train import fit as train
    from raydiff.fitting import placement_notes, statistics_notes
    from raydiff.lock import alone_at
    from raydiff.tracking import progress_line

    training = config.training

    def say(metrics: Mapping[str, Any]) -> None:
        steps = config.cross_fitting.num_steps if "fold" in metrics else None
        click.echo(progress_line(metrics, steps or training.num_steps, training.batch_size))

    with alone_at(run_dir), connect():
        shards = shards_of(config, run_dir)
        click.echo(
            f"training {config.denoiser.name} on {shards.count('train')} normal images with"
            f" {config.execution.num_workers} Ray Train worker(s), {training.num_steps} steps of {training.batch_size}"
        )
        for note in (*placement_notes(config, shards), *statistics_notes(config, shards)):
            click.echo(f"note: {note}")
        if folds := len(fold_runs(config, run_dir, shards)):
            click.echo(f"and before it {folds} networks that each leave a fold of the images out, to judge them by")
        try:
            return train(config, run_dir, shards, on_metrics=say)
        except KeyboardInterrupt:
            click.echo(f"\nInterrupted. Go on with: raydiff fit --resume {run_dir}", err=True)
            sys.exit(130)


def say_fitted(detector: Detector, run_dir: Path | Storage) -> None:
    """The threshold, and where the artefact lies."""
    assert detector.calibration is not None  # noqa: S101
    threshold = detector.calibration.threshold
    click.echo(f"threshold {threshold.value:.4g}: {threshold.rule}")
    for note in detector.notes:
        click.echo(f"note: {note}")
    if (mean := getattr(detector, "mean_evaluations", None)) is not None:
        click.echo(f"early exit: {mean:.1f} of {detector.num_evaluations} evaluations for a normal image, in the mean")
    click.echo(f"artefact: {run_dir / 'artifact'} ({(detector.artifact_digest or '')[:12]})")


def first_free(path: Path) -> Path:
    """The path, or the first of ``path-2``, ``path-3`` ... that does not exist."""
    if not path.exists():
        return path
    return next(p for i in range(2, 10_000) if not (p := path.with_name(f"{path.name}-{i}")).exists())
