"""How many bytes a run takes: on the device, in a node's memory, in the object store, in storage, over the network.

Pure functions of a profile, a run and a target, with the notation of :mod:`raydiff.planning.speed`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from raydiff.planning.machines import CUDA_CONTEXT_BYTES, RAY_BYTES
from raydiff.planning.profile import Line, Profile
from raydiff.planning.speed import Step, bytes_read_per_step, encodings, reading_share, row_group_rows
from raydiff.planning.target import Run, Target

__all__ = ["DeviceMemory", "HostMemory", "Network", "Storage", "device_memory", "host_memory", "network", "storage"]

_READ_AHEAD, _BUFFERED, _CHUNK_BYTES = 2, 4, 8 * 2**20
"""Those of :mod:`raydiff.distributed.data` (a test compares)."""

_COPIES = 1.25
"""Of the images of a fit, in float32: as they are read, in bytes, and joined."""

_EVIDENCE_BYTES = 24
"""Per number of evidence: float32 as measured, joined, without suspects and without a fold, and float64 of that.
Measured with no image suspect: 19, where a density is fitted 24."""


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of one worker: on its GPU, or part of the node's memory on a CPU.

    ``buckets`` are DistributedDataParallel's copies of the gradients, ``space`` a frozen network's weights,
    ``activations`` what autograd keeps of a forward pass, ``temporary`` what AdamW makes on a GPU for its step (when
    activations are gone), ``context`` CUDA's own, ``teacher`` a student's. ``total`` is the peak.
    """

    weights: float
    gradients: float
    buckets: float
    optimiser: float
    average: float
    space: float
    activations: float
    temporary: float
    context: float
    teacher: float = 0.0

    @property
    def stays(self) -> float:
        """Whatever a step is doing."""
        network = self.weights + self.gradients + self.buckets + self.optimiser + self.average
        return network + self.space + self.teacher + self.context

    @property
    def total(self) -> float:
        """All that stays, and the larger of what comes in turns."""
        return self.stays + max(self.activations, self.temporary)


@dataclass(frozen=True)
class HostMemory:
    """Bytes of the fullest node: ``processes`` before they hold anything, ``ray`` of Ray's own, ``images`` in memory
    or windows being read, ``latents`` that are remembered, ``networks`` of workers on CPUs, ``object_store``;
    ``fitting`` what the driver takes for a space's fit, before the workers hold anything, ``calibrating`` for the
    threshold, when they hold nothing any more, both on the driver's node. ``total`` is the peak.
    """

    processes: float
    ray: float
    images: float
    latents: float
    networks: float
    object_store: float
    fitting: float = 0.0
    calibrating: float = 0.0

    @property
    def total(self) -> float:
        """All that stays, and the largest of what comes in turns."""
        training = self.images + self.latents + self.networks + self.object_store
        return self.processes + self.ray + max(training, self.fitting, self.calibrating)


@dataclass(frozen=True)
class Storage:
    """Bytes in the place that all nodes reach: shards of all splits, checkpoints kept (and the one being written)."""

    shards: float
    checkpoint: float
    checkpoints: float
    artifact: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.shards + self.checkpoints + self.artifact


@dataclass(frozen=True)
class Network:
    """Bytes over a node's link.

    ``gradients`` per step and worker, sent as well as received; ``shards_per_s`` read by a node while it trains and
    ``shards_at_start`` before; ``shards_read`` by all nodes in the run; ``amplification``: over what one reading of
    each image that is trained on would take. ``groups_per_s``: row groups that all nodes read per second while they
    train, a request each or more. ``checkpoint_per_s`` is rank 0's, averaged over the run.
    """

    gradients: float
    gradients_per_s: float
    shards_per_s: float
    shards_at_start: float
    shards_read: float
    amplification: float
    groups_per_s: float
    checkpoint_per_s: float


def device_memory(profile: Profile, run: Run, target: Target) -> DeviceMemory:
    """4 P bytes each of weights, gradients and average, 8 P of AdamW's moments, 4 P of buckets with more workers.

    Activations are the line through what autograd kept of two batch sizes, at the images of one pass. AdamW's
    multi-tensor form, PyTorch's default on GPUs, makes about another 4 P bytes. A student's teacher is 4 P more; its
    space, which nobody asks, stays where it was read.
    """
    weights = 4.0 * profile.num_parameters
    on_gpu = bool(target.gpus)
    return DeviceMemory(
        weights=weights,
        gradients=weights,
        buckets=weights if target.workers > 1 else 0.0,
        optimiser=2 * weights,
        average=weights,
        space=float(profile.space_bytes),
        activations=Line.through(profile.saved_bytes).at(run.rows_at_once),
        temporary=weights if on_gpu else 0.0,
        context=CUDA_CONTEXT_BYTES if on_gpu else 0.0,
        teacher=weights + (0 if on_gpu else profile.space_bytes) if run.lessons else 0.0,
    )


def host_memory(profile: Profile, run: Run, target: Target, device: DeviceMemory) -> HostMemory:
    """What a node needs.

    In memory: N H W C bytes per worker. Streamed: two windows of a worker's share, encoded, in the tasks that read,
    with the row groups that they come from; in the object store per worker four encoded chunks of each window and a
    decoded one, at most 8 MiB, per decoding task and two more. Calibrating: the evidence of all images that are scored
    together, in the forms that statistics are made from.
    """
    workers = target.workers_per_node
    stored = run.stored_bytes(profile.images.file_bytes)
    images, store = float(run.num_train * run.image_bytes), 0.0
    if not run.cached:
        window = min(run.config.data.shuffle_window, run.num_train)
        group = row_group_rows(profile.images.file_bytes) * stored
        images = _READ_AHEAD * (window / run.workers * stored + group)
        decoders = 0 if run.raw else max(1, (target.cores - workers) // workers) + 2
        encoded = _CHUNK_BYTES / run.image_bytes * stored
        store = workers * (_READ_AHEAD * _BUFFERED * encoded + decoders * _CHUNK_BYTES)
    room = run.config.data.cache_mb * 2**20
    remembers = profile.costly_space and run.config.data.grids is None
    latents = min(encodings(profile, run) * 4 * profile.latent_values, room) if remembers else 0.0
    return HostMemory(
        processes=(workers + 1.0) * profile.process_bytes,  # and the driver's
        ray=RAY_BYTES,
        images=workers * images,
        latents=workers * latents,
        networks=0.0 if target.gpus else workers * device.total,
        object_store=store,
        fitting=(profile.space_fit_bytes if run.fits_space else 0)
        + _COPIES * 4.0 * run.num_fit_images * run.image_bytes,
        calibrating=_EVIDENCE_BYTES * float(profile.evidence_values) * max(run.num_calibrated, run.num_suspected),
    )


def storage(profile: Profile, run: Run) -> Storage:
    """Shards of every split; ``training.keep_checkpoints`` and one more while it is written."""
    return Storage(
        shards=run.num_all * run.stored_bytes(profile.images.file_bytes),
        checkpoint=float(profile.checkpoint_bytes),
        checkpoints=float(profile.checkpoint_bytes) * (run.config.training.keep_checkpoints + 1),
        artifact=float(profile.artifact_bytes),
    )


def network(profile: Profile, run: Run, target: Target, step: Step) -> Network:
    """What passes over the links; see :func:`raydiff.planning.speed.reading_share` for the amplification.

    Workers that keep the images in memory read the training split once each.
    """
    workers, training = target.workers, run.config.training
    gradients = 2 * (workers - 1) / workers * 4.0 * profile.num_parameters
    split = run.num_train * run.stored_bytes(profile.images.file_bytes)
    per_step = bytes_read_per_step(profile, run, target)
    if run.cached:
        at_start, amplification = target.workers_per_node * split, float(workers)
        read = workers * split
    else:
        at_start = 0.0
        amplification = workers * reading_share(run, row_group_rows(profile.images.file_bytes))
        read = run.epochs * split * amplification
    group_bytes = row_group_rows(profile.images.file_bytes) * run.stored_bytes(profile.images.file_bytes)
    groups = per_step / target.workers_per_node * workers / group_bytes / step.seconds
    saves = math.ceil(training.num_steps / training.checkpoint_every)
    return Network(
        gradients=gradients,
        gradients_per_s=gradients / step.seconds,
        shards_per_s=per_step / step.seconds,
        shards_at_start=at_start,
        shards_read=read,
        amplification=amplification,
        groups_per_s=groups,
        checkpoint_per_s=saves * profile.checkpoint_bytes / (training.num_steps * step.seconds),
    )
