"""From finished runs to one detector of several: fitted on calibration normals that none of them was trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from raydiff.detector import Combine, Detector, EnsembleDetector
from raydiff.errors import DataError
from raydiff.images import to_tensor
from raydiff.provenance import versions
from raydiff.shards import ShardSet
from raydiff.splits import labelled_batches

__all__ = ["ensemble_of"]


def ensemble_of(
    members: Sequence[Detector],
    shards: ShardSet,
    *,
    combine: Combine = "mean",
    target_fpr: float | None = None,
    map_from: int | None = None,
) -> EnsembleDetector:
    """The detectors as one, calibrated on the calibration split of the data that all of them were trained on.

    Args:
        members: two or more, diffusion models or baselines.
        shards: that data.
        combine: ``mean`` or ``max`` of z-scores, or ``fisher``, the sum of -log p.
        target_fpr: of the threshold; the first member's by default.
        map_from: which member's map, and mask, is the ensemble's, from 0; all members' maps combined by default.

    Raises:
        ConfigError: the members cannot be put together, or there is no such member or it has no map.
        DataError: they were trained on other images than these, or no image was set aside.
    """
    ensemble = EnsembleDetector.create(members, combine, _provenance(members), map_from)
    for member in members:
        trained_on = member.provenance.get("data_digest")
        if trained_on != shards.normal_digest:
            raise DataError(
                f"{member.name} was trained on other images ({(trained_on or 'not recorded')[:12]}) than those it is to"
                f" be calibrated on ({shards.normal_digest[:12]}); give runs of one data set, with one"
                " data.calibration_fraction and data.split_seed"
            )
    if not shards.count("calibration"):
        raise DataError(
            f"{shards.label}: no image was set aside, and an ensemble is fitted on images that no member was trained"
            " on; train its members with data.calibration_fraction above 0"
        )
    changes: dict[str, Any] = {"data.shards": shards.uri}
    if target_fpr is not None:
        changes["calibration.target_fpr"] = target_fpr
    ready = replace(ensemble, config=ensemble.config.override(changes))
    return ready.calibrate(_trusted(ready, shards), data_digest=shards.normal_digest)


def _provenance(members: Sequence[Detector]) -> dict[str, Any]:
    first = members[0].provenance
    counts = [member.provenance.get("num_train_images") for member in members]
    suspects = {name: weight for member in members for name, weight in member.provenance.get("suspects", {}).items()}
    kept = {name: first[name] for name in ("num_classes", "normal_classes", "data_digest") if name in first}
    return kept | {
        "num_train_images": max((count for count in counts if count is not None), default=None),
        "versions": versions(),
        "members": [{"name": member.name, "artifact": member.artifact_digest} for member in members],
        **({"suspects": suspects} if suspects else {}),
    }


def _trusted(ensemble: EnsembleDetector, shards: ShardSet) -> Iterator[Tensor]:
    """Calibration images but for those that a member suspects."""
    suspects = ensemble.provenance.get("suspects", {})
    for part in labelled_batches(shards, "calibration", ensemble.config):
        kept = torch.tensor([image_id not in suspects for image_id in part.ids])
        if kept.any():
            yield to_tensor(part.images)[kept]
