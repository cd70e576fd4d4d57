"""What spaces share that are fitted by a training: its rate, its progress, and rows that stand alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from raydiff.core.chunks import by_chunks
from raydiff.core.diffusion import full_precision
from raydiff.errors import TrainingError

__all__ = ["learning_rate", "learnt", "rows_apart"]

_REPORTS = 10
"""Lines of progress in a fit, about."""

_CHUNK_PIXELS, _MAX_CHUNK = 128 * 128, 16


def learning_rate(highest: float, step: int, num_steps: int) -> float:
    """The rate of a step, 0-based: up over a twentieth of the steps, then half a cosine down to 0."""
    warm = max(1, num_steps // 20)
    return highest * min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def learnt(losses: Iterator[Tensor], num_steps: int, report: Callable[[Mapping[str, Any]], None], what: str) -> None:
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


def rows_apart(
    function: Callable[[Tensor], Tensor], rows: Tensor, *, pixels: int, like: tuple[int, ...] | None = None
) -> Tensor:
    """``function`` of all rows, of which none knows another; gradients flow back to rows that ask for them.

    Args:
        function: of (b, ...) to (b, ...), in float32.
        rows: (B, ...); B may be 0.
        pixels: of an image, by which the rows of a call are chosen.
        like: shape of a row that stands for none where B is 0; that of ``rows`` by default.
    """
    with_gradients = torch.is_grad_enabled() and rows.requires_grad
    size = _MAX_CHUNK if rows.device.type != "cpu" else max(1, min(_MAX_CHUNK, _CHUNK_PIXELS // pixels))

    def call(chunk: Tensor) -> Tensor:
        with torch.set_grad_enabled(with_gradients), full_precision(chunk.device):
            return function(chunk)

    if rows.shape[0] == 0:  # the shape is wanted
        return call(rows.new_zeros(1, *(like or rows.shape[1:])))[:0]
    return by_chunks(call, size, rows, device=rows.device)
