"""How long a training step takes: what the workers compute, what passes between them, what has to be read for them.

Pure functions of a profile, a run and a target. Notation: W workers on all nodes, w on the fullest one, B images in the
global batch, b = ceil(B / W) of a worker, P parameters, G = 4 P bytes of gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from raydiff.planning.machines import BUCKET_BYTES, FORWARD_PASSES, HOP_SECONDS, LAUNCH_SECONDS, PASSES, Gpu
from raydiff.planning.profile import Line, Profile
from raydiff.planning.target import Run, Target

__all__ = ["Step", "bytes_read_per_step", "encodings", "reading_share", "row_group_rows", "score_seconds", "step"]

_OPTIMISER_PASSES = 13
"""Passes over 4 P bytes: clipping reads and writes the gradient (3), AdamW reads four and writes three, the average
reads two and writes one."""

_BACKWARD = 2 / 3
"""Share of a step in which gradients appear: a backward pass costs about twice a forward pass."""

_GROUP_ROWS, _GROUP_BYTES = 64, 4 * 2**20
"""A row group's, as :mod:`raydiff.shards.layout` cuts them (a test compares)."""


@dataclass(frozen=True)
class Step:
    """Seconds of one optimiser step, and what they are made of.

    ``compute`` is the network's, with a student's ``teacher``; on a GPU ``arithmetic`` + ``memory``, or ``launch`` if
    starting the kernels takes longer. ``slowdown`` is by how much workers that share cores, caches and memory slow each
    other (in ``compute``).
    ``encode`` is a costly space's share, averaged over the run. ``all_reduce`` is what summing the gradients takes, of
    which ``exposed`` does not hide behind the backward pass. ``decode`` and ``read`` go on beside the training: they
    count where they take longer. ``seconds`` is max(compute + encode + exposed, decode, read); where decoding takes
    cores from training on a CPU, ``cores`` is the least that all cores together need.
    """

    compute: float
    slowdown: float
    encode: float
    all_reduce: float
    exposed: float
    decode: float
    read: float
    cores: float
    arithmetic: float = 0.0
    memory: float = 0.0
    launch: float = 0.0
    teacher: float = 0.0

    @property
    def seconds(self) -> float:
        """Of a step, checkpoints and validation aside."""
        return max(self.compute + self.encode + self.exposed, self.decode, self.read, self.cores)

    @property
    def limits(self) -> dict[str, float]:
        """Seconds by what could be the bottleneck; waiting for all cores at once counts as decoding."""
        return {
            "compute": self.compute + self.encode,
            "network": self.exposed,
            "decode": self.cores if self.cores > self.compute + self.encode + self.exposed else self.decode,
            "storage": self.read,
        }


def step(profile: Profile, run: Run, target: Target) -> Step:
    """A step of the run on the target."""
    slowdown = _slowdown(profile, target)
    if target.gpu is None:
        parts = _Parts()
        own = _measured_seconds(profile, run) * slowdown
        compute = own * (1 + run.lessons * profile.forward_share)
    else:
        passes = _gpu_parts(profile, run, target)
        parts = passes.beside(_teacher_parts(profile, run, target))
        own, compute = passes.seconds, parts.seconds
    encode = encodings(profile, run) / run.config.training.num_steps * _encode_seconds(profile, run, target, slowdown)
    summed = _all_reduce(profile, target, slowdown)
    exposed = _exposed(summed, own, profile, target)
    decode, cores = _decode(profile, run, target, (compute + encode) / slowdown)
    read = _read(profile, run, target)
    return Step(compute, slowdown, encode, summed, exposed, decode, read, cores, *parts, teacher=compute - own)


def score_seconds(profile: Profile, run: Run, target: Target) -> float:
    """Scoring one image in a full batch on one worker's device: as measured, or from its FLOPs on a GPU of the table.

    There the network is called ``evaluations`` times (those of all tiles) with 16 rows, and the space encodes each
    tile, in float32 without TF32 (raydiff.core.diffusion): arithmetic at the assumed utilisation, or the starts of its
    kernels if they take longer.
    """
    if target.gpu is None:
        return profile.score_seconds
    rows = 16
    flops = profile.evaluations * profile.forward_flops + run.num_tiles * profile.encode_flops
    launch = profile.evaluations * profile.forward_operations * LAUNCH_SECONDS / rows
    return max(flops / (target.gpu.float32 * target.utilisation), launch)


def encodings(profile: Profile, run: Run) -> float:
    """Images that a worker has a costly space encode in the whole run; 0 for a space that is not.

    It remembers them while they fit into ``data.cache_mb``. Of N images in k ways, an image and way falls to this
    worker with 1 / (k W) in each of E epochs: it meets N k (1 - (1 - 1 / (k W))^E) different ones. What does not fit is
    encoded each time. With ``data.grids`` every image is encoded in all ways, by all workers together.
    """
    if not profile.costly_space:
        return 0.0
    ways = run.num_train * run.keys
    if run.config.data.grids is not None:
        return ways / run.workers
    met = float(ways * (1 - (1 - 1 / (run.keys * run.workers)) ** run.epochs))
    room = run.config.data.cache_mb * 2**20 // (4 * profile.latent_values)
    if met <= room:
        return met
    seen = run.config.training.num_steps * run.rows
    return min(seen, room + (seen - room) * max(0.0, 1 - room / ways))


def reading_share(run: Run, row_group: int) -> float:
    """Share of the training split's bytes that each worker reads per epoch when it streams.

    A worker reads the row groups that hold an image of its share. Images are dealt at random within a window, so a
    group of g has none with (1 - 1/W)^g: the share is 1 - (1 - 1/W)^g, and all workers together read W times that,
    which for many workers goes to g.
    """
    return 1 - (1 - 1 / run.workers) ** row_group


def row_group_rows(file_bytes: float) -> int:
    """Images in a row group of the shards."""
    return int(min(_GROUP_ROWS, max(1, _GROUP_BYTES // max(1.0, file_bytes))))


def _measured_seconds(profile: Profile, run: Run) -> float:
    """A step of b images on the profile's own device: the line through the measured batch sizes.

    With accumulation the passes repeat, the optimiser's fixed part (taken for all of it) does not.
    """
    return Line.through(profile.step_seconds).at(run.rows)


def _slowdown(profile: Profile, target: Target) -> float:
    """What workers on the same node cost each other, at least 1.

    c cores for w workers of t threads: w t / c where that is above 1, times what two processes were measured to slow
    each other beyond their share of the profile's cores (memory and caches). On GPUs, where each has its own, 1.
    """
    if target.gpus:
        return 1.0
    threads = target.workers_per_node * target.threads
    shared = max(1.0, threads / target.cores)
    if target.workers_per_node == 1 or profile.pair is None:
        return shared
    expected = max(1.0, 2 * profile.threads / profile.cores)
    return shared * max(1.0, profile.pair.slowdown / expected)


class _Parts(NamedTuple):
    """Seconds of arithmetic, memory traffic and kernel starts on a GPU of the table."""

    arithmetic: float = 0.0
    memory: float = 0.0
    launch: float = 0.0

    @property
    def seconds(self) -> float:
        """Kernels are started while others run."""
        return max(self.arithmetic + self.memory, self.launch)

    def beside(self, other: _Parts) -> _Parts:
        """Both, one after the other."""
        return _Parts(*(a + b for a, b in zip(self, other, strict=True)))


def _gpu_parts(profile: Profile, run: Run, target: Target) -> _Parts:
    """A step's own passes on a GPU of the table.

    Arithmetic: FLOPs over peak x utilisation. With bfloat16 both kinds at the tensor cores' rate; in float32
    convolutions are TF32 (cuDNN's default in PyTorch), products are not. Memory: the bytes kept for the backward pass
    go through memory ``PASSES`` times, the optimiser's state 13. Starts: the operations of each pass, two per row for
    its noise, at ``LAUNCH_SECONDS`` each.
    """
    gpu, training = target.gpu, run.config.training
    assert gpu is not None  # noqa: S101
    rates = _rates(gpu, training.precision == "bfloat16")
    arithmetic = run.rows * sum(flops / (rates[kind] * target.utilisation) for kind, flops in profile.flops.items())
    traffic = PASSES * _kept(profile, run) + _OPTIMISER_PASSES * 4 * profile.num_parameters
    starts = Line.through(profile.operations).at(run.rows_at_once) * training.accumulation_steps + 2 * run.rows
    return _Parts(arithmetic, traffic / gpu.memory_bytes_per_s, starts * LAUNCH_SECONDS)


def _teacher_parts(profile: Profile, run: Run, target: Target) -> _Parts:
    """A student's teacher on a GPU of the table: that many forward passes of every row, in float32 without TF32."""
    gpu = target.gpu
    assert gpu is not None  # noqa: S101
    arithmetic = run.rows * run.lessons * profile.forward_flops / (gpu.float32 * target.utilisation)
    traffic = run.lessons * FORWARD_PASSES * _kept(profile, run)
    starts = run.lessons * profile.forward_operations * run.config.training.accumulation_steps
    return _Parts(arithmetic, traffic / gpu.memory_bytes_per_s, starts * LAUNCH_SECONDS)


def _kept(profile: Profile, run: Run) -> float:
    """Bytes that the passes of a step make and the backward ones need."""
    return Line.through(profile.saved_bytes).at(run.rows_at_once) * run.config.training.accumulation_steps


def _rates(gpu: Gpu, bfloat16: bool) -> dict[str, float]:
    if bfloat16:
        return {"convolution": gpu.bfloat16, "matmul": gpu.bfloat16}
    return {"convolution": gpu.tf32, "matmul": gpu.float32}


def _encode_seconds(profile: Profile, run: Run, target: Target, slowdown: float) -> float:
    """An image through a costly space."""
    if target.gpu is None:
        return profile.encode_seconds * slowdown
    rates = _rates(target.gpu, run.config.training.precision == "bfloat16")
    return profile.encode_flops / (rates["convolution"] * target.utilisation)


def _all_reduce(profile: Profile, target: Target, slowdown: float) -> float:
    """Summing G bytes over W workers: a ring sends 2 (W - 1) / W G bytes over each link.

    Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations". On CPUs latency and
    bandwidth are the line through the sums measured on two processes (gloo), where 2 (W - 1) / W is 1; the latency
    counts W - 1 times, and workers that share cores take turns. Between nodes the link's bandwidth counts where it is
    less. On GPUs: the slower of the link between nodes and that between cards, and 2 log2(W) hops (NCCL's trees).
    """
    workers, gradients = target.workers, 4.0 * profile.num_parameters
    if workers == 1:
        return 0.0
    sent = 2 * (workers - 1) / workers * gradients
    if target.gpus:
        links = [target.network_bytes_per_s] if target.nodes > 1 else []
        links += [target.gpu.link_bytes_per_s] if target.gpu is not None and target.gpus > 1 else []
        slowest = min(links) if links else target.network_bytes_per_s
        return sent / slowest + 2 * math.ceil(math.log2(workers)) * HOP_SECONDS
    local = 0.0
    if profile.pair is not None:
        line = Line.through(profile.pair.all_reduce_seconds)
        local = ((workers - 1) * line.fixed + sent * line.per_row) * max(1.0, slowdown / profile.pair.slowdown)
    between = sent / target.network_bytes_per_s if target.nodes > 1 else 0.0
    return max(local, between)


def _exposed(summed: float, own: float, profile: Profile, target: Target) -> float:
    """What of the sum is waited for.

    DistributedDataParallel sends each bucket of 25 MiB while the backward pass goes on; the last one waits for its end
    (Li et al. 2020, arXiv:2006.15704). On CPUs the cores that would send are those that compute: all of it counts.
    ``own`` is what the network's own passes take, a student's teacher aside.
    """
    if not target.gpus:
        return summed
    last = min(1.0, BUCKET_BYTES / (4 * profile.num_parameters))
    return max(summed - _BACKWARD * own, last * summed)


def _decode(profile: Profile, run: Run, target: Target, busy: float) -> tuple[float, float]:
    """Seconds that decoding a step's images takes on the cores left to it, and that all cores of a node need at least.

    Nothing where the images are in memory, or raw. Decoding tasks run beside the workers: on GPUs on the cores that no
    worker's own thread takes (at least one); on CPUs they share all of them with training, whose ``busy`` core-seconds
    per worker and thread come on top.
    """
    if run.cached or run.raw:
        return 0.0, 0.0
    work = target.workers_per_node * run.rows * profile.images.decode_seconds
    if target.gpus:
        return work / max(1, target.cores - target.workers_per_node), 0.0
    training = target.workers_per_node * target.threads * busy
    return work / target.cores, (work + training) / target.cores


def _read(profile: Profile, run: Run, target: Target) -> float:
    """Seconds that a node's reading for a step takes; 0 where images are in memory, or the storage's speed unknown."""
    if run.cached or target.storage_bytes_per_s is None:
        return 0.0
    return bytes_read_per_step(profile, run, target) / target.storage_bytes_per_s


def bytes_read_per_step(profile: Profile, run: Run, target: Target) -> float:
    """Bytes of shards that the fullest node reads for a step when it streams; 0 where images are in memory."""
    if run.cached:
        return 0.0
    stored = run.stored_bytes(profile.images.file_bytes)
    share = reading_share(run, row_group_rows(profile.images.file_bytes))
    return target.workers_per_node * run.config.training.batch_size * stored * share
