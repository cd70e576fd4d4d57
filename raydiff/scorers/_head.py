"""A small network that says of each cell how anomalous it is, and its training on planted anomalies.

1x1 convolution in, residual blocks of a depthwise convolution, a normalisation over the channels of each cell and a
pointwise layer (ConvNeXt's, Liu et al. 2022, arXiv:2201.03545), 1x1 convolution out. With ``kernel_size`` 1 a cell's
answer depends on that cell alone, as in SimpleNet (Liu et al. 2023, arXiv:2303.15140).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from raydiff.core.diffusion import full_precision, keyed_seed
from raydiff.errors import ConfigError, TrainingError

__all__ = ["Head", "HeadSize", "HeadTraining", "train_head"]

_REPORTS = 10
"""Lines of progress in a training, about."""

_LEAST_SHARE = 0.1
"""A cell of which less than this is anomalous, but not nothing, teaches nothing: it is neither.

One cell for the whole image is anomalous if anything of it is.
"""

_LEAST_ANOMALIES = 4
"""Fewer planted anomalies that cover a cell teach nothing; unless fewer were planted."""


class HeadSize(NamedTuple):
    """Of a head."""

    width: int
    depth: int
    kernel_size: int


class HeadTraining(NamedTuple):
    """How a head is trained; half of each batch is anomalous images, ``noise`` is on z-scores of what it is shown."""

    num_steps: int
    batch_size: int
    learning_rate: float
    noise: float


class Head(nn.Module):
    """(B, channels, H, W) to logits (B, 1, H, W); what it is shown is z-scored per channel first."""

    mean: Tensor
    scale: Tensor

    def __init__(self, channels: int, size: HeadSize) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(channels))
        self.enter = nn.Conv2d(channels, size.width, 1)
        self.blocks = nn.ModuleList(_Block(size) for _ in range(size.depth))
        self.leave = nn.Conv2d(size.width, 1, 1)

    @classmethod
    def of(cls, channels: int, size: HeadSize, seed: int) -> Head:
        """With weights that follow from the seed, whatever ran before."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_seed("head", seed))
            return cls(channels, size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to (B, 1, H, W)."""
        return self.answer(self.z_scores(x))

    def z_scores(self, x: Tensor) -> Tensor:
        """Per channel, (B, channels, H, W)."""
        return (x - self.mean[:, None, None]) * self.scale[:, None, None]

    def answer(self, z_scores: Tensor) -> Tensor:
        """Logits (B, 1, H, W) to z-scores (B, channels, H, W)."""
        x: Tensor = self.enter(z_scores)
        x = x.contiguous(memory_format=torch.channels_last)  # faster on a CPU
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.leave(_layer_norm(x))
        return logits.contiguous()

    def scale_to(self, x: Tensor) -> None:
        """Z-scores become those of ``x``, (B, channels, H, W)."""
        values = x.double()
        self.mean.copy_(values.mean((0, 2, 3)))
        self.scale.copy_(1 / values.std((0, 2, 3), correction=0).clamp(min=1e-6))


class _Block(nn.Module):
    def __init__(self, size: HeadSize) -> None:
        super().__init__()
        width, side = size.width, size.kernel_size
        self.depthwise = nn.Conv2d(width, width, side, padding=side // 2, groups=width)
        self.expand, self.contract = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) to the same."""
        hidden: Tensor = self.contract(functional.gelu(self.expand(_layer_norm(self.depthwise(x)))))
        return x + hidden


def _layer_norm(x: Tensor) -> Tensor:
    """Over the channels of each cell, (B, D, H, W)."""
    return functional.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], eps=1e-6).permute(0, 3, 1, 2)


def train_head(
    head: Head,
    training: HeadTraining,
    shown: Callable[[list[int]], Tensor],
    shares: Tensor,
    num_normal: int,
    *,
    seed: int,
    report: Callable[[Mapping[str, Any]], None],
) -> Head:
    """Train a head, on its device, and give it back ready to be asked.

    The loss is the cross entropy per cell, in which anomalous cells weigh as much together as normal ones.

    Args:
        head: its weights are changed.
        training: how.
        shown: what it is shown of the examples with these numbers, (b, channels, H, W).
        shares: (n, 1, H, W), the share of each cell of each example that is anomalous.
        num_normal: the first so many examples are normal.
        seed: of the order in which they are seen.
        report: see :class:`raydiff.planting.TrainedScorer`.

    Raises:
        ConfigError: hardly any anomaly covers enough of a cell.
        TrainingError: the loss is not a number.
    """
    anomalous = _anomalous(shares, num_normal)
    begun = time.monotonic()
    for step, loss in _losses(head.train(), training, shown, (shares, anomalous), num_normal, seed):
        if step % max(1, training.num_steps // _REPORTS) == 0 or step == training.num_steps:
            value, seconds = float(loss), time.monotonic() - begun
            if not math.isfinite(value):
                raise TrainingError(
                    f"scoring discriminative: the head's loss is not a number at step {step}; lower"
                    " scoring.learning_rate"
                )
            report({"head_step": step, "head_steps": training.num_steps, "head_loss": value, "head_seconds": seconds})
    return head.eval().requires_grad_(False)


def _anomalous(shares: Tensor, num_normal: int) -> Tensor:
    """Which cells of which examples count as anomalous, (n, 1, H, W).

    Raises:
        ConfigError: those of hardly any example, so that nothing can be learnt of them.
    """
    height, width = shares.shape[-2:]
    anomalous = shares >= _LEAST_SHARE if height * width > 1 else shares > 0
    found, planted = int(anomalous[num_normal:].flatten(1).any(1).sum()), len(shares) - num_normal
    if found < min(_LEAST_ANOMALIES, planted):
        raise ConfigError(
            f"scoring discriminative: {found} of {planted} planted anomalies cover {_LEAST_SHARE:.0%} of a cell of the"
            f" {height} x {width} grid, too few to learn from; set scoring.severities higher, choose scoring.kinds that"
            " are larger, or a space with a finer grid"
        )
    return anomalous


def _losses(
    head: Head, training: HeadTraining, shown: Callable[[list[int]], Tensor], cells: tuple[Tensor, Tensor],
    num_normal: int, seed: int,
) -> Iterator[tuple[int, Tensor]]:  # fmt: skip
    """Each step's number, from 1 on, and loss; ``cells`` are the shares, and which of them are anomalous."""
    shares, anomalous = cells
    optimiser = torch.optim.AdamW(head.parameters(), lr=training.learning_rate, weight_decay=0.01)
    generator = torch.Generator().manual_seed(keyed_seed("head order", seed))
    device = head.mean.device
    weights = _weights(shares, anomalous, num_normal).to(device)
    for step in range(training.num_steps):
        for group in optimiser.param_groups:
            group["lr"] = training.learning_rate * _rate(step, training.num_steps)
        rows = _rows(num_normal, len(shares), training.batch_size, generator)
        inputs, wanted = head.z_scores(shown(rows).to(device)), anomalous[rows].to(device)
        if training.noise:
            inputs = inputs + training.noise * torch.randn(inputs.shape, generator=generator).to(device)
        counts = torch.where(wanted, weights[0], weights[1]) * ((shares[rows].to(device) == 0) | wanted)
        optimiser.zero_grad(set_to_none=True)
        with torch.enable_grad(), full_precision(device):
            losses = functional.binary_cross_entropy_with_logits(head.answer(inputs), wanted.float(), reduction="none")
            loss = (losses * counts).mean()
            loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimiser.step()
        yield step + 1, loss.detach()


def _weights(shares: Tensor, anomalous: Tensor, num_normal: int) -> Tensor:
    """What an anomalous cell counts, and a normal one, so that each kind has half of the mean weight of 1; (2,).

    Half of what is drawn is normal images.
    """
    inside = anomalous[num_normal:].double().mean() / 2
    outside = 0.5 + (shares[num_normal:] == 0).double().mean() / 2
    return torch.stack([0.5 / inside.clamp(min=1e-6), 0.5 / outside]).float()


def _rows(num_normal: int, count: int, size: int, generator: torch.Generator) -> list[int]:
    """Numbers of examples for a batch: half of them normal, or one less."""
    normal = torch.randint(num_normal, (size // 2,), generator=generator)
    planted = torch.randint(num_normal, count, (size - size // 2,), generator=generator)
    return [*normal.tolist(), *planted.tolist()]


def _rate(step: int, steps: int) -> float:
    """Share of the highest learning rate: up over a twentieth of the steps, then half a cosine down."""
    return min(1.0, (step + 1) / max(1, steps // 20)) * 0.5 * (1 + math.cos(math.pi * step / steps))
