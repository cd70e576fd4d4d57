"""Diffusion in the features of space ``rotnet`` beside the classics on the very same features.

    python -m benchmarks.learnt_features BENCHMARK [BENCHMARK ...]

Each ``BENCHMARK`` is the output folder of ``raydiff benchmark examples/suites/cifar10.yaml``. For every training in
space ``rotnet`` that lies there, kNN, Isolation Forest, OCSVM and COPOD learn what that space makes of the training
images and score what it makes of the test images; the diffusion's rows are those of the benchmark, the same images in
the same order. Differences, to these and to every other method in the folders: over classes, seeds and images, paired.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor

from benchmarks.paired import Key, differences, rows_of, shards_of
from raydiff import registry
from raydiff.config import component_options
from raydiff.detector import DiffusionDetector, load_detector
from raydiff.provenance import hardware, source_commit
from raydiff.shards import ShardSet
from raydiff.splits import split_batches, training_images

CLASSICS = ("knn", "isolation_forest", "ocsvm", "copod")


def encoded(detector: DiffusionDetector, shards: ShardSet) -> tuple[Tensor, Tensor]:
    """What its space makes of training and of test images, (n, K, cells, cells)."""
    test = [detector.encode(images) for images in split_batches(shards, "test", detector.config)]
    return detector.encode(training_images(detector.config, shards, 10_000)), torch.cat(test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmarks", type=Path, nargs="+")
    folders: list[Path] = parser.parse_args().benchmarks
    torch.set_num_threads(1)
    print(f"{hardware('cpu')}; commit {source_commit()}\n", flush=True)
    every = rows_of(folders)
    ours = {name: rows for name, rows in every.items() if name.startswith("learnt features")}
    classics: dict[str, dict[Key, NDArray[np.float64]]] = defaultdict(dict)
    for place in sorted(path for folder in folders for path in folder.glob("trainings/*/artifact")):
        detector = load_detector(place)
        if not isinstance(detector, DiffusionDetector) or detector.config.space.name != "rotnet":
            continue
        key = ", ".join(detector.provenance["normal_classes"]), detector.config.seed
        if not any(key in rows for rows in ours.values()):
            continue
        train, test = encoded(detector, shards_of(detector, folders))
        for name in CLASSICS:
            baseline = registry.build("baselines", component_options("baselines", name), seed=key[1])
            baseline.fit(train)
            classics[name][key] = baseline.score(test).image.numpy()
        labels = next(rows[key] for rows in ours.values() if key in rows).labels
        found = {name: rows[key].scores for name, rows in ours.items() if key in rows}
        found |= {name: rows[key] for name, rows in classics.items()}
        values = ", ".join(f"{name} {roc_auc_score(labels, scores):.3f}" for name, scores in found.items())
        print(f"{key[0]} seed {key[1]}: {values}", flush=True)
    others = {name: {key: one.scores for key, one in rows.items()} for name, rows in every.items() if name not in ours}
    for method, rows in ours.items():
        for name, theirs in ({f"{name}, same features": rows for name, rows in classics.items()} | others).items():
            print(f"\n{method} minus {name}: {differences(rows, theirs)}")


if __name__ == "__main__":
    main()
