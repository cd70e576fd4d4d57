"""A benchmark whose networks share one trained space beside the same one whose networks each fit their own.

    python -m benchmarks.shared_spaces [--turns 3] [--space rotnet] [--ray]

Digit 4 normal, three networks (of other schedules and widths) in one space and a method on each. Without sharing is
the same suite with another ``space.seed`` for each network, so that three spaces are fitted, of the same options. Both
take turns, each in an empty folder, and the ratio is taken per turn: wall time, and core-seconds of this process, which
other work on the machine hardly moves. With ``--ray`` tasks run on Ray, two at a time, and there is wall time alone.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.training_overhead import spread
from raydiff.benchmark import plan, run_benchmark
from raydiff.distributed.benchmark import RayWorkers
from raydiff.distributed.cluster import connect
from raydiff.provenance import hardware, source_commit
from raydiff.tasks import SerialWorkers

SPACES: dict[str, dict[str, Any]] = {
    "rotnet": {"name": "rotnet", "factor": 4, "num_steps": 400, "num_components": 32, "horizontal_flip": False},
    "latent": {"name": "latent", "factor": 2, "num_steps": 400, "latent_channels": 8},
}
NETWORKS: dict[str, dict[str, Any]] = {
    "linear": {"schedule": {"beta_schedule": "linear"}},
    "cosine": {"schedule": {"beta_schedule": "squaredcos_cap_v2"}},
    "wide": {"denoiser": {"name": "convnet", "kernel_size": 1, "width": 128, "num_blocks": 2}},
}


def suite_of(space: dict[str, Any], *, shared: bool) -> dict[str, Any]:
    """Three networks, in one space or each in its own."""
    scoring = {"name": "denoising_error", "num_inference_steps": 4, "blur": 0}
    spaces = {name: space | {"seed": 0 if shared else seed} for seed, name in enumerate(NETWORKS)}
    return {
        "base": {
            "data": {"dataset": {"name": "digits", "normal": ["4"]}},
            "denoiser": {"name": "convnet", "kernel_size": 1, "width": 64, "num_blocks": 2},
            "training": {"num_steps": 200, "batch_size": 32, "validate_every": 200, "checkpoint_every": 200},
        },
        "datasets": {"digits": {}},
        "trainings": {name: fields | {"space": spaces[name]} for name, fields in NETWORKS.items()},
        "methods": {name: {"training": name, "scoring": scoring} for name in NETWORKS},
        "cost": {"batch_sizes": [1], "num_images": 8},
    }


def measure(suite: dict[str, Any], *, on_ray: bool) -> tuple[float, float]:
    """Seconds and core-seconds of this process for the whole suite."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "suite.yaml"
        path.write_text(yaml.safe_dump(suite))
        planned = plan(path)
        begun, spent = time.monotonic(), time.process_time()
        result = run_benchmark(
            planned, Path(folder) / "out", partial(RayWorkers, num_workers=2) if on_ray else SerialWorkers
        )
        taken = time.monotonic() - begun, time.process_time() - spent
    if result.failed:
        raise SystemExit(f"failed: {result.failed}")
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--space", choices=SPACES, default="rotnet")
    parser.add_argument("--ray", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    suites = {shared: suite_of(SPACES[arguments.space], shared=shared) for shared in (True, False)}
    found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    with connect(num_cpus=2, spare_cpus=0) if arguments.ray else nullcontext():
        measure(suites[True], on_ray=arguments.ray)  # imports, and Ray's workers
        for turn in range(arguments.turns):
            for shared in (turn % 2 == 0, turn % 2 == 1):
                found[shared].append(measure(suites[shared], on_ray=arguments.ray))
            print(f"shared {found[True][-1]}, each its own {found[False][-1]}", flush=True)
    where = "Ray, two tasks at a time" if arguments.ray else "in this process"
    print(f"\n{hardware('cpu')}; commit {source_commit()}; space {arguments.space}; {where}\n")
    ratio = f"own over shared, median of {arguments.turns} turns [min, max]"
    print(f"| | shared, s | each its own, s | {ratio} |\n|{'---|' * 4}")
    for column, name in enumerate(("wall",) if arguments.ray else ("wall", "core")):
        pairs = [(one[column], own[column]) for one, own in zip(found[True], found[False], strict=True)]
        medians = [f"{statistics.median(values):.1f}" for values in zip(*pairs, strict=True)]
        print(f"| {name} | {' | '.join(medians)} | {spread([own / one for one, own in pairs], '.2f')} |")


if __name__ == "__main__":
    main()
