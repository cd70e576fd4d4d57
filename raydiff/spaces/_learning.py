"""What spaces share whose fit trains a network: options, fit, state and copies; the rate, progress, rows apart."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from raydiff.config import Options
from raydiff.core.chunks import by_chunks
from raydiff.core.diffusion import full_precision, keyed_seed
from raydiff.errors import ArtifactError, RaydiffError, TrainingError

__all__ = ["LearntOptions", "LearntSpace", "learning_rate"]

_REPORTS = 10
"""Lines of progress in a fit, about."""

_CHUNK_PIXELS, _MAX_CHUNK = 128 * 128, 16


class LearntOptions(Options):
    """What the options of all of them have."""

    factor: int = Field(8, ge=2, description="sides of an image over those of what it becomes, a power of two")
    num_steps: int = Field(1000, ge=1, description="optimiser steps of this network")
    num_fit_images: int = Field(500, ge=1, description="training images that it learns from, at most")
    seed: int | None = Field(None, ge=0, description="of its weights and of what it is shown; the run's when empty")

    @field_validator("factor")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError(f"factor is {value}; it must be a power of two")
        return value


_Options = TypeVar("_Options", bound=LearntOptions)
_Network = TypeVar("_Network", bound=nn.Module)


class LearntSpace(ABC, Generic[_Options, _Network]):
    """A :class:`raydiff.contracts.TrainedSpace` with a network, and statistics of what that makes of normal images.

    A subclass says which network, how it is trained, and which statistics. Nothing changes after ``fit`` or
    ``load_state``; several threads may encode and decode then.
    """

    costly = True
    pretrained: str | None = None

    network_name: ClassVar[str]
    """For messages; the seed of the initial weights follows from it too."""

    prefix: ClassVar[str]
    """Of the weights' names in the state."""

    def __init__(
        self, options: _Options, shape: tuple[int, int, int], *, channels: int, image_size: tuple[int, int]
    ) -> None:
        self.options, self.num_fit_images, self.shape = options, options.num_fit_images, shape
        self._channels, self._image_size = channels, image_size
        self._network: _Network | None = None
        self._statistics: dict[str, Tensor] = {}
        self._quick: nn.Module | None = None

    def check(self) -> None:
        """Nothing is needed."""

    def fit(self, images: Tensor) -> None:
        """Train the network on images (n, C, H, W) in [-1, 1], on their device, then take the statistics.

        Raises:
            TrainingError: the loss is not a number.
        """
        self.fit_with_progress(images, lambda _: None)

    def fit_with_progress(self, images: Tensor, report: Callable[[Mapping[str, Any]], None]) -> None:
        """:meth:`fit`; ``report`` gets ``space_step``, ``space_steps``, ``space_loss``, ``space_seconds`` now and then.

        Raises:
            TrainingError: the loss is not a number.
        """
        images = images.detach()
        network = self._initial().to(images.device).train()
        what = f"space {self.options.name}: the {self.network_name}"
        _learn(self._losses(network, images), self.options.num_steps, report, what)
        self._network = network.eval().requires_grad_(False)
        self._statistics = self._measured(images)

    def state(self) -> dict[str, Tensor]:
        """The network's weights, and the statistics."""
        weights = self._fitted().state_dict().items()
        named = {f"{self.prefix}.{key}": value.cpu().contiguous() for key, value in weights}
        return named | {name: value.cpu() for name, value in self._statistics.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state` gave.

        Raises:
            ArtifactError: a part is missing, or of another shape.
        """
        network, start = self._initial(), f"{self.prefix}."
        try:
            network.load_state_dict({key.removeprefix(start): v for key, v in state.items() if key.startswith(start)})
            shapes = self._statistic_shapes(network)
            statistics = {name: state[name].reshape(shape) for name, shape in shapes.items()}
        except (KeyError, RuntimeError) as error:
            name = self.options.name
            raise ArtifactError(f"the state of space {name!r} does not fit its options; fit it again") from error
        self._network, self._statistics = network.eval().requires_grad_(False), statistics

    def compiled(self, quick: Callable[[nn.Module], nn.Module]) -> Self:
        """A copy that encodes with ``quick`` of its encoder."""
        other = copy(self)
        other._quick = quick(self._encoder_of(self._fitted()))
        return other

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """(B, C, H, W) images in [-1, 1] to (B, *shape)."""

    @abstractmethod
    def _build(self) -> _Network:
        """A network whose weights follow from torch's generator."""

    @abstractmethod
    def _encoder_of(self, network: _Network) -> nn.Module:
        """The part of it that images go through."""

    @abstractmethod
    def _losses(self, network: _Network, images: Tensor) -> Iterator[Tensor]:
        """Train, giving each step's loss."""

    @abstractmethod
    def _measured(self, images: Tensor) -> dict[str, Tensor]:
        """The statistics of training images, by name; the network is trained."""

    @abstractmethod
    def _statistic_shapes(self, network: _Network) -> dict[str, tuple[int, ...]]:
        """Their names and shapes."""

    def _initial(self) -> _Network:
        """Weights that follow from the seed, whatever ran before."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_seed(self.network_name, self.options.seed or 0))
            return self._build()

    def _fitted(self) -> _Network:
        if self._network is None:
            raise RaydiffError(f"space {self.options.name!r} has learnt nothing yet; call fit or load_state first")
        return self._network

    def _encoder(self, device: torch.device) -> nn.Module:
        """What images on that device are encoded with."""
        return self._quick or self._encoder_of(self._fitted().to(device))

    def _statistic(self, name: str, device: torch.device) -> Tensor:
        self._fitted()
        return self._statistics[name].to(device)

    def _apart(self, function: Callable[[Tensor], Tensor], rows: Tensor, *, channels: int | None = None) -> Tensor:
        """:func:`_rows_apart`; ``channels`` of a row where there are none."""
        like = (self._channels if channels is None else channels, *rows.shape[2:])
        return _rows_apart(function, rows, pixels=self._image_size[0] * self._image_size[1], like=like)


def learning_rate(highest: float, step: int, num_steps: int) -> float:
    """The rate of a step, 0-based: up over a twentieth of the steps, then half a cosine down to 0."""
    warm = max(1, num_steps // 20)
    return highest * min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def _learn(losses: Iterator[Tensor], num_steps: int, report: Callable[[Mapping[str, Any]], None], what: str) -> None:
    """Go through a training that gives each step's loss, and say now and then how far it is.

    Args:
        losses: one number for each of the ``num_steps`` steps.
        num_steps: how many there are.
        report: gets ``space_step``, counted from 1, ``space_steps``, ``space_loss`` and ``space_seconds``.
        what: of the message, as in ``space latent: the autoencoder``.

    Raises:
        TrainingError: a loss that is looked at is not a number.
    """
    begun = time.monotonic()
    for step, loss in enumerate(losses, 1):
        if step % max(1, num_steps // _REPORTS) and step != num_steps:
            continue
        if not math.isfinite(value := float(loss)):
            raise TrainingError(f"{what}'s loss is not a number at step {step}; lower space.learning_rate")
        seconds = time.monotonic() - begun
        report({"space_step": step, "space_steps": num_steps, "space_loss": value, "space_seconds": seconds})


def _rows_apart(function: Callable[[Tensor], Tensor], rows: Tensor, *, pixels: int, like: tuple[int, ...]) -> Tensor:
    """``function`` of all rows, of which none knows another; gradients flow back to rows that ask for them.

    Args:
        function: of (b, ...) to (b, ...), in float32.
        rows: (B, ...); B may be 0.
        pixels: of an image, by which the rows of a call are chosen.
        like: shape of a row that stands for none where B is 0.
    """
    with_gradients = torch.is_grad_enabled() and rows.requires_grad
    size = _MAX_CHUNK if rows.device.type != "cpu" else max(1, min(_MAX_CHUNK, _CHUNK_PIXELS // pixels))

    def call(chunk: Tensor) -> Tensor:
        with torch.set_grad_enabled(with_gradients), full_precision(chunk.device):
            return function(chunk)

    if rows.shape[0] == 0:  # the shape is wanted
        return call(rows.new_zeros(1, *like))[:0]
    return by_chunks(call, size, rows, device=rows.device)
