"""Ten random cells of a benchmark that was run on two workers, run again here in another order: the same rows?

    python -m benchmarks.repeatability SUITE OUT [--data DIR] [--cells 10] [--seed 0]

``OUT`` holds the finished benchmark. The cells are run anew, with their trainings, in a temporary folder, one after the
other in a random order, and their rows compared field by field, times, hardware and commit aside. Exits with 1 when any
differs.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

import torch

from raydiff.benchmark import RESULTS, run_benchmark
from raydiff.plan import plan
from raydiff.provenance import hardware, source_commit
from raydiff.results import Evaluation, load_evaluations


def by_cell(out: Path) -> dict[str, Evaluation]:
    return {str(evaluation.rows[0].cell): evaluation for evaluation in load_evaluations(out / RESULTS)}


def differences(first: Evaluation, second: Evaluation) -> list[str]:
    """Names of the fields in which any row of two runs of a cell differs, and of the scores that do."""
    found = {"number of rows"} if len(first.rows) != len(second.rows) else set()
    for one, other in zip(first.rows, second.rows, strict=False):
        a, b = one.comparable(), other.comparable()
        found |= {name for name in a if a[name] != b[name]}
    if first.predictions is not None and second.predictions is not None:
        ours = dict(zip(first.predictions.ids, first.predictions.scores.tolist(), strict=True))
        theirs = dict(zip(second.predictions.ids, second.predictions.scores.tolist(), strict=True))
        found |= {"scores"} if ours != theirs else set()
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=Path())
    parser.add_argument("--cells", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    whole, before = plan(arguments.suite, arguments.data), by_cell(arguments.out)
    finished = sorted((cell for cell in whole.cells if cell.cell_id in before), key=lambda cell: cell.cell_id)
    chosen = random.Random(arguments.seed).sample(finished, min(arguments.cells, len(finished)))
    print(f"{hardware('cpu')}; commit {source_commit()}; {len(chosen)} of {len(finished)} finished cells")
    with tempfile.TemporaryDirectory() as temporary:
        run_benchmark(whole.of(chosen), Path(temporary))
        again = by_cell(Path(temporary))
    unequal = 0
    for cell in chosen:
        found = differences(before[cell.cell_id], again[cell.cell_id])
        unequal += bool(found)
        print(f"{cell.cell_id}  {cell.name}: {'differs in ' + ', '.join(found) if found else 'equal'}")
    print(f"{len(chosen) - unequal} of {len(chosen)} cells equal, every row and every image's score")
    sys.exit(bool(unequal))


if __name__ == "__main__":
    main()
