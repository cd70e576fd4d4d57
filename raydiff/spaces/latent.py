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

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from raydiff.core.diffusion import full_precision, keyed_seed
from raydiff.errors import ConfigError
from raydiff.spaces._autoencoder import Autoencoder
from raydiff.spaces._learning import LearntOptions, LearntSpace, learning_rate

__all__ = ["LatentSpace", "Options", "build"]


class Options(LearntOptions):
    """The autoencoder, and how it is trained."""

    name: Literal["latent"] = "latent"
    latent_channels: int = Field(16, ge=1, description="of what is diffused")
    width: int = Field(24, ge=1, description="channels inside at the finest resolution; doubled at each coarser one")
    num_blocks: int = Field(1, ge=1, description="residual blocks per resolution, in encoder and decoder each")
    batch_size: int = Field(16, ge=1, description="crops per step")
    crop_size: int = Field(
        64, ge=2, description="side in pixels of the crops it learns on, rounded down to a multiple of factor; no more"
        " than the image"
    )  # fmt: skip
    learning_rate: float = Field(2e-3, gt=0, description="highest; a short warm-up, then half a cosine down to 0")
    noise: float = Field(0.1, ge=0, description="deviation of the noise on normalised latents while it learns")


class LatentSpace(LearntSpace[Options, Autoencoder]):
    """See the module."""

    network_name = prefix = "autoencoder"

    def encode(self, images: Tensor) -> Tensor:
        """(B, C, H, W) images in [-1, 1] to (B, K, h, w), of mean 0 and variance 1 per channel over training images."""
        encoder = self._encoder(images.device)
        mean, deviation = (self._statistic(name, images.device)[:, None, None] for name in ("mean", "deviation"))
        return self._apart(lambda rows: (encoder(rows) - mean) / deviation, images)

    def decode(self, latents: Tensor) -> Tensor | None:
        """(B, K, h, w) latents to (B, C, H, W) images, clipped to [-1, 1]."""
        decoder = self._fitted().to(latents.device).decoder
        return self._apart(lambda rows: decoder(rows).clamp(-1, 1), latents, channels=self.options.latent_channels)

    def _build(self) -> Autoencoder:
        options = self.options
        return Autoencoder(
            channels=self._channels, latent_channels=options.latent_channels, factor=options.factor,
            width=options.width, num_blocks=options.num_blocks,
        )  # fmt: skip

    def _encoder_of(self, network: Autoencoder) -> nn.Module:
        return network.encoder

    def _measured(self, images: Tensor) -> dict[str, Tensor]:
        """``mean`` and ``deviation`` (K,) of the latents."""
        latents = self._apart(self._encoder(images.device), images).double()  # (n, K, h, w)
        deviation = latents.std((0, 2, 3), correction=0).clamp(min=1e-6).float()
        return {"mean": latents.mean((0, 2, 3)).float(), "deviation": deviation}

    def _statistic_shapes(self, network: Autoencoder) -> dict[str, tuple[int, ...]]:  # noqa: ARG002
        return dict.fromkeys(("mean", "deviation"), (self.options.latent_channels,))

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
    shape = (options.latent_channels, image_size[0] // options.factor, image_size[1] // options.factor)
    return LatentSpace(options, shape, channels=channels, image_size=image_size)
