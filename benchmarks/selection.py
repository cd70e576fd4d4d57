"""Which noise level and which pooling, without a test label: AUROC on synthetic anomalies from calibration normals.

    python -m benchmarks.selection RUN [--steps 0.1 0.2 ...] [--test]

    python -m benchmarks.selection runs/industrial/trainings/KEY --shards runs/industrial/shards/KEY

``RUN`` is a run folder (or a benchmark's training). For each step t an evaluation per image gives the evidence;
each way to judge it is then free. An image's and its synthetic twin's scores come from statistics fitted without the
image (5 folds). ``--test`` prints the test AUROC beside, to see whether the choice carries over; never to choose.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from raydiff.config import component_options
from raydiff.core.metrics import image_auroc
from raydiff.detector import DiffusionDetector, load_detector
from raydiff.experiment import artifact_of
from raydiff.images import to_tensor
from raydiff.selection import judged, selection_set
from raydiff.shards import ShardSet

BATCH = 16
NORMALISE, SHARES = ("step", "pixel"), (0.016, 0.05, 1.0)


def encoded(detector: DiffusionDetector, images: np.ndarray) -> Tensor:
    """uint8 images (n, H, W, C) in the detector's space."""
    parts = [detector.space.encode(to_tensor(images[i : i + BATCH])) for i in range(0, len(images), BATCH)]
    return torch.cat(parts)


def read(detector: DiffusionDetector, shards: ShardSet, split: str) -> tuple[np.ndarray, list[str], np.ndarray]:
    batches = list(shards.read(split, detector.image_spec, batch_size=64))  # type: ignore[arg-type]
    ids = [name for batch in batches for name in batch.ids]
    return np.concatenate([b.images for b in batches]), ids, np.concatenate([b.is_anomaly for b in batches])


def table(
    detector: DiffusionDetector, shards: ShardSet, steps: list[float], test: bool
) -> Iterator[tuple[float, str, float, float, float | None]]:
    """(t / T, normalise, pooled share, AUROC on the selection set, on the test set)."""
    images, ids, _ = read(detector, shards, "calibration")
    mixed, _, _ = selection_set(images, ids)
    normals, twins = encoded(detector, images), encoded(detector, mixed[len(images) :])
    tested, _, labels = read(detector, shards, "test") if test else (images[:0], [], np.array([]))
    latents = encoded(detector, tested) if test else None
    size = detector.config.data.image_size
    for t in steps:
        fields = {
            "name": "denoising_error",
            "num_inference_steps": 1,
            "start": t,
            "stop": min(1.0, t + 0.05),
            "blur": 0,
        }
        scorer = detector.with_scoring(component_options("scorers", fields)).scorer
        seen = [None if x is None else scorer.measure(detector.model, x) for x in (normals, twins, latents)]
        for how, share in product(NORMALISE, SHARES):
            pooling = {"normalise": how, "pooling": "top_k", "pooling_share": share}
            judge = detector.with_scoring(component_options("scorers", fields | pooling)).scorer
            low, high = judged(judge, seen[0], seen[1], size)
            chosen = image_auroc(np.r_[low, high], np.r_[np.zeros(len(low), bool), np.ones(len(high), bool)])
            on_test = None
            if seen[2] is not None:
                scores = judge.judge(seen[2], judge.fit(seen[0]), size).image.numpy()
                on_test = image_auroc(scores, labels)
            yield t, how, share, chosen, on_test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--shards", help="by default those of the run's config")
    parser.add_argument("--steps", type=float, nargs="+", default=[round(0.1 * i, 1) for i in range(1, 10)])
    parser.add_argument("--test", action="store_true", help="also print the AUROC on the test split")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    detector = load_detector(artifact_of(arguments.run))
    assert isinstance(detector, DiffusionDetector)
    shards = ShardSet.open(arguments.shards or detector.config.data.shards or str(arguments.run / "shards"))
    print("| t / T | z-scores per | share pooled | AUROC, synthetic | AUROC, test |\n|---|---|---|---|---|")
    for t, how, share, chosen, on_test in table(detector, shards, arguments.steps, arguments.test):
        print(f"| {t} | {how} | {share} | {chosen:.3f} | {'-' if on_test is None else f'{on_test:.3f}'} |", flush=True)


if __name__ == "__main__":
    main()
