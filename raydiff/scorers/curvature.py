"""``curvature``: the squared norm of the score over the trace of its Jacobian.

SCOPED (Barkley et al. 2025, arXiv:2510.01456): for data from the model E |s|^2 = -E tr(ds/dx), so the ratio of the two
is near 1 for normal images and elsewhere for others, above or below; a kernel density says how far. The trace is
Hutchinson's, v . (J v) with one fixed probe of +1 and -1 that all images share. J v is a finite difference of two
evaluations, so any network will do and nothing is differentiated.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from raydiff.core.density import DensityKind
from raydiff.core.diffusion import Diffusion
from raydiff.core.schedule import NoiseSchedule
from raydiff.judgement import Judge
from raydiff.scorers._steps import StepOptions, at_steps, evenly_spaced

__all__ = ["Curvature", "Options", "build"]

_PROBE_REPEAT = 1_000_000
"""The probe is the sign of a noise draw that no scorer adds to an image."""


class Options(StepOptions):
    """At which noise levels, of which image."""

    name: Literal["curvature"] = "curvature"
    num_inference_steps: int = Field(2, ge=1, description="L, noise levels; each costs two evaluations")
    start: float = Field(0.1, ge=0, lt=1, description="lowest step, as a share of T")
    stop: float = Field(0.3, gt=0, le=1, description="highest step, as a share of T")
    start_from: Literal["clean", "noised"] = Field(
        "clean", description="what the score is taken at: the scaled clean image, or the image with shared noise"
    )
    probe_size: float = Field(0.01, gt=0, description="how far the probe moves each number, at the scale of x_t")
    maps: bool = Field(True, description="give each pixel's share of the ratio, or the ratios alone")
    sided: Literal["high", "both"] = Field(
        "both", description="both: a z-score below the normals' counts as much as one above (its absolute value)"
    )
    density: DensityKind | Literal["none"] = Field(
        "kde", description="score by a two-sided density on the ratios instead of by pooling the map"
    )
    density_on: Literal["mean", "mean_and_top"] = Field(
        "mean", description="mean: the ratios; mean_and_top: also the mean of each map's highest share"
    )


class Curvature(Judge):
    """See the module."""

    positive = False  # a network's trace may have the wrong sign

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.options = options

    def timesteps(self, schedule: NoiseSchedule) -> list[int]:
        """The L steps, ascending and evenly spaced between ``start`` and ``stop``."""
        return evenly_spaced(schedule, self.options)

    def num_evaluations(self, model: Diffusion) -> int:  # noqa: ARG002
        """Two per noise level."""
        return 2 * self.options.num_inference_steps

    def measure(self, model: Diffusion, x: Tensor) -> Tensor:
        """-|s|^2 / tr(ds/dx) per level: (B, L, 1, 1), or maps (B, L, H, W) whose mean it is."""
        steps, size = self.timesteps(model.schedule), self.options.probe_size
        x_t, t, _ = at_steps(model, x, steps, noised=self.options.start_from == "noised")
        probe = torch.where(model.noise(tuple(x.shape[1:]), steps[0], _PROBE_REPEAT) >= 0, 1.0, -1.0).to(x)
        epsilon = model.predict_epsilon(x_t, t).double()
        moved = model.predict_epsilon(x_t + size * probe, t).double()
        # s = -epsilon / sqrt(1 - abar), so -|s|^2 / tr(ds/dx) = |epsilon|^2 / (sqrt(1 - abar) tr(depsilon/dx)).
        trace = _row_sum(probe * (moved - epsilon)) / size  # (B L, 1, 1, 1)
        floor = 1e-6 * x[0].numel()
        trace = torch.where(trace.abs() < floor, floor, trace)
        squares = epsilon.square() / (1 - model.schedule.alpha_bar(t, epsilon)).sqrt()
        if self.options.maps:
            ratios = squares.mean(1) * (x[0].numel() / trace[:, 0])  # (B L, H, W), mean over channels and pixels below
        else:
            ratios = (_row_sum(squares) / trace)[:, 0]
        return ratios.float().cpu().reshape(len(x), len(steps), *ratios.shape[1:])

    def reconstruct(self, model: Diffusion, x: Tensor) -> Tensor | None:  # noqa: ARG002
        """None: a ratio shows no other image."""
        return None


def _row_sum(values: Tensor) -> Tensor:
    """Sum per row, (N, 1, 1, 1); one axis at a time, since a long single sum is cut up by the number of threads."""
    return values.sum(3, keepdim=True).sum(2, keepdim=True).sum(1, keepdim=True)


def build(options: Options) -> Curvature:
    """The scorer."""
    return Curvature(options)
