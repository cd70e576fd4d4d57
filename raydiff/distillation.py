"""Distillation: a student network that does in one evaluation what its teacher's scorer does in many.

The student has the teacher's architecture and begins with its weights. For each training image the teacher's scorer
says, as a :class:`raydiff.contracts.Lesson`, what it makes of the image in all its evaluations, put into one predicted
clean image; the student learns to predict that image from one noised copy. Its artefact is one like any other: the same
scorer with one step, calibrated anew, and a config that names the teacher's digest.

The goal is the end of the teacher's own path (Luhman and Luhman 2021, arXiv:2101.02388), not found step by step as in
progressive (Salimans and Ho 2022, arXiv:2202.00512) or consistency distillation (Song et al. 2023, arXiv:2303.01469):
a scorer starts at one known step, a few steps above the image, so the path costs few evaluations and the student need
not learn the levels in between (docs/LOG.md has the comparison).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from raydiff import registry
from raydiff.config import ExperimentConfig, Options, component_options
from raydiff.config.overrides import parse_override
from raydiff.contracts import DistillableScorer, Scorer
from raydiff.core.diffusion import Denoiser, Diffusion
from raydiff.core.objective import diffusion_loss
from raydiff.core.schedule import predict_x0
from raydiff.detector import Detector, DiffusionDetector, load_detector, schedule_of
from raydiff.errors import ArtifactError, ConfigError
from raydiff.judgement import JudgeOptions
from raydiff.storage import Place

__all__ = ["TEACHER", "Teacher", "check_teacher", "student_config", "teacher_in"]

TEACHER = "teacher"
"""The run folder's subfolder for a copy of the teacher's artefact."""


@dataclass(frozen=True, eq=False)
class Teacher:
    """A calibrated diffusion detector as the source of what a student learns."""

    detector: DiffusionDetector

    @property
    def suspects(self) -> Mapping[str, float]:
        """Training and calibration images that it took for anomalies, with what they count: its student's too."""
        return dict(self.detector.provenance.get("suspects", {}))

    def initialised(self, student: nn.Module) -> nn.Module:
        """The student's network, with the teacher's weights."""
        student.load_state_dict(self.detector.network.state_dict())
        return student

    def loss(self, student: Denoiser, latents: Tensor, noise: Tensor) -> Tensor:
        """Squared error of the clean image that the student predicts, mean over its numbers, (B,).

        In units of the noise: times SNR at the student's step, so that learning rates mean what they mean in training.

        Args:
            student: the network in training, or its average.
            latents: (B, C, H, W) in the space, on the network's device.
            noise: standard normal, like ``latents``.
        """
        model = replace(self.detector.model, chunk_size=len(latents))  # rows need not be equal to the bit here
        with torch.autocast(latents.device.type, enabled=False):
            lesson = _distillable(self.detector.scorer, self.detector.config).lesson(
                model, latents, noise, self.detector.statistics
            )
        t = lesson.t.to(latents.device)
        output = student(lesson.x_t, t, _unlabelled(model, t))
        guess = predict_x0(model.schedule, output.float(), lesson.x_t, lesson.t, model.prediction_type)
        weights = model.schedule.snr(lesson.t).float().to(latents.device)
        return diffusion_loss(guess, lesson.goal.clone(), weights)  # the teacher's tensors know no gradients: a copy


def student_config(teacher: Detector, overrides: Sequence[str] | Mapping[str, Any] = ()) -> ExperimentConfig:
    """The config of a student: the teacher's with one evaluation per score and half the learning rate.

    Args:
        teacher: calibrated, and saved: its digest goes into the config.
        overrides: ``path=value``, as of ``--set``, or values by path.

    Raises:
        ConfigError: the teacher is no diffusion detector, is not calibrated, needs one evaluation already, or its
            scorer cannot be distilled; or an override makes the student another network, or need more than one.
    """
    if not isinstance(teacher, DiffusionDetector):
        raise ConfigError(f"{teacher.name} is no diffusion detector; there is nothing to distil")
    if teacher.calibration is None or teacher.artifact_digest is None:
        raise ConfigError(f"{teacher.name} has no calibrated artefact; finish its run with raydiff fit --resume")
    scorer, evaluations = check_teacher(teacher)
    own = teacher.config
    given = overrides if isinstance(overrides, Mapping) else dict(parse_override(text) for text in overrides)
    config = own.override(  # in one step: what a student cannot have of its teacher's config may be among them
        {
            "scoring": scorer.in_one(teacher.model.schedule).model_dump(mode="json"),
            "training.learning_rate": own.training.learning_rate / 2,
            "distillation": {"teacher": teacher.artifact_digest, "num_evaluations": evaluations},
            **given,
        }
    )
    _check(config, teacher)
    return config


def check_teacher(teacher: DiffusionDetector) -> tuple[DistillableScorer, int]:
    """The scorer of a detector, trained or not, that can be distilled, and its evaluations per score.

    Raises:
        ConfigError: it cannot, or needs one evaluation already.
    """
    scorer = _distillable(teacher.scorer, teacher.config)
    evaluations = scorer.num_evaluations(teacher.model)
    if evaluations < 2:
        raise ConfigError(
            f"{teacher.name} needs one network evaluation per score already; distil a run with more of them, or one"
            " whose scoring.num_inference_steps is higher"
        )
    component_options("scorers", scorer.in_one(teacher.model.schedule).model_dump(mode="json"))
    return scorer, evaluations


def teacher_in(run_dir: Place, config: ExperimentConfig, *, device: str = "cpu") -> Teacher | None:
    """The teacher whose copy lies in a student's run; None for a run that is no student's.

    Raises:
        ConfigError: a config with ``distillation`` in a folder that ``raydiff distill`` did not begin.
        ArtifactError: the copy is damaged, or another teacher's.
    """
    if config.distillation is None:
        return None
    place = run_dir / TEACHER
    if not place.exists():
        raise ConfigError(
            f"{run_dir}: distillation is set and the folder holds no teacher; begin a student with: raydiff distill RUN"
        )
    detector = load_detector(place, device=device)
    if detector.artifact_digest != config.distillation.teacher or not isinstance(detector, DiffusionDetector):
        raise ArtifactError(
            f"{place}: is {(detector.artifact_digest or '')[:12]} and distillation.teacher"
            f" {config.distillation.teacher[:12]}; start the distillation anew"
        )
    return Teacher(detector)


def _distillable(scorer: Scorer, config: ExperimentConfig) -> DistillableScorer:
    if not isinstance(scorer, DistillableScorer):
        if config.objective.prediction_type == "deviation":
            raise ConfigError(
                f"scoring is {config.scoring.name}, which has nothing to distil: it works with one evaluation, so set"
                " scoring.num_inference_steps to 1 in a new fit"
            )
        can = [name for name in registry.names("scorers") if hasattr(_built(name), "lesson")]
        raise ConfigError(
            f"scoring is {config.scoring.name}, which does not come down to one predicted image; raydiff distill takes"
            f" {' or '.join(can)}: calibrate the run with one of them first"
        )
    return scorer


def _built(name: str) -> Scorer:
    scorer: Scorer = registry.build("scorers", registry.component("scorers", name).Options())
    return scorer


def _check(config: ExperimentConfig, teacher: DiffusionDetector) -> None:
    """See that the student is the teacher's kind of network, in its space, and needs one evaluation."""
    for path in ("space", "tiles", "denoiser", "schedule", "objective.prediction_type", "objective.condition", "seed"):
        given, own = (_at(c, path) for c in (config, teacher.config))
        if given != own:
            raise ConfigError(
                f"--set {path}: a student has its teacher's {path}, since it begins with its weights; leave it out"
            )
    for path in ("image_size", "channels", "resize", "align", "aligned_width"):
        if getattr(config.data, path) != getattr(teacher.config.data, path):
            raise ConfigError(f"--set data.{path}: a student sees what its teacher sees; leave it out")
    if config.data.calibration_fraction and not teacher.config.data.calibration_fraction:
        raise ConfigError(
            "--set data.calibration_fraction: the teacher saw all images, also those that would be set aside; fit the"
            " teacher with it above 0"
        )
    for path in ("calibration_fraction", "split_seed"):
        if getattr(config.data, path) != getattr(teacher.config.data, path):
            raise ConfigError(
                f"--set data.{path}: the student would be calibrated on images that its teacher was trained on; leave"
                " it out, or fit the teacher with it"
            )
    scorer: Scorer = registry.build("scorers", config.scoring)
    count = scorer.num_evaluations(teacher.model)
    wanted = _distillable(teacher.scorer, teacher.config).in_one(schedule_of(config))
    step = _timesteps(config, wanted)
    if count != 1 or scorer.timesteps(schedule_of(config)) != step or _asked(config.scoring) != _asked(wanted):
        raise ConfigError(
            f"--set scoring: the student is asked once, at step {step[0]}, and in the way that its teacher's scorer"
            " decides; only how evidence is judged (normalise, blur, pooling, density) may differ"
        )


def _asked(options: Options) -> dict[str, object]:
    """How a scorer asks its network, but for the step: its options that are neither of judgement nor numbers."""
    asked = options.model_dump(exclude=set(JudgeOptions.model_fields))
    return {name: value for name, value in asked.items() if not isinstance(value, float)}


def _timesteps(config: ExperimentConfig, options: object) -> list[int]:
    scorer: Scorer = registry.build("scorers", options)
    return scorer.timesteps(schedule_of(config))


def _at(config: ExperimentConfig, path: str) -> object:
    value: object = config
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _unlabelled(model: Diffusion, t: Tensor) -> Tensor | None:
    """The label "none" for a conditional network, as scorers that ask for no class give it."""
    return None if model.num_classes is None else torch.full_like(t, model.num_classes)
