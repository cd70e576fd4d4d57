"""``Target``: the machines that a plan is for, and ``Run``: what is to be done on them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from raydiff.config import ExperimentConfig
from raydiff.detector import Crops
from raydiff.errors import ConfigError
from raydiff.planning.machines import NETWORK_GBIT, STORAGE_BYTES_PER_S, UTILISATION, Gpu, gpu_named
from raydiff.planning.profile import Profile

__all__ = ["Run", "Target", "check_machines", "target_of"]


@dataclass(frozen=True)
class Target:
    """Nodes that are alike.

    Attributes:
        nodes: how many; ``cores`` (real ones) and ``gpus`` of each.
        workers: of Ray Train, over all nodes; one GPU each where there are any.
        threads: of a worker on a CPU.
        gpu: from the table; None on CPUs, and where the profile was measured on the GPU itself.
        utilisation: share of the GPU's peak that convolutions and products reach.
        network_bytes_per_s: a node's link, one direction.
        storage_bytes_per_s: what a node reads from or writes to the place of shards and checkpoints; None: as fast as
            the disk where the profile was measured.
        price: USD per node and hour; None where it is not known.
        requests_per_s: images that ``raydiff serve`` is to score per second; None where it does not serve.
    """

    nodes: int
    cores: int
    gpus: int
    workers: int
    threads: int
    gpu: Gpu | None
    utilisation: float
    network_bytes_per_s: float
    storage_bytes_per_s: float | None
    price: float | None = None
    requests_per_s: float | None = None

    @property
    def workers_per_node(self) -> int:
        """On the fullest node."""
        return math.ceil(self.workers / self.nodes)


@dataclass(frozen=True)
class Run:
    """A config with its number of images, and what follows from both.

    Raises:
        ConfigError: there are fewer images in a batch than workers.
    """

    config: ExperimentConfig
    num_train: int
    num_calibration: int
    num_all: int
    workers: int

    def __post_init__(self) -> None:
        if self.config.training.batch_size < self.workers:
            raise ConfigError(
                f"training.batch_size is {self.config.training.batch_size}; {self.workers} workers need at least one"
                f" image each, so plan with --set training.batch_size={self.workers} or more, or with fewer workers"
            )

    @classmethod
    def of(cls, config: ExperimentConfig, profile: Profile, num_images: int | None, workers: int) -> Run:
        """With ``num_images`` normal images, calibration included, or as many as the data set has.

        Raises:
            ConfigError: neither is known, or none is left to train on.
        """
        known = profile.images
        if num_images is None:
            if known.num_train is None or known.num_calibration is None or known.num_all is None:
                raise ConfigError("the data set is not here, so how many images it has is not known; give --images N")
            return cls(config, known.num_train, known.num_calibration, known.num_all, workers)
        share = config.data.calibration_fraction
        calibration = max(1, round(share * num_images)) if share else 0
        if num_images <= calibration:
            raise ConfigError(
                f"--images {num_images}: data.calibration_fraction ({share:g}) sets {calibration} aside, and none is"
                " left to train on; give more, or --set data.calibration_fraction=0"
            )
        return cls(config, num_images - calibration, calibration, num_images, workers)

    @property
    def rows(self) -> int:
        """Images of a worker in a step, of the one with the most."""
        return math.ceil(self.config.training.batch_size / self.workers)

    @property
    def rows_at_once(self) -> int:
        """Images of a forward pass."""
        return math.ceil(self.rows / self.config.training.accumulation_steps)

    @property
    def epochs(self) -> float:
        """How often each image is seen."""
        return self.config.training.num_steps * self.config.training.batch_size / self.num_train

    @property
    def lessons(self) -> int:
        """Evaluations that a student's teacher makes of each image of a step; 0 for a run that is no student's."""
        return 0 if self.config.distillation is None else self.config.distillation.num_evaluations

    @property
    def fits_space(self) -> bool:
        """Whether a space that learns is to learn: a student has its teacher's."""
        return self.config.distillation is None

    @property
    def num_fit_images(self) -> int:
        """Training images that a space which learns is fitted on."""
        if not self.fits_space:
            return 0
        space = self.config.space
        return min(self.num_train, getattr(space, "images_to_fit", getattr(space, "num_fit_images", 0)))

    @property
    def num_calibrated(self) -> int:
        """Images, or views of them, that the threshold is made of; the limit is of images, with all their views."""
        config, count, views = self.config, self.num_calibration, 1
        if not config.data.calibration_fraction:
            count, views = self.num_train, config.cross_fitting.views if config.augmentation.changes else 1
        return views * min(count, config.calibration.max_images or count)

    @property
    def num_suspected(self) -> int:
        """Training images that are scored to find anomalies among them."""
        return self.num_train if self.config.contamination.max_share else 0

    @property
    def num_tiles(self) -> int:
        """Parts in which the network sees an image that is scored."""
        crops = Crops.of(self.config)
        return 1 if crops is None else len(crops.tiling)

    @property
    def image_bytes(self) -> int:
        """A decoded image."""
        height, width = self.config.data.image_size
        return height * width * self.config.data.channels

    @property
    def cached(self) -> bool:
        """Whether each worker holds the decoded training split in memory (:func:`raydiff.shards.fits_in_memory`)."""
        return self.num_train * self.image_bytes <= self.config.data.cache_mb * 2**20

    @property
    def raw(self) -> bool:
        """Whether shards hold pixels."""
        return self.config.data.shard_format == "raw"

    def stored_bytes(self, file_bytes: float) -> float:
        """An image in a shard; ``file_bytes`` that of its file."""
        return float(self.image_bytes) if self.raw else file_bytes

    @property
    def keys(self) -> int:
        """In how many ways an image is cropped, turned and flipped before a space encodes it."""
        crops = Crops.of(self.config)
        places = 1 if crops is None else math.prod(crops.tiling.canvas) if crops.anywhere else len(crops.tiling)
        return (
            places
            * (2 if self.config.training.horizontal_flip else 1)
            * (4 if self.config.objective.condition == "rotation" else 1)
        )


def check_machines(nodes: int, gpus: int, workers: int | None, gpu_type: str | None) -> Gpu | None:
    """The GPU of the table that the options of ``raydiff plan`` name, None where they name none.

    Raises:
        ConfigError: a GPU type without GPUs, one that is not in the table, or more workers than GPUs.
    """
    if gpu_type is not None and not gpus:
        raise ConfigError(f"--gpu-type {gpu_type}: there is no GPU to be of that type; add --gpus G")
    if workers is not None and gpus and workers > nodes * gpus:
        raise ConfigError(f"--workers {workers}: each takes a GPU, and there are {nodes * gpus}; ask for less")
    return None if gpu_type is None else gpu_named(gpu_type)


def target_of(
    config: ExperimentConfig,
    profile: Profile,
    *,
    nodes: int = 1,
    gpus: int = 0,
    cpus: int | None = None,
    workers: int | None = None,
    gpu_type: str | None = None,
    price: float | None = None,
    requests: float | None = None,
    network_gbit: float | None = None,
    storage_mb: float | None = None,
    utilisation: float | None = None,
) -> Target:
    """The machines that the options of ``raydiff plan`` describe; what is left out is the profile's or assumed.

    Raises:
        ConfigError: a GPU type without GPUs, one that is not in the table, more workers than GPUs, or no GPU where the
            profile was measured on one.
    """
    gpu = check_machines(nodes, gpus, workers, gpu_type)
    if profile.on_gpu and not gpus:
        raise ConfigError(f"the profile was measured on {profile.machine}, so it plans for GPUs; add --gpus G")
    storage = STORAGE_BYTES_PER_S if storage_mb is None else storage_mb * 1e6
    return Target(
        nodes=nodes,
        cores=cpus or profile.cores,
        gpus=gpus,
        workers=workers or (nodes * gpus if gpus else config.execution.num_workers),
        threads=profile.threads,
        gpu=gpu,
        utilisation=utilisation or UTILISATION,
        network_bytes_per_s=(network_gbit or NETWORK_GBIT) * 1e9 / 8,
        storage_bytes_per_s=None if storage_mb is None and nodes == 1 else storage,
        price=price,
        requests_per_s=requests,
    )
