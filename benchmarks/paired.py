"""How much AUROC a method wins over others, paired, and what other benchmarks share that read such folders.

    raydiff benchmark examples/suites/in_place.yaml --data DATA --out OUT
    python -m benchmarks.paired OUT --of "per cell, diffusion"

Each data set apart, over seeds and images, with 95 % intervals; both methods saw the same seeds' images. With
``--folders`` the first folders of images of one data set (its categories, in one_for_all.yaml) stand in for data sets.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from raydiff.core.statistics import auroc_draws, hierarchical_difference
from raydiff.detector import Detector
from raydiff.predictions import Predictions, read_predictions
from raydiff.provenance import hardware, source_commit
from raydiff.results import load_evaluations
from raydiff.shards import ShardSet

Key = tuple[str, int]
"""A data set or category, and a seed."""


def shards_of(detector: Detector, folders: Iterable[Path]) -> ShardSet:
    """The shards that the detector was trained on."""
    for place in (path for folder in folders for path in folder.glob("shards/*")):
        shards = ShardSet.open(place)
        if shards.normal_digest == detector.provenance["data_digest"]:
            return shards
    raise SystemExit(f"no shards of {detector.config.data.dataset} below {', '.join(map(str, folders))}")


def differences(ours: Mapping[Key, Predictions], theirs: Mapping[Key, NDArray[np.float64]]) -> str:
    """AUROC won, mean over categories of the mean over seeds, with its interval."""
    values: dict[str, list[float]] = defaultdict(list)
    draws: dict[str, list[NDArray[np.float64]]] = defaultdict(list)
    for source, seed in sorted(ours.keys() & theirs.keys()):
        scores, labels = (ours[source, seed].scores, theirs[source, seed]), ours[source, seed].labels
        drawn = auroc_draws(scores, labels, 2000, (len(source),))
        draws[source].append(drawn[0] - drawn[1])
        values[source].append(float(roc_auc_score(labels, scores[0]) - roc_auc_score(labels, scores[1])))
    parts = []
    for source in values:
        low, high = np.quantile(np.mean(draws[source], 0), [0.025, 0.975])
        parts.append(f"{source} {np.mean(values[source]):+.3f} [{low:+.3f}, {high:+.3f}]")
    whole = hierarchical_difference(list(values.values()), list(draws.values()))
    estimate = whole.estimate
    return f"{', '.join(parts)}; mean {estimate.value:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"


def rows_of(folders: Iterable[Path]) -> dict[str, dict[Key, Predictions]]:
    """What each method of suites made of the test images, by data set or category, and seed."""
    found: dict[str, dict[Key, Predictions]] = defaultdict(dict)
    for folder in folders:
        for evaluation in load_evaluations(folder / "results.jsonl"):
            row = evaluation.rows[0]
            predictions, _ = read_predictions(folder / "predictions" / f"{row.run}.parquet")
            found[row.detector][row.category or row.dataset, row.seed] = predictions
    return found


def by_folder(rows: Mapping[Key, Predictions]) -> dict[Key, Predictions]:
    """The same with the first folder of the images' ids for the data set."""
    found: dict[Key, Predictions] = {}
    for (_, seed), whole in rows.items():
        folders = np.array([image_id.partition("/")[0] for image_id in whole.ids])
        for folder in np.unique(folders).tolist():
            there = np.flatnonzero(folders == folder)
            found[folder, seed] = Predictions(
                [whole.ids[i] for i in there], [whole.defects[i] for i in there], whole.labels[there],
                whole.scores[there], whole.p_values[there], whole.verdicts[there],
            )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmarks", type=Path, nargs="+", metavar="OUT")
    parser.add_argument("--of", required=True, metavar="METHOD")
    parser.add_argument("--against", nargs="+", metavar="METHOD", help="all others by default")
    parser.add_argument("--folders", action="store_true", help="the first folders of images apart")
    arguments = parser.parse_args()
    print(f"{hardware('cpu')}; commit {source_commit()}\n{arguments.of} minus", flush=True)
    rows = rows_of(arguments.benchmarks)
    if arguments.folders:
        rows = {name: by_folder(found) for name, found in rows.items()}
    for name in (arguments.of, *(arguments.against or ())):
        if name not in rows:
            raise SystemExit(f"no method is called {name!r} there; there are: {', '.join(sorted(rows))}")
    ours = rows.pop(arguments.of)
    for name in arguments.against or sorted(rows):
        theirs = {key: predictions.scores for key, predictions in rows[name].items()}
        if ours.keys() & theirs.keys():
            print(f"  {name}: {differences(ours, theirs)}", flush=True)


if __name__ == "__main__":
    main()
