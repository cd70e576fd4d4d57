"""``raydiff ensemble``: several runs' detectors as one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from raydiff.cli.options import Place, shards_of
from raydiff.errors import ConfigError

__all__ = ["ensemble"]


@click.command()
@click.argument("runs", nargs=-1, required=True, type=Place(), metavar="RUN RUN...")
@click.option("--out", type=Place(), required=True, metavar="PLACE", help="A new folder, or s3://bucket/path.")
@click.option(
    "--combine", type=click.Choice(["mean", "max", "fisher"]), default="mean", show_default=True,
    help="Of the members' z-scores the mean or the highest; or the sum of -log p.",
)  # fmt: skip
@click.option(
    "--map-from", type=click.IntRange(min=1), metavar="N",
    help="Show the map of the N-th RUN alone, with a mask of its own [all maps, combined].",
)  # fmt: skip
@click.option("--target-fpr", type=float, help="Of the threshold [the first run's].")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
def ensemble(
    runs: Sequence[Path | str],
    out: Path | str,
    combine: str,
    map_from: int | None,
    target_fpr: float | None,
    device: str,
) -> None:
    """Put several runs' detectors together: one artefact, which score, evaluate and serve take.

    RUNs are runs or artefacts, baselines too, trained on the same images; what their scores mean is learnt from the
    calibration normals alone. Members with the same frozen backbone call it once.

    \b
    raydiff ensemble runs/features runs/pixels --out runs/both
    raydiff ensemble runs/fine runs/deep --out runs/both --map-from 1
    raydiff ensemble runs/features results/baselines/patch_knn --out runs/both --combine fisher
    """  # noqa: D301
    from raydiff.cli.fitting import say_fitted
    from raydiff.detector import load_detector
    from raydiff.ensembling import ensemble_of
    from raydiff.experiment import ARTIFACT, artifact_place
    from raydiff.storage import MANIFEST, as_place

    run_dir = as_place(out, field="--out")
    if (run_dir / ARTIFACT / MANIFEST).exists():
        raise ConfigError(f"--out {run_dir}: already holds an artefact; choose another place")
    saved = [artifact_place(run) for run in runs]
    members = [load_detector(place, device=device) for place in saved]
    shards = shards_of(members[0].config, saved[0].parent)
    found = ensemble_of(
        members, shards, combine=combine, target_fpr=target_fpr,  # type: ignore[arg-type]
        map_from=None if map_from is None else map_from - 1,
    )  # fmt: skip
    click.echo(f"ensemble of {len(members)}: {found.name}")
    say_fitted(found.save(run_dir / ARTIFACT), run_dir)
