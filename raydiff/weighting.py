"""What each training image counts in the loss: 1, but for those that are left out or weighed down.

Kept in a run as ``weights.json``, so that every worker, and a resumed run, knows them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from raydiff.artifact import encode_json
from raydiff.errors import ArtifactError
from raydiff.shards import TrainingBatch
from raydiff.storage import Place, Storage, uri_of

__all__ = ["WEIGHTS", "Weights", "read_weights", "write_weights"]

WEIGHTS = "weights.json"


@dataclass(frozen=True)
class Weights:
    """``by_id`` holds those that are not 1; ``num_images`` is how many images there are.

    ``mean_weight`` is that of an epoch in which some are seen more often than others; by default all are seen once.
    """

    by_id: Mapping[str, float] = field(default_factory=dict)
    num_images: int = 0
    mean_weight: float | None = None

    def with_repeats(self, image_ids: Sequence[str], repeats: Sequence[int]) -> Weights:
        """The same in epochs in which each of all images is seen so often."""
        total = sum(self.by_id.get(name, 1.0) * times for name, times in zip(image_ids, repeats, strict=True))
        return replace(self, mean_weight=total / sum(repeats))

    @property
    def left_out(self) -> frozenset[str]:
        """The ids of images that do not count at all."""
        return frozenset(image_id for image_id, weight in self.by_id.items() if not weight)

    def counted(self, batch: TrainingBatch) -> tuple[TrainingBatch, Tensor]:
        """The images of a batch that count (or one that does not, where none does), and what each counts, (b,)."""
        weights = [self.by_id.get(image_id, 1.0) for image_id in batch.ids]
        rows = [i for i, weight in enumerate(weights) if weight] or [0]
        counted = torch.tensor([weights[i] for i in rows])
        if len(rows) == len(weights):
            return batch, counted
        return batch.rows(rows), counted

    def mean(self, losses: Tensor, counted: Tensor, size: int) -> Tensor:
        """The mean loss of ``size`` images, of which ``counted`` are there; in units of the mean weight of all."""
        if not self.by_id:
            return losses.mean()
        mean_weight = self.mean_weight
        if mean_weight is None:
            mean_weight = 1 - sum(1 - weight for weight in self.by_id.values()) / max(1, self.num_images)
        return (losses * counted.to(losses)).sum() / (size * mean_weight)


def write_weights(run_dir: Place, by_id: Mapping[str, float]) -> None:
    """Keep them in a run; those that are there are replaced.

    Raises:
        StorageError: the place cannot be written.
    """
    Storage.of(uri_of(run_dir), field="--out").write(WEIGHTS, encode_json(dict(by_id)))


def read_weights(run_dir: Place, num_images: int) -> Weights:
    """Those of a run; of one that has none all count 1.

    Raises:
        ArtifactError: the file is not what was written.
        StorageError: the place cannot be reached.
    """
    storage = Storage.of(uri_of(run_dir), field="--out")
    if not storage.exists(WEIGHTS):
        return Weights(num_images=num_images)
    try:
        by_id = {str(name): float(weight) for name, weight in json.loads(storage.read(WEIGHTS)).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise ArtifactError(f"{run_dir / WEIGHTS}: is damaged ({error}); remove it and resume the run") from error
    return Weights({name: weight for name, weight in by_id.items() if weight != 1.0}, num_images)
