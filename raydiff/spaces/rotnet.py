"""``rotnet``: features of a network that learns here, before the diffusion begins, how far an image has been turned.

For data whose anomalies are other things and not other details: what tells a car from a truck is not how well its
pixels can be denoised. A network that must say by how many quarter turns an image was rotated has to learn what is up
in it (RotNet: Gidaris et al. 2018, arXiv:1803.07728; for anomalies Golan and El-Yaniv 2018, arXiv:1805.10917), and the
density of its features is a better measure than its own certainty (Sohn et al. 2021, arXiv:2011.02578). Here the
density is a diffusion. Nothing is pretrained, and no image but the normal training ones is seen.

What is diffused of an image are its features in all four turns together, each scaled to length 1, projected on
principal axes: a turn that looks like another one does not fit the rest. Images that are not square have two turns.
Where normal images lie at any angle, as screws do, there is nothing to learn. There is no way back to images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from raydiff.core.diffusion import full_precision, keyed_seed
from raydiff.errors import ConfigError
from raydiff.spaces._learning import LearntOptions, LearntSpace, learning_rate
from raydiff.spaces._projection import principal_axes
from raydiff.spaces._rotation_network import RotationNetwork

__all__ = ["Options", "RotNetSpace", "build"]


class Options(LearntOptions):
    """The network, how it is trained, and what of its features is diffused."""

    name: Literal["rotnet"] = "rotnet"
    width: int = Field(32, ge=1, description="channels at half the image's resolution; doubled at each coarser one")
    num_blocks: int = Field(1, ge=1, description="residual blocks per resolution")
    num_steps: int = Field(3000, ge=1, description="optimiser steps of this network")
    batch_size: int = Field(64, ge=1, description="images per step, each in all its turns")
    learning_rate: float = Field(0.1, gt=0, description="highest; a short warm-up, then half a cosine down to 0")
    weight_decay: float = Field(5e-4, ge=0)
    shift: float = Field(
        0.125, ge=0, lt=0.5, description="while it learns, images are moved by up to this share of a side"
    )
    horizontal_flip: bool = Field(True, description="while it learns, half of the images are flipped left to right")
    colour: float = Field(
        0.3,
        ge=0,
        lt=1,
        description="while it learns, contrast changes by up to this share and each channel's level by up to this much;"
        " else it soon knows the training images by heart",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="while it learns; bfloat16: autocast, weights stay float32. It encodes in float32"
    )
    cells: int = Field(
        1, ge=1, description="per side of the grid that features are averaged over; 1: one for the whole image, no map"
    )
    num_components: int = Field(96, ge=1, description="principal axes kept: the channels of what is diffused")
    whitening: float = Field(0.5, ge=0, le=1, description="power to which each axis is divided by its deviation")
    num_fit_images: int = Field(
        5000, ge=2, description="training images that it learns from, at most; all are held in memory as float32, of"
        " which 5,000 of 64 px take 0.25 GB and of 256 px 3.9 GB"
    )  # fmt: skip


class RotNetSpace(LearntSpace[Options, RotationNetwork]):
    """See the module."""

    network_name, prefix = "rotation network", "network"

    def __init__(self, options: Options, *, channels: int, image_size: tuple[int, int]) -> None:
        shape = (options.num_components, options.cells, options.cells)
        super().__init__(options, shape, channels=channels, image_size=image_size)
        self._turns = (0, 1, 2, 3) if image_size[0] == image_size[1] else (0, 2)

    def fit_with_progress(self, images: Tensor, report: Callable[[Mapping[str, Any]], None]) -> None:
        """:meth:`fit`; ``report`` gets ``space_step``, ``space_steps``, ``space_loss``, ``space_seconds`` now and then.

        Raises:
            ConfigError: there is one image, or all of them are alike.
            TrainingError: the loss is not a number.
        """
        if len(images) < 2 or bool((images == images[:1]).all()):
            raise ConfigError(
                f"space rotnet got {len(images)} training image(s), none of which differs from another; it has nothing"
                " to tell apart: add images, or name changes under augmentation"
            )
        super().fit_with_progress(images, report)

    def encode(self, images: Tensor) -> Tensor:
        """(B, C, H, W) images in [-1, 1] to (B, K, cells, cells), of mean 0 and variance 1 over training images."""
        mean, projection = (self._statistic(name, images.device) for name in ("mean", "projection"))

        def projected(rows: Tensor) -> Tensor:
            return F.conv2d(self._features(rows) - mean[:, None, None], projection[:, :, None, None])

        return self._apart(projected, images)

    def decode(self, latents: Tensor) -> Tensor | None:  # noqa: ARG002
        """None: features have no way back to images."""
        return None

    def _build(self) -> RotationNetwork:
        options = self.options
        network = RotationNetwork(
            channels=self._channels, factor=options.factor, width=options.width, num_blocks=options.num_blocks,
            num_turns=len(self._turns),
        )  # fmt: skip
        return network.to(memory_format=torch.channels_last)

    def _encoder_of(self, network: RotationNetwork) -> nn.Module:
        return network.features

    def _measured(self, images: Tensor) -> dict[str, Tensor]:
        """``mean`` (turns D,) of the features and ``projection`` (K, turns D)."""
        cells = self._apart(self._features, images).movedim(1, -1).flatten(0, 2).double()  # (n g g, turns D)
        mean = cells.mean(0)
        axes = principal_axes(cells - mean, self.options.num_components, self.options.whitening)
        return {"mean": mean.float(), "projection": axes.T.float().contiguous()}

    def _statistic_shapes(self, network: RotationNetwork) -> dict[str, tuple[int, ...]]:
        width = len(self._turns) * network.num_features
        return {"mean": (width,), "projection": (self.options.num_components, width)}

    def _losses(self, network: RotationNetwork, images: Tensor) -> Iterator[Tensor]:
        """Train, giving each step's loss: the cross-entropy of which turn an image was given."""
        options, device = self.options, images.device
        optimiser = torch.optim.SGD(
            network.parameters(), lr=options.learning_rate, momentum=0.9, nesterov=True,
            weight_decay=options.weight_decay,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(keyed_seed("rotation views", options.seed or 0))
        turns = torch.arange(len(self._turns), device=device).repeat_interleave(options.batch_size)
        half = options.precision == "bfloat16"
        for step in range(options.num_steps):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(options.learning_rate, step, options.num_steps)
            views = self._views(images, generator)
            turned = torch.cat([torch.rot90(views, turn, (-2, -1)) for turn in self._turns])
            turned = turned.contiguous(memory_format=torch.channels_last)
            optimiser.zero_grad(set_to_none=True)
            with torch.enable_grad(), full_precision(device):
                with torch.autocast(device.type, torch.bfloat16, enabled=half):
                    logits = network(turned)
                loss = F.cross_entropy(logits.float(), turns)
                loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            yield loss.detach()

    def _views(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Random images, moved with their edges mirrored, flipped, other in colour; (batch_size, C, H, W)."""
        options, count, device = self.options, self.options.batch_size, images.device
        height, width = images.shape[-2:]
        margins = [min(round(options.shift * side), side - 1) for side in (height, width)]
        chosen = torch.randint(len(images), (count,), generator=generator).to(device)
        tops, lefts = (torch.randint(2 * margin + 1, (count,), generator=generator).tolist() for margin in margins)
        flips = ((torch.rand(count, generator=generator) < 0.5) & options.horizontal_flip).tolist()
        contrast, level = (
            options.colour * (2 * torch.rand(count, channels, 1, 1, generator=generator).to(device) - 1)
            for channels in (1, images.shape[1])
        )
        padded = F.pad(images[chosen], (margins[1], margins[1], margins[0], margins[0]), mode="reflect")
        moved = [view[:, y : y + height, x : x + width] for view, y, x in zip(padded, tops, lefts, strict=True)]
        views = torch.stack([view.flip(-1) if flip else view for view, flip in zip(moved, flips, strict=True)])
        return views * (1 + contrast) + level

    def _features(self, images: Tensor) -> Tensor:
        """(B, turns D, cells, cells): of each turn its features, laid back to where they are in the image."""
        features, cells = self._encoder(images.device), self.options.cells

        def of_turn(turn: int) -> Tensor:
            turned = torch.rot90(images, turn, (-2, -1)).clone(memory_format=torch.channels_last)
            grid = F.adaptive_avg_pool2d(features(turned), cells)
            return F.normalize(torch.rot90(grid, -turn, (-2, -1)), dim=1)

        return torch.cat([of_turn(turn) for turn in self._turns], 1).contiguous()


def build(options: Options, *, channels: int, image_size: tuple[int, int]) -> RotNetSpace:
    """A space that has learnt nothing yet.

    Raises:
        ConfigError: more components than features, or cells than the features have.
    """
    smallest = min(image_size) // options.factor
    if options.cells > max(1, smallest):
        raise ConfigError(
            f"space.cells is {options.cells}; images of {image_size} have {max(1, smallest)} features a side at"
            f" space.factor {options.factor}: lower one of them"
        )
    space = RotNetSpace(options, channels=channels, image_size=image_size)
    width = (4 if image_size[0] == image_size[1] else 2) * options.width * options.factor // 2
    if options.num_components > width:
        raise ConfigError(
            f"space.num_components is {options.num_components}; the network has {width} features in all turns: set it"
            f" to {width} or less, or raise space.width"
        )
    return space
