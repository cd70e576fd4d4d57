"""``inversion``: follow the image up to noise, and ask whether path and latent are those of a normal image.

DDIM inversion starts at the clean image, adds no noise and needs few steps. ``path``: squares of the noise that is
read on the way, and of its first and second difference in t (rate and curvature of the path), after DiffPath (Heng et
al. 2024, arXiv:2402.11478), per step instead of summed over the steps. ``latent``: squares of the latent z_T, which is
standard normal for a perfect model, after InvAD (Sakai et al. 2025, arXiv:2504.05662, which inverts features in three
steps). All of them may be too low as well as too high: hence the density, and z-scores that count in both directions.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from raydiff.core.density import DensityKind
from raydiff.core.diffusion import Diffusion
from raydiff.core.sampler import Inversion, ddim_invert
from raydiff.core.schedule import NoiseSchedule
from raydiff.judgement import Judge, JudgeOptions

__all__ = ["InversionScorer", "Options", "build"]


class Options(JudgeOptions):
    """How far up, in how many steps, and what is looked at."""

    name: Literal["inversion"] = "inversion"
    num_inference_steps: int = Field(5, ge=1, description="k, steps from the image to the latent")
    top: float = Field(1.0, gt=0, le=1, description="step of the latent, as a share of T")
    statistic: Literal["path", "latent", "both"] = Field(
        "both", description="squared noise along the path with its differences, squared latent, or both"
    )
    sided: Literal["high", "both"] = Field(
        "both", description="both: a z-score below the normals' counts as much as one above (its absolute value)"
    )
    density: DensityKind | Literal["none"] = Field(
        "mahalanobis", description="score by a two-sided density on per-step statistics instead of by pooling the map"
    )


class InversionScorer(Judge):
    """See the module."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.options = options

    def timesteps(self, schedule: NoiseSchedule) -> list[int]:
        """Those of the k steps that the network is asked at: all but the latent's, unless that is the only one."""
        steps = self._path(schedule)
        return steps[1:] or steps

    def num_evaluations(self, model: Diffusion) -> int:  # noqa: ARG002
        """One per step: the latent itself is not evaluated."""
        return self.options.num_inference_steps

    def measure(self, model: Diffusion, x: Tensor) -> Tensor:
        """Squares, mean over channels, (B, K, H, W): K is k + (k - 1) + (k - 2) of the path, and 1 of the latent."""
        steps = self._path(model.schedule)
        inversion = ddim_invert(model.predict, model.schedule, x, steps, model.prediction_type)
        maps = [] if self.options.statistic == "latent" else _of_path(inversion, steps, len(model.schedule))
        if self.options.statistic != "path":
            maps.append(inversion.path[-1])
        return torch.stack([value.square().mean(1) for value in maps], 1).cpu()

    def reconstruct(self, model: Diffusion, x: Tensor) -> Tensor | None:  # noqa: ARG002
        """None: the way back from the latent ends at the image itself, normal or not."""
        return None

    def _path(self, schedule: NoiseSchedule) -> list[int]:
        """The k steps, from the latent's down."""
        return schedule.timesteps(round(self.options.top * (len(schedule) - 1)), self.options.num_inference_steps)


def _of_path(inversion: Inversion, steps: list[int], num_train_timesteps: int) -> list[Tensor]:
    """The noises, their differences per unit of t / T, and the differences of these; (B, C, H, W) each."""
    ascending = [-1, *reversed(steps)][:-1]  # where x lay when each noise was read
    times = [t / num_train_timesteps for t in ascending]
    rates = _differences(inversion.epsilons, times)
    middles = [(a + b) / 2 for a, b in pairwise(times)]
    return [*inversion.epsilons, *rates, *_differences(rates, middles)]


def _differences(values: list[Tensor], times: list[float]) -> list[Tensor]:
    return [(values[i + 1] - values[i]) / (times[i + 1] - times[i]) for i in range(len(values) - 1)]


def build(options: Options) -> InversionScorer:
    """The scorer."""
    return InversionScorer(options)
