"""Every image is brought to one light: its mean and deviation, and nothing else of it."""

from __future__ import annotations

import torch

from raydiff.core.lighting import standardised

MEAN, DEVIATION = torch.tensor(0.45), torch.tensor(0.22)


def images(seed: int = 0) -> torch.Tensor:
    return torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(seed))


def test_all_have_the_same_mean_and_deviation() -> None:
    made = standardised(images(), MEAN, DEVIATION)
    torch.testing.assert_close(made.mean((1, 2, 3)), MEAN.expand(3))
    torch.testing.assert_close(made.std((1, 2, 3), correction=0), DEVIATION.expand(3))


def test_darker_and_flatter_is_the_same_image() -> None:
    torch.testing.assert_close(
        standardised(0.1 + 0.3 * images(), MEAN, DEVIATION), standardised(images(), MEAN, DEVIATION)
    )


def test_colours_stay() -> None:
    """Channels keep their order and the ratio of their differences."""
    before, after = images(), standardised(images(), MEAN, DEVIATION)
    ratio = (after[:, 0] - after[:, 1]) / (before[:, 0] - before[:, 1])
    torch.testing.assert_close(ratio, ratio[:, :1, :1].expand_as(ratio), rtol=1e-3, atol=1e-3)


def test_each_stands_alone() -> None:
    together = standardised(images(), MEAN, DEVIATION)
    assert torch.equal(together[1:2], standardised(images()[1:2], MEAN, DEVIATION))


def test_noise_of_a_blank_image_stays_noise() -> None:
    noise = torch.randn(1, 3, 16, 24, generator=torch.Generator().manual_seed(1)) / 2550  # a tenth of a grey level
    made = standardised(0.5 + noise, MEAN, DEVIATION)
    assert float(made.std()) < 0.05 * float(DEVIATION) * 2
    assert torch.equal(standardised(torch.zeros(1, 3, 4, 4), MEAN, DEVIATION), MEAN.expand(1, 3, 4, 4))
