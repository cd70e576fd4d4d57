"""``Diffusion``: a denoiser with its schedule, evaluated so that a row never depends on its neighbours.

Libraries pick another kernel for another batch size, and the last bits of a result change with it. So the network is
always called with exactly ``chunk_size`` rows, the last chunk padded with zeros: on a CPU every row then comes out bit
for bit the same, whatever stands beside it, at whatever position, for a given number of torch threads: another number
of them may cut up a convolution's sums in another way (tests/core/test_diffusion.py; contract 1).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from raydiff.core.schedule import NoiseSchedule, PredictionType, predict_epsilon, predict_x0

__all__ = ["Denoiser", "Diffusion", "full_precision", "keyed_seed"]

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
    a conditional one knows the labels 0 to num_classes - 1, and num_classes stands for "no label". With
    ``differentiable`` gradients flow from the output to ``x_t`` (for attacks on a detector); else none are kept.
    """

    denoiser: Denoiser
    schedule: NoiseSchedule
    prediction_type: PredictionType
    seed: int = 0
    num_classes: int | None = None
    chunk_size: int = 16
    device: str = "cpu"
    differentiable: bool = False

    def predict(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """The denoiser's raw output, float32 (N, C, H, W), on the device of ``x_t``.

        Args:
            x_t: (N, C, H, W).
            t: (N,) int64, in [0, T).
            condition: (N,) int64 labels; None means "no label" for a conditional denoiser.
        """
        if self.num_classes is not None and condition is None:
            condition = torch.full_like(t, self.num_classes)
        with nullcontext() if self.differentiable else torch.inference_mode():
            outputs = [
                self._predict_chunk(x_t[i : i + self.chunk_size], t[i : i + self.chunk_size],
                                    None if condition is None else condition[i : i + self.chunk_size])
                for i in range(0, len(x_t), self.chunk_size)
            ]  # fmt: skip
            return torch.cat(outputs) if outputs else torch.empty_like(x_t)

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

    def _predict_chunk(self, x_t: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        count, padding = len(x_t), self.chunk_size - len(x_t)
        if padding:
            x_t = torch.cat([x_t, x_t.new_zeros(padding, *x_t.shape[1:])])
            t = torch.cat([t, t.new_zeros(padding)])
            condition = None if condition is None else torch.cat([condition, condition.new_zeros(padding)])
        moved = None if condition is None else condition.to(self.device)
        with full_precision(self.device):
            output = self.denoiser(x_t.to(self.device), t.to(self.device), moved)
        return output[:count].float().to(x_t.device)
