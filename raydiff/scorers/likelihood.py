"""``likelihood``: the variational bound on -log2 p(x), as the model's own opinion of how probable the image is.

K steps make a diffusion of K steps, and its bound is what is measured: the prior's KL at the highest step, one KL per
step, the decoder's term (Ho et al. 2020, arXiv:2006.11239, eq. 5 and 13; for any spacing Kingma et al. 2021,
arXiv:2107.00630). Steps evenly spaced in log SNR keep the bound of few steps tight. One noise draw for all images. With
the default options the score is the bound in bits per dimension.

Likelihood is a weak detector where anomalies are simpler than normals: models of CIFAR-10 find SVHN more likely than
CIFAR-10 (Nalisnick et al. 2019, arXiv:1810.09136). So low likelihood alone is the baseline of the literature, and
``density`` asks instead whether the terms are typical, neither too high nor too low.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from raydiff.core.diffusion import Diffusion
from raydiff.core.objective import decoder_nats, prior_nats, step_nats
from raydiff.core.schedule import NoiseSchedule
from raydiff.errors import ConfigError
from raydiff.judgement import Judge, JudgeOptions, Pooling
from raydiff.scorers._steps import at_steps

__all__ = ["Likelihood", "Options", "build"]


class Options(JudgeOptions):
    """How fine the bound is, and what the data are."""

    name: Literal["likelihood"] = "likelihood"
    num_inference_steps: int = Field(
        8, ge=1, description="K, steps of the bound; its decoder needs one evaluation more"
    )
    top: float = Field(
        0.8, gt=0, le=1, description="highest step, as a share of T; near 1 the clean image is guessed from noise alone"
    )
    decoder: Literal["levels", "continuous"] = Field(
        "levels", description="levels: the data are 256 grey levels on [-1, 1]; continuous: any numbers, as in features"
    )
    normalise: Literal["none", "step", "pixel"] = Field(
        "none", description="z-score terms on calibration normals: per step, or per step and pixel; none: plain bits"
    )
    blur: float = Field(0.0, ge=0, description="standard deviation in pixels of the Gaussian blur of the map; 0: none")
    pooling: Pooling = Field("mean", description="how the map becomes a number; top_k: mean of the highest share")


class Likelihood(Judge):
    """See the module."""

    positive = False  # a continuous decoder's density may exceed 1

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.options = options

    def check(self, num_conditions: int | None, space: str) -> None:  # noqa: ARG002
        """See that the data are what the decoder takes them for.

        Raises:
            ConfigError: they are not pixels, and so have no grey levels.
        """
        if self.options.decoder == "levels" and space != "pixel":
            raise ConfigError(
                f"scoring.decoder is levels and space is {space}, which has no grey levels; set scoring.decoder to"
                " continuous"
            )

    def timesteps(self, schedule: NoiseSchedule) -> list[int]:
        """Step 0 for the decoder, then K steps, ascending, evenly spaced in log SNR as far as whole steps allow.

        Raises:
            ConfigError: the schedule has fewer.
        """
        top, count = round(self.options.top * (len(schedule) - 1)), self.options.num_inference_steps
        if count > top:
            raise ConfigError(
                f"scoring.num_inference_steps is {count}; up to scoring.top a schedule of {len(schedule)} steps has"
                f" only {top}"
            )
        levels = schedule.snr(torch.arange(top + 1)).clamp(min=1e-12).log()  # descending
        steps = [0]
        for i, level in enumerate(torch.linspace(float(levels[0]), float(levels[-1]), count + 1)[1:], start=1):
            nearest = int((levels - level).abs().argmin())
            steps.append(min(max(nearest, steps[-1] + 1), top - (count - i)))
        return steps

    def num_evaluations(self, model: Diffusion) -> int:  # noqa: ARG002
        """K, and one for the decoder."""
        return self.options.num_inference_steps + 1

    def measure(self, model: Diffusion, x: Tensor) -> Tensor:
        """Terms in bits, (B, K + 2, H, W): decoder, steps ascending, prior. Their mean is the bound per dimension."""
        steps = self.timesteps(model.schedule)
        x_t, t, repeated = at_steps(model, x, steps)
        guesses, x0, schedule = model.predict_x0(x_t, t).double(), x.double(), model.schedule
        previous = torch.tensor([0, *steps[:-1]]).repeat(len(x))  # the first of each image is the decoder's
        kls = step_nats(schedule, repeated.double(), guesses, t, previous).reshape(len(x), -1, *x.shape[1:])
        bin_width = 2 / 255 if self.options.decoder == "levels" else None
        decoder = decoder_nats(schedule, x0, guesses[:: len(steps)], bin_width)
        nats = torch.cat([decoder[:, None], kls[:, 1:], prior_nats(schedule, x0, steps[-1])[:, None]], 1)
        return (nats.mean(2) * (nats.shape[1] / math.log(2))).float().cpu()

    def reconstruct(self, model: Diffusion, x: Tensor) -> Tensor | None:  # noqa: ARG002
        """None: a likelihood shows no other image."""
        return None


def build(options: Options) -> Likelihood:
    """The scorer."""
    return Likelihood(options)
