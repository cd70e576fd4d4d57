"""Every denoiser in the folder passes the shipped checks; a new file is tested without being told."""

import pytest

from raydiff import registry
from raydiff.testing import check_denoiser


@pytest.mark.parametrize("name", registry.names("denoisers"))
def test_denoiser(name):
    check_denoiser(name)


def test_unet_with_other_options():
    check_denoiser("unet", block_out_channels=(8, 16, 24), layers_per_block=2, attention_levels=(), dropout=0.1)


def test_convnet_with_other_options():
    check_denoiser("convnet", width=24, num_blocks=2, kernel_size=3, expansion=1.5, positions=False, dropout=0.1)


@pytest.mark.parametrize("patch_size", [1, 4])
def test_dit_with_other_options(patch_size):
    check_denoiser("dit", size="S", depth=2, hidden_size=48, num_heads=3, patch_size=patch_size, dropout=0.1,
                   learn_sigma=True, activation_checkpointing=True)  # fmt: skip
