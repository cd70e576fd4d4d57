"""From an artefact's folder to the detector that was saved in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raydiff import registry
from raydiff.artifact import Folder, read_folder
from raydiff.config import ExperimentConfig, Options, component_options
from raydiff.contracts import Baseline
from raydiff.core.calibration import Calibration
from raydiff.detector.baseline import BaselineDetector
from raydiff.detector.contract import Detector
from raydiff.detector.diffusion import DiffusionDetector
from raydiff.detector.ensemble import EnsembleDetector, member_prefix
from raydiff.errors import ArtifactError, ConfigError
from raydiff.storage import Storage, label_of

__all__ = ["load_detector", "tensors_below"]


def load_detector(path: str | Path | Storage, *, device: str = "cpu") -> Detector:
    """Load an artefact, or a checkpoint as an uncalibrated detector, after checking every byte of it.

    Args:
        path: its folder, or a URI such as ``s3://bucket/run/artifact``.
        device: ``cpu`` or ``cuda``.

    Raises:
        ArtifactError: the folder is missing, unfinished, truncated, altered, or of a newer format.
        StorageError: the store that holds it cannot be reached.
        ConfigError: ``device`` is not there.
    """
    _check_device(device)
    folder = read_folder(path)
    try:
        return _load(folder, device)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        where = path if isinstance(path, Storage) else label_of(str(path))
        raise ArtifactError(f"{where}: does not hold a detector ({' '.join(str(error).split())[:200]})") from error


def _load(folder: Folder, device: str) -> Detector:
    content = folder.json("config.json")
    config = ExperimentConfig.model_validate(content["experiment"])
    described, provenance = content["detector"], content["provenance"]
    if described["kind"] == "baseline":
        return _load_baseline(folder, config, component_options("baselines", described["baseline"]), provenance)
    if described["kind"] == "ensemble":
        return _load_ensemble(folder, config, described, provenance, device)
    return _load_diffusion(folder, config, provenance, device)


def _load_ensemble(
    folder: Folder, config: ExperimentConfig, described: Mapping[str, Any], provenance: Mapping[str, Any], device: str
) -> Detector:
    return EnsembleDetector(
        config=config, provenance=provenance, combine=described["combine"], map_from=described.get("map_from"),
        members=tuple(_load(folder.part(member_prefix(i)), device) for i in range(described["members"])),
        statistics=folder.tensors("statistics.safetensors"), calibration=_load_calibration(folder),
        artifact_digest=folder.digest,
    )  # fmt: skip


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = "unknown"
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"device is {device!r}; use cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {device!r} and there is no such GPU here; use cpu")


def _load_diffusion(folder: Folder, config: ExperimentConfig, provenance: Mapping[str, Any], device: str) -> Detector:
    detector = DiffusionDetector.create(
        config, num_classes=int(provenance["num_classes"]), provenance=provenance, device=device
    )
    weights = folder.tensors("weights.safetensors")
    detector.network.load_state_dict(tensors_below("denoiser.", weights))
    detector.space.load_state(tensors_below("space.", weights))
    if folder.kind != "checkpoint":  # which knows no scorer; what a scorer needs comes from its source then
        detector.scorer.load_state(tensors_below("scorer.", weights))
    calibration = _load_calibration(folder)
    statistics = folder.tensors("statistics.safetensors") if calibration is not None else {}
    return replace(detector, calibration=calibration, statistics=statistics, artifact_digest=folder.digest)


def _load_baseline(
    folder: Folder, config: ExperimentConfig, options: Options, provenance: Mapping[str, Any]
) -> Detector:
    baseline: Baseline = registry.build("baselines", options, seed=config.seed)
    baseline.load_state(folder.tensors("weights.safetensors"))
    return BaselineDetector(
        config=config, options=options, baseline=baseline, provenance=provenance,
        calibration=_load_calibration(folder), artifact_digest=folder.digest,
    )  # fmt: skip


def _load_calibration(folder: Folder) -> Calibration | None:
    if "calibration.json" not in folder.files:
        return None
    return Calibration.from_dict(folder.json("calibration.json"))


def tensors_below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those whose name begins with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
