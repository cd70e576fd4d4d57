"""Counters and histograms of a scoring service in Prometheus' text format, in a registry of their own.

=======================================  =========  ==========================================================
raydiff_images_total                     counter    images scored, by artefact and verdict
raydiff_problems_total                   counter    images or requests refused, by type of problem
raydiff_stage_seconds                    histogram  decode, score (whole batch), explain
raydiff_batch_size                       histogram  images scored in one call
raydiff_p_value                          histogram  conformal p-values: uniform for normal images
raydiff_artifact_info                    gauge      1 for the live artefact
raydiff_threshold, raydiff_target_fpr    gauge      of the live artefact
raydiff_drift_*                          gauge      scores in the window, ks, ks_p_value, psi, psi_by_chance,
                                                    share_flagged; NaN where nothing can be said
raydiff_shadow_*                         gauge      scored, agreement, mean_p_value_difference
=======================================  =========  ==========================================================
"""

from __future__ import annotations

import math
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from raydiff.service.artifacts import LoadedArtifact
from raydiff.service.drift import Drift
from raydiff.service.problems import PROBLEM_TYPES, ProblemType

__all__ = ["CONTENT_TYPE", "ServiceMetrics"]

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_P_VALUES = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_DRIFT = ("num_scores", "ks", "ks_p_value", "psi", "psi_by_chance", "share_flagged")
_SHADOW = ("num_scored", "agreement", "mean_p_value_difference")


class ServiceMetrics:
    """Counts from any thread; :meth:`render` is what a scrape gets."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._images = Counter("raydiff_images", "Images scored", ["artifact", "verdict"], registry=registry)
        self._problems = Counter("raydiff_problems", "Images or requests refused", ["type"], registry=registry)
        self._stages = Histogram(
            "raydiff_stage_seconds", "Time of a stage", ["stage"], buckets=_SECONDS, registry=registry
        )
        self._batches = Histogram(
            "raydiff_batch_size", "Images in one call", buckets=(1, 2, 4, 8, 16, 32, 64, 128), registry=registry
        )
        self._p_values = Histogram("raydiff_p_value", "Conformal p-values", buckets=_P_VALUES, registry=registry)
        self._info = Gauge("raydiff_artifact_info", "The live artefact", ["artifact"], registry=registry)
        self._threshold = Gauge("raydiff_threshold", "Scores above are anomalous", registry=registry)
        self._target = Gauge("raydiff_target_fpr", "The rate the threshold answers", registry=registry)
        self._drift = {
            name: Gauge(f"raydiff_drift_{name.removeprefix('num_')}", "Live scores against calibration",
                        registry=registry)
            for name in _DRIFT
        }  # fmt: skip
        self._shadow = {
            name: Gauge(f"raydiff_shadow_{name.removeprefix('num_')}", "Shadow against live", registry=registry)
            for name in _SHADOW
        }
        for type_ in PROBLEM_TYPES:
            self._problems.labels(type_)

    def problem(self, type: ProblemType) -> None:  # noqa: A002
        """One more image or request was refused."""
        self._problems.labels(type).inc()

    def stage(self, stage: str, milliseconds: float) -> None:
        """How long ``decode``, ``score`` or ``explain`` took."""
        self._stages.labels(stage).observe(milliseconds / 1000)

    def batch(self, size: int) -> None:
        """So many images were scored in one call."""
        self._batches.observe(size)

    def scored(self, artifact_id: str, verdict: str, p_value: float) -> None:
        """One more image has a verdict."""
        self._images.labels(artifact_id[:12], verdict).inc()
        self._p_values.observe(p_value)

    def render(self, live: LoadedArtifact, drift: Drift, shadow: dict[str, Any] | None) -> bytes:
        """Everything, in Prometheus' text format (:data:`CONTENT_TYPE`)."""
        self._info.clear()
        self._info.labels(live.artifact_id[:12]).set(1)
        self._threshold.set(live.calibration.threshold.value)
        self._target.set(live.calibration.threshold.target_fpr)
        for name, gauge in self._drift.items():
            gauge.set(_number(getattr(drift, name)))
        for name, gauge in self._shadow.items():
            gauge.set(_number((shadow or {}).get(name)))
        return generate_latest(self.registry)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
