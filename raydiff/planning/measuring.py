"""Measures a :class:`Profile`: the real training loop, scorer and decoder of a config, on this machine, without Ray.

It takes about a minute: no figure is repeated for longer than some seconds, and a network that needs more than that for
one step is run at the smallest batches.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from raydiff.config import ExperimentConfig
from raydiff.detector import DiffusionDetector
from raydiff.errors import ConfigError
from raydiff.images import to_tensor, to_uint8
from raydiff.planning.learning import as_seen, fitted_space, with_measured_head
from raydiff.planning.profile import Pair, Profile, workload
from raydiff.planning.sampling import sample_images
from raydiff.provenance import hardware, source_commit, versions
from raydiff.shards import TrainingBatch
from raydiff.training import HeldOut, train

__all__ = [
    "STEP_SECONDS",
    "Clock",
    "Graph",
    "chosen_rows",
    "measure",
    "measure_graph",
    "measure_steps",
    "measured_on",
]

STEP_SECONDS = 6.0
"""What timing the steps of one batch size may take, about."""


@dataclass
class Clock:
    """A :class:`raydiff.runtime.Runtime` that keeps the loop's own timings; writes checkpoints if it has a place."""

    device: str
    folder: Path | None = None
    rank: int = 0
    world_size: int = 1
    speeds: list[float] = field(default_factory=list)
    checkpoint: tuple[int, float] = (0, 0.0)

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network itself."""
        return network

    def reduce_mean(self, values: Tensor) -> Tensor:
        """The values themselves."""
        return values

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Keep the images per second."""
        if "images_per_second" in metrics:
            self.speeds.append(metrics["images_per_second"])

    def save(self, step: int, write: Callable[[Path], None]) -> None:  # noqa: ARG002
        """Bytes and seconds of a checkpoint."""
        if self.folder is None:
            return
        began = time.perf_counter()
        write(self.folder / "checkpoint")
        taken = time.perf_counter() - began
        self.checkpoint = (sum(path.stat().st_size for path in (self.folder / "checkpoint").iterdir()), taken)

    @contextmanager
    def latest(self) -> Iterator[Path | None]:
        """None: every measurement begins anew."""
        yield None


@dataclass(frozen=True)
class Graph:
    """What one forward and backward pass is made of; FLOPs are per row. See :class:`Profile`."""

    saved_bytes: int
    flops: dict[str, float]
    forward_flops: float
    operations: int
    forward_operations: int


def measured_on(config: ExperimentConfig, device: str | None) -> str:
    """The device that :func:`measure` takes: the one named, else a GPU where the config uses them and there is one.

    Raises:
        ConfigError: the device is not there.
    """
    there = torch.cuda.is_available()
    device = device or ("cuda" if config.execution.use_gpu and there else "cpu")
    if device.startswith("cuda") and not there:
        raise ConfigError(f"--device {device}: torch finds no GPU here; leave it out, or measure where one is")
    return device


def measure(
    config: ExperimentConfig,
    *,
    device: str | None = None,
    threads: int | None = None,
    pair: bool = True,
    seconds: float = STEP_SECONDS,
    say: Callable[[str], None] = lambda _: None,
) -> Profile:
    """Measure a config on this machine.

    Args:
        config: whose network, space, scorer and images; batch and workers say which batch sizes are looked at.
        device: ``cpu`` or ``cuda``; by default a GPU where the config uses them and there is one.
        threads: of a worker; what Ray gives one by default: ``execution.cpus_per_worker``, at least 1.
        pair: also measure two processes at once (on a CPU; some 25 seconds).
        seconds: what timing the steps of one batch size may take, about.
        say: told what is being measured.

    Raises:
        ConfigError: the device is not there, or the config cannot be trained.
        DataError: an image of the sample cannot be decoded.
    """
    device = measured_on(config, device)
    began, before = time.perf_counter(), torch.get_num_threads()
    threads = threads or max(1, int(config.execution.cpus_per_worker))
    torch.set_num_threads(threads)
    try:
        profile = _measured(config, device, threads, pair, seconds, say)
    finally:
        torch.set_num_threads(before)
    return Profile(**{**vars(profile), "seconds": time.perf_counter() - began})


def _measured(
    config: ExperimentConfig, device: str, threads: int, pair: bool, budget: float, say: Callable[[str], None]
) -> Profile:
    resident = _resident_bytes()
    say("images")
    sample = sample_images(config)
    pixels = sample.pixels
    fit = fitted_space(config, pixels, device)
    state = fit.state
    detector = DiffusionDetector.create(config, num_classes=1, device=device, space_state=state)
    say("network")
    graphs = {rows: measure_graph(detector, rows) for rows in (2, 3)}  # one row is a special case to some layers
    rows = chosen_rows(config, _one_step(config, pixels, state, device), budget)
    steps: dict[int, float] = {}
    peaks: dict[int, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in rows:
            say(f"steps of {count} images")
            clock = Clock(device, Path(folder) if count == rows[-1] else None)
            steps[count] = measure_steps(config, pixels, state, count, clock, budget)
            if device.startswith("cuda"):
                peaks[count] = torch.cuda.max_memory_allocated()
                torch.cuda.reset_peak_memory_stats()
    say("scores")
    seen = to_uint8(as_seen(config, pixels))
    detector, head_seconds = with_measured_head(detector, seen, sample.images.num_train)
    encode_seconds, encode_flops = _encoding(detector, pixels)
    score_rows = min(detector.images_per_call, len(pixels))
    score_seconds, evidence_values = _scoring(detector, pixels[:score_rows])
    artifact = detector.files()
    found: Pair | None = None
    if pair and device == "cpu":
        say("two processes at once")
        from raydiff.planning.pair import measure_pair

        found = measure_pair(config, pixels, rows[-1], threads, budget)
    return Profile(
        workload=workload(config), machine=hardware(device), device=device, cores=_cores(), threads=threads,
        num_parameters=sum(p.numel() for p in detector.network.parameters()),
        space_bytes=sum(t.numel() * t.element_size() for t in detector.space.state().values()),
        latent_values=int(np.prod(detector.space.shape)), step_seconds=steps,
        saved_bytes={count: graph.saved_bytes for count, graph in graphs.items()}, flops=graphs[2].flops,
        forward_flops=graphs[2].forward_flops, operations={n: graph.operations for n, graph in graphs.items()},
        forward_operations=graphs[2].forward_operations, encode_seconds=encode_seconds, encode_flops=encode_flops,
        costly_space=detector.space.costly, space_seconds=fit.seconds, head_seconds=head_seconds,
        space_fixed_seconds=max(0.0, fit.measured_seconds - fit.measured_images * encode_seconds),
        space_fit_bytes=fit.bytes,
        evaluations=detector.num_evaluations or 0,
        score_seconds=score_seconds, score_rows=score_rows, evidence_values=evidence_values,
        checkpoint_bytes=clock.checkpoint[0], checkpoint_seconds=clock.checkpoint[1],
        artifact_bytes=sum(map(len, artifact.values())), process_bytes=resident, images=sample.images, pair=found,
        device_peak_bytes=peaks,
        device_memory_bytes=torch.cuda.get_device_properties(device).total_memory if peaks else 0,
        versions=versions(), commit=source_commit(),
    )  # fmt: skip


def chosen_rows(config: ExperimentConfig, seconds_per_row: float, budget: float) -> tuple[int, ...]:
    """One or two batch sizes to time: a worker's share of the batch and half of it, or less if that takes too long."""
    share = -(-config.training.batch_size // (config.execution.num_workers * config.training.accumulation_steps))
    most = max(1, min(share, int(budget / 4 / max(seconds_per_row, 1e-9))))
    return tuple(sorted({max(1, most // 2), most}))


def measure_steps(
    config: ExperimentConfig,
    pixels: NDArray[np.uint8],
    state: Mapping[str, Tensor],
    rows: int,
    clock: Clock,
    budget: float,
) -> float:
    """Median seconds of an optimiser step with ``rows`` images, by the training loop's own clock after a warm-up."""
    first = _timed(config, pixels, state, rows, Clock(clock.device), steps=1, parts=2)
    per_part = max(1, min(50, int(budget / 6 / first)))
    parts = max(2, min(6, int(budget / (per_part * first))))
    return _timed(config, pixels, state, rows, clock, steps=per_part, parts=parts)


def _timed(
    config: ExperimentConfig, pixels: NDArray[np.uint8], state: Mapping[str, Tensor], rows: int, clock: Clock,
    *, steps: int, parts: int,
) -> float:  # fmt: skip
    """``parts`` times ``steps`` steps, the first part to warm up."""
    total = steps * parts
    changed = config.override(
        {
            "execution.min_workers": None, "execution.num_workers": 1, "training.accumulation_steps": 1,
            "training.batch_size": rows, "training.num_steps": total, "training.log_every": steps,
            "training.validate_every": total, "training.checkpoint_every": total, "training.horizontal_flip": False,
            "data.cache_mb": 4096,
        }
    )  # fmt: skip
    held_out = HeldOut(as_seen(config, pixels[:1]), torch.zeros(1, dtype=torch.int64), ["held-out"])
    train(changed, _stream(pixels, rows), held_out, clock, num_classes=1, space_state=state)
    kept = clock.speeds[1:] or clock.speeds
    return rows / statistics.median(kept)


def _stream(pixels: NDArray[np.uint8], rows: int) -> Callable[[int], Iterator[TrainingBatch]]:
    """The same images over and over, each time of another epoch, so that noise and step are new."""

    def stream(start: int) -> Iterator[TrainingBatch]:
        places = np.arange(rows) % len(pixels)
        epochs = np.arange(rows) // len(pixels)
        ids = [f"image-{place}" for place in places]
        labels = np.zeros(rows, dtype=np.int64)
        while True:
            yield TrainingBatch(ids, epochs + start * rows, pixels[places], labels)
            start += 1

    return stream


def _one_step(config: ExperimentConfig, pixels: NDArray[np.uint8], state: Mapping[str, Tensor], device: str) -> float:
    """Seconds of a step of one image, after one to warm up."""
    return _timed(config, pixels, state, 1, Clock(device), steps=1, parts=2)


def measure_graph(detector: DiffusionDetector, rows: int) -> Graph:
    """One forward and backward pass of the network with ``rows`` images: bytes kept, FLOPs, operations.

    The bytes are those of the storages that autograd keeps (``torch.autograd.graph.saved_tensors_hooks``), each counted
    once, parameters left out. Blocks that are computed again (``activation_checkpointing``) keep their inputs alone.
    """
    network, config, device = detector.network, detector.config, detector.device
    x_t = torch.zeros(rows, *detector.space.shape, device=device)
    t = torch.full((rows,), config.schedule.num_train_timesteps // 2, device=device)
    condition = None if detector.model.num_classes is None else torch.zeros_like(t)
    known = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, tuple[Tensor, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (tensor, storage.nbytes())
        return tensor

    autocast = torch.autocast(device.split(":")[0], torch.bfloat16)
    network.train()
    try:
        with FlopCounterMode(display=False) as flops, _Operations() as operations:
            with (
                torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
                autocast if config.training.precision == "bfloat16" else nullcontext(),
            ):
                loss = network(x_t, t, condition).float().square().mean()
            saved = sum(size for _, size in kept.values())
            forward, started = flops.get_total_flops() / rows, operations.count
            loss.backward()
    finally:
        network.zero_grad(set_to_none=True)
        network.eval()
    by_kind = {"convolution": 0.0, "matmul": 0.0}
    for operation, count in flops.get_flop_counts()["Global"].items():
        by_kind["convolution" if "convolution" in str(operation) else "matmul"] += count / rows
    return Graph(saved, by_kind, forward, operations.count, started)


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that start work: views and metadata do not."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (func.is_view or func.namespace != "aten")
        return func(*args, **(kwargs or {}))


def _encoding(detector: DiffusionDetector, pixels: NDArray[np.uint8]) -> tuple[float, float]:
    """Seconds and FLOPs per image of a costly space; zeros for another."""
    if not detector.space.costly:
        return 0.0, 0.0
    images = as_seen(detector.config, pixels[:4]).to(detector.device)
    with FlopCounterMode(display=False) as flops:  # it warms up, too
        detector.space.encode(images)
    return _median_seconds(lambda: detector.space.encode(images), detector.device) / len(images), (
        flops.get_total_flops() / len(images)
    )


def _scoring(detector: DiffusionDetector, pixels: NDArray[np.uint8]) -> tuple[float, int]:
    """Seconds per image of the scorer's evidence and how many numbers that is.

    The seconds are those of the space and of all evaluations, not of the threshold's arithmetic.
    """
    images = to_tensor(pixels)
    values = detector.measure(images[:1]).numel()
    return _median_seconds(lambda: detector.measure(images), detector.device) / len(images), values


def _median_seconds(call: Callable[[], object], device: str) -> float:
    """Of up to ten calls in three seconds or so."""
    taken: list[float] = []
    while len(taken) < 10 and sum(taken) < 3:
        began = time.perf_counter()
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def _cores() -> int:
    """Usable ones."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _resident_bytes() -> int:
    """Of this process; 0 where the system does not tell."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0
