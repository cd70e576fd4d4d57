"""``Diffusion``: a denoiser with its schedule, evaluated so that a row never depends on its neighbours.

Every call has the same number of rows for the same shape of row: see :mod:`raydiff.core.chunks`. A lone image pays for
its whole chunk, so chunks are as small as they can be without costing much throughput (docs/LOG.md).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from raydiff.core.chunks import by_chunks
from raydiff.core.moving import to_device
from raydiff.core.schedule import NoiseSchedule, PredictionType, predict_epsilon, predict_x0

__all__ = ["Denoiser", "Diffusion", "full_precision", "keyed_seed"]

_CHUNK = 16
"""Rows of a call, at most."""

_CHUNK_VALUES = 2**14
"""Numbers in the rows of a call on a CPU, where more are hardly faster: 5 colour images of 32 px, rounded down to 4."""

Denoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""``(x_t (B, C, H, W), t (B,), condition (B,) or None) -> prediction (B, C, H, W)``."""


def keyed_seed(*key: int | str) -> int:
    """A 63-bit seed that depends on the key alone: the same on every machine, rank and run."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


@contextmanager
def full_precision(device: torch.device | str) -> Iterator[None]:
    """Convolutions on a GPU in float32 throughout, not rounded to TF32's 10 bits, which cuDNN does by default.

    The setting is the process's, so it changes back when the last of several threads leaves. On a CPU nothing happens.
    """
    if torch.device(device).type != "cuda":
        yield
        return
    _tf32.enter()
    try:
        yield
    finally:
        _tf32.leave()


class _Tf32:
    """What cuDNN was allowed before the first thread entered."""

    def __init__(self) -> None:
        self._lock, self._inside, self._allowed = Lock(), 0, True

    def enter(self) -> None:
        """Not allowed from here."""
        with self._lock:
            if not self._inside:
                self._allowed = torch.backends.cudnn.allow_tf32
                torch.backends.cudnn.allow_tf32 = False
            self._inside += 1

    def leave(self) -> None:
        """As before, for the last one."""
        with self._lock:
            self._inside -= 1
            if not self._inside:
                torch.backends.cudnn.allow_tf32 = self._allowed


_tf32 = _Tf32()


@dataclass(frozen=True)
class Diffusion:
    """A trained (or closed-form) denoiser and all that is needed to evaluate it.

    ``seed`` fixes the noise that scorers share between images. ``num_classes`` is None for an unconditional denoiser;
    a conditional one knows the labels 0 to num_classes - 1, and num_classes stands for "no label". ``chunk_size`` is
    the number of rows in a call; None chooses one by the shape of a row. With ``differentiable`` gradients flow from
    the output to ``x_t`` (for attacks on a detector); else none are kept. ``decode`` makes images in [-1, 1] of what is
    diffused, row by row; None where that is the image itself, or nothing can.
    """

    denoiser: Denoiser
    schedule: NoiseSchedule
    prediction_type: PredictionType
    seed: int = 0
    num_classes: int | None = None
    chunk_size: int | None = None
    device: str = "cpu"
    differentiable: bool = False
    decode: Callable[[Tensor], Tensor | None] | None = None

    def predict(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """The denoiser's raw output, float32 (N, C, H, W), on the device of ``x_t``.

        Args:
            x_t: (N, C, H, W).
            t: (N,) int64, in [0, T).
            condition: (N,) int64 labels; None means "no label" for a conditional denoiser.
        """
        if self.num_classes is not None and condition is None:
            condition = torch.full_like(t, self.num_classes)
        if x_t.shape[0] == 0:
            return torch.empty_like(x_t)

        def call(*rows: Tensor) -> Tensor:
            moved = [to_device(tensor, self.device) for tensor in rows] + [None] * (3 - len(rows))
            with nullcontext() if self.differentiable else torch.inference_mode(), full_precision(self.device):
                return self.denoiser(*moved).float()  # type: ignore[arg-type]

        rows = (x_t, t) if condition is None else (x_t, t, condition)
        with nullcontext() if self.differentiable else torch.inference_mode():
            found = by_chunks(call, self.rows_per_call(tuple(x_t.shape[1:])), *rows, device=self.device)
            return found.to(x_t.device)  # once, so that a device is waited for once

    def rows_per_call(self, shape: tuple[int, ...]) -> int:
        """How many rows of ``shape`` the network is called with at a time, a power of two by default.

        On a CPU it halves while the rows of a call hold more numbers than pay; on an accelerator it is always the same.
        """
        if self.chunk_size is not None:
            return self.chunk_size
        if torch.device(self.device).type != "cpu":
            return _CHUNK
        fitting = _CHUNK_VALUES // math.prod(shape)
        return min(_CHUNK, 1 << (fitting.bit_length() - 1)) if fitting else 1

    def predict_x0(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """The clean image expected from ``x_t``, (N, C, H, W)."""
        return predict_x0(self.schedule, self.predict(x_t, t, condition), x_t, t, self.prediction_type)

    def predict_epsilon(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """The noise expected in ``x_t``, (N, C, H, W)."""
        return predict_epsilon(self.schedule, self.predict(x_t, t, condition), x_t, t, self.prediction_type)

    def noise(self, shape: tuple[int, ...], step: int, repeat: int = 0) -> Tensor:
        """The one standard normal draw that every image shares at (step, repeat); depends on the seed alone."""
        generator = torch.Generator().manual_seed(keyed_seed("score", self.seed, step, repeat))
        return torch.randn(shape, generator=generator)
