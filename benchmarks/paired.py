"""What benchmarks that read the folders of ``raydiff benchmark`` share: its shards, and differences of AUROC."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from raydiff.core.statistics import auroc_draws, hierarchical_difference
from raydiff.detector import Detector
from raydiff.predictions import Predictions
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
