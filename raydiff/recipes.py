"""Configs that are known to work, by what the data is; ``raydiff demo`` starts from them."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from raydiff import registry
from raydiff.backbone import BackboneOptions, has_weights
from raydiff.config import ExperimentConfig, component_options
from raydiff.errors import ConfigError, DataError
from raydiff.images import ImageSpec, decode_file, images_in

__all__ = ["digits", "images", "photographs", "recipe"]

_UNLEARNT = {"ground_truth", "test"}


def recipe(data: str, source: str | None = None) -> ExperimentConfig:
    """The config for a data set's name or a folder of images: a folder's in feature space where weights are at hand.

    Raises:
        ConfigError: ``data`` is neither.
    """
    if data == "digits":
        return digits()
    if data in registry.names("datasets"):
        return images({"name": data} | ({"source": source} if source else {}), channels=3)
    if Path(data).is_dir():
        dataset = {"name": "folder", "source": str(Path(data).resolve())}
        recipe_of = photographs if _has_features() else images
        return recipe_of(dataset, channels=_channels(Path(data)))
    raise ConfigError(
        f"--data {data}: is neither a folder nor a data set's name; there are: {', '.join(registry.names('datasets'))}"
    )


def digits(normal: str = "8") -> ExperimentConfig:
    """scikit-learn's digits with one of them normal, in about a minute on two cores."""
    return ExperimentConfig().override(
        {
            "data.dataset.normal": [normal],
            "training.num_steps": 400,
            "scoring.start": 0.1,
            "scoring.stop": 0.6,
            "scoring.blur": 0.0,
            "scoring.pooling": "mean",
            "execution.num_workers": 2,
        }
    )


def images(dataset: dict[str, Any], *, channels: int) -> ExperimentConfig:
    """Photographs of parts at 64 px, in pixels: without a pretrained network."""
    return ExperimentConfig().override(
        {
            "data.dataset": dataset,
            "data.image_size": [64, 64],
            "data.channels": channels,
            "denoiser.block_out_channels": [16, 32, 64, 64],
            "denoiser.attention_levels": [3],
            "training.num_steps": 2500,
            "training.batch_size": 16,
            "training.ema_decay": 0.998,
            "training.validate_every": 500,
            "training.checkpoint_every": 500,
            "scoring.blur": 1.5,
            "execution.num_workers": 2,
        }
    )


def photographs(dataset: dict[str, Any], *, channels: int) -> ExperimentConfig:
    """Photographs of parts at 256 px, in the space of a frozen network's features; one evaluation per score.

    The step and the pooling were chosen on synthetic anomalies (benchmarks/selection.py).
    """
    return ExperimentConfig().override(
        {
            "data.dataset": dataset,
            "data.image_size": [256, 256],
            "data.channels": channels,
            "space": {"name": "feature"},
            "denoiser": {"name": "convnet", "width": 192, "num_blocks": 5},
            "objective.prediction_type": "sample",
            "training.num_steps": 1000,
            "training.batch_size": 16,
            "training.ema_decay": 0.995,
            "training.precision": "bfloat16",
            "training.channels_last": True,
            "training.validate_every": 500,
            "training.checkpoint_every": 500,
            "scoring": {"name": "denoising_error", "num_inference_steps": 1, "start": 0.6, "stop": 0.7},
            "scoring.normalise": "step",
            "scoring.blur": 0.0,
            "scoring.pooling_share": 0.05,
            "execution.num_workers": 2,
        }
    )


def _has_features() -> bool:
    """Whether the feature space's default network can be had without a hub."""
    options = component_options("spaces", "feature")
    return isinstance(options, BackboneOptions) and has_weights(options)


def _channels(folder: Path) -> int:
    """1 when the first image to learn from is grey, else 3; a file that cannot be decoded is left to ``prepare``."""
    files = images_in(folder / "train" / "good")
    if not files:  # a plain folder, or one per category: masks and defects last
        files = sorted(images_in(folder), key=lambda path: not _UNLEARNT.isdisjoint(path.relative_to(folder).parts))
    for path in files[:10]:
        with suppress(DataError, OSError):
            return decode_file(path.read_bytes(), ImageSpec((1, 1)), str(path)).channels
    return 3
