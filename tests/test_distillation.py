"""A student does in one evaluation what its teacher's scorer does in many, and is a detector like any other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from raydiff.artifact import write_folder
from raydiff.config import ExperimentConfig, component_options
from raydiff.detector import DiffusionDetector, load_detector
from raydiff.distillation import TEACHER, Teacher, check_teacher, student_config, teacher_in
from raydiff.errors import ArtifactError, ConfigError
from raydiff.experiment import begin_distillation, calibrated, fit_locally, open_run
from raydiff.shards import ShardSet
from raydiff.splits import image_ids, weights_of
from raydiff.tracking import read_metrics

QUICK = ["training.num_steps=16", "training.warmup_steps=2", "training.checkpoint_every=8", "training.validate_every=8"]
SCORERS = [
    {"name": "denoising_error"},
    {"name": "denoising_error", "normalise": "none", "num_repeats": 2, "num_inference_steps": 3},
    {"name": "reconstruction", "num_inference_steps": 4},
    {"name": "reconstruction", "num_inference_steps": 3, "start": "clean", "error": "absolute"},
]


@pytest.fixture(scope="module")
def student_run(run_dir: Path, digit_shards: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("distilled") / "run"
    fit_locally(begin_distillation(run, run_dir, QUICK), run, digit_shards)
    return run


def rescored(detector: DiffusionDetector, shards: ShardSet, fields: dict[str, object]) -> DiffusionDetector:
    made = calibrated(detector.with_scoring(component_options("scorers", fields)), shards)
    assert isinstance(made, DiffusionDetector)
    return replace(made, artifact_digest="0" * 64)


def test_the_student_is_a_calibrated_artefact_that_names_its_teacher(
    student_run: Path, detector: DiffusionDetector, digit_images: Tensor
) -> None:
    student = load_detector(student_run / "artifact")
    assert (detector.num_evaluations, student.num_evaluations) == (8, 1)
    assert student.name == f"{detector.name} distilled"
    assert student.config.distillation is not None
    assert student.config.distillation.teacher == detector.artifact_digest
    assert student.config.distillation.num_evaluations == 8
    assert student.predict(digit_images).anomaly_map is not None
    assert load_detector(student_run / TEACHER).artifact_digest == detector.artifact_digest
    alone = torch.cat([student.score(digit_images[i : i + 1]).image for i in range(5)])
    assert torch.equal(alone, student.score(digit_images).image[:5])


def test_the_student_comes_nearer_to_what_its_teacher_makes_of_an_image(student_run: Path) -> None:
    losses = [line["held_out_loss"] for line in read_metrics(student_run) if "held_out_loss" in line]
    assert losses[-1] < losses[0]


def test_an_interrupted_distillation_ends_with_the_same_weights(
    student_run: Path, run_dir: Path, digit_shards: ShardSet, tmp_path: Path
) -> None:
    run, seen = tmp_path / "run", []

    def stop(line: object) -> None:
        seen.append(line)
        if len(seen) == 3:  # after the checkpoint of step 8
            raise KeyboardInterrupt

    config = begin_distillation(run, run_dir, [*QUICK, "training.log_every=4"])
    with pytest.raises(KeyboardInterrupt):
        fit_locally(config, run, digit_shards, on_metrics=stop)
    resumed = fit_locally(open_run(run, None, resume=True), run, digit_shards)
    assert any(line.get("resumed") and line["step"] == 8 for line in read_metrics(run))
    whole = load_detector(student_run / "artifact")
    assert isinstance(resumed, DiffusionDetector)
    assert isinstance(whole, DiffusionDetector)
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, resumed.network.state_dict()[name]), name


@pytest.mark.parametrize("fields", SCORERS, ids=lambda fields: "-".join(map(str, fields.values())))
def test_a_lesson_shows_what_the_student_will_be_asked(
    fields: dict[str, object], detector: DiffusionDetector, digit_shards: ShardSet, digit_images: Tensor
) -> None:
    """The student's evidence is the error of its guess at the lesson's x_t; a perfect student's is the goal's."""
    teacher = rescored(detector, digit_shards, fields)
    config = student_config(teacher)
    options = component_options("scorers", config.scoring)
    student = teacher.with_scoring(options)
    assert student.num_evaluations == 1
    (step,) = student.scorer.timesteps(teacher.model.schedule)
    noise = teacher.model.noise(tuple(digit_images.shape[1:]), step).expand_as(digit_images)
    lesson = teacher.scorer.lesson(teacher.model, digit_images, noise, teacher.statistics)  # type: ignore[attr-defined]
    assert lesson.t.tolist() == [step] * len(digit_images)
    shown: list[Tensor] = []

    def perfect(x_t: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        shown.append(x_t.clone())
        return lesson.goal

    model = replace(teacher.model, denoiser=perfect, prediction_type="sample", chunk_size=len(digit_images))
    evidence = student.scorer.measure(model, digit_images)
    assert torch.equal(shown[0], lesson.x_t)
    difference = lesson.goal - digit_images
    expected = difference.abs() if fields.get("error") == "absolute" else difference.square()
    torch.testing.assert_close(evidence, expected.mean(1, keepdim=True))


def test_a_reconstruction_lesson_is_the_teachers_own_reconstruction(
    detector: DiffusionDetector, digit_shards: ShardSet, digit_images: Tensor
) -> None:
    teacher = rescored(detector, digit_shards, SCORERS[2])
    step = teacher.scorer.timesteps(teacher.model.schedule)[0]
    noise = teacher.model.noise(tuple(digit_images.shape[1:]), step).expand_as(digit_images)
    lesson = teacher.scorer.lesson(teacher.model, digit_images, noise, {})  # type: ignore[attr-defined]
    assert torch.equal(lesson.goal, teacher.scorer.reconstruct(teacher.model, digit_images))


def test_the_loss_is_zero_for_a_student_that_answers_the_goal_and_trains_the_others(
    detector: DiffusionDetector, digit_images: Tensor
) -> None:
    noise = torch.randn(digit_images.shape, generator=torch.Generator().manual_seed(0))
    teacher = Teacher(detector)
    lesson = detector.scorer.lesson(detector.model, digit_images, noise, detector.statistics)  # type: ignore[attr-defined]
    abar = detector.model.schedule.alpha_bar(lesson.t, lesson.x_t)
    epsilon = (lesson.x_t - abar.sqrt() * lesson.goal) / (1 - abar).sqrt()
    assert float(teacher.loss(lambda *_: epsilon, digit_images, noise).max()) < 1e-8
    network = teacher.initialised(detector.network)
    loss = teacher.loss(network, digit_images, noise)
    assert loss.shape == (len(digit_images),)
    loss.mean().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in network.parameters())
    network.zero_grad(set_to_none=True)


def refused(teacher: DiffusionDetector, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        student_config(teacher, overrides)
    return str(caught.value)


def test_what_cannot_be_distilled_is_refused(detector: DiffusionDetector, digit_shards: ShardSet) -> None:
    assert "denoising_error or reconstruction" in refused(rescored(detector, digit_shards, {"name": "inversion"}))
    one = rescored(detector, digit_shards, {"name": "denoising_error", "num_inference_steps": 1})
    assert "needs one network evaluation per score already" in refused(one)
    assert "has no calibrated artefact" in refused(replace(detector, calibration=None))
    assert refused(detector, "denoiser.block_out_channels=[8, 8]").startswith("--set denoiser: ")
    assert refused(detector, "seed=4").startswith("--set seed: ")
    assert refused(detector, "scoring.start=0.5").startswith("--set scoring: the student is asked once, at step 385")
    asking = ("start_from=clean", "num_repeats=2", "classes=minimum")
    assert all(refused(detector, f"scoring.{one}").startswith("--set scoring: the student is") for one in asking)
    image = rescored(detector, digit_shards, SCORERS[2])
    assert "in the way that its teacher's scorer decides" in refused(image, "scoring.error=absolute")
    for split in ("data.calibration_fraction=0.45", "data.split_seed=7"):
        assert "would be calibrated on images that its teacher was trained on" in refused(detector, split)
    for sight in ("data.image_size=[16, 16]", "data.resize=pad", "data.align=principal_axis"):
        assert refused(detector, sight).startswith(f"--set {sight.partition('=')[0]}: a student sees what")
    assert student_config(detector, ["scoring.pooling=mean"]).scoring.model_dump()["pooling"] == "mean"


def test_a_run_that_looked_for_anomalies_is_distilled_without_looking(detector: DiffusionDetector) -> None:
    trusting = replace(detector, config=detector.config.override({"contamination.max_share": 0.1}))
    assert refused(trusting).endswith("its teacher saw; set contamination.max_share to 0")
    for overrides in (["contamination.max_share=0"], {"contamination.max_share": 0}):
        assert student_config(trusting, overrides).contamination.max_share == 0
    few = replace(detector, config=trusting.config.override({"data.calibration_fraction": 0}))
    assert "fit the teacher with it above 0, or set cross_fitting.folds" in refused(few)
    assert "the teacher saw all images" in refused(few, "data.calibration_fraction=0.2", "contamination.max_share=0")
    known = student_config(few, ["cross_fitting.folds=0", "contamination.max_share=0"])
    assert not known.needs_folds


def test_what_a_teacher_took_for_anomalies_its_student_leaves_out(
    tiny_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path
) -> None:
    looking = {"contamination": {"max_share": 0.1, "cutoff": 1.0}, "cross_fitting": {"folds": 2, "num_steps": 8}}
    shards = {"data.shards": digit_shards.uri}
    teacher = fit_locally(tiny_config.override({**looking, **shards}), tmp_path / "teacher", digit_shards)
    suspects = teacher.provenance["suspects"]
    asked = set(suspects) & set(image_ids(digit_shards, "calibration"))
    assert asked < set(suspects)  # some of both splits
    assert asked
    config = begin_distillation(tmp_path / "student", tmp_path / "teacher", [*QUICK, "contamination.max_share=0"])
    student = fit_locally(config, tmp_path / "student", digit_shards)
    assert student.provenance["suspects"] == suspects
    assert set(weights_of(tmp_path / "student", digit_shards).by_id) == set(suspects) - asked
    assert student.calibration is not None
    assert teacher.calibration is not None
    for field in ("num_images", "num_removed"):
        assert getattr(student.calibration.threshold, field) == getattr(teacher.calibration.threshold, field), field
    again = calibrated(load_detector(tmp_path / "student" / "artifact"), digit_shards)  # with no run at hand
    assert again.calibration is not None
    assert again.calibration.threshold == student.calibration.threshold


def test_a_teacher_asked_at_the_last_step_has_a_student(detector: DiffusionDetector, digit_shards: ShardSet) -> None:
    teacher = rescored(detector, digit_shards, {"name": "denoising_error", "num_inference_steps": 2, "stop": 1.0})
    assert check_teacher(teacher)[1] == 2
    student = teacher.with_scoring(student_config(teacher).scoring)
    assert student.scorer.timesteps(teacher.model.schedule) == [len(teacher.model.schedule) - 1]


def test_a_student_without_its_teacher_is_refused(detector: DiffusionDetector, tmp_path: Path) -> None:
    config = student_config(detector)
    with pytest.raises(ConfigError, match="the folder holds no teacher; begin a student with: raydiff distill RUN"):
        teacher_in(tmp_path, config)
    replace(detector, provenance={**detector.provenance, "other": True}).save(tmp_path / TEACHER)
    with pytest.raises(ArtifactError, match="start the distillation anew"):
        teacher_in(tmp_path, config)
    assert teacher_in(tmp_path, ExperimentConfig()) is None


def test_a_teacher_of_an_older_raydiff_keeps_its_digest(detector: DiffusionDetector, tmp_path: Path) -> None:
    """Its config.json lacks what came later; saved anew it would be another artefact."""
    files = detector.files()
    content = json.loads(files["config.json"])
    del content["experiment"]["distillation"]
    digest = write_folder(tmp_path / "old", "artifact", files | {"config.json": json.dumps(content).encode()})
    config = begin_distillation(tmp_path / "run", tmp_path / "old")
    teacher = teacher_in(tmp_path / "run", config)
    assert teacher is not None
    assert teacher.detector.artifact_digest == digest
