"""Every perturbation in the folder passes the shipped checks; a new file is tested without being told."""

import pytest

from raydiff import registry
from raydiff.testing import check_perturbation


@pytest.mark.parametrize("name", registry.names("perturbations"))
def test_perturbation(name):
    check_perturbation(name)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("cut_paste", {"shape": "patch"}),
        ("cut_paste", {"shape": "scar"}),
        ("gaussian_noise", {"seed": 3}),
    ],
)
def test_perturbation_with_other_options(name, fields):
    check_perturbation(name, **fields)
