"""Real parts in the MVTec-AD layout: one training per seed, every scorer on its checkpoint, beside the classics.

    python -m benchmarks.industrial CONFIG SOURCE [--seeds 0 1 2] [--out DIR]

    python -m benchmarks.industrial examples/configs/magnetic_tile.yaml /data/magnetic_tile

Runs in this process on one thread, without Ray. The scorers' settings are those below for every data set: none was
chosen on test labels. Writes results.jsonl and report.html under ``--out``; a finished training is not run again.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raydiff.config import ExperimentConfig, component_options, load_config
from raydiff.detector import Detector, DiffusionDetector, load_detector
from raydiff.evaluation import evaluate
from raydiff.experiment import ARTIFACT, calibrated, fit_baselines, fit_locally
from raydiff.provenance import hardware, source_commit
from raydiff.report import write_report
from raydiff.results import Evaluation, save_evaluations
from raydiff.shards import ShardSet, write_shards
from raydiff.tracking import progress_line

BASELINES = ("isolation_forest", "ocsvm", "copod", "knn")
SCORERS: dict[str, dict[str, Any]] = {
    "reconstruction, noised (the paper's)": {"name": "reconstruction", "start": "noised", "normalise": "none"},
    "reconstruction, clean start": {"name": "reconstruction", "start": "clean", "normalise": "none"},
    "reconstruction, clean, z-scored": {"name": "reconstruction", "start": "clean"},
    "denoising error, density": {"name": "denoising_error", "density": "mahalanobis"},
}
METRICS = ("auroc", "average_precision", "tpr_at_5_fpr", "pixel_auroc", "aupro")


def detectors(config: ExperimentConfig, place: Path, shards: ShardSet) -> Iterator[tuple[str, Detector]]:
    """The config's own scorer, the scorers above on the same network, the baselines."""
    if (place / ARTIFACT / "manifest.json").exists():
        own = load_detector(place / ARTIFACT)
    else:
        training = config.training
        own = fit_locally(
            config, place, shards,
            on_metrics=lambda m: print(progress_line(m, training.num_steps, training.batch_size), flush=True),
        )  # fmt: skip
    assert isinstance(own, DiffusionDetector)
    yield "denoising error, z-scored", own
    blur = {"blur": config.scoring.model_dump()["blur"]}
    for title, fields in SCORERS.items():
        scored = own.with_scoring(component_options("scorers", fields | blur))
        detector = calibrated(scored, shards)
        yield title, detector.save(place / "scorers" / title.replace(", ", "-").replace(" ", "-"), overwrite=True)
    for detector in fit_baselines(config, shards, BASELINES):
        yield detector.name, detector.save(place / "baselines" / detector.name, overwrite=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("source")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out = arguments.out or Path("runs") / f"benchmark-{arguments.config.stem}"
    base = load_config(arguments.config, [f"data.dataset.source={arguments.source}", "execution.num_workers=1"])
    shards = write_shards(base.data, str(out / "shards"))
    found: dict[str, list[Evaluation]] = defaultdict(list)
    for seed in arguments.seeds:
        config = base.override({"seed": seed})
        for title, detector in detectors(config, out / f"seed{seed}", shards):
            result = evaluate(detector, shards)
            rows = [row.model_copy(update={"detector": title, "run": f"{row.run}-{len(found)}"}) for row in result.rows]
            found[title].append(replace(result, rows=rows))
            print(f"seed {seed}: {title}: AUROC {rows[0].metrics['auroc']}", flush=True)
    (out / "results.jsonl").unlink(missing_ok=True)
    everything = [evaluation for evaluations in found.values() for evaluation in evaluations]
    save_evaluations(out / "results.jsonl", everything)
    write_report(everything, out / "report.html", title=arguments.config.stem.replace("_", " "))
    print(f"\n{hardware('cpu')}; commit {source_commit()}; seeds {arguments.seeds}\n")
    print(
        f"| detector | {' | '.join(METRICS)} | FPR, TPR at threshold | NFE | ms/image |\n|{'---|' * (len(METRICS) + 4)}"
    )
    for title, evaluations in found.items():
        print(f"| {title} | {' | '.join(_cells([e.rows[0] for e in evaluations]))} |")


def _cells(rows: list[Any]) -> Iterator[str]:
    for metric in METRICS:
        values = [row.metrics[metric].value for row in rows if metric in row.metrics]
        spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
        yield f"{np.mean(values):.3f}{spread}" if values else "-"
    yield f"{np.mean([r.realised_fpr.value for r in rows]):.3f}, {np.mean([r.realised_tpr.value for r in rows]):.3f}"
    yield str(rows[0].num_evaluations or "-")
    yield f"{np.mean([r.ms_per_image for r in rows]):.1f}"


if __name__ == "__main__":
    main()
