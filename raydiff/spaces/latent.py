"""``latent``: latents of a small autoencoder, trained here on the training images before the diffusion begins.

What latent diffusion (Rombach et al. 2022, arXiv:2112.10752) does with a network from elsewhere, without one: nothing
pretrained, images and latents both ways.

It is a plain autoencoder and no variational one. A score needs one latent per image and nothing is sampled from the
latents' prior, so a mean that a KL term pulls to zero would only cost sharpness. What the term is good for, a decoder
that bears latents a little off those it knows, such as a diffusion makes, comes from noise on the latents in training
(``noise``), whose scale means something because latents are normalised, per channel: by their batch in training, by
all training images after.

The loss is the mean absolute error. It learns on random crops, flipped and turned: it should code whatever is in an
image, defects too, not know what normal images look like, which is the diffusion's part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import copy
from typing import Any, Literal, Self

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from raydiff.config import Options as BaseOptions
from raydiff.core.diffusion import full_precision, keyed_seed
from raydiff.errors import ArtifactError, ConfigError, RaydiffError
from raydiff.spaces._autoencoder import Autoencoder
from raydiff.spaces._learning import learning_rate, learnt, rows_apart

__all__ = ["LatentSpace", "Options", "build"]


class Options(BaseOptions):
    """The autoencoder, and how it is trained."""

    name: Literal["latent"] = "latent"
    factor: int = Field(8, ge=2, description="sides of an image over those of its latents, a power of two")
    latent_channels: int = Field(16, ge=1, description="of what is diffused")
    width: int = Field(24, ge=1, description="channels inside at the finest resolution; doubled at each coarser one")
    num_blocks: int = Field(1, ge=1, description="residual blocks per resolution, in encoder and decoder each")
    num_steps: int = Field(1000, ge=1, description="optimiser steps of the autoencoder")
    batch_size: int = Field(16, ge=1, description="crops per step")
    crop_size: int = Field(
        64, ge=2, description="side in pixels of the crops it learns on, rounded down to a multiple of factor; no more"
        " than the image"
    )  # fmt: skip
    learning_rate: float = Field(2e-3, gt=0, description="highest; a short warm-up, then half a cosine down to 0")
    noise: float = Field(0.1, ge=0, description="deviation of the noise on normalised latents while it learns")
    num_fit_images: int = Field(500, ge=1, description="training images that it learns from, at most")
    seed: int | None = Field(None, ge=0, description="of its weights and crops; the run's when empty")

    @field_validator("factor")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError(f"factor is {value}; it must be a power of two")
        return value


class LatentSpace:
    """See the module. Nothing changes after ``fit`` or ``load_state``; several threads may encode and decode then."""

    costly = True
    pretrained = None

    def __init__(self, options: Options, *, channels: int, image_size: tuple[int, int]) -> None:
        self.options, self.num_fit_images = options, options.num_fit_images
        self._channels, self._image_size = channels, image_size
        self.shape = (options.latent_channels, image_size[0] // options.factor, image_size[1] // options.factor)
        self._network: Autoencoder | None = None
        self._mean, self._deviation = torch.empty(0), torch.empty(0)
        self._quick: nn.Module | None = None

    def check(self) -> None:
        """Nothing is needed."""

    def fit(self, images: Tensor) -> None:
        """Train the autoencoder on images (n, C, H, W) in [-1, 1], on their device.

        Raises:
            TrainingError: the loss is not a number.
        """
        self.fit_with_progress(images, lambda _: None)

    def fit_with_progress(self, images: Tensor, report: Callable[[Mapping[str, Any]], None]) -> None:
        """:meth:`fit`; ``report`` gets ``space_step``, ``space_steps``, ``space_loss``, ``space_seconds`` now and then.

        Raises:
            TrainingError: the loss is not a number.
        """
        network = self._initial().to(images.device).train()
        learnt(self._losses(network, images), self.options.num_steps, report, "space latent: the autoencoder")
        self._network = network.eval().requires_grad_(False)
        self._mean = torch.zeros(self.options.latent_channels, device=images.device)
        self._deviation = torch.ones_like(self._mean)
        latents = self.encode(images.detach()).double()  # (n, K, h, w), not normalised yet
        self._mean = latents.mean((0, 2, 3)).float()
        self._deviation = latents.std((0, 2, 3), correction=0).clamp(min=1e-6).float()

    def encode(self, images: Tensor) -> Tensor:
        """(B, C, H, W) images in [-1, 1] to (B, K, h, w), of mean 0 and variance 1 per channel over training images."""
        mean, deviation = (v.to(images.device)[:, None, None] for v in (self._mean, self._deviation))
        encoder = self._quick or self._fitted().to(images.device).encoder
        return self._by_chunks(lambda rows: (encoder(rows) - mean) / deviation, images, self._channels)

    def decode(self, latents: Tensor) -> Tensor | None:
        """(B, K, h, w) latents to (B, C, H, W) images, clipped to [-1, 1]."""
        decoder = self._fitted().to(latents.device).decoder
        return self._by_chunks(lambda rows: decoder(rows).clamp(-1, 1), latents, self.options.latent_channels)

    def state(self) -> dict[str, Tensor]:
        """The autoencoder's weights, and ``mean`` and ``deviation`` (K,) of its latents."""
        weights = {f"autoencoder.{key}": value.cpu() for key, value in self._fitted().state_dict().items()}
        return weights | {"mean": self._mean.cpu(), "deviation": self._deviation.cpu()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state` gave.

        Raises:
            ArtifactError: a part is missing, or of another shape.
        """
        network = self._initial()
        weights = {key.removeprefix("autoencoder."): v for key, v in state.items() if key.startswith("autoencoder.")}
        try:
            network.load_state_dict(weights)
            mean, deviation = (state[name].reshape(self.options.latent_channels) for name in ("mean", "deviation"))
        except (KeyError, RuntimeError) as error:
            raise ArtifactError("the state of space 'latent' does not fit its options; fit it again") from error
        self._network = network.eval().requires_grad_(False)
        self._mean, self._deviation = mean, deviation

    def compiled(self, quick: Callable[[nn.Module], nn.Module]) -> Self:
        """A copy whose encoder is ``quick`` of it."""
        other = copy(self)
        other._quick = quick(self._fitted().encoder)
        return other

    def _fitted(self) -> Autoencoder:
        if self._network is None:
            raise RaydiffError("space 'latent' has learnt nothing yet; call fit or load_state first")
        return self._network

    def _initial(self) -> Autoencoder:
        """Weights that follow from the seed, whatever ran before."""
        options = self.options
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_seed("autoencoder", options.seed or 0))
            return Autoencoder(
                channels=self._channels, latent_channels=options.latent_channels, factor=options.factor,
                width=options.width, num_blocks=options.num_blocks,
            )  # fmt: skip

    def _losses(self, network: Autoencoder, images: Tensor) -> Iterator[Tensor]:
        """Train, giving each step's loss."""
        options = self.options
        optimiser = torch.optim.AdamW(network.parameters(), lr=options.learning_rate, weight_decay=0.0)
        generator = torch.Generator().manual_seed(keyed_seed("crops", options.seed or 0))
        for step in range(options.num_steps):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(options.learning_rate, step, options.num_steps)
            crops = self._crops(images, generator)
            optimiser.zero_grad(set_to_none=True)
            with torch.enable_grad(), full_precision(images.device):
                loss = (network.decoder(self._noised(network.encoder(crops), generator)) - crops).abs().mean()
                loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            yield loss.detach()

    def _noised(self, latents: Tensor, generator: torch.Generator) -> Tensor:
        """Normalised by the batch, with noise."""
        mean, variance = latents.mean((0, 2, 3), keepdim=True), latents.var((0, 2, 3), correction=0, keepdim=True)
        normalised = (latents - mean) * torch.rsqrt(variance + 1e-6)
        return normalised + self.options.noise * torch.randn(latents.shape, generator=generator).to(latents.device)

    def _crops(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Random parts of random images, flipped and, where they are square, turned; (batch_size, C, h, w)."""

        def below(bound: int) -> int:
            return int(torch.randint(bound, (), generator=generator))

        factor, sides = self.options.factor, images.shape[-2:]
        height, width = (max(factor, min(self.options.crop_size, side) // factor * factor) for side in sides)
        places = (len(images), sides[0] - height + 1, sides[1] - width + 1)
        parts = []
        for _ in range(self.options.batch_size):
            image, top, left = (below(count) for count in places)
            part = images[image, :, top : top + height, left : left + width]
            if below(2):
                part = part.flip(-1)
            turns = below(4) if height == width else 2 * below(2)
            parts.append(torch.rot90(part, turns, (-2, -1)))
        return torch.stack(parts)

    def _by_chunks(self, function: Callable[[Tensor], Tensor], rows: Tensor, channels: int) -> Tensor:
        pixels = self._image_size[0] * self._image_size[1]
        return rows_apart(function, rows, pixels=pixels, like=(channels, *rows.shape[2:]))


def build(options: Options, *, channels: int, image_size: tuple[int, int]) -> LatentSpace:
    """A latent space that has learnt nothing yet.

    Raises:
        ConfigError: the image's sides are no multiples of ``factor``.
    """
    if any(side % options.factor for side in image_size):
        raise ConfigError(
            f"space.factor is {options.factor} and the model sees images of {image_size}; both sides must be multiples"
            " of it: change data.image_size (tiles.size, where that is set) or space.factor"
        )
    return LatentSpace(options, channels=channels, image_size=image_size)
