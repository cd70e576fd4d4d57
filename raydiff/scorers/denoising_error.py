"""``denoising_error``: how badly the denoiser predicts at several noise levels, all of them in one batch.

Each image is noised to K steps with noise that all images share, or only scaled as that step scales it, and the squared
error of the predicted clean image is one residual map per step. Without noise nothing small is drowned (D3AD's clean
start, of which docs/LOG.md has what it does here). K evaluations, none of which waits for another: the cheapest way to
use a diffusion model.
Sources: the training loss as a score goes back to Graham et al. 2023 (arXiv:2211.07740); z-scores per step and pixel
and two-sided densities answer the reversals that Mahmood et al. 2021 (arXiv:2010.13132) and Heng et al. 2024
(arXiv:2402.11478) describe.

With ``early_exit`` an image is asked at some of the steps first, and at the others only where it is not surely
normal yet (:mod:`raydiff.scorers._early_exit`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from raydiff.contracts import Lesson, Scores
from raydiff.core.diffusion import Diffusion
from raydiff.core.sampler import ddim_sample
from raydiff.core.schedule import NoiseSchedule
from raydiff.errors import ConfigError
from raydiff.judgement import Judge
from raydiff.scorers._early_exit import fit_exits, in_stages, mean_evaluations
from raydiff.scorers._steps import StepOptions, at_steps, evenly_spaced

__all__ = ["DenoisingError", "Options", "build"]


class Options(StepOptions):
    """Which steps are looked at, and how often."""

    name: Literal["denoising_error"] = "denoising_error"
    num_repeats: int = Field(1, ge=1, description="noise draws per step, averaged")
    start_from: Literal["noised", "clean"] = Field(
        "noised", description="clean: the image is only scaled, so that no noise hides what is looked for"
    )
    classes: Literal["unlabelled", "minimum"] = Field(
        "unlabelled", description="conditional denoisers: score without a label, or by the class that fits best"
    )
    early_exit: float | None = Field(
        None, gt=0, lt=1, description="stop once surely normal; share of normals for which that may be wrong; try 0.05"
    )
    exit_fpr: float = Field(
        0.05,
        gt=0,
        lt=1,
        description="with early_exit: false-positive rate of the threshold that surely normal is well below",
    )

    @model_validator(mode="after")
    def _check_exit(self) -> Self:
        if self.early_exit is None:
            return self
        if self.num_inference_steps < 2:
            raise ValueError("early_exit needs num_inference_steps of 2 or more; raise it, or leave early_exit out")
        if self.density != "none":
            raise ValueError("early_exit pools maps, of as many steps as were asked; set density to none")
        if self.classes != "unlabelled":
            raise ValueError("early_exit asks without a label; set classes to unlabelled")
        return self


class DenoisingError(Judge):
    """See the module."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.options = options

    def timesteps(self, schedule: NoiseSchedule) -> list[int]:
        """The K steps, ascending and evenly spaced between ``start`` and ``stop``."""
        return evenly_spaced(schedule, self.options)

    def num_evaluations(self, model: Diffusion) -> int:
        """K x repeats, times the classes when each is tried; with ``early_exit`` at most."""
        return self.options.num_inference_steps * self.options.num_repeats * len(self._conditions(model))

    def measure(self, model: Diffusion, x: Tensor) -> Tensor:
        """Squared error of the predicted clean image, mean over channels, (B, K, H, W)."""
        return self.measure_steps(model, x, self.timesteps(model.schedule))

    def by_step(self, model: Diffusion) -> bool:
        """Yes, but where the class that fits best is sought, over all steps."""
        return len(self._conditions(model)) == 1

    def measure_steps(self, model: Diffusion, x: Tensor, steps: list[int]) -> Tensor:
        """The same at other steps."""
        repeats = range(self.options.num_repeats)
        per_class = [
            torch.stack([self._errors(model, x, steps, repeat, condition) for repeat in repeats]).mean(0)
            for condition in self._conditions(model)
        ]
        if len(per_class) == 1:
            return per_class[0]
        errors = torch.stack(per_class)  # (classes, B, K, H, W)
        best = torch.from_numpy(errors.detach().double().numpy().mean((2, 3, 4)).argmin(0))  # (B,)
        return errors[best, torch.arange(len(x))]

    @property
    def stops_early(self) -> bool:
        """Whether images may be asked at fewer steps than K."""
        return self.options.early_exit is not None

    def score(
        self, model: Diffusion, x: Tensor, statistics: Mapping[str, Tensor], image_size: tuple[int, int]
    ) -> Scores:
        """:meth:`judge` of :meth:`measure`, bit for bit, without measuring what it does not look at."""
        steps = self.timesteps(model.schedule)

        def measured(rows: Tensor, some: list[int]) -> Tensor:
            return self.measure_steps(model, x[rows.to(x.device)], [steps[i] for i in some])

        return in_stages(len(x), len(steps), measured, self._at(statistics, image_size), statistics)

    def mean_evaluations(self, statistics: Mapping[str, Tensor]) -> float | None:
        """NFE of the calibration normals in the mean; None where nothing stops early."""
        steps = mean_evaluations(statistics)
        return None if steps is None else steps * self.options.num_repeats

    def fit(self, evidence: Tensor) -> dict[str, Tensor]:
        """As every judge; with ``early_exit`` also where to stop."""
        statistics = super().fit(evidence)
        error = self.options.early_exit
        if error is None:
            return statistics
        judged = self._at(statistics, (1, 1))  # the maps are not looked at
        return statistics | fit_exits(evidence, judged, error=error, rate=self.options.exit_fpr)

    def fit_key(self) -> tuple[object, ...]:
        """As every judge; with ``early_exit`` also what the exits, and the scores before them, come from."""
        options = self.options
        if options.early_exit is None:
            return super().fit_key()
        judging = (options.sided, options.blur, options.pooling, options.pooling_share)
        return *super().fit_key(), options.early_exit, options.exit_fpr, *judging

    def judge(self, evidence: Tensor, statistics: Mapping[str, Tensor], image_size: tuple[int, int]) -> Scores:
        """As every judge; with ``early_exit`` from as many of the steps as each image needs."""
        if not self.stops_early:
            return super().judge(evidence, statistics, image_size)
        judged = self._at(statistics, image_size)
        kept = evidence.detach()
        return in_stages(
            len(kept), kept.shape[1], lambda rows, some: kept[rows][:, some], judged, statistics
        )  # fmt: skip

    def surrogate(self, evidence: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
        """As every judge; with ``early_exit`` of the steps that :meth:`judge` looks at."""
        every = super().surrogate
        if not self.stops_early:
            return every(evidence, statistics)

        def judged(part: Tensor, some: list[int]) -> Scores:
            return Scores(every(part, _at_some(statistics, some)))

        count, steps = evidence.shape[:2]
        return in_stages(count, steps, lambda rows, some: evidence[rows][:, some], judged, statistics).image

    def _at(
        self, statistics: Mapping[str, Tensor], image_size: tuple[int, int]
    ) -> Callable[[Tensor, list[int]], Scores]:
        """The judgement of evidence at some of the steps."""
        every = super().judge

        def judged(evidence: Tensor, some: list[int]) -> Scores:
            return every(evidence, _at_some(statistics, some), image_size)

        return judged

    def reconstruct(self, model: Diffusion, x: Tensor) -> Tensor | None:
        """Diffuse to the highest step and denoise down the same steps, without a label (not part of the score)."""
        steps = sorted(set(self.timesteps(model.schedule)), reverse=True)
        t = torch.full((len(x),), steps[0], dtype=torch.int64)
        start = model.schedule.add_noise(x, t, model.noise(tuple(x.shape[1:]), steps[0]).to(x))
        return ddim_sample(model.predict, model.schedule, start, steps, model.prediction_type)

    def in_one(self, schedule: NoiseSchedule) -> Options:
        """One evaluation at the middle one of the K steps."""
        steps = self.timesteps(schedule)
        last = len(schedule) - 1
        start = min(steps[len(steps) // 2], last - 0.25) / last  # below 1, which rounds to the last step
        stop = max(self.options.stop, min(1.0, start + 0.01))
        once = {"num_inference_steps": 1, "num_repeats": 1, "classes": "unlabelled", "start": start, "stop": stop}
        once["early_exit"] = None
        return self.options.model_copy(update=once)

    def lesson(self, model: Diffusion, x: Tensor, noise: Tensor, statistics: Mapping[str, Tensor]) -> Lesson:
        """All K predicted clean images as one, from the image noised to the middle step.

        The score is a mean over steps of z-scored squared errors. Their common part is the error of the mean predicted
        image in which each step counts by one over the root of its error's deviation among normals: what the student
        predicts. What differs between the draws, which is noise to the score, is left out.

        Raises:
            ConfigError: the score tries each class, which one evaluation cannot.
        """
        if len(self._conditions(model)) > 1:
            raise ConfigError(
                "scoring.classes is minimum, which asks once per class; set it to unlabelled, calibrate, and distil"
            )
        steps = self.timesteps(model.schedule)
        guesses = torch.zeros_like(x)
        weights = _shares(statistics, len(steps)).to(x)
        for repeat in range(self.options.num_repeats):
            x_t, t, _ = at_steps(model, x, steps, repeat, noised=self._noised)
            predicted = model.predict_x0(x_t, t).reshape(len(x), len(steps), *x.shape[1:])
            guesses += torch.einsum("k,bkchw->bchw", weights, predicted) / self.options.num_repeats
        middle = torch.full((len(x),), steps[len(steps) // 2], dtype=torch.int64)
        seen = noise if self._noised else torch.zeros_like(noise)
        return Lesson(model.schedule.add_noise(x, middle, seen), middle, guesses)

    @property
    def _noised(self) -> bool:
        return self.options.start_from == "noised"

    def _conditions(self, model: Diffusion) -> list[int | None]:
        if model.num_classes is None or self.options.classes == "unlabelled":
            return [None]
        return list(range(model.num_classes))

    def _errors(self, model: Diffusion, x: Tensor, steps: list[int], repeat: int, condition: int | None) -> Tensor:
        """(B, K, H, W) for one noise draw per step."""
        x_t, t, repeated = at_steps(model, x, steps, repeat, noised=self._noised)
        labels = None if condition is None else torch.full_like(t, condition)
        difference = model.predict_x0(x_t, t, labels) - repeated
        return difference.square().mean(1).cpu().reshape(x.shape[0], len(steps), *x.shape[2:])


def _shares(statistics: Mapping[str, Tensor], count: int) -> Tensor:
    """What each step counts, (K,), summing to 1; the same for all where errors are not z-scored."""
    if "deviation" not in statistics:
        return torch.full((count,), 1 / count)
    inverse = statistics["deviation"].double().mean((1, 2)).rsqrt()
    return (inverse / inverse.sum()).float()


def _at_some(statistics: Mapping[str, Tensor], some: list[int]) -> dict[str, Tensor]:
    """What evidence at some of the steps is z-scored with."""
    return {name: statistics[name][some] for name in ("mean", "deviation") if name in statistics}


def build(options: Options) -> DenoisingError:
    """The scorer."""
    return DenoisingError(options)
