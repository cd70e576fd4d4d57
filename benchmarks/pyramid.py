"""Two feature-space detectors as one, fine and deep levels, beside patch-kNN on the same network.

    python -m benchmarks.pyramid BENCHMARK [BENCHMARK ...] --out RESULTS [--evaluations 1 3 10] [--normalise step]

Each ``BENCHMARK`` is the output folder of ``raydiff benchmark examples/suites/industrial.yaml``, ``aligned.yaml`` or
``one_for_all.yaml`` (several where it was run in parts; ``--folders`` tells the categories of the latter apart). For
every category and seed of which it trained ``features`` (levels 1 to 3, convolutions) and ``deep`` (levels 3 and 4, an
MLP per cell), both are asked from a clean start, put
together as ``raydiff ensemble`` does (mean of z-scores of calibration normals; ``both, fine map`` shows the fine one's
map, as with ``--map-from 1``), and scored on the test split. The rows of patch-kNN are those of the suite: the same
images, the same backbone, one row per seed. Differences: over categories, seeds and images, paired. ``RESULTS``, a JSON
lines file, keeps what is scored: run again, it is not scored again, and ``raydiff report`` draws it. What both cost:
``benchmarks.core_speed --only ensemble``.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.paired import Key, by_folder, differences, shards_of
from raydiff.config import component_options
from raydiff.detector import DiffusionDetector, load_detector
from raydiff.ensembling import ensemble_of
from raydiff.evaluation import evaluate
from raydiff.fitting import calibrated
from raydiff.predictions import Predictions, read_predictions
from raydiff.provenance import hardware, source_commit
from raydiff.results import Evaluation, load_evaluations, save_evaluations
from raydiff.shards import ShardSet

RANGES = {1: (0.7, 0.8), 3: (0.5, 0.8), 10: (0.3, 0.8)}
"""Network evaluations of one member: lowest and highest step."""
PATCHES = ("features, patch-kNN, same levels", "features, patch-kNN, levels 3 and 4")
METRICS = ("auroc", "tpr_at_5_fpr", "pixel_auroc", "pixel_average_precision", "aupro")


def scoring(evaluations: int, normalise: str) -> dict[str, Any]:
    low, high = RANGES[evaluations]
    return {
        "name": "denoising_error", "start_from": "clean", "num_inference_steps": evaluations, "start": low,
        "stop": high, "normalise": normalise, "blur": 0, "pooling": "top_k", "pooling_share": 0.03,
    }  # fmt: skip


def trained(folders: Iterable[Path]) -> dict[Key, dict[str, DiffusionDetector]]:
    """Per source and seed the members that are there, ``fine`` and ``deep``."""
    found: dict[Key, dict[str, DiffusionDetector]] = defaultdict(dict)
    for place in sorted(path for folder in folders for path in folder.glob("trainings/*/artifact")):
        detector = load_detector(place)
        if not isinstance(detector, DiffusionDetector) or detector.config.space.name != "feature":
            continue
        levels = tuple(detector.config.space.levels)  # type: ignore[attr-defined]
        name = {(1, 2, 3): "fine", (3, 4): "deep"}.get(levels)
        if name is not None:
            source = Path(str(detector.config.data.dataset.source)).name  # type: ignore[attr-defined]
            found[source, detector.config.seed][name] = detector
    return found


def measured(
    key: Key, members: Mapping[str, DiffusionDetector], shards: ShardSet, count: int, normalise: str
) -> list[Evaluation]:
    """Fine, deep and both, with the maps of both and with fine's, at so many evaluations each."""
    options = component_options("scorers", scoring(count, normalise))
    asked = {name: calibrated(member.with_scoring(options), shards) for name, member in members.items()}
    pair = [asked["fine"], asked["deep"]]
    found = {**asked, "both": ensemble_of(pair, shards), "both, fine map": ensemble_of(pair, shards, map_from=0)}
    return [
        evaluate(detector, shards, num_pictures=0, name=f"{name} x {count}", dataset=key[0], num_draws=200)
        for name, detector in found.items()
    ]


def line(evaluation: Evaluation) -> str:
    row = evaluation.rows[0]
    values = ", ".join(f"{name} {row.metrics[name].value:.3f}" for name in METRICS if name in row.metrics)
    return f"{row.detector}: {values}, {row.ms_per_image:.1f} ms"


def suite_rows(folders: Iterable[Path]) -> dict[str, dict[Key, Predictions]]:
    """What patch-kNN made of the test images, by method, source and seed."""
    found: dict[str, dict[Key, Predictions]] = defaultdict(dict)
    for folder in folders:
        for evaluation in load_evaluations(folder / "results.jsonl"):
            row = evaluation.rows[0]
            if row.detector in PATCHES:
                predictions, _ = read_predictions(folder / "predictions" / f"{row.run}.parquet")
                found[row.detector][row.dataset.replace(" ", "_"), row.seed] = predictions
                print(f"{row.dataset} seed {row.seed}, {line(evaluation)}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmarks", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True, metavar="RESULTS")
    parser.add_argument("--evaluations", type=int, nargs="+", default=[1], choices=sorted(RANGES))
    parser.add_argument("--normalise", default="pixel", choices=["pixel", "step"], help="step for aligned.yaml")
    parser.add_argument("--folders", action="store_true", help="first folders of images apart: one_for_all.yaml")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{hardware('cpu')}; commit {source_commit()}\n", flush=True)
    patches = suite_rows(arguments.benchmarks)
    ours: dict[str, dict[Key, Evaluation]] = defaultdict(dict)
    for found in load_evaluations(arguments.out) if arguments.out.exists() else []:
        ours[found.rows[0].detector][found.rows[0].dataset, found.rows[0].seed] = found
    for key, members in sorted(trained(arguments.benchmarks).items()):
        for count in arguments.evaluations:
            if len(members) < 2 or key in ours[f"both, fine map x {count}"]:
                continue
            rows = measured(key, members, shards_of(members["fine"], arguments.benchmarks), count, arguments.normalise)
            save_evaluations(arguments.out, rows)
            for found in rows:
                ours[found.rows[0].detector][key] = found
                print(f"{key[0]} seed {key[1]}, {line(found)}", flush=True)
    for name, evaluations in ours.items():
        print(f"\n{name}")
        for source in sorted({source for source, _ in evaluations}):
            rows = [found.rows[0] for (other, _), found in evaluations.items() if other == source]
            cells = []
            for metric in METRICS:
                values = [row.metrics[metric].value for row in rows if metric in row.metrics]
                cells.append(f"{metric} {np.mean(values):.3f} ± {np.std(values, ddof=min(1, len(values) - 1)):.3f}")
            milliseconds = np.mean([row.ms_per_image for row in rows])
            print(f"  {source}, {len(rows)} seeds: {', '.join(cells)}, {milliseconds:.1f} ms")
        predicted = {key: found.predictions for key, found in evaluations.items() if found.predictions is not None}
        for method, theirs in patches.items():
            if predicted.keys() & theirs.keys():
                pair = [by_folder(both) if arguments.folders else both for both in (predicted, theirs)]
                scores = {key: predictions.scores for key, predictions in pair[1].items()}
                print(f"  AUROC minus {method}: {differences(pair[0], scores)}")


if __name__ == "__main__":
    main()
