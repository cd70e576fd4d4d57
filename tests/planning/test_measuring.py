from __future__ import annotations

import shutil
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from raydiff.config import ExperimentConfig
from raydiff.errors import ConfigError
from raydiff.planning.learning import fitted_space
from raydiff.planning.measuring import chosen_rows, measure
from raydiff.planning.model import make_plan
from raydiff.planning.pair import measure_pair
from raydiff.planning.profile import Profile
from raydiff.planning.sampling import sample_images
from raydiff.planning.target import Run, target_of
from raydiff.planning.words import plan_words
from raydiff.shards import ShardSet


@pytest.fixture(scope="module")
def measured(tiny_config: ExperimentConfig) -> Profile:
    threads = torch.get_num_threads()
    profile = measure(tiny_config, pair=False, seconds=0.3)
    assert torch.get_num_threads() == threads
    return profile


def test_every_figure_is_there(measured: Profile) -> None:
    nothing = {"encode_seconds", "encode_flops", "space_bytes", "costly_space", "pair", "device_peak_bytes", "commit"}
    for field in fields(measured):
        learnt = {"space_seconds", "space_fixed_seconds", "space_fit_bytes", "head_seconds"}
        if field.name not in nothing | learnt | {"device_memory_bytes"}:
            assert getattr(measured, field.name), field.name
    assert max(measured.step_seconds) <= 16  # fewer where the machine is busy
    assert measured.evaluations == 8
    assert measured.evidence_values == 8 * 8 * 8  # a map of the image for each


def test_a_checkpoint_is_as_large_as_one_of_a_run(measured: Profile, run_dir: Path) -> None:
    checkpoint = next((run_dir / "checkpoints").iterdir())
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    assert measured.checkpoint_bytes == pytest.approx(size, rel=0.01)  # 16 bytes a weight, and two JSON files
    artifact = sum((run_dir / "artifact" / name).stat().st_size for name in ("config.json", "weights.safetensors"))
    assert measured.artifact_bytes == pytest.approx(artifact, rel=0.01)


def test_a_backward_pass_is_twice_a_forward_pass(measured: Profile) -> None:
    """But for the gradient of the images, which nobody asks for."""
    assert 2.5 < sum(measured.flops.values()) / measured.forward_flops <= 3


def test_images_of_the_data_set_are_counted_as_the_shards_are(measured: Profile, digit_shards: ShardSet) -> None:
    images = measured.images
    assert images.num_train == digit_shards.count("train")
    assert images.num_calibration == digit_shards.count("calibration")
    assert images.num_all == sum(record.rows for record in digit_shards.records)


def test_images_come_from_shards_or_are_drawn(tiny_config: ExperimentConfig, digit_shards: ShardSet) -> None:
    sample = sample_images(tiny_config.override({"data.shards": digit_shards.uri}))
    assert sample.images.source == f"shards {digit_shards.uri}"
    assert sample.images.num_all == sum(record.rows for record in digit_shards.records)
    missing = tiny_config.override(
        {"data.dataset": {"name": "folder", "source": "nowhere"}, "data.image_size": [48, 32], "data.channels": 3}
    )
    drawn = sample_images(missing)
    assert "drawn" in drawn.images.source
    assert drawn.images.num_train is None
    assert drawn.pixels.shape[1:] == (48, 32, 3)
    assert drawn.images.file_bytes > 500
    assert np.array_equal(drawn.pixels, sample_images(missing).pixels)


def test_broken_shards_are_left_out_as_a_run_leaves_them_out(
    tiny_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(digit_shards.uri, tmp_path / "shards"))
    broken = own / digit_shards.shard_names("test")[0]
    broken.write_bytes(broken.read_bytes()[:100])
    config = tiny_config.override({"data.shards": str(own), "data.on_bad_shard": "skip"})
    images = sample_images(config).images
    assert images.source == f"shards {own}"
    rows = sum(record.rows for record in digit_shards.records)
    assert images.num_all == sum(record.rows for record in ShardSet.open(str(own), on_bad_shard="skip").records) < rows


def test_batches_are_as_large_as_a_workers_share_or_as_there_is_time_for(tiny_config: ExperimentConfig) -> None:
    config = tiny_config.override({"training.batch_size": 64, "execution.num_workers": 2})
    assert chosen_rows(config, 0.001, 6.0) == (16, 32)
    assert chosen_rows(config.override({"training.accumulation_steps": 4}), 0.001, 6.0) == (4, 8)
    assert chosen_rows(config, 0.3, 6.0) == (2, 5)
    assert chosen_rows(config, 60.0, 6.0) == (1,)


def test_a_space_that_learns_is_measured_apart() -> None:
    config = ExperimentConfig().override(
        {
            "data.image_size": [32, 32], "denoiser": {"name": "convnet", "width": 16}, "training.batch_size": 4,
            "space": {"name": "feature", "backbone": "tf_efficientnet_lite0", "grid": 8, "num_components": 24},
            "scoring.num_inference_steps": 1,
        }
    )  # fmt: skip
    profile = measure(config, pair=False, seconds=0.3)
    assert profile.latent_values == 24 * 4 * 4
    assert profile.space_bytes > 1e6
    assert profile.encode_flops > 1e6
    assert profile.encode_seconds > 0
    assert profile.space_fit_bytes == 200 * 4 * 16 * (24 + 40 + 112)  # grids of 4 x 4 cells, float32


def test_a_space_that_is_trained_is_measured_by_some_of_its_steps() -> None:
    space = {"name": "latent", "factor": 2, "latent_channels": 4, "width": 8, "batch_size": 4, "num_steps": 100_000}
    config = ExperimentConfig().override({"space": space, "denoiser": {"name": "convnet", "width": 16}})
    fit = fitted_space(config, sample_images(config).pixels, "cpu")
    assert fit.state["autoencoder.encoder.1.weight"].shape == (8, 4, 3, 3)
    assert 20 < fit.seconds < 20_000
    assert not fit.bytes


def test_two_processes_slow_each_other_and_sum(tiny_config: ExperimentConfig) -> None:
    config = ExperimentConfig().override({"denoiser": {"name": "convnet", "width": 16}})  # imports the least
    pair = measure_pair(config, sample_images(tiny_config).pixels, 4, 1, 0.2)
    assert pair.slowdown >= 1
    assert sorted(pair.all_reduce_seconds) == [2**16, 2**22]
    assert all(seconds > 0 for seconds in pair.all_reduce_seconds.values())


def test_a_device_that_is_not_here_is_refused(tiny_config: ExperimentConfig) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match="--device cuda: torch finds no GPU here"):
        measure(tiny_config, device="cuda")


def test_a_scorer_with_a_head_is_planned_with_the_training_of_it(tiny_config: ExperimentConfig) -> None:
    """However few cells its anomalies cover."""
    scoring = {"name": "discriminative", "width": 8, "depth": 1, "num_steps": 100_000, "severities": [1]}
    config = tiny_config.override({"scoring": scoring})
    profile = measure(config, pair=False, seconds=0.1)
    assert profile.score_seconds > 0
    assert profile.evaluations == 1
    assert 20 < profile.head_seconds < 20_000
    run = Run.of(config, profile, None, 1)
    plan = make_plan(profile, run, target_of(config, profile))
    assert plan.time.head == profile.head_seconds
    without = make_plan(replace(profile, head_seconds=0.0), run, plan.target)
    assert plan.time.total == pytest.approx(without.time.total + profile.head_seconds)
    assert ", head " in plan_words(plan)
    assert any("the scorer's head is trained" in sentence for sentence in plan.assumptions)
    few = replace(profile.images, num_train=6)
    folds = config.override({"data.calibration_fraction": 0, "cross_fitting.folds": 2})
    crossed = Run.of(folds, replace(profile, images=few), None, 1)
    assert make_plan(profile, crossed, plan.target).time.head == 3 * profile.head_seconds
