"""How rare a score is among normals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raydiff.core.surprise import surprise


def test_the_surprise_rises_and_says_how_rare_a_score_is() -> None:
    normals = torch.from_numpy(np.sort(np.random.default_rng(0).exponential(size=500)))
    values = torch.linspace(-1, 30, 4000, dtype=torch.float64)
    found = surprise(values, normals)
    assert bool((found.diff() > 0).all())  # also where no normal is: clear anomalies do not tie
    for score in (0.5, 1.0, 2.0, 6.0):  # of an exponential -log p is the score itself
        assert float(surprise(torch.tensor([score], dtype=torch.float64), normals)) == pytest.approx(score, rel=0.25)
