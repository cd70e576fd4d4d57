"""Every denoiser in the folder passes the shipped checks; a new file is tested without being told."""

import pytest

from raydiff import registry
from raydiff.testing import check_denoiser


@pytest.mark.parametrize("name", registry.names("denoisers"))
def test_denoiser(name):
    check_denoiser(name)


def test_unet_with_other_options():
    check_denoiser("unet", block_out_channels=(8, 16, 24), layers_per_block=2, attention_levels=(), dropout=0.1)
