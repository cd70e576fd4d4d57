"""``conditioned``: a reconstruction that is steered towards the image, and how far it still is from it.

DDAD (Mousakhan et al. 2023, arXiv:2305.15956): at each denoising step the expected noise is corrected by
w sqrt(1 - abar_t) (y_t - x_t), where y_t is the image noised with that very noise. What the model knows is thus
reproduced faithfully, and what remains is what it cannot make.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from raydiff.core.diffusion import Diffusion
from raydiff.core.sampler import steered_sample
from raydiff.core.schedule import NoiseSchedule
from raydiff.judgement import Judge, JudgeOptions

__all__ = ["Conditioned", "Options", "build"]


class Options(JudgeOptions):
    """How far up, in how many steps down, and how strongly steered."""

    name: Literal["conditioned"] = "conditioned"
    start_step: float = Field(0.3, gt=0, le=1, description="t*, as a share of T")
    num_inference_steps: int = Field(5, ge=1, description="k, denoising steps from t* to the image")
    start: Literal["noised", "clean"] = Field("noised", description="diffuse to t*, or only scale the clean image")
    weight: float = Field(
        2.0, ge=0, description="w, how strongly the image steers; 0 is a plain reconstruction, and above"
        " sqrt(abar) / (1 - abar) at t* it overshoots"
    )  # fmt: skip
    error: Literal["squared", "absolute"] = "squared"


class Conditioned(Judge):
    """See the module."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.options = options

    def timesteps(self, schedule: NoiseSchedule) -> list[int]:
        """The k steps from t* down."""
        start = round(self.options.start_step * (len(schedule) - 1))
        return schedule.timesteps(start, self.options.num_inference_steps)

    def num_evaluations(self, model: Diffusion) -> int:  # noqa: ARG002
        """One per step."""
        return self.options.num_inference_steps

    def measure(self, model: Diffusion, x: Tensor) -> Tensor:
        """Error of the steered reconstruction, mean over channels, (B, 1, H, W)."""
        difference = self.reconstruct(model, x) - x
        error = difference.square() if self.options.error == "squared" else difference.abs()
        return error.mean(1, keepdim=True).cpu()

    def reconstruct(self, model: Diffusion, x: Tensor) -> Tensor:
        """The steered reconstruction."""
        steps = self.timesteps(model.schedule)
        noise = model.noise(tuple(x.shape[1:]), steps[0]).to(x)
        t = torch.full((len(x),), steps[0], dtype=torch.int64)
        x_t = model.schedule.add_noise(x, t, noise if self.options.start == "noised" else torch.zeros_like(x))
        return steered_sample(model.predict, model.schedule, x_t, x, steps, model.prediction_type, self.options.weight)


def build(options: Options) -> Conditioned:
    """The scorer."""
    return Conditioned(options)
