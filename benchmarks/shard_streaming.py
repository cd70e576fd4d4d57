"""Images/s of streaming through Ray beside a torch ``DataLoader`` on the same shards, and the memory it takes.

``python -m benchmarks.shard_streaming --repeats 5`` prints two Markdown tables. The images are crops of the two
photographs that come with scikit-learn, with a little noise, 256 x 256 RGB. The two loaders run in turn, so that a busy
machine slows both; the ratio is taken per turn.

The DataLoader is the quick way to do it by hand: an ``IterableDataset`` whose workers read whole row groups, each its
own, and decode them with Pillow, in an order that is shuffled by row group only.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from raydiff.config import DataConfig
from raydiff.distributed.cluster import connect
from raydiff.distributed.data import prepare, streaming
from raydiff.images import ImageSpec
from raydiff.shards import ShardSet, TrainingOrder
from raydiff.shards.reading import GroupReader

SIDE = 256
BATCH = 32
WINDOW = 512
WARM_UP = 10  # batches that are not timed
SPEC = ImageSpec((SIDE, SIDE), 3)


def draw_images(folder: Path, count: int, kind: str) -> None:
    """Crops of real photographs, scaled by up to two, with noise of +-4 grey values."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(count):
        photograph = photographs[number % 2]
        side = int(rng.integers(SIDE // 2, SIDE + 150))
        left, top = (int(rng.integers(0, extent - side + 1)) for extent in photograph.size)
        crop = photograph.crop((left, top, left + side, top + side)).resize((SIDE, SIDE))
        noisy = np.asarray(crop).astype(np.int16) + rng.integers(-4, 5, (SIDE, SIDE, 3))
        image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        image.save(folder / f"{number:05d}.{'jpg' if kind == 'jpeg' else 'png'}", quality=90)


def make_shards(root: Path, kind: str, count: int) -> ShardSet:
    source = root / ("png" if kind == "raw" else kind)
    if not source.exists():
        draw_images(source, count, kind)
    config = DataConfig(
        dataset={"name": "folder", "source": str(source)}, image_size=(SIDE, SIDE), channels=3, shard_mb=16,
        calibration_fraction=0.01, shard_format="raw" if kind == "raw" else "encoded",
    )  # fmt: skip
    return prepare(config, str(root / f"shards-{kind}"))


class RowGroups(IterableDataset[torch.Tensor]):
    def __init__(self, shards: ShardSet) -> None:
        self.shards = shards

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        count = len(self.shards.row_groups("train"))
        with GroupReader(self.shards, "train") as reader:
            while True:
                for group in torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()[
                    worker::workers
                ]:
                    table = reader.table(group, ("image", "format"))
                    for content, kind in zip(table.column("image"), table.column("format"), strict=True):
                        yield self.decode(content.as_buffer(), kind.as_py())

    @staticmethod
    def decode(content: Any, kind: str) -> torch.Tensor:
        if kind == "raw":
            return torch.from_numpy(np.frombuffer(content, np.uint8).reshape(SIDE, SIDE, 3).copy())
        return torch.from_numpy(np.array(Image.open(io.BytesIO(content)).convert("RGB")))


def rate(batches: Iterable[Any], steps: int) -> tuple[float, float]:
    """Images/s after the warm-up, and seconds to the first batch."""
    began = time.perf_counter()
    first = start = began
    for number, _ in enumerate(islice(batches, steps + WARM_UP)):
        if number == 0:
            first = time.perf_counter()
        if number == WARM_UP - 1:
            start = time.perf_counter()
    return steps * BATCH / (time.perf_counter() - start), first - began


def ours(shards: ShardSet, steps: int, processes: int) -> tuple[float, float]:
    order = TrainingOrder.of(shards, seed=0, window=WINDOW)
    stream = streaming(shards, SPEC, order, batch_size=BATCH, num_steps=steps + WARM_UP, num_decoders=processes)
    return rate(stream, steps)


def theirs(shards: ShardSet, steps: int, processes: int) -> tuple[float, float]:
    loader = DataLoader(RowGroups(shards), batch_size=BATCH, num_workers=processes)
    return rate(loader, steps)


def throughput(root: Path, options: argparse.Namespace) -> None:
    print(f"\n{options.images} images of {SIDE} px, batches of {BATCH}, {options.processes} decoding processes each, ")
    print(f"{options.steps} batches per run, {options.repeats} runs in turn; median (lowest to highest)\n")
    print("| shards | raydiff images/s | DataLoader images/s | ratio per turn | first batch, raydiff / DataLoader |")
    print("|---|---|---|---|---|")
    for kind in options.kinds:
        shards = make_shards(root, kind, options.images)
        ours(shards, 10, options.processes)  # Ray's workers start once
        runs = [
            (ours(shards, options.steps, options.processes), theirs(shards, options.steps, options.processes))
            for _ in range(options.repeats)
        ]
        mine, other = [run[0][0] for run in runs], [run[1][0] for run in runs]
        ratios = [a / b for a, b in zip(mine, other, strict=True)]
        starts = [statistics.median(run[side][1] for run in runs) for side in (0, 1)]
        print(
            f"| {kind} | {spread(mine, 0)} | {spread(other, 0)} | {spread(ratios, 2)} "
            f"| {starts[0]:.1f} s / {starts[1]:.1f} s |",
            flush=True,
        )


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


class Watch(threading.Thread):
    """Samples memory of this process and its children, and the object store, until stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.done = threading.Event()
        self.peak_store = self.spilled = self.peak_tasks = self.peak_driver = 0

    def run(self) -> None:
        while not self.done.wait(0.1):
            store = store_stats()
            self.peak_store = max(self.peak_store, store.object_store_bytes_used)
            self.spilled = store.spilled_bytes_total
            self.peak_tasks = max(self.peak_tasks, sum(own_memory(pid) for pid in busy_tasks()))
            self.peak_driver = max(self.peak_driver, own_memory(os.getpid()))


def busy_tasks() -> list[int]:
    """Processes of our Ray that read or decode at this moment (Ray names them so)."""
    parents, tasks = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if (folder / "cmdline").read_bytes().startswith((b"ray::_read", b"ray::_decode")):
                tasks.append(int(folder.name))

    def descends(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and descends(parents[pid]))

    return [pid for pid in tasks if descends(pid)]


def own_memory(pid: int) -> int:
    """Bytes in memory that are the process's alone: without the object store, which is shared."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return 0
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")


def store_stats() -> Any:
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    address = ray.get_runtime_context().gcs_address
    return get_memory_info_reply(get_state_from_address(address)).store_stats


def memory(root: Path, options: argparse.Namespace) -> None:
    print(f"\nMemory while two epochs are streamed, window {WINDOW}, object store {options.store_mb} MB (2^20 bytes)\n")
    print(
        "| shards | on disk | decoded | object store, peak | spilled | read and decode tasks, peak | driver, grown by |"
    )
    print("|---|---|---|---|---|---|---|")
    for kind in options.kinds:
        shards = make_shards(root, kind, options.images)
        stored = sum(record.bytes for record in shards.records)
        decoded = shards.count("train") * SIDE * SIDE * 3
        before = own_memory(os.getpid())
        watch = Watch()
        watch.start()
        ours(shards, 2 * shards.count("train") // BATCH - WARM_UP, options.processes)
        watch.done.set()
        watch.join()
        cells = [stored, decoded, watch.peak_store, watch.spilled, watch.peak_tasks, watch.peak_driver - before]
        print(f"| {kind} | " + " | ".join(f"{cell / 2**20:.0f} MB" for cell in cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--store-mb", type=int, default=80, help="object store for the memory table")
    parser.add_argument("--kinds", nargs="+", default=["png", "jpeg", "raw"], choices=["png", "jpeg", "raw"])
    parser.add_argument("--only", choices=["throughput", "memory"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if options.only != "memory":
            with connect(object_store_mb=512):
                throughput(Path(folder), options)
        if options.only != "throughput":
            with connect(object_store_mb=options.store_mb):
                memory(Path(folder), options)


if __name__ == "__main__":
    main()
