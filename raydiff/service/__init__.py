"""Scoring for others: bytes of images in, verdicts with their reasons out. No web framework and no Ray in here.

:class:`ScoringService` is the whole of it; the rest are what it takes and gives.
"""

from __future__ import annotations

from raydiff.service.decoding import Limits, ReceivedImage, receive
from raydiff.service.drift import Drift, DriftWindow, measure_drift
from raydiff.service.explaining import Box, HeatScale, Pictures
from raydiff.service.metrics import CONTENT_TYPE
from raydiff.service.problems import PROBLEM_TYPES, ProblemError, ProblemType
from raydiff.service.service import Explanation, ScoredImage, ScoringService

__all__ = [
    "CONTENT_TYPE",
    "PROBLEM_TYPES",
    "Box",
    "Drift",
    "DriftWindow",
    "Explanation",
    "HeatScale",
    "Limits",
    "Pictures",
    "ProblemError",
    "ProblemType",
    "ReceivedImage",
    "ScoredImage",
    "ScoringService",
    "measure_drift",
    "receive",
]
