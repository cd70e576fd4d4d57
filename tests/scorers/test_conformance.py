"""Every scorer in the folder passes the shipped checks; a new file is tested without being told."""

import pytest

from raydiff import registry
from raydiff.testing import check_scorer

VARIANTS = {
    "denoising_error": [
        {"num_inference_steps": 1, "num_repeats": 2},
        {"num_inference_steps": 3, "normalise": "none", "blur": 0, "pooling": "max"},
        {"normalise": "step", "pooling": "percentile"},
        {"density": "mahalanobis"},
        {"density": "gaussian_mixture"},
        {"density": "kde"},
        {"pooling": "mean", "classes": "minimum"},
    ],
    "reconstruction": [
        {"num_inference_steps": 1, "num_repeats": 2},
        {"start": "clean", "error": "absolute"},
        {"start_step": 1.0, "num_inference_steps": 10, "normalise": "none", "blur": 0},
        {"density": "mahalanobis"},
    ],
}


@pytest.mark.parametrize("name", registry.names("scorers"))
def test_scorer(name):
    check_scorer(name)


@pytest.mark.parametrize(("name", "fields"), [(name, fields) for name in VARIANTS for fields in VARIANTS[name]])
def test_scorer_with_other_options(name, fields):
    check_scorer(name, **fields)
