"""The nouns as types: what passes between the parts, and what each kind of component must do.

Images are float32 in [-1, 1], shape (B, C, H, W). Steps ``t`` are 0-based int64. A higher score is more anomalous.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, Self, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raydiff.config import Options
from raydiff.core.diffusion import Diffusion
from raydiff.core.schedule import NoiseSchedule

__all__ = [
    "Baseline",
    "Dataset",
    "DistillableScorer",
    "Entry",
    "Lesson",
    "Perturbation",
    "Perturbed",
    "Prediction",
    "Scorer",
    "Scores",
    "Space",
    "Split",
    "StepScorer",
    "TrainedSpace",
]

Split = Literal["train", "calibration", "test"]


@dataclass(frozen=True)
class Entry:
    """One image of a data set, not read yet.

    ``image_id`` is unique in the data set and stable between runs and machines. A data set has the splits ``train``
    (normal images only) and ``test``; ``calibration`` is cut from ``train`` when shards are written. ``defect`` is
    ``"good"`` for a normal image. ``size`` is the encoded size in bytes (an estimate will do). ``fingerprint`` changes
    with the image's and its mask's content, so that changed files are written to shards again (size and modification
    time will do); empty where the content cannot change. No digest of the data depends on it.
    """

    image_id: str
    split: Split
    class_name: str
    defect: str
    is_anomaly: bool
    size: int
    fingerprint: str = ""


class Dataset(Protocol):
    """Built by ``datasets/<name>.py: build(options)``, which checks files and counts and raises ``DataError``.

    It can be pickled to a worker, and both methods are deterministic.
    """

    def entries(self) -> list[Entry]:
        """Every image, in a fixed order; lists files and opens none of them."""
        ...

    def read(self, entry: Entry) -> tuple[bytes, bytes | None]:
        """The bytes of an image file (PNG, JPEG, ...) and of its mask's, or None where it has none.

        Raises:
            DataError: the file cannot be read; the message names it.
        """
        ...


@dataclass(frozen=True)
class Scores:
    """Raw anomaly scores: ``image`` (B,), ``map`` (B, 1, H, W) or None; unbounded, higher is more anomalous."""

    image: Tensor
    map: Tensor | None = None

    @staticmethod
    def concatenate(parts: list[Scores]) -> Scores:
        """Join batches along the first axis."""
        maps = [part.map for part in parts if part.map is not None]
        return Scores(torch.cat([part.image for part in parts]), torch.cat(maps) if maps else None)


@dataclass(frozen=True)
class Prediction:
    """Verdicts for a batch.

    ``pred_score`` (B,), ``pred_label`` (B,) bool, ``p_value`` (B,) in (0, 1] (share of calibration normals at least as
    anomalous), ``anomaly_map`` (B, 1, H, W), ``pred_mask`` (B, 1, H, W) bool, ``reconstruction`` (B, C, H, W) in
    [-1, 1]: the last three are None where the detector has none.
    """

    pred_score: Tensor
    pred_label: Tensor
    p_value: Tensor
    anomaly_map: Tensor | None = None
    pred_mask: Tensor | None = None
    reconstruction: Tensor | None = None


class Space(Protocol):
    """Built by ``spaces/<name>.py: build(options, channels=, image_size=)``.

    A space that learns is fitted once per run, on training images, before the denoiser is trained; what it learnt (and
    any pretrained weights it uses) is its state, so that an artefact needs nothing else to be loaded.
    """

    shape: tuple[int, int, int]
    """(C, H, W) of what is diffused."""

    num_fit_images: int
    """How many training images :meth:`fit` wants at most; 0 for a space that has nothing to learn."""

    costly: bool
    """Whether encoding takes so long that training should remember what it gave."""

    pretrained: str | None
    """The name of the pretrained weights in it, for the mark beside its figures; None without."""

    def check(self) -> None:
        """See that it can be fitted here; from then on pretrained weights are in :meth:`state`, before any fit.

        Raises:
            ConfigError: it needs a file that is not there; says how to get it.
        """
        ...

    def fit(self, images: Tensor) -> None:
        """Learn from normal training images, (n, C, H, W); depends on them alone."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """(B, C, H, W) images in [-1, 1] to (B, *shape), on the device of ``images``.

        Row i depends on ``images[i]`` alone, bit for bit. Gradients flow back to images that ask for them.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor | None:
        """Back to images in [-1, 1], or None where there is no way back."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What must be saved with the artefact; empty for a fixed space."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state` gave."""
        ...


@runtime_checkable
class TrainedSpace(Space, Protocol):
    """A :class:`Space` whose fit is a training, and says how far it is. Optional.

    Its options have ``num_steps``; a ``seed`` of None becomes the run's. Benchmarks share fits of ``LearntOptions``.
    """

    def fit_with_progress(self, images: Tensor, report: Callable[[Mapping[str, Any]], None]) -> None:
        """:meth:`fit`, with numbers now and then.

        ``report`` gets ``space_step`` of ``space_steps``, ``space_loss`` and ``space_seconds`` since it began.
        """
        ...


@runtime_checkable
class CompilableSpace(Space, Protocol):
    """A :class:`Space` that calls a network to encode, which may be compiled. Optional."""

    def compiled(self, quick: Callable[[nn.Module], nn.Module]) -> Self:
        """A copy of the fitted space that calls ``quick`` of its network; its state is the same."""
        ...


class Scorer(Protocol):
    """Built by ``scorers/<name>.py: build(options)``. What it learns travels as ``statistics``.

    Scoring is cut in two, so that settings that need no network can be changed on measured evidence:
    ``measure`` costs network evaluations, ``judge`` does not.
    """

    def timesteps(self, schedule: NoiseSchedule) -> list[int]:
        """The steps that the network is asked at.

        Raises:
            ConfigError: the schedule has too few steps for the options; asked for before training starts.
        """
        ...

    def check(self, num_conditions: int | None, space: str) -> None:
        """See that it can work with the denoiser that there will be; asked for before training starts.

        Args:
            num_conditions: how many labels the denoiser knows, None for an unconditional one.
            space: the name of the space that is diffused; the channels of any but ``pixel`` are no image's.

        Raises:
            ConfigError: it cannot; names the field to change.
        """
        ...

    def num_evaluations(self, model: Diffusion) -> int:
        """NFE: network evaluations per image, counting every class of a conditional model that is tried."""
        ...

    def measure(self, model: Diffusion, x: Tensor) -> Tensor:
        """Evidence per image, float32 (B, K, H, W): one residual map per step. ``x`` is (B, C, H, W) in the space.

        Gradients flow back to ``x`` where ``model.differentiable`` is set.

        A scorer that has numbers and no maps gives (B, K, 1, 1), and its ``Scores.map`` is None.

        Row i depends on ``x[i]`` and the model alone, bit for bit.
        """
        ...

    def fit(self, evidence: Tensor) -> dict[str, Tensor]:
        """Statistics of calibration normals, from their evidence (n, K, H, W)."""
        ...

    def judge(self, evidence: Tensor, statistics: Mapping[str, Tensor], image_size: tuple[int, int]) -> Scores:
        """Scores and maps (at ``image_size``) from evidence (B, K, H, W); row i depends on evidence row i alone.

        Image scores are the same whatever ``image_size``.
        """
        ...

    def surrogate(self, evidence: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
        """``judge``'s image scores (B,) up to rounding, with gradients back to ``evidence``: for attacks."""
        ...

    def reconstruct(self, model: Diffusion, x: Tensor) -> Tensor | None:
        """What the model takes the normal version of ``x`` to be, (B, C, H, W) in the space, or None."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Weights that must travel with the artefact, such as those of a feature network; mostly empty."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state` gave."""
        ...


@runtime_checkable
class StepScorer(Scorer, Protocol):
    """A :class:`Scorer` that may also measure step by step, so that no step is measured twice in a sweep.

    Optional: a sweep measures any other scorer anew for each choice of steps. The options that choose the steps are
    called ``start``, ``stop`` and ``num_inference_steps``; evidence of given steps does not depend on them.
    """

    def by_step(self, model: Diffusion) -> bool:
        """Whether, with these options and this model, evidence of a step depends on that step alone."""
        ...

    def measure_steps(self, model: Diffusion, x: Tensor, steps: list[int]) -> Tensor:
        """Evidence at other steps, (B, K, H, W); at :meth:`timesteps` that of :meth:`measure`, bit for bit.

        Where :meth:`by_step` holds, map k depends on ``steps[k]``, not on the other steps, bit for bit.
        """
        ...


@runtime_checkable
class SequentialScorer(Scorer, Protocol):
    """A :class:`Scorer` that may stop asking the network before :meth:`num_evaluations` are spent.

    Optional. ``judge`` of all evidence says what :meth:`score` says, bit for bit, so thresholds and sweeps, which have
    all evidence, are of the scores as they are. Its options ``early_exit`` and ``exit_fpr`` change no evidence.
    """

    @property
    def stops_early(self) -> bool:
        """Whether, with these options, it does."""
        ...

    def score(
        self, model: Diffusion, x: Tensor, statistics: Mapping[str, Tensor], image_size: tuple[int, int]
    ) -> Scores:
        """Scores of ``x`` (B, C, H, W) in the space; row i depends on ``x[i]`` alone, bit for bit."""
        ...

    def mean_evaluations(self, statistics: Mapping[str, Tensor]) -> float | None:
        """NFE of the calibration normals in the mean; None where nothing stops early."""
        ...


class Lesson(NamedTuple):
    """What a student is shown, and what it is to answer: one row per image."""

    x_t: Tensor
    """(B, C, H, W), as the one-evaluation scorer will show it."""
    t: Tensor
    """(B,) int64, the step it is asked at."""
    goal: Tensor
    """(B, C, H, W), the clean image that it should predict: what the teacher makes of it in many evaluations."""


@runtime_checkable
class DistillableScorer(Scorer, Protocol):
    """A :class:`Scorer` whose evidence another network can learn to give in one evaluation (``raydiff distill``).

    Optional: what cannot be put into one predicted image has no such methods, and is refused.
    """

    def in_one(self, schedule: NoiseSchedule) -> Options:
        """The options of the same scorer with one evaluation: the student's."""
        ...

    def lesson(self, model: Diffusion, x: Tensor, noise: Tensor, statistics: Mapping[str, Tensor]) -> Lesson:
        """What this scorer does with ``model``, the teacher, as one image to predict.

        Args:
            model: the teacher.
            x: (B, C, H, W) in the space, on the device it computes on.
            noise: standard normal, like ``x``, for the student's input.
            statistics: what :meth:`fit` gave for the teacher.
        """
        ...


class Baseline(Protocol):
    """Built by ``baselines/<name>.py: build(options, seed=)``; wrapped in a ``BaselineDetector``.

    Whatever it keeps is tensors: ``state`` and ``load_state`` take the place of pickle. A library model that
    cannot be written as tensors is refitted in ``load_state`` from the training sample kept in ``state``, to the same
    scores bit for bit.
    """

    pretrained: str | None
    """The name of the pretrained weights it uses, for the mark beside its figures; None without."""

    def check(self) -> None:
        """See that it can be fitted here.

        Raises:
            ConfigError: it needs a file that is not there; says how to get it.
        """
        ...

    def fit(self, images: Tensor) -> None:
        """Learn from normal images (n, C, H, W)."""
        ...

    def score(self, images: Tensor) -> Scores:
        """Row i depends on ``images[i]`` and the training images alone, bit for bit."""
        ...

    def state(self) -> dict[str, Tensor]:
        """All that :meth:`load_state` needs, as tensors."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` gave."""
        ...


@dataclass(frozen=True)
class Perturbed:
    """Changed images, uint8 (B, H, W, C), and, of a synthetic anomaly, the pixels that changed, bool (B, H, W)."""

    images: NDArray[np.uint8]
    masks: NDArray[np.bool_] | None = None


class Perturbation(Protocol):
    """Built by ``perturbations/<name>.py: build(options)``: a change of images as they are after decoding.

    A ``corruption`` leaves an image what it is, normal or anomalous: the robustness table counts what it costs. An
    ``anomaly`` makes a normal image anomalous, for choosing between models without test labels.
    """

    @property
    def kind(self) -> Literal["corruption", "anomaly"]:
        """What it does to an image."""
        ...

    def apply(self, images: NDArray[np.uint8], *, severity: int, ids: Sequence[str]) -> Perturbed:
        """New images of the same shape, from uint8 (B, H, W, C) and B ids.

        Row i depends on ``images[i]``, ``ids[i]``, ``severity`` and the options' seed alone. An anomaly changes at
        least one pixel of each image, and marks all that it changes.

        Raises:
            ConfigError: ``severity`` is not 1 (slight) to 5 (heavy).
            ShapeError: the images are not uint8 (B, H, W, 1 or 3), or there is not one id for each.
        """
        ...
