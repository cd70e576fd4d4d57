"""The demo's question over all ten digits: is the diffusion detector at least as good as the classics?

    python -m benchmarks.digits [--digits 0 3 8] [--seeds 0 1 2] [--out DIR]

Each digit in turn is normal, each seed trains anew; everything runs in this process, without Ray. Prints one row per
digit and the means. The interval of a mean is a paired bootstrap over test images: a draw resamples each digit's images
once, for all detectors and seeds alike. Finished cells in ``--out`` are not run again.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from raydiff.evaluation import evaluate
from raydiff.experiment import fit_baselines, fit_locally
from raydiff.provenance import hardware, source_commit
from raydiff.recipes import digits
from raydiff.results import Evaluation, load_evaluations, save_evaluations
from raydiff.shards import write_shards

BASELINES = ("isolation_forest", "ocsvm", "copod", "knn")
CLASSICS = ("isolation_forest", "ocsvm", "copod")
DRAWS = 2000


def run_cell(digit: str, seed: int, out: Path) -> list[Evaluation]:
    """Train, calibrate and evaluate the diffusion detector and the baselines; read back if done before."""
    place = out / f"digit{digit}-seed{seed}"
    results = place / "results.jsonl"
    if not results.exists():
        config = digits(digit).override({"seed": seed, "execution.num_workers": 1})
        shards = write_shards(config.data, str(place / "shards"))
        detectors = [fit_locally(config, place, shards), *fit_baselines(config, shards, BASELINES)]
        save_evaluations(results, [evaluate(detector, shards, num_pictures=0) for detector in detectors])
    return load_evaluations(results)


def wins(scores: NDArray[np.float64], labels: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(anomalous, normal): 1 where the anomalous image scores higher, 1/2 for a tie."""
    difference = scores[labels][:, None] - scores[~labels][None]
    return (difference > 0) + 0.5 * (difference == 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", nargs="+", default=list("0123456789"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-digits"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    point: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    draws: dict[str, list[NDArray[np.float64]]] = defaultdict(list)
    for digit in arguments.digits:
        generator = np.random.default_rng(int(digit))
        weights: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None
        for seed in arguments.seeds:
            for evaluation in run_cell(digit, seed, arguments.out):
                name, seen = evaluation.rows[0].detector, evaluation.predictions
                assert seen is not None
                table = wins(seen.scores, seen.labels)
                if weights is None:
                    weights = tuple(generator.multinomial(n, np.full(n, 1 / n), DRAWS) / n for n in table.shape)
                point[name][digit].append(float(table.mean()))
                draws[name].append(np.einsum("dp,pn,dn->d", *(weights[0], table, weights[1]), optimize=True))
            print(f"digit {digit} seed {seed} done", flush=True)
    report(arguments.digits, arguments.seeds, point, draws)


def report(
    digits_shown: list[str], seeds: list[int], point: dict[str, dict[str, list[float]]],
    draws: dict[str, list[NDArray[np.float64]]],
) -> None:  # fmt: skip
    names = list(point)
    print(f"\n{hardware('cpu')}; commit {source_commit()}; seeds {seeds}\n")
    print(f"| normal digit | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    for digit in digits_shown:
        cells = [f"{np.mean(point[n][digit]):.3f} ± {np.std(point[n][digit], ddof=1):.3f}" for n in names]
        print(f"| {digit} | {' | '.join(cells)} |")
    means = {name: np.mean(draws[name], 0) for name in names}
    cells = []
    for name in names:
        low, high = np.quantile(means[name], [0.025, 0.975])
        cells.append(f"**{np.mean([np.mean(v) for v in point[name].values()]):.4f}** [{low:.4f}, {high:.4f}]")
    print(f"| mean [95 %] | {' | '.join(cells)} |\n")
    ours = names[0]
    for other in names[1:]:
        low, high = np.quantile(means[ours] - means[other], [0.025, 0.975])
        gap = np.mean([np.mean(point[ours][d]) - np.mean(point[other][d]) for d in digits_shown])
        print(f"{ours} minus {other}: {gap:+.4f} [{low:+.4f}, {high:+.4f}]{' (classic)' if other in CLASSICS else ''}")


if __name__ == "__main__":
    main()
