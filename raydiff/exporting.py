"""From an artefact to one file that runs elsewhere: ``torch.export`` or ONNX (see :mod:`raydiff.exported`).

The graph is not written by hand: it is traced through the detector's own space, scorer and judgement, on a batch whose
size stays open, with the noise of the artefact's seed as constants. What is written is run at once beside the detector,
and refused where scores differ by more than the tolerance.
"""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Protocol, cast, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raydiff.artifact import encode_json
from raydiff.contracts import Scorer, SequentialScorer
from raydiff.core.chunks import in_one_call
from raydiff.core.diffusion import Diffusion
from raydiff.core.schedule import NoiseSchedule
from raydiff.detector import Detector, DiffusionDetector
from raydiff.errors import ConfigError, RaydiffError, StorageError
from raydiff.exported import EXPORT_VERSION, METADATA, SUFFIXES, TOLERANCE, load_exported
from raydiff.images import to_tensor
from raydiff.judgement import Judge

__all__ = ["Exported", "Format", "export"]

Format = Literal["torch", "onnx"]

_BATCH = 3
"""Images of the batch that is traced; neither 1 nor a size of anything else, so that no number is taken for it."""


@dataclass(frozen=True)
class Exported:
    """What was written: where, and the largest difference to the artefact's scores, as :data:`TOLERANCE` counts."""

    path: Path
    difference: float
    tolerance: float = TOLERANCE


def export(detector: Detector, path: str | Path, format: Format | None = None) -> Exported:  # noqa: A002
    """Write a calibrated diffusion detector as one file.

    Args:
        detector: calibrated, on the CPU.
        path: ending in ``.pt2`` for ``torch`` and ``.onnx`` for ``onnx``.
        format: by the ending where it is not given.

    Raises:
        ConfigError: the ending does not fit, the detector is a baseline or not calibrated, its scorer cannot be traced,
            or ONNX is not installed.
        RaydiffError: what was written scores otherwise than the detector.
        StorageError: the file cannot be written.
    """
    path = Path(path)
    format = _format_of(path, format)  # noqa: A001
    detector = _exportable(detector)
    graph = _Graph(detector)
    images = _trial_images(detector)
    program = _traced(graph, images, detector)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=SUFFIXES[format], dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        text = encode_json(_metadata(detector, format)).decode()
        (_write_torch if format == "torch" else _write_onnx)(program, temporary, text)
        difference = _difference(detector, temporary, images)
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return Exported(path, difference)


def _format_of(path: Path, given: Format | None) -> Format:
    known: dict[str, Format] = {".onnx": "onnx", ".pt2": "torch"}
    found = known.get(path.suffix.lower())
    if found is None or given not in (None, found):
        wanted = SUFFIXES[given] if given else " or ".join(SUFFIXES.values())
        raise ConfigError(f"--out {path}: must end in {wanted}")
    return found


def _exportable(detector: Detector) -> DiffusionDetector:
    if not isinstance(detector, DiffusionDetector):
        raise ConfigError(f"{detector.name} is no diffusion detector; only those can be exported")
    if detector.calibration is None:
        raise ConfigError(f"{detector.name} has no threshold; finish its run with raydiff fit --resume, then export")
    if detector.tiles is not None:
        raise ConfigError(f"{detector.name} sees tiles, and joins them outside of any network; it cannot be exported")
    if isinstance(detector.scorer, SequentialScorer) and detector.scorer.stops_early:
        raise ConfigError("scoring.early_exit is set, and a graph asks all images alike; leave it out, and calibrate")
    if not isinstance(detector.scorer, Judge):
        raise ConfigError(f"scoring {detector.config.scoring.name} cannot be exported; use a scorer with a surrogate")
    return detector


@dataclass(frozen=True)
class _FixedNoise(Diffusion):
    """Draws noise once and keeps it: in a graph it is a constant."""

    draws: dict[tuple[tuple[int, ...], int, int], Tensor] = field(default_factory=dict)

    def noise(self, shape: tuple[int, ...], step: int, repeat: int = 0) -> Tensor:
        key = (tuple(shape), step, repeat)
        if key not in self.draws:
            self.draws[key] = super().noise(shape, step, repeat)
        return self.draws[key]


@dataclass(frozen=True, eq=False)
class _FixedSteps(NoiseSchedule):
    """Says once which steps there are and keeps it: a tracer cannot follow a tensor into a list of numbers."""

    known: dict[tuple[int, int], list[int]] = field(default_factory=dict)

    def timesteps(self, start: int, num_inference_steps: int) -> list[int]:
        key = (start, num_inference_steps)
        if key not in self.known:
            self.known[key] = super().timesteps(start, num_inference_steps)
        return self.known[key]


@runtime_checkable
class _Branching(Protocol):
    """A network that does otherwise by the number of images, and can be told not to."""

    def for_any_batch(self) -> nn.Module: ...


class _Graph(nn.Module):
    """uint8 (B, H, W, C) to scores (B,) and maps (B, 1, H, W)."""

    def __init__(self, detector: DiffusionDetector) -> None:
        super().__init__()
        assert isinstance(detector.scorer, Judge)  # noqa: S101
        self.network = deepcopy(detector.network).eval().requires_grad_(False)
        if isinstance(self.network, _Branching):
            self.network.for_any_batch()
        known = {f.name: getattr(detector.model, f.name) for f in fields(Diffusion)}
        schedule = _FixedSteps(detector.model.schedule.alphas_cumprod)
        changed = {"denoiser": self.network, "schedule": schedule, "differentiable": True}
        self.model = _FixedNoise(**{**known, **changed})
        steps, self.judge = detector.scorer.timesteps(schedule), copy(detector.scorer)
        self.judge.__dict__["timesteps"] = lambda _: steps
        self.space, self.scorer = detector.space, cast(Scorer, self.judge)
        self.statistics = dict(detector.statistics)
        self.image_size = detector.config.data.image_size

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        x = images.permute(0, 3, 1, 2).float() / 127.5 - 1.0
        evidence = self.scorer.measure(self.model, self.space.encode(x))
        score = self.judge.surrogate(evidence, self.statistics)
        if evidence.shape[-2:] == (1, 1):
            return (score,)
        maps = self.judge.surrogate_map(evidence, self.statistics)[:, None].float()
        if tuple(maps.shape[-2:]) != self.image_size:
            maps = nn.functional.interpolate(maps, self.image_size, mode="bilinear", align_corners=False)
        return score, maps


def _trial_images(detector: DiffusionDetector) -> NDArray[np.uint8]:
    """uint8 (B, H, W, C): grey, noise, and a ramp."""
    data = detector.config.data
    shape = (*data.image_size, data.channels)
    noise = np.random.default_rng(0).integers(0, 256, shape)
    ramp = np.broadcast_to(np.linspace(0, 255, shape[1])[:, None], shape)
    return np.stack([np.full(shape, 128), noise, ramp]).astype(np.uint8)


def _traced(graph: _Graph, images: NDArray[np.uint8], detector: DiffusionDetector) -> torch.export.ExportedProgram:
    given = torch.from_numpy(images[:_BATCH])
    with _quietly(), in_one_call(), torch.no_grad():
        graph(given)  # draws the noise
        try:
            return torch.export.export(
                graph, (given,), dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}}, strict=False
            )
        except MemoryError:  # which says nothing of the detector
            raise
        except Exception as error:  # torch's tracer raises many kinds
            raise ConfigError(
                f"{detector.name} cannot be traced ({' '.join(str(error).split())[:160]}); export a run with scoring"
                " denoising_error, reconstruction, inversion or score_norms"
            ) from error


def _metadata(detector: DiffusionDetector, format: Format) -> dict[str, Any]:  # noqa: A002
    assert detector.calibration is not None  # noqa: S101
    data = detector.config.data
    return {
        "export_version": EXPORT_VERSION,
        "format": format,
        "name": detector.name,
        "artifact_digest": detector.artifact_digest,
        "num_evaluations": detector.num_evaluations,
        "pretrained": detector.pretrained,
        "input": {
            "type": "uint8", "shape": ["batch", *data.image_size, data.channels], "channels": "RGB or grey",
            "resize": data.resize, "aligned_width": detector.image_spec.aligned_width, "max_pixels": data.max_pixels,
        },
        "threshold": detector.calibration.threshold.value,
        "tolerance": TOLERANCE,
        "calibration": detector.calibration.to_dict(),
        "experiment": detector.config.to_dict(),
        "provenance": dict(detector.provenance),
    }  # fmt: skip


def _write_torch(program: torch.export.ExportedProgram, path: Path, text: str) -> None:
    with _quietly():
        torch.export.save(program, path, extra_files={METADATA: text})


def _write_onnx(program: torch.export.ExportedProgram, path: Path, text: str) -> None:
    try:
        import onnx
        import onnxruntime  # noqa: F401  (runs what is written)
        import onnxscript  # noqa: F401  (torch writes with it)
    except ImportError as error:
        raise ConfigError(f"--format onnx needs {error.name}; pip install 'raydiff[export]'") from error
    names = ["score", "map"][: len(program.graph_signature.user_outputs)]
    with _quietly():
        written = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=["images"], output_names=names, external_data=False
        )
    assert written is not None  # noqa: S101
    model = written.model_proto
    onnx.helper.set_model_props(model, {METADATA: text})
    onnx.save_model(model, path)


def _difference(detector: DiffusionDetector, path: Path, images: NDArray[np.uint8]) -> float:
    """The largest of the trial images' differences, alone and together; see :data:`TOLERANCE`.

    A map's pixels differ in units of its highest one.

    Raises:
        RaydiffError: it exceeds the tolerance.
    """
    assert detector.calibration is not None  # noqa: S101
    exported, given = load_exported(path), to_tensor(images)
    expected = detector.score(given)
    unit = torch.maximum(expected.image.double().abs(), detector.calibration.scores.std())
    worst = 0.0
    for part in (slice(None), *(slice(i, i + 1) for i in range(len(given)))):
        found = exported.score(given[part])
        apart = [(found.image.double() - expected.image[part].double()).abs() / unit[part]]
        if expected.map is not None and found.map is not None:
            highest = expected.map[part].abs().amax((-2, -1), keepdim=True)
            apart.append((found.map - expected.map[part]).abs() / highest.clamp(min=1e-30))
        worst = max(worst, *(float(one.max()) for one in apart))
    if not worst <= TOLERANCE:
        raise RaydiffError(
            f"{detector.name}: the exported scores or maps are {worst:.2g} away from the artefact's, more than"
            f" {TOLERANCE:g}; nothing is written: its scorer magnifies rounding; serve the artefact itself, or export"
            " another scorer"
        )
    return worst


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what torch's exporters say about themselves."""
    noisy = [logging.getLogger(name) for name in ("torch.export", "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in noisy]
    for logger in noisy:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(noisy, levels, strict=True):
            logger.setLevel(level)
