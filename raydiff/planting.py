"""Synthetic anomalies planted in normal images, and the scorers that train a network of their own on them.

A plant is a perturbation that makes an anomaly (:mod:`raydiff.perturbations`): cut and pasted pieces, textures in the
shape of Perlin noise, patches of noise or blur. The selection split has one of each calibration image, for choosing
without test labels; a :class:`TrainedScorer` has them of training images, from a seed of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from raydiff import registry
from raydiff.config import component_options
from raydiff.contracts import Perturbation, Scorer
from raydiff.core.diffusion import Diffusion, keyed_seed
from raydiff.errors import ConfigError

__all__ = ["Examples", "Plants", "TrainedScorer", "anomalies", "check_kinds", "planted"]


class Plants(NamedTuple):
    """Which synthetic anomalies a scorer's own network is to be trained on."""

    num_images: int
    """Training images that they are made of, at most."""
    num_anomalies: int
    """How many are made of them, at least one of each."""
    kinds: tuple[str, ...]
    """Names of perturbations; empty for every one that makes an anomaly."""
    severities: tuple[int, ...]
    """Of the anomalies, from 1 to 5; each as often."""


class Examples(Protocol):
    """Training images, then anomalies made of them, as a scorer's own network is shown them."""

    @property
    def num_normal(self) -> int:
        """The first so many are normal."""
        ...

    def __len__(self) -> int:
        """How many there are, anomalies included."""
        ...

    def latents(self, rows: Sequence[int]) -> Tensor:
        """What is diffused, (len(rows), C, H, W)."""
        ...

    def shares(self, rows: Sequence[int]) -> Tensor:
        """The share of each cell that is anomalous, (len(rows), 1, H, W) from 0 to 1."""
        ...


@runtime_checkable
class TrainedScorer(Scorer, Protocol):
    """A :class:`raydiff.contracts.Scorer` with a network of its own, trained after the denoiser. Optional.

    It learns from training images and synthetic anomalies made of them, before calibration, whose images have no part
    in it. Its weights are its ``state``; until they are there ``measure`` raises. Its evidence has maps.
    """

    @property
    def plants(self) -> Plants:
        """The anomalies that it wants."""
        ...

    @property
    def is_trained(self) -> bool:
        """Whether :meth:`train` or ``load_state`` was called."""
        ...

    def training_key(self) -> str:
        """Equal for options under which the same network comes out of the same examples."""
        ...

    def train(self, model: Diffusion, examples: Examples, report: Callable[[Mapping[str, Any]], None]) -> None:
        """Train its network, which follows from ``model``, its seed and the examples, whatever ran before.

        ``report`` gets ``head_step`` of ``head_steps``, ``head_loss`` and ``head_seconds`` since it began.

        Raises:
            ConfigError: the anomalies are too small for the grid to learn from.
            TrainingError: the loss is not a number.
        """
        ...


def anomalies(seed: int, kinds: Sequence[str] = ()) -> dict[str, Perturbation]:
    """The perturbations that make an anomaly, by name and sorted: those of the given names, or all there are.

    Args:
        seed: of what is drawn, together with each image's id.
        kinds: names; empty for every one.

    Raises:
        ConfigError: a name is no perturbation's, or that of one that leaves an image what it is.
    """
    found = {name: _built(name, seed) for name in sorted(set(kinds) or registry.names("perturbations"))}
    making = {name: perturbation for name, perturbation in found.items() if perturbation.kind == "anomaly"}
    if kinds and len(making) < len(found):
        corruption = next(name for name in found if name not in making)
        raise ConfigError(f"{corruption} makes no anomaly; name some of {', '.join(anomalies(seed))}")
    return making


def check_kinds(kinds: Sequence[str], field: str) -> None:
    """See that all are names of synthetic anomalies.

    Raises:
        ConfigError: one is not; names the field.
    """
    try:
        anomalies(0, kinds)
    except ConfigError as error:
        raise ConfigError(f"{field}: {error}") from error


def planted(images: NDArray[np.uint8], plants: Plants, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Anomalies made of normal images, and the pixels that each changed: uint8 (m, H, W, C) and bool (m, H, W).

    Each image gets as many as the others, one more or less, and each kind at each severity is made as often. The draws
    are keyed apart from those of the selection split, whatever its seed: no anomaly of the one is in the other.

    Args:
        images: training normals, uint8 (n, H, W, C).
        plants: how many, and which.
        seed: the run's.

    Raises:
        ConfigError: there is no such kind.
    """
    ways = list(product(anomalies(keyed_seed("planted", seed), plants.kinds).values(), plants.severities))
    count = max(len(images), plants.num_anomalies)
    made, masks = np.empty((count, *images.shape[1:]), np.uint8), np.empty((count, *images.shape[1:3]), np.bool_)
    order = sorted(range(count), key=lambda number: keyed_seed("plant", seed, number))
    for rank, number in enumerate(order):
        perturbation, severity = ways[rank % len(ways)]
        source = images[number % len(images)][None]
        one = perturbation.apply(source, severity=severity, ids=[f"plant {number}"])
        assert one.masks is not None  # noqa: S101
        made[number], masks[number] = one.images[0], one.masks[0]
    return made, masks


def _built(name: str, seed: int) -> Perturbation:
    seeded = "seed" in registry.component("perturbations", name).Options.model_fields
    fields: dict[str, object] = {"name": name, "seed": seed} if seeded else {"name": name}
    perturbation: Perturbation = registry.build("perturbations", component_options("perturbations", fields))
    return perturbation
