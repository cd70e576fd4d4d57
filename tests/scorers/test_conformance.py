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
        {"sided": "both", "density": "gaussian_mixture", "density_on": "mean"},
    ],
    "conditioned": [{"start": "clean", "error": "absolute", "weight": 0.3}, {"num_inference_steps": 1, "weight": 0}],
    "contrast": [
        {"rotations": 4, "normalise": "pixel"},
        {"pairing": "log_ratio", "rotations": 4},
        {"pairing": "softmax", "temperature": 0.5},
        {"condition": "class"},
        {"condition": "class", "pairing": "log_ratio", "density": "kde", "num_inference_steps": 2},
    ],
    "curvature": [
        {"maps": False},
        {"maps": False, "density": "none", "num_inference_steps": 1},
        {"start_from": "noised", "density": "none"},
    ],
    "deviation_correction": [
        {"num_inference_steps": 1},
        {"num_inference_steps": 3, "start_step": 0.5, "normalise": "none", "changes": "latent"},
        {"density": "mahalanobis", "changes": "latent", "pooling": "max"},
    ],
    "discriminative": [
        {"combine": "max", "sees": "difference", "start_from": "noised", "depth": 0},
        {"combine": "head", "sees": "image", "kernel_size": 1, "noise": 0, "learning_rate": 3e-3},
        {"density": "mahalanobis", "num_inference_steps": 2, "width": 16},
    ],
    "inversion": [
        {"statistic": "latent", "density": "none"},
        {"statistic": "path", "density": "gaussian_mixture", "num_inference_steps": 2},
        {"statistic": "both", "density": "none", "num_inference_steps": 1},
    ],
    "likelihood": [
        {"density": "gaussian_mixture", "num_inference_steps": 3},
        {"normalise": "pixel", "sided": "both", "blur": 1, "pooling": "top_k"},
        {"decoder": "continuous", "density": "mahalanobis"},
    ],
    "score_norms": [
        {"start_from": "noised"},
        {"density": "none", "sided": "both"},
        {"density_on": "mean_and_top", "density": "mahalanobis"},
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
