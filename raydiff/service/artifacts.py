"""An artefact that is loaded and warm: everything needed to score with it, none of which changes any more."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raydiff.compiling import compiled
from raydiff.core.calibration import Calibration
from raydiff.detector import Detector, load_detector
from raydiff.errors import ArtifactError, ConfigError, DataError, NotCalibratedError, RaydiffError
from raydiff.experiment import artifact_of
from raydiff.images import ImageSpec, images_per_batch, to_tensor
from raydiff.results import read_results
from raydiff.service.drift import DriftWindow
from raydiff.service.explaining import HeatScale
from raydiff.service.problems import ProblemError

_PUBLIC_FIGURES = (
    "dataset", "num_normal", "num_anomalous", "metrics", "threshold", "target_fpr", "realised_fpr", "realised_tpr",
    "ms_per_image_alone", "ms_per_image", "hardware", "created", "commit", "data_digest",
)  # fmt: skip

__all__ = ["LoadedArtifact", "describe", "load_artifact", "probe", "with_rate"]


@dataclass(frozen=True, eq=False)
class LoadedArtifact:
    """``detector`` answers the target rate in force; ``artifact_id`` is the folder's digest.

    ``own_target_fpr`` is the rate it was saved with, ``probe_score`` what :func:`probe` said when it was loaded.
    ``drift`` is shared by all copies of one loading.
    """

    artifact_id: str
    detector: Detector
    calibration: Calibration
    own_target_fpr: float
    probe_score: float
    has_reconstruction: bool
    metrics: Mapping[str, Any] | None
    loaded: str
    warm_up_ms: float
    drift: DriftWindow = field(repr=False)

    @property
    def scale(self) -> HeatScale | None:
        """The heat maps'; None for a detector without."""
        cut = self.calibration.mask_threshold
        return None if cut is None else HeatScale.of(cut)


def load_artifact(
    folder: str | Path, *, device: str = "cpu", max_batch: int = 32, window: int = 1000, min_scores: int = 100,
    compile: bool = False,  # noqa: A002
) -> LoadedArtifact:  # fmt: skip
    """Load a folder (or a run's), check that it can serve, and score a made-up batch so that the next is not slow.

    Args:
        folder: an artefact's, or that of the run that holds it.
        device: ``cpu`` or ``cuda``.
        max_batch: the largest batch that will be asked for.
        window: scores that drift is measured over.
        min_scores: scores below which nothing is said about drift.
        compile: its networks, see :func:`raydiff.compiling.compiled`.

    Raises:
        ArtifactError: the folder is missing, altered, of a newer format, or its detector does not score.
        NotCalibratedError: it has no threshold.
        ConfigError: the device is not there, or it cannot be compiled.
    """
    path = artifact_of(folder)
    detector = load_detector(path, device=device)
    if detector.calibration is None or detector.artifact_digest is None:
        raise NotCalibratedError(f"{path}: has no threshold; calibrate the detector and save it again")
    live = compiled(detector) if compile else detector
    try:
        warm_up_ms, probe_score, has_reconstruction = _warm_up(live, max_batch)
    except RaydiffError as error:
        raise ArtifactError(f"{path}: loads but does not score ({error}); train it again") from error
    return LoadedArtifact(
        artifact_id=detector.artifact_digest,
        detector=live,
        calibration=detector.calibration,
        own_target_fpr=detector.calibration.threshold.target_fpr,
        probe_score=probe_score,
        has_reconstruction=has_reconstruction,
        metrics=_metrics(path, detector.artifact_digest),
        loaded=datetime.now(UTC).isoformat(timespec="seconds"),
        warm_up_ms=warm_up_ms,
        drift=DriftWindow(window, min_scores=min_scores),
    )


def with_rate(artifact: LoadedArtifact, target_fpr: float | None) -> LoadedArtifact:
    """A copy whose threshold answers ``target_fpr``, or the rate that it was saved with where that is None.

    Raises:
        ProblemError: the rate is no number between 0 and 1.
    """
    rate = artifact.own_target_fpr if target_fpr is None else target_fpr
    if isinstance(rate, bool) or not isinstance(rate, int | float):
        raise ProblemError("invalid-target-rate", "The target rate is no number; give one between 0 and 1, say 0.01.")
    if rate == artifact.calibration.threshold.target_fpr:
        return artifact
    try:
        detector = artifact.detector.with_target_fpr(float(rate))
    except ConfigError as error:
        raise ProblemError(
            "invalid-target-rate", f"The target rate is {rate}; give a number between 0 and 1, say 0.01."
        ) from error
    assert detector.calibration is not None  # noqa: S101
    return replace(artifact, detector=detector, calibration=detector.calibration)


def describe(artifact: LoadedArtifact, *, num_bins: int = 40) -> dict[str, Any]:
    """What is public about an artefact, as JSON: nothing in it says where files lie."""
    detector, spec = artifact.detector, artifact.detector.image_spec
    counts, edges = np.histogram(artifact.calibration.scores.numpy(), bins=num_bins)
    calibration = {name: value for name, value in artifact.calibration.to_dict().items() if name != "scores"}
    return {
        "artifact_id": artifact.artifact_id,
        "detector": detector.name,
        "loaded": artifact.loaded,
        "warm_up_ms": artifact.warm_up_ms,
        "num_evaluations": detector.num_evaluations,
        "pretrained": detector.pretrained,
        "model_bytes": detector.model_bytes,
        "image": {
            "height": spec.image_size[0], "width": spec.image_size[1], "channels": spec.channels,
            "resize": spec.resize, "aligned_width": spec.aligned_width, "max_pixels": spec.max_pixels,
        },
        "has_maps": artifact.scale is not None,
        "has_reconstruction": artifact.has_reconstruction,
        "heat_scale": None if artifact.scale is None else vars(artifact.scale),
        "calibration": {
            **calibration,
            "rule": artifact.calibration.threshold.rule,
            "own_target_fpr": artifact.own_target_fpr,
            "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        },
        "training_data_digest": detector.provenance.get("data_digest"),
        "metrics": None if artifact.metrics is None else dict(artifact.metrics),
        "provenance": _without_places(_without_names(detector.provenance)),
        "notes": list(detector.notes_for_others),
        "config": _without_places(detector.config.to_dict()),
    }  # fmt: skip


def probe(detector: Detector) -> float:
    """The raw score of a slope of greys: the same for as long as nothing of the detector changes.

    Raises:
        RaydiffError: it has none.
    """
    return float(detector.score(to_tensor(_slope(detector.image_spec))).image[0])


def _slope(spec: ImageSpec) -> NDArray[np.uint8]:
    """uint8 (1, H, W, C)."""
    shape = (1, *spec.image_size, spec.channels)
    return np.linspace(64, 192, num=math.prod(shape)).astype(np.uint8).reshape(shape)


def _warm_up(detector: Detector, max_batch: int) -> tuple[float, float, bool]:
    """Milliseconds of scoring and explaining a slope of greys, its score, and whether there is a reconstruction."""
    image = _slope(detector.image_spec)
    started = time.perf_counter()
    score = probe(detector)
    detector.predict(to_tensor(image.repeat(min(max_batch, images_per_batch(detector.config)), axis=0)))
    rebuilt = detector.reconstruct(to_tensor(image))
    return 1000 * (time.perf_counter() - started), score, rebuilt is not None


def _metrics(path: Path, digest: str) -> dict[str, Any] | None:
    """Of the last evaluation of this very artefact, from ``results.jsonl`` beside it; None without."""
    try:
        rows = read_results(path.parent / "results.jsonl")
    except (DataError, OSError):
        return None
    mine = [row for row in rows if row.artifact_digest == digest and row.subset == "all"]
    if not mine:
        return None
    return mine[-1].model_dump(mode="json", include=set(_PUBLIC_FIGURES))


def _without_names(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """A detector's, with the number of suspect images in the place of their names."""
    named = provenance.get("suspects")
    return dict(provenance) | ({"suspects": len(named)} if named else {})


def _without_places(value: Any) -> Any:
    """JSON with only the last part of every path and address in it."""
    if isinstance(value, dict):
        return {name: _without_places(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_places(inner) for inner in value]
    if isinstance(value, str) and (value.startswith(("/", "~", ".")) or "://" in value):
        return PurePath(value).name
    return value
