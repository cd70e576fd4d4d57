"""A Gaussian per cell: what is whitened, by which distance, from few images, and where nothing ever moved."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis
from torch import Tensor

from raydiff.core.cell_gaussians import CellGaussians, Moments


def grids(count: int, seed: int = 0) -> Tensor:
    """(count, 3, 2, 2), each cell with a mean and a covariance of its own."""
    mixed = torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(9))
    means = 100 * torch.randn(4, 3, generator=torch.Generator().manual_seed(8))
    plain = torch.randn(4, count, 3, generator=torch.Generator().manual_seed(seed))
    return (torch.bmm(plain, mixed) + means[:, None]).permute(1, 2, 0).reshape(count, 3, 2, 2)


def fitted(images: Tensor, shrinkage: float, each: int = 7) -> CellGaussians:
    moments = Moments()
    for part in torch.split(images, each):
        moments.add(part)
    return moments.gaussians(shrinkage)


def test_every_cell_is_whitened_by_itself() -> None:
    images = grids(500)
    white = fitted(images, 1e-6).whitened(images)
    assert white.shape == images.shape
    for cell in white.flatten(2).permute(2, 0, 1):
        torch.testing.assert_close(cell.mean(0), torch.zeros(3), rtol=0, atol=1e-3)
        torch.testing.assert_close(torch.cov(cell.T, correction=0), torch.eye(3), rtol=0, atol=1e-3)


def test_the_length_of_a_cell_is_its_mahalanobis_distance() -> None:
    normal, image = grids(60), grids(1, seed=5)
    white = fitted(normal, 0.2).whitened(image)[0]
    for row in range(2):
        for column in range(2):
            cells = normal[:, :, row, column].double().numpy()
            covariance = np.cov(cells.T, bias=True)
            shrunk = 0.8 * covariance + 0.2 * np.trace(covariance) / 3 * np.eye(3)
            expected = mahalanobis(image[0, :, row, column].numpy(), cells.mean(0), np.linalg.inv(shrunk))
            assert float(white[:, row, column].norm()) == pytest.approx(expected, rel=1e-3)


def test_it_does_not_matter_how_many_are_shown_at_a_time() -> None:
    one, other = fitted(grids(40), 0.1, each=40), fitted(grids(40), 0.1, each=3)
    torch.testing.assert_close(one.mean, other.mean)
    torch.testing.assert_close(one.whitening, other.whitening, rtol=1e-4, atol=1e-5)


def test_shrunk_wholly_all_directions_are_alike() -> None:
    whitening = fitted(grids(40), 1.0).whitening
    torch.testing.assert_close(whitening, whitening[:, :1, :1] * torch.eye(3), rtol=1e-4, atol=1e-5)


def test_a_cell_that_never_moves_gets_a_scale_from_the_others() -> None:
    images = grids(40)
    images[:, :, 1, 1] = 3.0
    gaussians = fitted(images, 0.1)
    images[0, 0, 1, 1] = 4.0
    white = gaussians.whitened(images)
    assert bool(white[1:, :, 1, 1].abs().max() < 1e-3)
    assert 10 < float(white[0, :, 1, 1].norm()) < 1e4


def test_two_images_are_enough_for_something_finite() -> None:
    assert bool(fitted(grids(2), 0.01).whitened(grids(3, seed=2)).isfinite().all())
