"""Two processes of one machine at once: how much they slow each other, and how long gloo takes to sum gradients.

:func:`measure_pair` starts this module twice (``python -m raydiff.planning.pair``). The job, the images, where they
meet and what was found are files in a temporary folder. No Ray, no port of our choosing.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydiff.errors import WorkerError
from raydiff.planning.profile import Pair

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from raydiff.config import ExperimentConfig

__all__ = ["measure_pair"]

_TIMEOUT_S = 300
_SIZES = (2**16, 2**22)
"""Bytes of the sums that are timed: the line through both gives latency and bandwidth."""

_REPEATS = 20


def measure_pair(config: ExperimentConfig, pixels: NDArray[np.uint8], rows: int, threads: int, budget: float) -> Pair:
    """Steps of ``rows`` images, and sums, in two processes at the same time.

    Args:
        config: what is trained; nothing passes between the two while they train.
        pixels: images to train on, uint8 (n, H, W, C).
        rows: of each process's batch.
        threads: of each.
        budget: seconds that timing the steps may take, about: once alone and once together.

    Raises:
        WorkerError: a process failed or did not end; the message has its last line.
    """
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/pixels.npy", pixels, allow_pickle=False)
        job = {"config": config.to_dict(), "rows": rows, "threads": threads, "budget": budget}
        Path(folder, "job.json").write_text(json.dumps(job), encoding="utf-8")
        processes = [_start(folder, rank, threads) for rank in range(2)]
        result = Path(folder, "found.json")
        try:
            _wait(processes, result)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if not result.exists():
            # A negative code may be that it was killed for the other's failure.
            rank = max(range(2), key=lambda rank: processes[rank].returncode)
            said = Path(folder, f"errors-{rank}").read_text(encoding="utf-8").strip().splitlines()
            reason = said[-1] if said else "it said nothing"
            raise WorkerError(f"two processes at once could not be measured ({reason}); use --no-pair")
        found = json.loads(result.read_text(encoding="utf-8"))
    sums = {int(size): float(seconds) for size, seconds in found["all_reduce_seconds"].items()}
    return Pair(max(1.0, found["slowdown"]), sums)


def _start(folder: str, rank: int, threads: int) -> subprocess.Popen[bytes]:
    with Path(folder, f"errors-{rank}").open("wb") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", "raydiff.planning.pair", folder, str(rank)], stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=errors, env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip


def _wait(processes: list[subprocess.Popen[bytes]], result: Path) -> None:
    """Until ``result`` is there or a process has ended without it: the other would wait for it.

    How they end once it is there does not matter: gloo's threads now and then abort a process on its way out.
    """
    end = time.monotonic() + _TIMEOUT_S
    while not result.exists():
        if any(process.poll() for process in processes) or all(process.returncode == 0 for process in processes):
            return
        if time.monotonic() > end:
            raise WorkerError(f"two processes at once were not measured within {_TIMEOUT_S} s; use --no-pair")
        time.sleep(0.1)


def _main(folder: Path, rank: int) -> None:
    job: dict[str, Any] = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    import numpy as np
    import torch
    from torch import distributed

    from raydiff.config import ExperimentConfig
    from raydiff.journal import write_whole
    from raydiff.planning.learning import fitted_space
    from raydiff.planning.measuring import Clock, measure_steps

    torch.set_num_threads(job["threads"])
    config = ExperimentConfig.model_validate(job["config"])
    pixels = np.load(folder / "pixels.npy", allow_pickle=False)
    state = fitted_space(config, pixels, "cpu").state
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    sums = {size: _sum_seconds(size) for size in _SIZES}
    alone = 0.0
    if rank == 0:  # the other one waits
        alone = measure_steps(config, pixels, state, job["rows"], Clock("cpu"), job["budget"])
    distributed.barrier()
    both = torch.tensor(
        measure_steps(config, pixels, state, job["rows"], Clock("cpu"), job["budget"]), dtype=torch.float64
    )
    distributed.all_reduce(both)
    if rank == 0:
        found = {"slowdown": float(both) / 2 / alone, "all_reduce_seconds": sums}
        write_whole(folder / "found.json", json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


def _sum_seconds(size: int) -> float:
    """Median seconds of an all-reduce of so many bytes."""
    import torch
    from torch import distributed

    values = torch.zeros(size // 4)
    taken = []
    for _ in range(_REPEATS):
        distributed.barrier()
        began = time.perf_counter()
        distributed.all_reduce(values)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[2:])


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))
