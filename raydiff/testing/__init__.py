"""For tests, yours and ours: a denoiser whose answers are known, small real images, checks for every component.

The checks take a component's name and, after it, option fields other than the defaults::

    from raydiff.testing import check_scorer
    check_scorer("denoising_error", num_inference_steps=2)

They build the component through the registry and raise ``AssertionError`` with one line that names the component and
what it breaks. raydiff's own tests run them over ``registry.names(kind)``: a new file is tested without being told.
Each kind's check lies in the file named like the kind.
"""

from __future__ import annotations

from raydiff.testing.baselines import check_baseline
from raydiff.testing.datasets import check_dataset
from raydiff.testing.denoisers import check_denoiser
from raydiff.testing.examples import LatentExamples
from raydiff.testing.images import planted_defect, small_images
from raydiff.testing.oracle import CorrectingOracle, OracleDenoiser, TurnedOracle
from raydiff.testing.perturbations import check_perturbation
from raydiff.testing.scorers import check_scorer
from raydiff.testing.spaces import check_space

__all__ = [
    "CorrectingOracle",
    "LatentExamples",
    "OracleDenoiser",
    "TurnedOracle",
    "check_baseline",
    "check_dataset",
    "check_denoiser",
    "check_perturbation",
    "check_scorer",
    "check_space",
    "planted_defect",
    "small_images",
]
