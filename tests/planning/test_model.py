from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from raydiff.errors import ConfigError
from raydiff.planning.advice import advice
from raydiff.planning.model import Plan, make_plan
from raydiff.planning.profile import Profile
from raydiff.planning.target import Run
from raydiff.planning.words import duration, plan_words, profile_words, size
from tests.planning.conftest import STUDENT, run_on, target, with_images


def planned(profile: Profile, workers: int = 1, fields: dict[str, Any] | None = None, **options: Any) -> Plan:
    run = run_on(profile, workers, **(fields or {}))
    return make_plan(profile, run, target(profile, workers=workers, **options))


GPUS = {"gpus": 1, "gpu_type": "h100", "cpus": 64}
LIMITS: dict[str, dict[str, Any]] = {
    "compute": {},
    "network": {"nodes": 16, "workers": 16, "network_gbit": 0.1, **GPUS},
    "decode": {"fields": {"data__cache_mb": 0}, **GPUS, "cpus": 1},
    "storage": {"fields": {"data__cache_mb": 0}, "storage_mb": 10.0, **GPUS},
    "checkpoints": {"fields": {"training__checkpoint_every": 1}, **GPUS},
}


@pytest.mark.parametrize("bottleneck", LIMITS)
def test_the_bottleneck_is_what_was_made_slow(round_profile: Profile, bottleneck: str) -> None:
    plan = planned(round_profile, **LIMITS[bottleneck])
    assert plan.bottleneck == bottleneck
    assert advice(plan)
    assert f"Bottleneck: {bottleneck}." in plan_words(plan)


def test_advice_on_checkpoints_brings_them_to_a_twentieth(round_profile: Profile) -> None:
    plan = planned(round_profile, **LIMITS["checkpoints"])
    every = int(advice(plan)[0].partition("training.checkpoint_every to ")[2].split()[0])
    better = planned(round_profile, **LIMITS["checkpoints"] | {"fields": {"training__checkpoint_every": every}})
    assert better.shares["checkpoints"] == pytest.approx(0.05 * better.step.seconds, rel=0.01)


def test_more_requests_than_a_bucket_serves_are_told(round_profile: Profile) -> None:
    fields = {"data__cache_mb": 0, "training__batch_size": 4096}
    many = planned(round_profile, 512, fields, nodes=64, storage_mb=1e6, **GPUS | {"gpus": 8})
    assert any("requests/s for a prefix" in sentence for sentence in advice(many)) == (many.network.groups_per_s > 5500)
    assert many.network.groups_per_s > 5500
    assert not any("for a prefix" in sentence for sentence in advice(planned(round_profile, fields=fields, **GPUS)))


def test_advice_on_decoding_names_the_cores_that_keep_up(round_profile: Profile) -> None:
    plan = planned(round_profile, **LIMITS["decode"])
    cores = int(advice(plan)[0].partition("about ")[2].split()[0])
    assert planned(round_profile, **LIMITS["decode"] | {"cpus": cores}).bottleneck == "compute"
    assert planned(round_profile, **LIMITS["decode"] | {"cpus": cores - 2}).bottleneck == "decode"


def test_what_does_not_fit_is_told_with_a_remedy_that_fits(round_profile: Profile) -> None:
    large = replace(round_profile, saved_bytes={2: 10**9, 3: 1_500_000_000})
    plan = planned(large, gpus=1, gpu_type="t4")
    assert "DOES NOT FIT" in advice(plan)[0]
    passes = int(advice(plan)[0].partition("training.accumulation_steps to ")[2].split()[0])
    fits = planned(large, fields={"training__accumulation_steps": passes}, gpus=1, gpu_type="t4")
    assert fits.device.total < 16e9
    assert "DOES NOT FIT" not in plan_words(fits)
    huge = planned(replace(round_profile, num_parameters=10**9), gpus=1, gpu_type="t4")
    assert "smaller denoiser, or" in advice(huge)[0]


def test_fewer_images_at_once_are_no_remedy_where_they_do_not_help(round_profile: Profile) -> None:
    """13.2 GB of weights and their like, and 2.6 GB more while AdamW steps, beside CUDA's 0.6: more than 16."""
    weighty = replace(round_profile, num_parameters=660_000_000, saved_bytes={2: 40_000_000, 3: 60_000_000})
    plan = planned(weighty, gpus=1, gpu_type="t4")
    assert plan.device.total > 16e9
    assert "accumulation_steps" not in advice(plan)[0]
    assert "DOES NOT FIT" in advice(plan)[0]
    wide = replace(round_profile, saved_bytes={2: 40 * 10**9, 3: 60 * 10**9})  # one image is too many
    assert "training.precision=bfloat16" in advice(planned(wide, gpus=1, gpu_type="t4"))[0]
    narrow = planned(wide, fields={"training__precision": "bfloat16"}, gpus=1, gpu_type="t4")
    assert "smaller denoiser, or a GPU" in advice(narrow)[0]
    uneven = replace(round_profile, saved_bytes={2: 22 * 10**9, 3: 33 * 10**9})  # 11 GB an image, 3 and 2 of 5
    odd = planned(uneven, 2, {"training__batch_size": 5}, gpus=2, gpu_type="t4")
    assert "accumulation_steps" not in advice(odd)[0]  # 3 of them for each of two workers are more than the batch has


def test_windows_too_small_for_many_workers_are_told(round_profile: Profile) -> None:
    fields = {"data__cache_mb": 0, "training__batch_size": 4096}
    small = planned(round_profile, 128, fields, nodes=16, **GPUS | {"gpus": 8})
    assert any("data.shuffle_window=8192 or more" in sentence for sentence in advice(small))
    wide = planned(round_profile, 128, fields | {"data__shuffle_window": 8192}, nodes=16, **GPUS | {"gpus": 8})
    assert not any("shuffle_window" in sentence for sentence in advice(wide))


def test_a_long_calibration_is_told(round_profile: Profile) -> None:
    fields = {"training__num_steps": 100}
    assert any("calibration.max_images" in sentence for sentence in advice(planned(round_profile, fields=fields)))
    fewer = planned(round_profile, fields=fields | {"calibration__max_images": 100})
    assert fewer.time.calibration == pytest.approx(0.4)
    assert not any("calibration.max_images" in sentence for sentence in advice(fewer))


def test_a_calibration_that_holds_much_is_told(round_profile: Profile) -> None:
    large = replace(round_profile, evidence_values=8 * 256 * 256)
    assert any("20,000 images, 251.7 GB where" in sentence for sentence in advice(planned(large)))
    fewer = planned(large, fields={"calibration__max_images": 100})
    assert not any("holds the maps" in sentence for sentence in advice(fewer))


@pytest.mark.parametrize(("limit", "scored"), [(50, 50 * 8), (None, 200 * 8)])
def test_views_are_scored_of_as_many_images_as_the_limit_says(
    round_profile: Profile, limit: int | None, scored: int
) -> None:
    fields = {
        "data__calibration_fraction": 0, "augmentation__rotation": 5.0, "cross_fitting__views": 8,
        "calibration__max_images": limit,
    }  # fmt: skip
    few = with_images(round_profile, num_train=200, num_calibration=0, num_all=260)
    plan = planned(few, fields=fields)
    assert plan.num_calibrated == scored
    assert plan.time.calibration == pytest.approx(scored * 0.004)
    assert plan.host.calibrating == 24 * scored * 8 * 64


def test_a_student_is_planned_with_its_teacher(round_profile: Profile) -> None:
    """Each step and the validation; its space is learnt already."""
    profile = replace(round_profile, space_seconds=1000.0)
    alone, taught = (planned(profile, fields=fields) for fields in ({}, STUDENT))
    assert taught.time.steps == pytest.approx(3 * alone.time.steps)
    assert taught.time.validation == pytest.approx(7 * alone.time.validation)
    assert (alone.time.space, taught.time.space) == (1000.0, 0.0)
    assert taught.device.teacher == 4e6
    words = " ".join(plan_words(taught).split())
    assert "of it the teacher 148, " in words
    assert "teacher makes 6 evaluations of every image" in words
    assert "teacher" not in plan_words(alone)
    assert "space is trained" not in words


def test_a_profile_without_the_size_of_evidence_is_told(round_profile: Profile) -> None:
    assert "calibration takes no memory" in plan_words(planned(replace(round_profile, evidence_values=0)))
    assert "calibration takes no memory" not in plan_words(planned(round_profile))


def test_the_parts_of_the_time_add_up_and_cost_follows(round_profile: Profile) -> None:
    plan = planned(round_profile, fields={"training__num_steps": 1000}, price=3.0)
    time = plan.time
    assert time.steps == pytest.approx(1000 * 0.074)
    assert time.checkpoints == pytest.approx(5 * 0.2)  # every 200 steps; written here, then copied
    assert time.images == pytest.approx(60_000 * 0.002)
    assert time.calibration == pytest.approx(20_000 * 0.004)
    assert time.validation == pytest.approx(5 * 256 * 0.074 / 64 / 3)
    assert plan.cost == pytest.approx(time.total / 3600 * 3.0)
    assert plan.images_per_second == pytest.approx(64 / 0.074)


def test_replicas_for_a_rate(round_profile: Profile) -> None:
    assert planned(round_profile, requests=1000).replicas == 5  # 4 ms each, 0.82 of it served: 4.88
    assert planned(round_profile).replicas is None


def test_assumptions_are_told_where_nothing_was_measured(round_profile: Profile) -> None:
    text = plan_words(planned(round_profile, gpus=1, gpu_type="l4"))
    assert "l4: not measured; 30% of its peak (NVIDIA L4 data sheet" in text
    measured = replace(round_profile, device="cuda", machine="NVIDIA L4", pair=None, device_memory_bytes=24 * 10**9)
    assert "not measured; 30%" not in plan_words(planned(measured, gpus=1))
    assert "times measured on" not in plan_words(planned(measured, gpus=1)) + text
    other = planned(measured, gpus=1, gpu_type="l4")
    assert "the times measured on NVIDIA L4 are not used; leave out --gpu-type" in other.assumptions[0]
    assert "share the 2 core(s)" in plan_words(planned(round_profile, 3))
    unknown = with_images(round_profile, num_train=None)
    run = Run.of(run_on(round_profile, 1).config, unknown, 10**6, 1)
    assert "images like a data set" in plan_words(make_plan(unknown, run, target(unknown)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": 2}, "need a --gpu-type"),
        ({"gpus": 2, "gpu_type": "a1000"}, "--gpu-type a1000: is not in the table; did you mean"),
        (
            {"gpus": 2, "gpu_type": "a100"},
            r"did you mean a100-40gb or a100-80gb\? there are: a10, a100-40gb, .*, v100;",
        ),
        ({"gpus": 2, "gpu_type": "NVIDIA_H100-SXM"}, r"did you mean h100\?"),
        ({"gpus": 2, "gpu_type": "b9"}, r"table; there are: a10, a100-40gb, [^:]*, v100; for another one"),
        ({"gpu_type": "l4"}, "add --gpus G"),
        ({"gpus": 2, "gpu_type": "l4", "workers": 3}, "there are 2; ask for less"),
    ],
)
def test_machines_that_cannot_be_planned_for(round_profile: Profile, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(round_profile, run_on(round_profile, 1), target(round_profile, **options))


def test_more_workers_than_images_in_a_batch_are_refused(round_profile: Profile) -> None:
    with pytest.raises(ConfigError, match=r"--set training.batch_size=65 or more"):
        run_on(round_profile, 65)


def test_how_many_images_must_be_known(round_profile: Profile) -> None:
    unknown = with_images(round_profile, num_train=None)
    with pytest.raises(ConfigError, match="give --images N"):
        run_on(unknown, 1)
    run = Run.of(run_on(round_profile, 1).config, unknown, 1000, 1)
    assert (run.num_train, run.num_calibration, run.num_all) == (750, 250, 1000)


def test_a_plan_is_json(round_profile: Profile) -> None:
    plan = planned(round_profile, 2, gpus=2, gpu_type="h100")
    data = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    assert data["step"]["seconds"] == pytest.approx(plan.step.seconds)
    assert data["target"]["gpu"] == "h100"
    assert data["bottleneck"] == plan.bottleneck


def test_units(round_profile: Profile) -> None:
    assert [size(999), size(1500), size(2.5e13)] == ["999 B", "1.5 kB", "25 TB"]
    assert [duration(3.456), duration(200), duration(8000), duration(2e5)] == ["3.46 s", "3.3 min", "2.2 h", "2.3 days"]
    assert "two processes at once: steps 1.20 times as long" in profile_words(round_profile)


def test_no_image_is_set_aside_where_the_fraction_is_0(round_profile: Profile) -> None:
    config = run_on(round_profile, 1).config
    few = config.override({"data.calibration_fraction": 0})
    run = Run.of(few, round_profile, 1, 1)
    assert (run.num_train, run.num_calibration, run.epochs) == (1, 0, few.training.num_steps * few.training.batch_size)
    plan = make_plan(round_profile, Run.of(few, round_profile, 4, 1), target(round_profile))
    assert "4 training images" in plan_words(plan)
    with pytest.raises(ConfigError, match=r"--images 1: data.calibration_fraction \(0\.\d+\) sets 1 aside"):
        Run.of(config, round_profile, 1, 1)
