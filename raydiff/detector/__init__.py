"""Detectors: the one thing that everything else scores with, a diffusion model and a baseline alike.

>>> detector = load_detector("runs/digits/artifact")                # doctest: +SKIP
>>> detector.predict(images).pred_label                              # doctest: +SKIP

A detector is immutable and its methods may be called from several threads: ``calibrate`` returns a new one.

``contract`` says what all of them share, ``diffusion`` and ``baseline`` are the two kinds, ``ensemble`` is several of
them and ``sharing`` lets those call one frozen network once, ``building`` makes the parts of the first from a config,
``tiles`` lets one score images larger than what its model sees, and ``loading`` reads any of them from its artefact.
"""

from __future__ import annotations

from raydiff.detector.baseline import BaselineDetector
from raydiff.detector.building import (
    NUM_ROTATIONS,
    build_denoiser,
    build_scorer,
    build_space,
    noised,
    num_conditions,
    schedule_of,
    space_options,
    trained_steps,
)
from raydiff.detector.contract import Detector
from raydiff.detector.diffusion import MIN_CALIBRATION, DiffusionDetector, too_few
from raydiff.detector.ensemble import Combine, EnsembleDetector
from raydiff.detector.loading import load_detector, tensors_below
from raydiff.detector.tiles import Crops, Tiles

__all__ = [
    "MIN_CALIBRATION",
    "NUM_ROTATIONS",
    "BaselineDetector",
    "Combine",
    "Crops",
    "Detector",
    "DiffusionDetector",
    "EnsembleDetector",
    "Tiles",
    "build_denoiser",
    "build_scorer",
    "build_space",
    "load_detector",
    "noised",
    "num_conditions",
    "schedule_of",
    "space_options",
    "tensors_below",
    "too_few",
    "trained_steps",
]
