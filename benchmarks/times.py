"""What an image costs the detectors of a suite, in turns: its tables' times are of whatever else ran beside them.

    raydiff benchmark examples/suites/parts.yaml --data DATA --out OUT
    python -m benchmarks.times OUT --of "diffusion x 1"

Each data set apart: the methods' saved detectors (of one seed) score the same real test images, in turns, at batch 1
and 8. On a CPU with one thread, and milliseconds are the processor's: another process can slow them down, but is not
counted. ``--device cuda`` moves diffusion detectors to a GPU and tells time by the clock.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.core_speed import in_turns, spread
from benchmarks.paired import shards_of
from raydiff.cells import artifact_place
from raydiff.detector import Detector, load_detector
from raydiff.images import to_tensor
from raydiff.provenance import hardware, source_commit
from raydiff.results import load_evaluations


def detectors(out: Path, device: str) -> dict[str, dict[str, Detector]]:
    """By data set or category, then method: the detector of the first seed whose artefact is there."""
    found: dict[str, dict[str, Detector]] = defaultdict(dict)
    rows = [evaluation.rows[0] for evaluation in load_evaluations(out / "results.jsonl")]
    for row in sorted(rows, key=lambda row: row.seed):
        place = artifact_place(out, str(row.cell))
        if row.detector not in found[row.category or row.dataset] and place.exists():
            found[row.category or row.dataset][row.detector] = load_detector(place, device=device)
    return dict(found)


def table(
    name: str, methods: dict[str, Detector], out: Path, device: str, sizes: list[int], turns: int, of: str
) -> None:
    """Print the row of each method: milliseconds per image, and times those of the method that is compared with."""
    taken = {
        size: in_turns(
            {method: partial(found.predict, _images(found, out, size)) for method, found in methods.items()},
            device, turns, processor=device == "cpu",
        )
        for size in sizes
    }  # fmt: skip
    head = " | ".join(f"ms per image, batch {size} | times {of}" for size in sizes)
    print(f"\n| {name} | NFE | {head} |\n|---|---|{'---|' * 2 * len(sizes)}", flush=True)
    for method in sorted(methods, key=lambda method: statistics.median(taken[sizes[-1]][method])):
        cells = []
        for size in sizes:
            ours = taken[size][method]
            ratios = [a / b for a, b in zip(ours, taken[size][of if of in methods else method], strict=True)]
            cells += [spread([1000 * seconds / size for seconds in ours], ".1f"), spread(ratios, ".2f")]
        print(f"| {method} | {methods[method].num_evaluations or '-'} | {' | '.join(cells)} |", flush=True)


_SEEN: dict[tuple[str, object], Tensor] = {}


def _images(detector: Detector, out: Path, size: int) -> Tensor:
    """The first test images, read once for all detectors that see the same."""
    key = (str(detector.provenance["data_digest"]), detector.image_spec)
    if key not in _SEEN:
        shards = shards_of(detector, [out])
        batches = shards.read(
            "test", detector.image_spec, batch_size=64, on_bad_image=detector.config.data.on_bad_image
        )
        _SEEN[key] = to_tensor(next(iter(batches)).images)
    return _SEEN[key][:size]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--of", required=True, metavar="METHOD", help="the one that others are compared with")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{hardware(arguments.device)}; commit {source_commit()}", flush=True)
    found = detectors(arguments.out, arguments.device)
    if not any(arguments.of in methods for methods in found.values()):
        known = sorted({method for methods in found.values() for method in methods})
        raise SystemExit(f"no method is called {arguments.of!r} there; there are: {', '.join(known)}")
    for name, methods in found.items():
        table(name, methods, arguments.out, arguments.device, arguments.batch, arguments.turns, arguments.of)


if __name__ == "__main__":
    main()
