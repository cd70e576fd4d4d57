"""The grids of one run: where they lie, made if need be, and the stream that training takes in place of images."""

from __future__ import annotations

import hashlib
import logging
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from raydiff.config import ExperimentConfig
from raydiff.contracts import Space
from raydiff.grids.layout import GridSet, origin_of
from raydiff.grids.reading import grid_stream
from raydiff.grids.writing import Maker, write_missing
from raydiff.images import ImageSpec
from raydiff.latents import Latents
from raydiff.runtime import Runtime
from raydiff.shards import ShardSet, TrainingBatch, TrainingOrder
from raydiff.shards.order import Share
from raydiff.storage import Place, Storage, uri_of
from raydiff.views import Views

__all__ = ["GRIDS", "Grids"]

GRIDS = "grids"
"""The run's folder for them, with ``data.grids: run``; removed when its network is trained."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Grids:
    """What ``data.grids`` of a config asks for. ``own``: nobody else's, in the run's folder."""

    config: ExperimentConfig
    shards: ShardSet
    place: Storage
    own: bool
    start_at: str

    @classmethod
    def of(cls, config: ExperimentConfig, run_dir: Place, shards: ShardSet) -> Grids | None:
        """Those of a run in ``run_dir``; None where the config asks for none.

        Raises:
            StorageError: the place is none.
        """
        place, own = config.data.grids, config.data.grids == "run"
        if place is None:
            return None
        storage = Storage.of(uri_of(run_dir / GRIDS) if own else place, field="data.grids")
        return cls(config, shards, storage, own, uri_of(run_dir))

    def stream(
        self, space: Space, views: Views, runtime: Runtime, *, step: int = 0
    ) -> Callable[[int], Iterator[TrainingBatch]]:
        """Make what is missing, with all workers, each of which must call it; what training then takes for images.

        Raises:
            StorageError: there is no room, or the place cannot be written or is not shared.
            DataError: an image cannot be read.
        """
        config, shards = self.config, self.shards
        origin = origin_of(config, space, views, _machine(runtime))
        grids = GridSet.of(shards, space.shape, len(views.all), config.data.grids_dtype, origin)
        storage = self.place.child(grids.digest[:32])
        self._say_if_wasteful(grids, runtime)
        maker = Maker(shards, ImageSpec.of(config.data), views, Latents(space, runtime.device, 0))
        write_missing(grids, storage, origin, maker.content, runtime, start_at=self.start_at, step=step)
        order = TrainingOrder.of_run(shards, config)

        def stream(start_step: int) -> Iterator[TrainingBatch]:
            share = Share(config.training.batch_size, start_step, runtime.rank, runtime.world_size)
            return grid_stream(grids, storage, order, share, views, shards.classes)

        return stream

    def finished(self, runtime: Runtime) -> None:
        """Remove those that are this run's own: its network is trained.

        Raises:
            StorageError: they cannot be removed.
        """
        if self.own and runtime.rank == 0:
            self.place.delete_tree()

    def _say_if_wasteful(self, grids: GridSet, runtime: Runtime) -> None:
        made = grids.num_views * self.shards.count("train")
        seen = self.config.training.num_steps * self.config.training.batch_size
        if made > seen and self.own and runtime.rank == 0:
            _logger.warning(
                "data.grids makes %d grids (%d views of each image) and training looks at %d; leave it out, or have"
                " fewer views (augmentation.views)", made, grids.num_views, seen,
            )  # fmt: skip


def _machine(runtime: Runtime) -> str:
    """What the last bits of a grid depend on: the kind of device and PyTorch. ``mixed`` where workers differ."""
    device = torch.device(runtime.device)
    kind = f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    if device.type == "cuda":
        kind = torch.cuda.get_device_name(device)
    name = f"{kind}, torch {torch.__version__}"
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:2], "little")
    mine = torch.tensor([number, number**2], dtype=torch.float64, device=runtime.device)
    mean, squared = runtime.reduce_mean(mine).tolist()
    return name if squared == mean**2 else "mixed"
