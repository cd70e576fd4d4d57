"""``raydiff sweep``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from raydiff.cli.options import Folder, command_line, set_option, shards_of

if TYPE_CHECKING:
    from raydiff.distributed.sweep import Ended
    from raydiff.sweep_records import Final
    from raydiff.tasks import Progress

__all__ = ["sweep"]


@click.command()
@click.argument("space", type=Folder())
@click.option("--config", type=Folder(), metavar="FILE", help="What the sweep begins with [digits].")
@click.option("--out", metavar="PLACE", help="A folder that all nodes share, or s3://bucket/path [runs/SPACE].")
@click.option("--storage", metavar="URL", help="The study's database [sqlite:///OUT/study.db].")
@click.option("--study", metavar="NAME", help="The study's name [that of SPACE].")
@click.option("--trials", type=click.IntRange(min=1), metavar="N", help="Another budget than the file's.")
@click.option(
    "--test/--no-test", default=True, help="Measure the winner on the test split in the end.", show_default=True
)
@click.option("--status", "only_status", is_flag=True, help="Say how far it is, and run nothing.")
@set_option
def sweep(
    space: Path, config: Path | None, out: str | None, storage: str | None, study: str | None, trials: int | None,
    test: bool, only_status: bool, overrides: Sequence[str],
) -> None:  # fmt: skip
    """Search the parameters that a file names, and say which of them matter.

    Settings are compared on calibration normals and synthetic anomalies made of them; the test split is read once, at
    the very end, for the winner. The same command goes on after an interruption.

    \b
    raydiff sweep search_spaces/noise_schedule.yaml --config examples/configs/digits.yaml
    raydiff sweep search_spaces/scoring.yaml --config examples/configs/digits.yaml --status
    raydiff sweep search_spaces/scoring.yaml --config examples/configs/digits.yaml --out s3://bucket/scoring
    """  # noqa: D301
    from contextlib import ExitStack

    from raydiff.distributed.cluster import connect
    from raydiff.distributed.sweep_phases import Sweep, run_sweep
    from raydiff.distributed.sweep_status import status
    from raydiff.mirror import mirrored
    from raydiff.search_space import load_search_space
    from raydiff.sources import config_of
    from raydiff.storage import as_place

    wanted, start = load_search_space(space), config_of(config, overrides).located()
    if trials is not None:
        wanted = wanted.model_copy(update={"trials": trials})
    start = start.override(wanted.workers)
    wanted.check(start, str(space))
    place = as_place(out, field="--out") if out else Path("runs") / space.stem
    with ExitStack() as stack:
        mirror = None if isinstance(place, Path) else stack.enter_context(mirrored(place, alone=not only_status))
        folder = mirror.folder if mirror else Path(str(place))
        this = Sweep(wanted, start, folder, study or space.stem, storage, mirror)
        if only_status:
            click.echo(status(this))
            return
        command = command_line()
        stack.enter_context(connect(spare_cpus=int(wanted.num_workers > 1), dashboard=wanted.num_workers > 1))
        shards = shards_of(start, mirror.storage if mirror else folder)
        try:
            final = run_sweep(this, shards, test=test, on_trial=_say_trial, on_task=_say_task)
        except KeyboardInterrupt:
            click.echo(f"\nInterrupted; finished trials are kept. Go on with: {command}", err=True)
            sys.stdout.flush()
            if mirror is not None:
                mirror.leave()
            os._exit(130)  # Ray's own shutdown may crash beside Tune's thread; its processes end with this one
    click.echo(_summary(final, [objective.name for objective in wanted.objectives]))
    click.echo(f"winner: {this.label}/winner.yaml\nreport: {this.label}/report.html")


def _say_trial(ended: Ended) -> None:
    if ended.failure:
        said = f"FAILED ({ended.failure.strip().splitlines()[-1][:200]})"
    elif ended.value is None:
        said = "stopped early"
    else:
        said = f"{ended.value:.4f} (best {ended.best:.4f})"
    click.echo(f"[{ended.num_done}/{ended.num_trials}] trial {ended.number}: {said}, {ended.seconds:.1f} s", err=True)


def _say_task(phase: str, progress: Progress) -> None:
    done = f"{progress.num_done + progress.num_failed}/{progress.num_tasks}"
    failure = progress.outcome.failure
    said = "done" if failure is None else f"FAILED ({failure.type}: {failure.message[:200]})"
    click.echo(f"[{phase} {done}] {progress.task.name}: {said}, {progress.outcome.seconds:.1f} s", err=True)


def _summary(final: Final | None, names: Sequence[str]) -> str:
    if final is None or not final.winner:
        return "no winner was refitted"
    lines = [f"{final.num_settings} settings on {final.num_trainings} trainings"]
    first = names[0]
    lines.append(f"{first}: promised {final.promised[first]:.4f}")
    for which, refits in (("winner", final.winner), ("start", final.start)):
        figures = [f"{first} {_mean([refit.selection.get(first) for refit in refits])}"]
        if all(refit.test for refit in refits):
            figures.append(f"test AUROC {_mean([refit.test['auroc'] for refit in refits])}")
        lines.append(f"{which}, {len(refits)} fresh seeds: {', '.join(figures)}")
    return "\n".join(lines)


def _mean(values: Sequence[Any]) -> str:
    known = [float(value) for value in values if value is not None]
    return f"{sum(known) / len(known):.4f}" if known else "-"
