"""Training images/s through Ray Train over the same loop without Ray, side by side.

    python -m benchmarks.training_overhead [--repeats 5] [--steps 300]

The plain loop and one Ray Train worker take turns, so that a busy machine slows both, and the ratio is taken per turn.
Both run on one thread, train the digits' U-Net from memory, write metrics and checkpoints, and are timed by the loop's
own clock after the first log interval; start-up is shown apart. Two workers follow, for the scaling on this machine.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from raydiff.config import ExperimentConfig
from raydiff.detector import Detector
from raydiff.distributed.cluster import connect
from raydiff.distributed.train import fit
from raydiff.experiment import fit_locally
from raydiff.provenance import hardware, source_commit
from raydiff.recipes import digits
from raydiff.shards import ShardSet, write_shards
from raydiff.tracking import read_metrics


def measure(
    train: Callable[[ExperimentConfig, Path, ShardSet], Detector], config: ExperimentConfig
) -> tuple[float, float]:
    """Images/s of the loop after its first interval, and the seconds of the whole call that are not training."""
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(config.data, f"{folder}/shards")
        started = time.monotonic()
        train(config, Path(folder), shards)
        elapsed = time.monotonic() - started
        speeds = [line["images_per_second"] for line in read_metrics(Path(folder)) if "loss" in line]
    speed = statistics.harmonic_mean(speeds[1:])
    return speed, elapsed - config.training.num_steps * config.training.batch_size / speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    one = digits().override({"training.num_steps": arguments.steps, "execution.num_workers": 1})
    two = one.override({"execution.num_workers": 2})
    found: dict[str, list[tuple[float, float]]] = {
        "plain loop": [],
        "Ray Train, 1 worker": [],
        "Ray Train, 2 workers": [],
    }
    with connect():
        for _ in range(arguments.repeats):
            found["plain loop"].append(measure(fit_locally, one))
            found["Ray Train, 1 worker"].append(measure(fit, one))
            found["Ray Train, 2 workers"].append(measure(fit, two))
            print(found, flush=True)
    print(f"\n{hardware('cpu')}; commit {source_commit()}; {arguments.repeats} turns of {arguments.steps} steps\n")
    head = ["", "images/s, median [min, max]", "over the plain loop", "start-up and the rest, s"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for name, runs in found.items():
        speeds = [speed for speed, _ in runs]
        ratios = [speed / plain for (speed, _), (plain, _) in zip(runs, found["plain loop"], strict=True)]
        rest = statistics.median(rest for _, rest in runs)
        print(f"| {name} | {spread(speeds, '.0f')} | {spread(ratios, '.2f')} | {rest:.1f} |")


def spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


if __name__ == "__main__":
    main()
