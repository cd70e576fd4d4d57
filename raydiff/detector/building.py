"""From a config to the parts of a diffusion detector, before anything is trained or loaded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raydiff import registry
from raydiff.config import ExperimentConfig, Options
from raydiff.contracts import Scorer, SequentialScorer, Space
from raydiff.core.corruption import Patches
from raydiff.core.diffusion import keyed_seed
from raydiff.core.schedule import NoiseSchedule, make_schedule, target
from raydiff.errors import ConfigError
from raydiff.judgement import Judge

__all__ = [
    "NUM_ROTATIONS",
    "build_denoiser",
    "build_scorer",
    "build_space",
    "noised",
    "num_conditions",
    "patches_of",
    "schedule_of",
    "space_options",
    "trained_steps",
]

NUM_ROTATIONS = 4
"""Labels of ``objective.condition: rotation``: quarter turns counter-clockwise, 0 for an image as it is."""


def build_space(config: ExperimentConfig) -> Space:
    """The config's space, not fitted."""
    space: Space = registry.build(
        "spaces", space_options(config), channels=config.data.channels, image_size=config.model_size
    )
    return space


def space_options(config: ExperimentConfig) -> Options:
    """Those of the config's space; one that is trained and names no seed of its own has the config's."""
    options = config.space
    return options.model_copy(update={"seed": config.seed}) if getattr(options, "seed", 0) is None else options


def build_denoiser(config: ExperimentConfig, space: Space, num_classes: int) -> nn.Module:
    """The config's network with weights that follow from its seed, whatever ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed("weights", config.seed))
        network: nn.Module = registry.build(
            "denoisers", config.denoiser, channels=space.shape[0], image_size=space.shape[1:],
            num_classes=num_conditions(config, num_classes),
        )  # fmt: skip
    return network


def build_scorer(config: ExperimentConfig, num_classes: int) -> Scorer:
    """The config's scorer, once it is sure that the denoiser will know what it asks: steps, conditions, images.

    Raises:
        ConfigError: the denoiser will not.
    """
    scorer: Scorer = registry.build("scorers", config.scoring)
    _check_prediction_type(config, scorer)
    steps, trained = scorer.timesteps(schedule_of(config)), trained_steps(config)
    if outside := [t for t in steps if t not in trained]:
        raise ConfigError(
            f"scoring {config.scoring.name} looks at step {outside[0]} of {config.schedule.num_train_timesteps};"
            f" objective.step_range trains {trained[0]} to {trained[-1]} alone: change one of them"
        )
    scorer.check(num_conditions(config, num_classes), config.space.name)
    if config.tiles.size is not None and isinstance(scorer, SequentialScorer) and scorer.stops_early:
        raise ConfigError(
            "scoring.early_exit is set, which asks about a whole image at a time, and tiles.size cuts it up; leave one"
            " of them out"
        )
    return scorer


def _check_prediction_type(config: ExperimentConfig, scorer: Scorer) -> None:
    known = getattr(scorer, "prediction_types", Judge.prediction_types)
    given, name = config.objective.prediction_type, config.scoring.name
    if given in known:
        return
    if given == "deviation":
        raise ConfigError(
            f"scoring is {name} and objective.prediction_type deviation, whose network knows images that are corrupted"
            " in patches alone; set scoring to deviation_correction, or another prediction_type and train"
        )
    raise ConfigError(
        f"scoring is {name} and objective.prediction_type {given}; set that to {' or '.join(known)} and train"
    )


def patches_of(config: ExperimentConfig) -> Patches | None:
    """How training images are corrupted where the network learns deviations; None where they are noised all over."""
    objective = config.objective
    if objective.prediction_type != "deviation":
        return None
    return Patches(objective.corrupted, objective.shuffled, objective.patch_sizes)


def noised(
    config: ExperimentConfig,
    schedule: NoiseSchedule,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    keys: Sequence[tuple[int | str, ...]],
) -> tuple[Tensor, Tensor]:
    """What the network is shown in training, and what it is to output, (B, C, H, W) each.

    Args:
        config: for the objective.
        schedule: the config's.
        x0: what is diffused, (B, C, H, W).
        t: (B,) int64.
        noise: standard normal, (B, C, H, W).
        keys: of each image; what of it is corrupted follows from its key.
    """
    patches = patches_of(config)
    if patches is not None:
        return patches.corrupt(schedule, x0, t, noise, [keyed_seed("patches", *key) for key in keys])
    return schedule.add_noise(x0, t, noise), target(schedule, x0, t, noise, config.objective.prediction_type)


def num_conditions(config: ExperimentConfig, num_classes: int) -> int | None:
    """How many labels the denoiser knows; None for an unconditional one."""
    return {"none": None, "class": num_classes, "rotation": NUM_ROTATIONS}[config.objective.condition]


def trained_steps(config: ExperimentConfig) -> range:
    """The steps that ``objective.step_range`` trains, 0-based."""
    low, high = (round(share * (config.schedule.num_train_timesteps - 1)) for share in config.objective.step_range)
    return range(low, high + 1)


def schedule_of(config: ExperimentConfig) -> NoiseSchedule:
    """The config's noise schedule."""
    fields = config.schedule.model_dump()
    return make_schedule(fields.pop("beta_schedule"), fields.pop("num_train_timesteps"), **fields)
