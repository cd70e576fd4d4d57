"""``make_plan``: what a run will take on a target, from a profile; pure, every formula in a docstring.

The parts are :mod:`raydiff.planning.speed` (a step) and :mod:`raydiff.planning.sizes` (bytes). What was assumed rather
than measured is listed in the plan, with the option that replaces it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from raydiff.errors import ConfigError
from raydiff.planning import machines
from raydiff.planning.profile import Profile
from raydiff.planning.sizes import (
    DeviceMemory,
    HostMemory,
    Network,
    Storage,
    device_memory,
    host_memory,
    network,
    storage,
)
from raydiff.planning.speed import Step, encodings, score_seconds, step
from raydiff.planning.target import Run, Target

__all__ = ["Plan", "Time", "make_plan"]


@dataclass(frozen=True)
class Time:
    """Seconds of a whole ``raydiff fit``: ``startup`` is Ray's and the workers', ``images`` reading them into memory,
    ``space`` fitting it, ``steps`` the training, then checkpoints and validation, ``head`` the training
    of a scorer's own network, and calibration.
    """

    startup: float
    images: float
    space: float
    steps: float
    checkpoints: float
    validation: float
    head: float
    calibration: float

    @property
    def total(self) -> float:
        """All of it, one after the other."""
        return (
            self.startup + self.images + self.space + self.steps + self.checkpoints + self.validation + self.head
            + self.calibration
        )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What it will take. ``cost`` is in USD; ``replicas`` of the endpoint for the asked rate; None where not asked."""

    run: Run
    target: Target
    profile: Profile
    step: Step
    time: Time
    device: DeviceMemory
    host: HostMemory
    storage: Storage
    network: Network
    checkpoint_seconds: float
    score_seconds: float
    replicas: int | None
    cost: float | None
    assumptions: tuple[str, ...]

    @property
    def images_per_second(self) -> float:
        """While it trains, as ``raydiff fit`` prints it: checkpoints and validation aside."""
        return self.run.config.training.batch_size / self.step.seconds

    @property
    def num_calibrated(self) -> int:
        """Images, or views of them, that are scored for the threshold; with suspects to find, training images too."""
        return self.run.num_calibrated + self.run.num_suspected

    @property
    def shares(self) -> dict[str, float]:
        """Seconds per step by what could be the bottleneck, checkpoints averaged over the steps."""
        every = self.run.config.training.checkpoint_every
        return self.step.limits | {"checkpoints": self.checkpoint_seconds / every}

    @property
    def bottleneck(self) -> str:
        """compute, network, decode, storage or checkpoints: the one that takes most of a step."""
        return max(self.shares, key=self.shares.__getitem__)

    @property
    def device_bytes(self) -> float | None:
        """Of the GPU that is planned for, from the table or as measured; None on CPUs."""
        if self.target.gpu is not None:
            return self.target.gpu.memory_bytes
        return float(self.profile.device_memory_bytes) or None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: all estimates with their totals; the profile's workload and the config left out."""
        target = asdict(self.target)
        target["gpu"] = None if self.target.gpu is None else self.target.gpu.name
        run = {name: getattr(self.run, name) for name in ("num_train", "num_calibration", "rows", "epochs", "cached")}
        return {
            "target": target,
            "run": run | {"batch_size": self.run.config.training.batch_size, "digest": self.run.config.digest()},
            "profile": {"machine": self.profile.machine, "device": self.profile.device, "commit": self.profile.commit},
            "images_per_second": self.images_per_second,
            "step": asdict(self.step) | {"seconds": self.step.seconds},
            "bottleneck": self.bottleneck,
            "seconds_per_step_by_limit": self.shares,
            "time": asdict(self.time) | {"total": self.time.total},
            "device_memory": asdict(self.device) | {"total": self.device.total},
            "host_memory": asdict(self.host) | {"total": self.host.total},
            "storage": asdict(self.storage) | {"total": self.storage.total},
            "network": asdict(self.network),
            "score_seconds": self.score_seconds,
            "replicas": self.replicas,
            "cost_usd": self.cost,
            "assumptions": list(self.assumptions),
        }


def make_plan(profile: Profile, run: Run, target: Target) -> Plan:
    """Everything, for a run on a target.

    Raises:
        ConfigError: GPUs are planned for, but the profile was measured on a CPU and no GPU of the table is named.
    """
    if target.gpus and target.gpu is None and not profile.on_gpu:
        raise ConfigError(
            "the profile was measured on a CPU, so GPUs need a --gpu-type (one of: "
            f"{', '.join(sorted(machines.GPUS))}), or --profile FILE from raydiff plan CONFIG --measure FILE on one"
        )
    a_step = step(profile, run, target)
    device = device_memory(profile, run, target)
    score = score_seconds(profile, run, target)
    save = checkpoint_seconds(profile, target)
    time = _time(profile, run, target, a_step, score, save)
    return Plan(
        run=run,
        target=target,
        profile=profile,
        step=a_step,
        time=time,
        device=device,
        host=host_memory(profile, run, target, device),
        storage=storage(profile, run),
        network=network(profile, run, target, a_step),
        checkpoint_seconds=save,
        score_seconds=score,
        replicas=_replicas(target, score),
        cost=None if target.price is None else target.price * target.nodes * time.total / 3600,
        assumptions=tuple(_assumptions(profile, run, target)),
    )


def checkpoint_seconds(profile: Profile, target: Target) -> float:
    """What all workers wait for a checkpoint: rank 0 encodes, hashes and writes it, then copies it to storage."""
    if target.storage_bytes_per_s is None:
        return 2 * profile.checkpoint_seconds
    return profile.checkpoint_seconds + profile.checkpoint_bytes / target.storage_bytes_per_s


def _time(profile: Profile, run: Run, target: Target, a_step: Step, score: float, save: float) -> Time:
    """The phases of ``raydiff fit``.

    Into memory: every worker decodes the whole training split, in one thread, and reads it from storage. Validation:
    the forward share of a step per image and all of a student's teacher, over W workers. Calibration: the driver scores
    the calibration split.
    """
    training = run.config.training
    images = 0.0
    if run.cached:
        images = run.num_train * profile.images.decode_seconds * max(1.0, target.workers_per_node / target.cores)
        if target.storage_bytes_per_s is not None:
            stored = run.num_train * run.stored_bytes(profile.images.file_bytes) * target.workers_per_node
            images = max(images, stored / target.storage_bytes_per_s)
    forward = (a_step.compute - a_step.teacher) * profile.forward_share + a_step.teacher
    validated = math.ceil(min(training.validation_images, run.num_calibration or run.num_train) / run.workers)
    each = validated * forward / run.rows
    fitted = profile.space_seconds or run.num_fit_images * profile.encode_seconds + profile.space_fixed_seconds
    return Time(
        startup=machines.STARTUP_SECONDS[1 if run.workers == 1 else 2],
        images=images,
        space=(1 + _num_folds(run)) * fitted if run.fits_space else 0.0,
        steps=_num_steps(run) * a_step.seconds,
        checkpoints=math.ceil(_num_steps(run) / training.checkpoint_every) * save,
        validation=math.ceil(_num_steps(run) / training.validate_every) * each,
        head=(1 + _num_folds(run)) * profile.head_seconds,
        calibration=(run.num_calibrated + run.num_suspected) * score,
    )


def _num_folds(run: Run) -> int:
    """Networks that are trained beside the run's own."""
    config = run.config
    return min(config.cross_fitting.folds, run.num_train) if config.needs_folds else 0


def _num_steps(run: Run) -> int:
    """Of the run's network and of those that each leave a fold of the images out."""
    config = run.config
    return config.training.num_steps + _num_folds(run) * (config.cross_fitting.num_steps or config.training.num_steps)


def _replicas(target: Target, score: float) -> int | None:
    """Replicas for the rate: each scores 1 / score images a second alone, and 0.82 of that behind HTTP (measured)."""
    if target.requests_per_s is None:
        return None
    return max(1, math.ceil(target.requests_per_s * score / machines.SERVED_SHARE))


def _assumptions(profile: Profile, run: Run, target: Target) -> Iterator[str]:
    """What was not measured, one sentence each."""
    if profile.on_gpu and target.gpu is not None:
        yield f"the times measured on {profile.machine} are not used; leave out --gpu-type to plan for that GPU"
    if target.gpu is not None:
        yield (
            f"{target.gpu.name}: not measured; {target.utilisation:.0%} of its peak ({target.gpu.source}), "
            f"{machines.PASSES} passes of its memory over what is kept for the backward pass,"
            f" {machines.LAUNCH_SECONDS * 1e6:.0f} us to start an operation (--utilisation, or a --profile from there)"
        )
    elif not target.gpus:
        yield f"each node has {target.cores} cores like those of the profile ({profile.machine})"
    if target.gpus:
        yield "the process that starts raydiff fit has a GPU to calibrate on; the head of a cluster may have none"
    if target.nodes > 1:
        yield f"{target.network_bytes_per_s * 8 / 1e9:g} Gbit/s between nodes, nothing else on them (--network)"
    elif target.gpus > 1 and target.gpu is None:
        yield (
            f"{target.network_bytes_per_s * 8 / 1e9:g} Gbit/s between the cards: theirs was not measured (--network, or"
            " --gpu-type)"
        )
    if target.storage_bytes_per_s is None:
        yield "storage is a local disk like the profile's: shards are read in no time, checkpoints as there (--storage)"
    else:
        yield f"{target.storage_bytes_per_s / 1e6:g} MB/s per node from and to storage (--storage)"
    if not target.gpus and target.workers > 1 and profile.pair is None:
        yield "summing gradients costs nothing: the profile has no two processes at once (measure without --no-pair)"
    if not profile.images.num_sampled or profile.images.num_train is None:
        yield f"images like {profile.images.source} ({profile.images.file_bytes / 1e3:.1f} kB a file)"
    if profile.costly_space and encodings(profile, run) and target.gpu is not None:
        yield "the frozen network of the space is scaled like the denoiser, at the rate of convolutions"
    if profile.costly_space and run.config.data.grids is not None:
        size = run.num_train * run.keys * profile.latent_values * (2 if run.config.data.grids_dtype == "float16" else 4)
        yield f"grids (data.grids) take {size / 2**30:.2f} GB more in storage; reading them takes no time"
    if run.lessons:
        yield (
            f"the student's teacher makes {run.lessons} evaluations of every image of a step, in float32: not measured,"
            f" {'but counted' if target.gpu is not None else 'each taken for the forward share of a step'}"
        )
    if not profile.evidence_values:
        yield "calibration takes no memory: the profile is from before that was measured (--measure writes another)"
    if profile.space_seconds and run.fits_space:
        yield "the space is trained by the process that starts raydiff fit, in the time it would take here" + (
            ", or found in data.spaces in no time" if run.config.data.spaces is not None else ""
        )
    if profile.head_seconds:
        yield "the scorer's head is trained by the process that starts raydiff fit, in the time it would take here"
    if run.workers > 2:
        yield "the start of more than two workers takes as long as that of two"
    if getattr(run.config.denoiser, "activation_checkpointing", False):
        yield "activations: the inputs of the blocks alone; one block's own come on top while it is computed again"
