"""Training in feature space with grids kept in files, in memory and not at all, side by side.

    python -m benchmarks.grids --read
    python -m benchmarks.grids DATA [--turns 3] [--steps 100] [--images 400] [--set training.batch_size=32]

DATA is a folder in the MVTec-AD layout. The same config is trained in five ways, which take turns, each run in a
process of its own so that its peak memory is its own: nothing kept (``data.cache_mb: 0``: every epoch decodes and
encodes anew), what the network made kept in memory (the default), kept in Parquet files that this run makes, in files
that it finds, and in float16 ones. Shards and the space's fit are ready beforehand. Seconds are those of the whole
training, making the grids included, core-seconds what the process computed in them (which other work on the machine
hardly changes); images/s are of the second half. Ratios are taken per turn, against memory. All but
float16 must end with the same weights, bit for bit; it says whether they do.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from raydiff.config import ExperimentConfig, load_config
from raydiff.experiment import cached, fit_space, held_out_images, provenance_of, space_state, streamed
from raydiff.grids import GridFiles, Grids, GridSet, Part
from raydiff.grids.writing import encoded_part
from raydiff.images import ImageSpec
from raydiff.provenance import hardware, source_commit
from raydiff.runtime import CHECKPOINTS, LocalRuntime
from raydiff.shards import ShardSet, fits_in_memory, write_shards
from raydiff.storage import Storage
from raydiff.training import train

_RECIPE = Path(__file__).parent.parent / "examples/configs/photographs.yaml"
WAYS: dict[str, dict[str, Any]] = {
    "nothing kept": {"data.cache_mb": 0},
    "memory": {},
    "Parquet, made": {"data.cache_mb": 0, "data.grids": "{made}"},
    "Parquet, found": {"data.cache_mb": 0, "data.grids": "{found}"},
    "Parquet float16, found": {"data.cache_mb": 0, "data.grids": "{found}", "data.grids_dtype": "float16"},
}


DTYPES: tuple[Literal["float32", "float16"], ...] = ("float32", "float16")


def run(way: str, folder: Path, device: str) -> dict[str, Any]:
    """Train in one way, in this process; what it took."""
    config = load_config(folder / "config.yaml")
    places = {"made": str(folder / "made"), "found": str(folder / "found")}
    chosen = {k: v.format(**places) if isinstance(v, str) else v for k, v in WAYS[way].items()}
    config = config.override(chosen)
    shards = ShardSet.open(str(folder / "shards"))
    held_out, lines = held_out_images(config, shards), list[tuple[float, int]]()
    before = _peak_mb()
    with tempfile.TemporaryDirectory() as place:
        runtime = LocalRuntime(Path(place), device, on_metrics=lambda m: lines.append((time.monotonic(), m["step"])))
        stream = cached if fits_in_memory(shards, ImageSpec.of(config.data), config.data.cache_mb) else streamed
        begun, worked = time.monotonic(), time.process_time()
        train(
            config, stream(config, shards), held_out, runtime, num_classes=1, provenance=provenance_of(shards),
            space_state=space_state(folder), grids=Grids.of(config, Path(place), shards),
        )  # fmt: skip
        seconds, core_seconds = time.monotonic() - begun, time.process_time() - worked
        newest = sorted((Path(place) / CHECKPOINTS).iterdir())[-1]
        digest = hashlib.sha256((newest / "weights.safetensors").read_bytes()).hexdigest()
    return {
        "seconds": seconds,
        "core_seconds": core_seconds,
        "images_per_second": _second_half(lines, config),
        "peak_mb": _peak_mb(),
        "before_mb": before,
        "weights": digest,
        "gpu_mb": torch.cuda.max_memory_allocated() / 2**20 if device != "cpu" else 0.0,
    }


def _second_half(lines: list[tuple[float, int]], config: ExperimentConfig) -> float:
    middle = next(line for line in lines if line[1] >= config.training.num_steps / 2)
    return (lines[-1][1] - middle[1]) * config.training.batch_size / (lines[-1][0] - middle[0])


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _prepare(arguments: argparse.Namespace, folder: Path) -> ExperimentConfig:
    log_every = max(1, arguments.steps // 20)
    config = load_config(_RECIPE).override(
        [
            f"data.dataset.source={Path(arguments.data).resolve()}", f"data.max_train_images={arguments.images}",
            f"training.num_steps={arguments.steps}", f"training.log_every={log_every}",
            "training.validate_every=100000", "training.checkpoint_every=100000", "training.validation_images=1",
            *arguments.overrides,
        ]
    )  # fmt: skip
    shards = write_shards(config.data, str(folder / "shards"))
    fit_space(config, folder, shards, device=arguments.device)
    (folder / "config.yaml").write_text(json.dumps(config.to_dict()))
    return config


def _measured(way: str, folder: Path, device: str) -> dict[str, Any]:
    """:func:`run` in a process of its own: a fork, which need not import anything, but where there is a GPU."""
    context: Any = multiprocessing.get_context("fork" if device == "cpu" else "spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, way, folder, device))
    process.start()
    sender.close()
    try:
        found: dict[str, Any] = receiver.recv()
    except EOFError:
        raise SystemExit(f"{way}: the run failed; see above") from None
    process.join()
    print(f"{way}: {json.dumps(found)}", flush=True)
    return found


def _send(sender: Connection, way: str, folder: Path, device: str) -> None:
    sender.send(run(way, folder, device))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", help="a folder of images")
    parser.add_argument("--read", action="store_true", help="how fast files of random grids are written and read alone")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--images", type=int, default=400, help="training and calibration images")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="FIELD=VALUE")
    arguments = parser.parse_args()
    if arguments.read or arguments.data is None:
        read_speed()
        return
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = _prepare(arguments, folder)
        for way in list(WAYS)[3:]:
            _measured(way, folder, arguments.device)  # makes what the measured runs find
        for _ in range(arguments.turns):
            for way, runs in found.items():
                shutil.rmtree(folder / "made", ignore_errors=True)
                runs.append(_measured(way, folder, arguments.device))
        sizes = [sum(file.stat().st_size for file in grids.glob("*.parquet")) for grids in (folder / "found").iterdir()]
        count = ShardSet.open(str(folder / "shards")).count("train")
    _report(found, config, arguments, count, max(sizes) / 2**20)


def _report(
    found: dict[str, list[dict[str, Any]]], config: ExperimentConfig, arguments: argparse.Namespace, count: int,
    size_mb: float,
) -> None:  # fmt: skip
    epochs = arguments.steps * config.training.batch_size / count
    print(
        f"\n{hardware(arguments.device)}; commit {source_commit()}; seed {config.seed}; {arguments.turns} turns of"
        f" {arguments.steps} steps of {config.training.batch_size} images, {count} training images ({epochs:.1f}"
        f" epochs), {config.data.image_size[0]} px; grids {size_mb:.0f} MB\n"
    )
    head = ["", "seconds", "over memory", "core-seconds", "over memory", "images/s, second half", "over memory"]
    head += ["peak memory, MB", "of it before"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for way, runs in found.items():
        cells = [way]
        for name, form in (("seconds", ".1f"), ("core_seconds", ".1f"), ("images_per_second", ".1f")):
            pairs = zip(runs, found["memory"], strict=True)
            cells += [_spread((one[name] for one in runs), form), _spread((a[name] / b[name] for a, b in pairs), ".2f")]
        cells += [_spread((one[name] for one in runs), ".0f") for name in ("peak_mb", "before_mb")]
        print(f"| {' | '.join(cells)} |")
    exact = {one["weights"] for way, runs in found.items() if "float16" not in way for one in runs}
    print(f"\nfloat32 weights: {'the same, bit for bit' if len(exact) == 1 else 'THEY DIFFER'}")


def read_speed() -> None:
    """Rows/s and MB/s of one core that writes files of grids, and reads them in random order from the page cache."""
    print(f"{hardware('cpu')}; commit {source_commit()}; core-seconds\n")
    print(
        "| grid | views | dtype | rows | MB on disk | over the values | written, rows/s | read, rows/s | read, MB/s |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for shape, num_views in (((96, 16, 16), 1), ((96, 16, 16), 8), ((16, 7, 7), 8)):
        for dtype in DTYPES:
            _read_speed(shape, num_views, dtype)


def _read_speed(shape: tuple[int, int, int], num_views: int, dtype: Literal["float32", "float16"]) -> None:
    grids = GridSet("0" * 64, num_views, shape, dtype, ())
    per_part = max(1, 32 * 2**20 // (grids.row_bytes * num_views))
    count = min(4 * per_part, 2000)
    starts = range(0, count, per_part)
    parts = (Part(f"{i}.parquet", "shard", i, min(per_part, count - i)) for i in starts)
    grids = GridSet(grids.digest, num_views, shape, dtype, tuple(parts))
    rng, written = np.random.default_rng(0), 0.0
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage.of(folder)
        for part in grids.parts:
            values = rng.standard_normal((part.count * num_views, *shape), dtype=np.float32).astype(dtype)
            names = [f"train/good/{i:06d}.png" for i in range(part.count)]
            begun = time.process_time()
            storage.write(part.name, encoded_part(grids, part, names, ["good"] * part.count, values))
            written += time.process_time() - begun
        size, files = sum(storage.sizes().values()), GridFiles(grids, storage)
        rows, views = np.concatenate([rng.permutation(count) for _ in range(3)]), rng.integers(0, num_views, 3 * count)
        begun = time.process_time()
        for start in range(0, len(rows), 340):
            files.read(rows[start : start + 340], views[start : start + 340])
        speed = len(rows) / (time.process_time() - begun)
        files.close()
    grid, total = " x ".join(map(str, shape)), count * num_views
    over = size / (total * grids.row_bytes) - 1
    print(
        f"| {grid} | {num_views} | {dtype} | {total} | {size / 2**20:.0f} | {over:+.1%} |"
        f" {total / written:.0f} | {speed:.0f} | {speed * grids.row_bytes / 2**20:.0f} |"
    )


def _spread(values: Iterable[float], form: str) -> str:
    values = list(values)
    return f"{statistics.median(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


if __name__ == "__main__":
    main()
