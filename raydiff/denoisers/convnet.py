"""``convnet``: depthwise convolutions at one resolution, for grids of features and for small images.

A block is ConvNeXt's (Liu et al. 2022, arXiv:2201.03545, section 2): a depthwise convolution, a normalisation over the
channels of each cell, a pointwise MLP, a residual. The step and the label scale, shift and gate it as in DiT's
adaLN-Zero (Peebles and Xie 2023, arXiv:2212.09748, section 3.2): with gates at zero every block begins as the identity.
The grid keeps its size, whatever it is; a cell sees num_blocks x (kernel_size - 1) / 2 cells in each direction.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from raydiff.config import Options as BaseOptions
from raydiff.denoisers._conditioning import Conditioning, modulate, sine_cosine_positions

__all__ = ["ConvNet", "Options", "build"]


class Options(BaseOptions):
    """Depth, width and reach."""

    name: Literal["convnet"] = "convnet"
    width: int = Field(192, ge=4, multiple_of=4, description="channels inside")
    num_blocks: int = Field(5, ge=1)
    kernel_size: int = Field(7, ge=1, description="side of the depthwise convolutions, odd")
    expansion: float = Field(2.0, gt=0, description="hidden width of the pointwise MLP, in multiples of width")
    positions: bool = Field(True, description="tell each cell where it is: for parts that are always placed alike")
    dropout: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {self.kernel_size}; it must be odd, so that the grid keeps its size")
        return self


class ConvNet(nn.Module):
    """1x1 convolution in, residual blocks, 1x1 convolution out that starts at zero."""

    positions: Tensor | None

    def __init__(
        self, options: Options, *, channels: int, image_size: tuple[int, int], num_classes: int | None
    ) -> None:
        super().__init__()
        width = options.width
        table = sine_cosine_positions(width, image_size).permute(2, 0, 1) if options.positions else None  # (D, H, W)
        self.register_buffer("positions", table, persistent=False)
        self.conditioning = Conditioning(width, num_classes)
        self.enter = nn.Conv2d(channels, width, 1)
        self.blocks = nn.ModuleList(Block(options) for _ in range(options.num_blocks))
        self.modulation = nn.Linear(width, 2 * width)
        self.leave = nn.Conv2d(width, channels, 1)
        for module in (self.modulation, self.leave):
            _start_at_zero(module)

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """(B, C, H, W) at steps ``t`` (B,), with labels (B,) if the network is conditional, to (B, C, H, W)."""
        signal = F.silu(self.conditioning(t, condition))  # (B, D)
        x: Tensor = self.enter(x_t)  # (B, D, H, W)
        if self.positions is not None:
            x = x + self.positions
        x = x.contiguous(memory_format=torch.channels_last)  # three times as fast as NCHW on a CPU
        for block in self.blocks:
            x = block(x, signal)
        shift, scale = self.modulation(signal)[:, :, None, None].chunk(2, dim=1)  # (B, D, 1, 1) each
        output: Tensor = self.leave(modulate(_layer_norm(x), shift, scale))
        return output.contiguous()


class Block(nn.Module):
    """x + gate MLP(modulated layer norm of a depthwise convolution of x)."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        width, hidden = options.width, max(1, round(options.width * options.expansion))
        self.modulation = nn.Linear(width, 3 * width)
        self.depthwise = nn.Conv2d(width, width, options.kernel_size, padding=options.kernel_size // 2, groups=width)
        self.expand = nn.Conv2d(width, hidden, 1)
        self.contract = nn.Conv2d(hidden, width, 1)
        self.dropout = nn.Dropout(options.dropout)
        _start_at_zero(self.modulation)

    def forward(self, x: Tensor, signal: Tensor) -> Tensor:
        """(B, D, H, W) with ``signal`` (B, D) to (B, D, H, W)."""
        shift, scale, gate = self.modulation(signal)[:, :, None, None].chunk(3, dim=1)  # (B, D, 1, 1) each
        hidden = modulate(_layer_norm(self.depthwise(x)), shift, scale)
        return torch.addcmul(x, gate, self.contract(self.dropout(F.gelu(self.expand(hidden)))))


def _layer_norm(x: Tensor) -> Tensor:
    """Over the channels of each cell, (B, D, H, W); a cell's result depends on the cell alone."""
    return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], eps=1e-6).permute(0, 3, 1, 2)


def _start_at_zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


def build(options: Options, *, channels: int, image_size: tuple[int, int], num_classes: int | None) -> ConvNet:
    """A network with fresh weights from torch's global generator (seed it first).

    Args:
        options: its size.
        channels: of what is diffused.
        image_size: height and width of what is diffused; any.
        num_classes: how many labels the condition has; None for an unconditional network.
    """
    return ConvNet(options, channels=channels, image_size=image_size, num_classes=num_classes)
