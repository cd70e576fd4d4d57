"""Every space in the folder passes the shipped checks; a new file is tested without being told."""

import pytest
import torch

from raydiff import registry
from raydiff.spaces import pixel
from raydiff.testing import check_space, small_images

SHORT = {"latent": {"num_steps": 5, "width": 8}, "rotnet": {"num_steps": 5, "batch_size": 8}}
"""Options that make a fit short, of spaces that are trained; the checks are the same."""


@pytest.mark.parametrize(("channels", "size"), [(1, (8, 8)), (3, (16, 8))])
@pytest.mark.parametrize("name", registry.names("spaces"))
def test_space(name, channels, size):
    check_space(name, channels=channels, image_size=size, **SHORT.get(name, {}))


def test_the_pixel_space_is_the_identity():
    space = pixel.build(pixel.Options(), channels=3, image_size=(16, 8))
    images = small_images(4, (16, 8), 3)
    assert space.shape == (3, 16, 8)
    assert torch.equal(space.decode(space.encode(images)), images)
    assert space.state() == {}
