"""``discriminative``: a small network looks at what the denoiser makes of an image and says which cells are anomalous.

DRAEM (Zavrtanik et al. 2021, arXiv:2108.07610) trains a segmentation network on synthetic anomalies, shown the image
beside its reconstruction; DiffusionAD (Zhang et al. 2023, arXiv:2303.08730) takes the reconstruction from a diffusion
model's one step; SimpleNet (Liu et al. 2023, arXiv:2303.15140) asks cell by cell, in features. Here a head sees, at
each step that the denoiser is asked at, what is diffused, the difference to the predicted clean image, and its size.
It is trained when the denoiser is, on training images and anomalies planted in them (:mod:`raydiff.planting`).

The head's evidence is its logit per cell, raw. The diffusion's own is the squared error of the prediction, as in
``denoising_error``. Each is z-scored on calibration normals, who taught the head nothing, and then they are combined:
such a head finds what looks like its anomalies, the error also what looks like none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from raydiff.core.chunks import by_chunks
from raydiff.core.diffusion import Diffusion, full_precision
from raydiff.core.schedule import NoiseSchedule
from raydiff.errors import ArtifactError, RaydiffError
from raydiff.judgement import Judge, JudgeOptions
from raydiff.planting import Examples, Plants, check_kinds
from raydiff.scorers._head import Head, HeadSize, HeadTraining, train_head
from raydiff.scorers._steps import StepOptions, at_steps, evenly_spaced

__all__ = ["Discriminative", "Options", "build"]

_CACHE_BYTES = 2**30
"""What the head is shown is kept in memory while it is trained, unless it is more."""

_SCALED_ON = 128
"""Normal images that the z-scores of what the head is shown come from, at most."""

_TOGETHER = 32
"""Examples that the denoiser is asked about at a time before training."""


class Options(StepOptions):
    """What the head sees, what it is trained on, and how it is combined with the denoising error."""

    name: Literal["discriminative"] = "discriminative"
    num_inference_steps: int = Field(1, ge=1, description="K, steps at which the denoiser is asked")
    start: float = Field(0.6, ge=0, lt=1, description="lowest step, as a share of T")
    stop: float = Field(0.8, gt=0, le=1, description="highest step, as a share of T")
    start_from: Literal["noised", "clean"] = Field("clean", description="clean: the image is only scaled, as by a step")
    combine: Literal["mean", "max", "head"] = Field(
        "mean", description="z-scores of the head and of the denoising error: their mean, the higher one, or the"
        " head's alone"
    )  # fmt: skip
    sees: Literal["both", "image", "difference"] = Field(
        "both", description="what the head looks at: what is diffused, its difference to the prediction, or both"
    )
    kinds: tuple[str, ...] = Field(
        (), description="synthetic anomalies that it learns from; empty: every kind there is. Leave some out to choose"
        " by the others"
    )  # fmt: skip
    severities: tuple[int, ...] = Field((1, 2, 3), min_length=1, description="of the anomalies, from 1 to 5")
    num_anomalies: int = Field(600, ge=1, description="how many are planted, at least one in each image")
    num_fit_images: int = Field(300, ge=1, description="training images that they are planted in, at most")
    width: int = Field(64, ge=1, description="channels of the head")
    depth: int = Field(2, ge=0, description="blocks of the head")
    kernel_size: int = Field(3, ge=1, description="cells along a side that a block looks at, odd; 1: each cell alone")
    num_steps: int = Field(300, ge=1, description="optimiser steps of the head")
    batch_size: int = Field(16, ge=2, description="images per step, half of them normal")
    learning_rate: float = Field(1e-3, gt=0, description="highest; a short warm-up, then half a cosine down to 0")
    noise: float = Field(
        1.0, ge=0, description="deviation of the noise on what the head is shown while it learns, z-scored; without any"
        " it learns by heart how well the denoiser knows the training images"
    )  # fmt: skip

    @model_validator(mode="after")
    def _check_head(self) -> Self:
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {self.kernel_size}; it must be odd, so that it has a middle")
        if bad := [severity for severity in self.severities if not 1 <= severity <= 5]:
            raise ValueError(f"severities holds {bad[0]}; each must be a whole number from 1 to 5")
        if self.combine != "head" and self.normalise == "none":
            raise ValueError(
                f"combine is {self.combine} and normalise none, but logits and errors can only be compared as z-scores;"
                " set normalise to step or pixel, or combine to head"
            )
        return self


class Discriminative(Judge):
    """See the module. Nothing changes after ``train`` or ``load_state``; several threads may measure then."""

    positive: ClassVar[bool] = False

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.options = options
        self._head: Head | None = None

    def timesteps(self, schedule: NoiseSchedule) -> list[int]:
        """The K steps, ascending and evenly spaced between ``start`` and ``stop``."""
        return evenly_spaced(schedule, self.options)

    def check(self, num_conditions: int | None, space: str) -> None:  # noqa: ARG002
        """Any denoiser in any space will do; see that there are such anomalies.

        Raises:
            ConfigError: there are not.
        """
        check_kinds(self.options.kinds, "scoring.kinds")

    def num_evaluations(self, model: Diffusion) -> int:  # noqa: ARG002
        """One per step; none for a head that looks at the image and is not combined."""
        return self.options.num_inference_steps if self._asks else 0

    @property
    def plants(self) -> Plants:
        """The anomalies that the head learns from."""
        options = self.options
        return Plants(options.num_fit_images, options.num_anomalies, options.kinds, options.severities)

    @property
    def is_trained(self) -> bool:
        """Whether there is a head."""
        return self._head is not None

    def training_key(self) -> str:
        """All options but those of judgement and ``combine``."""
        return self.options.model_dump_json(exclude={*JudgeOptions.model_fields, "combine"})

    def train(self, model: Diffusion, examples: Examples, report: Callable[[Mapping[str, Any]], None]) -> None:
        """See :class:`raydiff.planting.TrainedScorer`.

        What the head is shown of all examples is held in memory, as far as that is less than a gigabyte, so that the
        denoiser is asked about each once.
        """
        options = self.options
        shown = _Shown(lambda rows: self._look(model, examples.latents(rows))[0], len(examples))
        shares = torch.cat([examples.shares([row]) for row in range(len(examples))])
        training = HeadTraining(options.num_steps, options.batch_size, options.learning_rate, options.noise)
        normal = shown(list(range(min(_SCALED_ON, examples.num_normal))))
        head = Head.of(normal.shape[1], self._size, model.seed)
        head.scale_to(normal)
        self._head = train_head(
            head.to(model.device), training, shown, shares, examples.num_normal, seed=model.seed, report=report
        )

    def measure(self, model: Diffusion, x: Tensor) -> Tensor:
        """The head's logits, and squared errors at each step unless it is not combined, (B, 1 + K, H, W) or 1 for K.

        Raises:
            RaydiffError: the head is not trained.
        """
        if self._head is None:
            raise RaydiffError("scoring discriminative: its head is not trained yet; fit it with raydiff.heads")
        shown, errors = self._look(model, x)
        logits = self._answer(self._head, model, shown)
        return (logits if self.options.combine == "head" else torch.cat([logits, errors], 1)).cpu()

    def reconstruct(self, model: Diffusion, x: Tensor) -> Tensor | None:
        """The clean image that the denoiser predicts at the highest step."""
        x_t, t, _ = at_steps(model, x, self.timesteps(model.schedule)[-1:], noised=self._noised)
        return model.predict_x0(x_t, t)

    def state(self) -> dict[str, Tensor]:
        """The head's weights; none before it is trained."""
        return {} if self._head is None else {f"head.{k}": v.cpu() for k, v in self._head.state_dict().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over the head's weights.

        Raises:
            ArtifactError: a part is missing, or of another shape.
        """
        weights = {key.removeprefix("head."): value for key, value in state.items() if key.startswith("head.")}
        try:
            head = Head.of(len(weights["mean"]), self._size, 0)
            head.load_state_dict(weights)
        except (KeyError, RuntimeError) as error:
            raise ArtifactError(
                "the state of scoring 'discriminative' does not fit its options; fit it again"
            ) from error
        self._head = head.eval().requires_grad_(False)

    def _normalised(self, evidence: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
        """Of all maps one, (B, 1, H, W): the head's z-scores and the mean of the steps' combined."""
        values = super()._normalised(evidence, statistics)
        if self.options.combine == "head":
            return values
        errors = values[:, 1:2]
        for k in range(2, values.shape[1]):  # one after the other, so that no kernel decides the order
            errors = errors + values[:, k : k + 1]
        head, error = values[:, :1], errors / (values.shape[1] - 1)
        return torch.maximum(head, error) if self.options.combine == "max" else (head + error) / 2

    @property
    def _noised(self) -> bool:
        return self.options.start_from == "noised"

    @property
    def _asks(self) -> bool:
        """Whether the denoiser is asked at all."""
        return self.options.sees != "image" or self.options.combine != "head"

    @cached_property
    def _size(self) -> HeadSize:
        return HeadSize(self.options.width, self.options.depth, self.options.kernel_size)

    def _look(self, model: Diffusion, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the head is shown, (B, channels, H, W), and the squared errors, (B, K, H, W)."""
        if not self._asks:
            return x, x[:, :0]
        steps = self.timesteps(model.schedule)
        x_t, t, repeated = at_steps(model, x, steps, noised=self._noised)
        difference = model.predict_x0(x_t, t) - repeated  # (B K, C, H, W)
        errors = difference.square().mean(1).reshape(x.shape[0], len(steps), *x.shape[2:])
        if self.options.sees == "image":
            return x, errors
        signed = difference.reshape(x.shape[0], len(steps) * x.shape[1], *x.shape[2:])  # not len(): it is traced
        seen = [signed, signed.abs()] if self.options.sees == "difference" else [x, signed, signed.abs()]
        return torch.cat(seen, 1), errors

    def _answer(self, head: Head, model: Diffusion, shown: Tensor) -> Tensor:
        """Logits (B, 1, H, W); row i depends on row i alone, bit for bit."""
        head = head.to(model.device)

        def call(rows: Tensor) -> Tensor:
            with nullcontext() if model.differentiable else torch.inference_mode(), full_precision(model.device):
                logits: Tensor = head(rows.to(model.device))
                return logits.to(rows.device)

        if not shown.shape[0]:
            return shown.new_zeros(0, 1, *shown.shape[2:])
        return by_chunks(call, model.rows_per_call(tuple(shown.shape[1:])), shown, device=model.device)


class _Shown:
    """What the head is shown of examples by their numbers: made once and kept, or made each time it is asked for."""

    def __init__(self, look: Callable[[list[int]], Tensor], count: int) -> None:
        self._look = look
        one = look([0])
        self._kept = one.new_empty(count, *one.shape[1:]) if count * one.nbytes <= _CACHE_BYTES else None
        for start in range(0, count if self._kept is not None else 0, _TOGETHER):
            rows = list(range(start, min(start + _TOGETHER, count)))
            self._kept[start : start + _TOGETHER] = look(rows)  # type: ignore[index]

    def __call__(self, rows: list[int]) -> Tensor:
        """(len(rows), channels, H, W)."""
        return self._look(rows).clone() if self._kept is None else self._kept[rows]


def build(options: Options) -> Discriminative:
    """The scorer, its head not trained yet."""
    return Discriminative(options)
