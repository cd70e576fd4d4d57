"""A detector in one file: ``.pt2`` (``torch.export``) or ``.onnx``, with what a verdict needs written beside the graph.

The graph takes images uint8 (B, H, W, C) as :func:`raydiff.images.decode` gives them, any B, and gives scores float32
(B,) and, where the scorer has one, maps float32 (B, 1, H, W). Scaling, space, noise, network and judgement are all in
it. :class:`ExportedDetector` runs it and says what the artefact would say: threshold, p-value, verdict, mask. Scores
are the artefact's to :data:`TOLERANCE`, not bit for bit: a graph sees a batch at once.

Whoever runs the graph without raydiff finds the metadata as JSON under ``raydiff``: in ONNX's metadata properties, in
the ``.pt2`` as an extra file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raydiff.config import ExperimentConfig
from raydiff.contracts import Scores
from raydiff.core.calibration import Calibration
from raydiff.detector import Detector
from raydiff.errors import ArtifactError, ConfigError
from raydiff.images import to_uint8

__all__ = ["EXPORT_VERSION", "METADATA", "SUFFIXES", "TOLERANCE", "ExportedDetector", "is_exported", "load_exported"]

EXPORT_VERSION = 1
"""Of the metadata; raised when a reader of the old could not read the new."""

METADATA = "raydiff"
"""The key of the metadata in either format."""

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
"""Format to ending of the file."""

TOLERANCE = 1e-4
"""Largest difference to the artefact's score, as a share of the score or of the calibration scores' deviation."""

Graph = Callable[[NDArray[np.uint8]], list[Tensor]]
"""Images to scores and maybe maps."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ExportedDetector(Detector):
    """A graph with its metadata. It scores; it can be neither calibrated nor saved: export the artefact again."""

    graph: Graph
    metadata: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The artefact's, and the format."""
        return f"{self.metadata['name']} ({self.metadata['format']})"

    @property
    def num_evaluations(self) -> int | None:
        """NFE, as of the artefact."""
        count: int | None = self.metadata["num_evaluations"]
        return count

    @property
    def pretrained(self) -> str | None:
        """As of the artefact."""
        name: str | None = self.metadata["pretrained"]
        return name

    def calibrate(self, images: Tensor | Iterable[Tensor], *, data_digest: str | None = None) -> Self:  # noqa: ARG002
        """Refused.

        Raises:
            ConfigError: always.
        """
        self._refuse("calibrated")

    def _score(self, images: Tensor) -> Scores:
        found = self.graph(to_uint8(images))
        return Scores(found[0], found[1] if len(found) > 1 else None)

    def _describe(self) -> dict[str, Any]:
        self._refuse("saved as an artefact")

    def _weights(self) -> dict[str, Tensor]:
        self._refuse("saved as an artefact")

    def _refuse(self, what: str) -> NoReturn:
        raise ConfigError(f"{self.name} is an exported file, which cannot be {what}; do it with its artefact")


def is_exported(path: str | Path) -> bool:
    """Whether a path names an exported file, by its ending."""
    return "://" not in str(path) and Path(path).suffix.lower() in SUFFIXES.values()


def load_exported(path: str | Path, *, threads: int | None = None) -> ExportedDetector:
    """The detector in an exported file, on the CPU.

    Args:
        path: ``.onnx``, run by ONNX Runtime, or ``.pt2``, run by PyTorch.
        threads: of ONNX Runtime; as many as PyTorch has by default.

    Raises:
        ArtifactError: the file is missing, damaged, no export of raydiff's, or of a newer version.
        ConfigError: another ending, or ONNX Runtime is not installed.
    """
    path = Path(path)
    if not is_exported(path):
        raise ConfigError(f"{path}: is no exported file; give one that ends in {' or '.join(SUFFIXES.values())}")
    if not path.is_file():
        raise ArtifactError(f"{path}: there is no such file; write it with: raydiff export ARTEFACT --out {path}")
    onnx = path.suffix.lower() == SUFFIXES["onnx"]
    graph, text = _onnx(path, threads or torch.get_num_threads()) if onnx else _torch(path)
    metadata = _checked(path, text)
    return ExportedDetector(
        config=ExperimentConfig.from_dict(metadata["experiment"], str(path)),
        calibration=Calibration.from_dict(metadata["calibration"]),
        provenance=metadata["provenance"],
        artifact_digest=metadata["artifact_digest"],
        graph=graph,
        metadata=metadata,
    )


def _checked(path: Path, text: str | None) -> Mapping[str, Any]:
    try:
        metadata: dict[str, Any] = json.loads(text or "")
        version = metadata["export_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: was not written by raydiff export; export the artefact again") from error
    if version != EXPORT_VERSION:
        raise ArtifactError(
            f"{path}: has export version {version}; this raydiff reads {EXPORT_VERSION}, so export the artefact again"
        )
    return metadata


def _onnx(path: Path, threads: int) -> tuple[Graph, str | None]:
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigError(f"{path}: needs ONNX Runtime; pip install 'raydiff[export]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except MemoryError:
        raise
    except Exception as error:  # its own exceptions have no common root
        raise ArtifactError(f"{path}: is no whole ONNX file ({_line(error)}); export the artefact again") from error
    name = session.get_inputs()[0].name

    def run(images: NDArray[np.uint8]) -> list[Tensor]:
        return [torch.from_numpy(value) for value in session.run(None, {name: np.ascontiguousarray(images)})]

    return run, session.get_modelmeta().custom_metadata_map.get(METADATA)


def _torch(path: Path) -> tuple[Graph, str | None]:
    extra = {METADATA: ""}
    try:
        program = torch.export.load(str(path), extra_files=extra)
    except MemoryError:
        raise
    except Exception as error:  # whatever a garbled zip makes it trip over
        raise ArtifactError(f"{path}: is no whole .pt2 file ({_line(error)}); export the artefact again") from error
    module = program.module()

    def run(images: NDArray[np.uint8]) -> list[Tensor]:
        with torch.inference_mode():
            return list(module(torch.from_numpy(np.array(images))))

    return run, extra[METADATA]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]
