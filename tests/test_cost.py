"""What a call costs: a figure per batch size, and memory that grows with what is allocated."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from raydiff.cost import Cost, measure_cost
from raydiff.detector import DiffusionDetector
from raydiff.errors import ConfigError, DataError

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1)).astype(np.uint8)


def test_every_batch_size_has_a_time(detector: DiffusionDetector) -> None:
    cost = measure_cost(detector, IMAGES, (1, 4, 64))
    assert sorted(cost.ms_per_image) == [1, 4, 6], "sizes above the number of images are measured at that number"
    assert all(milliseconds > 0 for milliseconds in cost.ms_per_image.values())
    assert cost.ms_per_image[6] < cost.ms_per_image[1], "a batch is quicker per image than one at a time"
    assert cost.fields()["best_batch_size"] in cost.ms_per_image
    assert cost.fields()["ms_per_image_best"] == min(cost.ms_per_image.values())


def test_the_best_is_the_smaller_of_equals() -> None:
    assert Cost({16: 1.0, 4: 1.0, 1: 2.0}, None).best_batch_size == 4


class Hungry(torch.nn.Module):
    """Holds 80 MB while it works, and answers like the network inside."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        held = torch.ones(20_000_000)
        answer: Tensor = self.inner(x, *rest)
        return answer + 0 * held[0]


def test_memory_is_that_of_a_call(detector: DiffusionDetector) -> None:
    little = measure_cost(detector, IMAGES, (6,)).peak_memory_mb
    much = measure_cost(replace(detector, network=Hungry(detector.network)), IMAGES, (6,)).peak_memory_mb
    assert little is not None
    assert much is not None
    assert little < 40
    assert 70 < much < 200


def test_nothing_to_measure_is_refused(detector: DiffusionDetector) -> None:
    with pytest.raises(ConfigError, match=r"batch_sizes is \[0\]"):
        measure_cost(detector, IMAGES, (0,))
    with pytest.raises(DataError, match="no image"):
        measure_cost(detector, IMAGES[:0], (1,))
