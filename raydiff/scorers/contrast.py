"""``contrast``: the error under the true condition against the errors under the others, with the same noise.

A denoiser that was told by how many quarter turns each training image was rotated (objective.condition rotation)
denoises a normal image best when told the truth. For an image it does not understand, the truth helps less. What is
hard about an image for any condition cancels in the difference, which a bare error mistakes for an anomaly. The idea
joins rotation prediction (Golan and El-Yaniv 2018, arXiv:1805.10917; Hendrycks et al. 2019, arXiv:1906.12340) with
diffusion models as classifiers (Li et al. 2023, arXiv:2303.16203). With classes for conditions the true one is taken
to be the one that fits best.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from raydiff.core.diffusion import Diffusion
from raydiff.core.schedule import NoiseSchedule
from raydiff.errors import ConfigError, ShapeError
from raydiff.judgement import Judge, Pooling
from raydiff.scorers._steps import StepOptions, at_steps, evenly_spaced

__all__ = ["Contrast", "Options", "build"]

_QUARTERS = 4


class Options(StepOptions):
    """Which conditions are told apart, and how."""

    name: Literal["contrast"] = "contrast"
    num_inference_steps: int = Field(4, ge=1, description="K, steps evaluated per turn and condition")
    condition: Literal["rotation", "class"] = Field(
        "rotation", description="what objective.condition told the denoiser"
    )
    rotations: Literal[1, 4] = Field(
        1, description="4: also look at the image turned by one, two and three quarters, each with its own true label"
    )
    pairing: Literal["difference", "log_ratio", "softmax"] = Field(
        "difference",
        description="of the true error and the mean of the others: their difference, as a map; the logarithm of their"
        " ratio; or minus the log probability of the true condition",
    )
    temperature: float = Field(0.1, gt=0, description="softmax: conditions are weighed by error^(-1/temperature)")
    normalise: Literal["none", "step", "pixel"] = Field(
        "step", description="z-score contrasts on calibration normals: per step, or per step and pixel"
    )
    pooling: Pooling = Field("mean", description="how the map becomes a number; top_k: mean of the highest share")


class Contrast(Judge):
    """See the module."""

    positive = False

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.options = options

    def timesteps(self, schedule: NoiseSchedule) -> list[int]:
        """The K steps, ascending and evenly spaced between ``start`` and ``stop``."""
        return evenly_spaced(schedule, self.options)

    def check(self, num_conditions: int | None, space: str) -> None:
        """See that there are conditions to tell apart, and images to turn.

        Raises:
            ConfigError: the denoiser has no condition, a single class, is told of classes where turns are asked, or
                diffuses something that cannot be turned.
        """
        self._check_conditions(num_conditions)
        if self.options.rotations != 1 and space != "pixel":
            raise ConfigError(
                f"scoring.rotations is {self.options.rotations} and space is {space}, whose grids are not those of"
                " turned images; set scoring.rotations to 1, or space to pixel"
            )

    def _check_conditions(self, num_conditions: int | None) -> None:
        wanted = self.options.condition
        if num_conditions is None:
            raise ConfigError(
                f"objective.condition is none; scoring contrast tells conditions apart: set it to {wanted} and train"
            )
        if wanted == "rotation" and num_conditions != _QUARTERS:
            raise ConfigError(
                f"scoring.condition is rotation and the denoiser knows {num_conditions} labels; set"
                " objective.condition to rotation and train, or scoring.condition to class"
            )
        if num_conditions < 2:
            raise ConfigError("scoring.condition is class and there is one class; set objective.condition to rotation")
        if wanted == "class" and self.options.rotations != 1:
            raise ConfigError("scoring.rotations is 4 and scoring.condition class; turn images with condition rotation")

    def num_evaluations(self, model: Diffusion) -> int:
        """Steps x turns x conditions."""
        return self.options.num_inference_steps * self.options.rotations * self._num_conditions(model)

    def measure(self, model: Diffusion, x: Tensor) -> Tensor:
        """Contrasts, negative where the truth helps: maps (B, K, H, W), or numbers (B, K, 1, 1); mean over turns.

        Raises:
            ConfigError: as :meth:`check`.
            ShapeError: images that are turned must be square.
        """
        return self.measure_steps(model, x, self.timesteps(model.schedule))

    def by_step(self, model: Diffusion) -> bool:  # noqa: ARG002
        """Yes where the true condition is known; with classes it is the one that fits best over all steps."""
        return self.options.condition == "rotation"

    def measure_steps(self, model: Diffusion, x: Tensor, steps: list[int]) -> Tensor:
        """The same at other steps.

        Raises:
            ConfigError, ShapeError: as :meth:`measure`.
        """
        count = self._num_conditions(model)
        if self.options.rotations > 1 and x.shape[2] != x.shape[3]:
            raise ShapeError(f"images are {x.shape[2]} x {x.shape[3]}; scoring.rotations 4 needs square ones")
        contrasts = []
        for turn in range(self.options.rotations):
            errors = self._errors(model, torch.rot90(x, turn, (-2, -1)), steps, count)  # (conditions, B, K, H, W)
            errors = torch.rot90(errors, -turn, (-2, -1))
            truth = self._truth(errors, turn)
            true = errors[truth, torch.arange(len(x))]  # (B, K, H, W)
            contrasts.append(self._paired(errors, true))
        return torch.stack(contrasts).mean(0).float()

    def reconstruct(self, model: Diffusion, x: Tensor) -> Tensor | None:  # noqa: ARG002
        """None: a contrast shows no other image."""
        return None

    def _num_conditions(self, model: Diffusion) -> int:
        self._check_conditions(model.num_classes)
        return int(model.num_classes or 0)

    def _truth(self, errors: Tensor, turn: int) -> Tensor:
        """The true label of each row, int64 (B,)."""
        if self.options.condition == "rotation":
            return torch.full((errors.shape[1],), turn)
        return torch.from_numpy(errors.detach().double().numpy().mean((2, 3, 4)).argmin(0))

    def _paired(self, errors: Tensor, true: Tensor) -> Tensor:
        """(B, K, H, W) or (B, K, 1, 1) from errors (conditions, B, K, H, W) and the true one's (B, K, H, W)."""
        if self.options.pairing == "difference":
            return true - (errors.sum(0) - true) / (len(errors) - 1)
        all_means, true_mean = _image_mean(errors), _image_mean(true)
        if self.options.pairing == "log_ratio":
            return true_mean.log() - ((all_means.sum(0) - true_mean) / (len(errors) - 1)).log()
        # p(condition) is error^(-1/temperature), normalised: with 1/temperature = D/2 it is the likelihood of Gaussian
        # errors of unknown variance, which is much too sure of itself for the D dependent pixels of an image.
        return ((true_mean.log() - all_means.log()) / self.options.temperature).logsumexp(0)

    def _errors(self, model: Diffusion, x: Tensor, steps: list[int], count: int) -> Tensor:
        """Squared error of the predicted clean image, mean over channels, per condition, (conditions, B, K, H, W)."""
        x_t, t, repeated = at_steps(model, x, steps)
        errors = [
            (model.predict_x0(x_t, t, torch.full_like(t, label)) - repeated).square().mean(1) for label in range(count)
        ]
        return torch.stack(errors).cpu().reshape(count, len(x), len(steps), *x.shape[2:])


def _image_mean(errors: Tensor) -> Tensor:
    """Mean over pixels in float64, (..., 1, 1), above 0; by axis, since a long single sum is cut up by the threads."""
    return errors.double().mean(-1, keepdim=True).mean(-2, keepdim=True).clamp(min=1e-24)


def build(options: Options) -> Contrast:
    """The scorer."""
    return Contrast(options)
