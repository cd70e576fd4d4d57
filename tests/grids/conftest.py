"""Digits in the features of a small network with random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from raydiff.config import ExperimentConfig


@pytest.fixture(scope="session")
def feature_config(tiny_config: ExperimentConfig, tmp_path_factory: pytest.TempPathFactory) -> ExperimentConfig:
    """Two levels on a grid of 4 x 4 cells, 6 components; 16 images a step, 24 steps."""
    import timm

    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        save_file(timm.create_model("test_efficientnet").state_dict(), path)
    space: dict[str, Any] = {
        "name": "feature", "backbone": "test_efficientnet", "weights": str(path), "levels": [0, 1], "grid": [4, 4],
        "num_components": 6, "num_fit_images": 40,
    }  # fmt: skip
    network = {"name": "convnet", "width": 16, "num_blocks": 2, "kernel_size": 3}
    return tiny_config.override({"space": space, "denoiser": network})
