"""raydiff: image anomaly detection with diffusion models, on Ray.

>>> from raydiff import load_detector
>>> detector = load_detector("runs/digits/artifact")        # doctest: +SKIP
>>> detector.predict(images).pred_label                      # doctest: +SKIP

Importing this package loads nothing heavy: each name below is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raydiff.config import ExperimentConfig, load_config
    from raydiff.contracts import Prediction, Scores
    from raydiff.detector import Detector, load_detector
    from raydiff.errors import RaydiffError

__version__ = "0.1.0"
__all__ = ["Detector", "ExperimentConfig", "Prediction", "RaydiffError", "Scores", "load_config", "load_detector"]

_HOME = {
    "Detector": "raydiff.detector",
    "ExperimentConfig": "raydiff.config",
    "Prediction": "raydiff.contracts",
    "RaydiffError": "raydiff.errors",
    "Scores": "raydiff.contracts",
    "load_config": "raydiff.config",
    "load_detector": "raydiff.detector",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'raydiff' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
