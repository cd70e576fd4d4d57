"""Every baseline in the folder passes the shipped checks; a new file is tested without being told."""

import pytest

from raydiff import registry
from raydiff.testing import check_baseline

pytestmark = pytest.mark.filterwarnings("ignore:Precision loss occurred:RuntimeWarning")  # constant pixels, scipy


@pytest.mark.parametrize("name", registry.names("baselines"))
def test_baseline(name):
    check_baseline(name)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("isolation_forest", {"n_estimators": 25, "max_samples": 16, "max_features": 0.5}),
        ("ocsvm", {"standardize": True, "gamma": "auto", "nu": 0.1}),
        ("ocsvm", {"gamma": 0.01}),
        ("copod", {"max_side": 5}),
        ("knn", {"n_neighbors": 1, "method": "largest", "max_train_images": 20}),
        ("knn", {"method": "median"}),
        ("knn", {"features": "backbone", "levels": (0, 1)}),
        (
            "patch_knn",
            {"levels": (1, 2), "grid": (3, 2), "reweight": True, "max_bank": 40, "blur": 0.0},
        ),
    ],
)
def test_baseline_with_other_options(name, fields):
    check_baseline(name, **fields)
