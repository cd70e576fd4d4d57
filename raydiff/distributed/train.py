"""Ray Train around :mod:`raydiff.training`: workers, restarts, checkpoints in a place that every node can reach."""

from __future__ import annotations

import errno
import logging
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import ray
import ray.train.torch
import torch
from ray.exceptions import RayError
from torch import Tensor, nn

from raydiff.config import ExperimentConfig
from raydiff.detector import Detector
from raydiff.distillation import teacher_in
from raydiff.distributed.room import wait_for_room
from raydiff.distributed.train_storage import (
    check_shared,
    forget_failure,
    local_folder,
    places_of,
    raise_recorded,
    record_failure,
    recorded,
    remove_unfinished,
    upload,
)
from raydiff.errors import ConfigError, DataError, RaydiffError, StorageError, WorkerError
from raydiff.experiment import (
    begin_run,
    cached,
    fit_in_parts,
    fit_space,
    held_out_images,
    of_fold,
    provenance_of,
    space_state,
)
from raydiff.grids import Grids
from raydiff.images import ImageSpec
from raydiff.runtime import CHECKPOINTS
from raydiff.shards import ShardSet, TrainingBatch, TrainingOrder, fits_in_memory
from raydiff.splits import weights_of
from raydiff.storage import Place
from raydiff.tracking import MetricsLog, read_metrics
from raydiff.training import Stream, train

__all__ = ["RayRuntime", "fit", "in_a_thread"]

_POLL_S, _POLL_STORE_S = 0.5, 2.0
_RESIZE_S = 30.0
"""How often an elastic run looks whether it can have more workers again; they then restart from a checkpoint."""

_START_TIMEOUT = ("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "30")
"""Workers of an elastic run that do not start in time (60 s by default) are asked for again, of the nodes left."""

_STOP_S = 20.0


def fit(
    config: ExperimentConfig,
    run_dir: Place,
    shards: ShardSet,
    *,
    on_metrics: Callable[[Mapping[str, Any]], None] = lambda _: None,
    spaces: str | None = None,
) -> Detector:
    """Train on ``execution.num_workers`` Ray Train workers, calibrate, and save ``run_dir/artifact``.

    ``run_dir`` is a folder that every node can reach, or a place in a store. One with checkpoints is taken up where it
    stopped. A killed worker is restarted from the last checkpoint up to ``execution.max_failures`` times; with
    ``execution.min_workers`` set training goes on with the workers that the cluster still has room for, and takes more
    when there is room again: losses stay the same but for rounding.
    With ``data.on_bad_shard: skip`` a shard that breaks on the way is left out from the last checkpoint on.
    ``on_metrics`` gets what a space that is trained says of its fit, here and on the driver's GPU if it has one, then
    each line of ``metrics.jsonl`` as it is written, then what a scorer's own network says of its training, on the
    driver too; those of a fold's network have its number as ``fold``. ``spaces`` is where spaces that are trained are
    kept for other runs, where ``data.spaces`` says nothing.

    Raises:
        ConfigError: the cluster has fewer CPUs or GPUs than the workers ask for.
        TrainingError: the loss is not a number; WorkerError: workers failed too often, or the cluster was lost.
        DataError, StorageError: what a worker met while it read or wrote.
    """
    run_dir = run_dir.resolve() if isinstance(run_dir, Path) else run_dir
    _check_resources(config)
    begin_run(run_dir, config, shards)
    device = "cuda" if config.execution.use_gpu and torch.cuda.is_available() else "cpu"

    @contextmanager
    def trained(config: ExperimentConfig, place: Place) -> Iterator[tuple[Path, ShardSet]]:
        heed = of_fold(on_metrics, run_dir, place)
        fit_space(config, place, shards, device=device, on_metrics=heed, spaces=spaces)
        forget_failure(place)
        remove_unfinished(place)
        with _follow(place, heed):
            checkpoint, trained_on = _run_on_good_shards(config, place, shards, run_dir)
        with _opened(checkpoint, place) as folder:
            yield folder, trained_on

    return fit_in_parts(config, run_dir, shards, trained, device=device, on_metrics=on_metrics)


@contextmanager
def _opened(checkpoint: Any, run_dir: Place) -> Iterator[Path]:
    """A checkpoint's folder, or a copy on this machine of one in a store."""
    here = local_folder(checkpoint, run_dir)
    with ExitStack() as stack:
        try:
            folder = here or stack.enter_context(checkpoint.as_directory())
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise StorageError(
                f"{run_dir}: no room for a copy of the checkpoint in {tempfile.gettempdir()} on node"
                f" {socket.gethostname()}; make room there, or set TMPDIR"
            ) from error
        yield Path(folder)


def _run_on_good_shards(
    config: ExperimentConfig, run_dir: Place, shards: ShardSet, whole: Place
) -> tuple[Any, ShardSet]:
    """The last checkpoint, and the shards it was trained on.

    Where a shard breaks on the way and ``data.on_bad_shard`` is ``skip``, all workers begin again at the last
    checkpoint, without it. ``whole`` is the run that errors name: ``run_dir``, or the one that has it as a fold.
    """
    while True:
        try:
            return _run(config, run_dir, shards, whole), shards
        except DataError:
            if config.data.on_bad_shard == "error":
                raise
            left = ShardSet.open(shards.uri, on_bad_shard="skip")
            if {bad.record.name for bad in left.left_out} <= {bad.record.name for bad in shards.left_out}:
                raise
            shards = left
            forget_failure(run_dir)


def _run(config: ExperimentConfig, run_dir: Place, shards: ShardSet, whole: Place) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    execution = config.execution
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    if execution.min_workers:
        os.environ.setdefault(*_START_TIMEOUT)  # Ray Train hands it on to its controller
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"config": config.to_dict(), "run_dir": run_dir, "shards": shards},
        scaling_config=ScalingConfig(
            num_workers=(least, execution.num_workers) if (least := execution.min_workers) else execution.num_workers,
            use_gpu=execution.use_gpu,
            elastic_resize_monitor_interval_s=_RESIZE_S,
            resources_per_worker={"CPU": execution.cpus_per_worker} | ({"GPU": 1} if execution.use_gpu else {}),
        ),
        run_config=RunConfig(
            **places_of(run_dir),
            failure_config=FailureConfig(max_failures=execution.max_failures, controller_failure_limit=2),
            checkpoint_config=CheckpointConfig(num_to_keep=config.training.keep_checkpoints),
        ),
    )
    try:
        result = in_a_thread(trainer.fit)
    except TrainingFailedError as error:
        raise_recorded(run_dir, error)
        raise WorkerError(f"{run_dir}: {_reason(error)}; resume with: raydiff fit --resume {whole}") from error
    except RayError as error:  # the cluster's head has gone, and what directs the workers with it
        raise_recorded(run_dir)
        raise WorkerError(
            f"{run_dir}: the cluster was lost ({type(error).__name__}); start it again, and resume with:"
            f" raydiff fit --resume {whole}"
        ) from error
    raise_recorded(run_dir)
    if result.checkpoint is None:
        raise StorageError(
            f"{run_dir / CHECKPOINTS}: training ended without a checkpoint; see that the place is shared"
        )
    return result.checkpoint


def in_a_thread(call: Callable[[], Any], stop: Callable[[], None] | None = None) -> Any:
    """The call's result or error, with Ctrl-C left to this thread.

    In the main thread Ray Train and Tune take Ctrl-C over and end the process in their own way. Here it stays a
    ``KeyboardInterrupt``, and the run ends with the Ray session that the caller shuts down. A call that can be stopped
    is told to first, and given some seconds: one that goes on asking a session that is gone takes the process with it.
    """
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["result"] = call()
        except BaseException as error:  # handed over to the caller, whatever it is
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(_POLL_S)
    except KeyboardInterrupt:
        if stop is not None:
            stop()
            thread.join(_STOP_S)
        raise
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]


def _worker(job: dict[str, Any]) -> None:
    """One Ray Train worker. An error of ours is written down, so that the restart that Ray tries gives up at once."""
    run_dir: Place = job["run_dir"]
    check_shared(run_dir, job["shards"])
    if recorded(run_dir):
        return
    config, shards = ExperimentConfig.model_validate(job["config"]), job["shards"]
    try:
        runtime = RayRuntime.here(config, run_dir)
        weights = weights_of(run_dir, shards, balance=config.training.balance_classes)
        provenance = provenance_of(shards, weights, config)
        train(
            config, _stream(config, shards, runtime), held_out_images(config, shards, weights.left_out), runtime,
            num_classes=provenance["num_classes"], provenance=provenance, space_state=space_state(run_dir),
            teacher=teacher_in(run_dir, config, device=runtime.device), weights=weights,
            grids=Grids.of(config, run_dir, shards),
        )  # fmt: skip
    except WorkerError:
        raise  # a task that Ray lost: a restart may mend it
    except RaydiffError as error:
        record_failure(run_dir, error)
        raise


def _stream(config: ExperimentConfig, shards: ShardSet, runtime: RayRuntime) -> Stream:
    """From memory when the decoded training images fit there, else streamed by Ray tasks: the same batches."""
    spec = ImageSpec.of(config.data)
    if fits_in_memory(shards, spec, config.data.cache_mb):
        return cached(config, shards, rank=runtime.rank, world_size=runtime.world_size)
    from raydiff.distributed.data import streaming

    order = TrainingOrder.of_run(shards, config)

    def stream(start_step: int) -> Iterator[TrainingBatch]:
        return streaming(
            shards, spec, order, batch_size=config.training.batch_size, start_step=start_step,
            num_steps=config.training.num_steps - start_step, rank=runtime.rank, world_size=runtime.world_size,
        )  # fmt: skip

    return stream


@dataclass
class RayRuntime:
    """:class:`raydiff.runtime.Runtime` on a Ray Train worker: DDP over gloo or nccl, checkpoints through Ray."""

    rank: int
    world_size: int
    device: str
    run_dir: Place
    log: MetricsLog | None

    @classmethod
    def here(cls, config: ExperimentConfig, run_dir: Place) -> RayRuntime:
        """The runtime of the worker this is called on."""
        context = ray.train.get_context()
        rank = context.get_world_rank()
        device = str(ray.train.torch.get_device()) if config.execution.use_gpu else "cpu"
        log = MetricsLog(run_dir, batch_size=config.training.batch_size) if rank == 0 else None
        return cls(rank, context.get_world_size(), device, run_dir, log)

    def wrap(self, network: nn.Module) -> nn.Module:
        """DistributedDataParallel when there is more than one worker."""
        if self.world_size == 1:
            return network
        return nn.parallel.DistributedDataParallel(network, device_ids=None if self.device == "cpu" else [self.device])

    def reduce_mean(self, values: Tensor) -> Tensor:
        """All-reduce over the workers."""
        if self.world_size == 1:
            return values
        summed = values.clone()
        torch.distributed.all_reduce(summed)
        return summed / self.world_size

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Rank 0 writes the line."""
        if self.log is not None:
            self.log(metrics)

    def save(self, step: int, write: Callable[[Place], None]) -> None:
        """Rank 0 writes to a temporary folder, which is copied to the run's storage; Ray prunes older ones."""
        if self.log is not None:
            self.log.flush()
        if self.rank != 0:
            ray.train.report({"step": step})
            return
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "checkpoint"
            write(folder)
            try:
                ray.train.report(
                    {"step": step},
                    checkpoint=ray.train.Checkpoint.from_directory(folder),
                    checkpoint_upload_fn=upload(self.run_dir),
                )
            except (OSError, StorageError) as error:
                raise StorageError(
                    f"the checkpoint of step {step} cannot be written ({error}); the one before is still there; free"
                    " space and resume"
                ) from error

    @contextmanager
    def latest(self) -> Iterator[Path | None]:
        """The checkpoint that Ray resumes from, on this worker's disk."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with _opened(checkpoint, self.run_dir) as folder:
            yield folder


@contextmanager
def _follow(run_dir: Place, on_metrics: Callable[[Mapping[str, Any]], None]) -> Iterator[None]:
    """Hand over the metrics that rank 0 writes, as they come, from a thread."""
    seen = list(read_metrics(run_dir))
    stop = threading.Event()

    def follow() -> None:
        nonlocal seen
        while True:
            ended = stop.wait(_POLL_S if isinstance(run_dir, Path) else _POLL_STORE_S)
            try:
                lines = list(read_metrics(run_dir))
            except RaydiffError:  # a store that is away: the workers will say so, and the next look may succeed
                lines = seen
            pairs = zip(lines, seen, strict=False)  # a restart takes lines out: what differs from there on is new
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            for line in lines[same:]:
                on_metrics(line)
            seen = lines
            if ended:
                return

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _check_resources(config: ExperimentConfig) -> None:
    """Refuse what the cluster's nodes cannot give: Ray would wait for it for ever."""
    execution = config.execution
    per_worker = {"CPU": execution.cpus_per_worker} | ({"GPU": 1.0} if execution.use_gpu else {})
    least = execution.min_workers or execution.num_workers
    room, num_nodes = wait_for_room(per_worker, least)
    if room < least:
        wanted = " and ".join(f"{amount:g} {name}" for name, amount in per_worker.items())
        raise ConfigError(
            f"execution.{'min' if execution.min_workers else 'num'}_workers is {least}, with {wanted} each; the"
            f" cluster's {num_nodes} node(s)"
            f" have room for {room}; ask for less, or add nodes"
        )


def _reason(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None) or {}
    cause = next(iter(failures.values()), error)
    return f"training failed ({type(cause).__name__}: {' '.join(str(cause).split())[:300]})"
