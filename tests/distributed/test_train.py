"""Ray Train for real: the same losses on one and two workers, kill -9, Ctrl-C, errors that end at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import yaml

from raydiff.config import ExperimentConfig
from raydiff.detector import load_detector
from raydiff.errors import ConfigError, TrainingError, WorkerError
from raydiff.experiment import fit_locally
from raydiff.shards import ShardSet
from raydiff.tracking import read_metrics

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


def fit(config: ExperimentConfig, path: Path, shards: ShardSet, on_metrics: Any = lambda _: None) -> dict[int, float]:
    """The loss at each logged step."""
    from raydiff.distributed.train import fit

    fit(config, path, shards, on_metrics=on_metrics)
    return {line["step"]: line["loss"] for line in read_metrics(path) if "loss" in line}


def final_weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(load_detector(path / "artifact").network.state_dict())  # type: ignore[attr-defined]


def same(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left | right)


def train_workers() -> list[int]:
    """Process ids of the Ray Train workers of this very Ray session."""
    session = ray._private.worker.global_worker.node.get_session_dir_path()
    found = []
    for entry in Path("/proc").iterdir():
        try:
            ours = b"TrainWorker" in (entry / "cmdline").read_bytes() if entry.name.isdigit() else False
            if ours and any(session in str(link.resolve()) for link in (entry / "fd").iterdir()):
                found.append(int(entry.name))
        except OSError:  # it has just ended
            continue
    return found


@pytest.mark.usefixtures("ray_cluster")
def test_one_two_and_no_workers_learn_the_same(
    tiny_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path
) -> None:
    """Contract 7. One Ray worker equals the plain loop bit for bit; two differ by rounding."""
    plain = fit_locally(tiny_config, tmp_path / "plain", digit_shards)
    expected = {line["step"]: line["loss"] for line in read_metrics(tmp_path / "plain")}
    one = fit(tiny_config, tmp_path / "one", digit_shards)
    two = fit(tiny_config.override({"execution.num_workers": 2}), tmp_path / "two", digit_shards)
    assert one == expected
    assert same(plain.network.state_dict(), final_weights(tmp_path / "one"))  # type: ignore[attr-defined]
    assert two == pytest.approx(one, rel=1e-4)
    torch.testing.assert_close(final_weights(tmp_path / "two"), final_weights(tmp_path / "one"), rtol=1e-2, atol=2e-3)


@pytest.mark.usefixtures("ray_cluster")
def test_streamed_training_equals_cached_training(
    uneven_config: ExperimentConfig, uneven_shards: ShardSet, tmp_path: Path
) -> None:
    """With classes that are balanced."""
    cached = fit_locally(uneven_config, tmp_path / "cached", uneven_shards)
    fit(uneven_config.override({"data.cache_mb": 0}), tmp_path / "streamed", uneven_shards)
    assert same(cached.network.state_dict(), final_weights(tmp_path / "streamed"))  # type: ignore[attr-defined]
    plain = fit_locally(uneven_config.override({"training.balance_classes": False}), tmp_path / "plain", uneven_shards)
    assert not same(cached.network.state_dict(), plain.network.state_dict())  # type: ignore[attr-defined]
    steps, size = uneven_config.training.num_steps, uneven_config.training.batch_size
    assert list(read_metrics(tmp_path / "streamed"))[-1]["epoch"] == (steps * size - 1) // (30 + 4 * 7)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_that_stream_correct_deviations_in_latents_as_one_process_does(
    tiny_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path
) -> None:
    """The autoencoder is trained once, before them; what is corrupted of an image is the same on any worker."""
    space = {"name": "latent", "factor": 2, "latent_channels": 4, "width": 8, "num_steps": 30, "batch_size": 4}
    config = tiny_config.override(
        {
            "objective.prediction_type": "deviation", "space": space, "scoring": {"name": "deviation_correction"},
            "denoiser": {"name": "convnet", "width": 16, "num_blocks": 2, "kernel_size": 3},
        }
    )  # fmt: skip
    lines: list[Mapping[str, Any]] = []
    fit_locally(config, tmp_path / "plain", digit_shards)
    expected = {line["step"]: line["loss"] for line in read_metrics(tmp_path / "plain")}
    streamed = config.override({"execution.num_workers": 2, "data.cache_mb": 0})
    two = fit(streamed, tmp_path / "two", digit_shards, lines.append)
    assert two == pytest.approx(expected, rel=1e-4)
    assert [line["space_step"] for line in lines if "space_step" in line] == list(range(3, 31, 3))
    weights = [tmp_path / name / "space" / "space.safetensors" for name in ("plain", "two")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_worker_is_restarted_from_the_last_checkpoint(
    tiny_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path
) -> None:
    config = tiny_config.override(
        {"training.num_steps": 400, "training.log_every": 10, "training.checkpoint_every": 40}
    )
    whole = fit_locally(config, tmp_path / "whole", digit_shards)
    killed: list[int] = []

    def kill_once(metrics: Mapping[str, Any]) -> None:
        if metrics["step"] >= 90 and not killed:
            killed.extend(train_workers()[:1])
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    fit(config, tmp_path / "killed", digit_shards, kill_once)
    notes = [line for line in read_metrics(tmp_path / "killed") if line.get("resumed")]
    assert killed, "no worker was found to kill"
    assert len(notes) == 1, notes
    assert notes[0]["step"] % 40 == 0
    assert same(whole.network.state_dict(), final_weights(tmp_path / "killed"))  # type: ignore[attr-defined]


@pytest.mark.usefixtures("ray_cluster")
def test_a_divergence_ends_the_run_and_says_where(
    tiny_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path
) -> None:
    wild = tiny_config.override({"training.learning_rate": 1e30, "training.warmup_steps": 0})
    with pytest.raises(TrainingError, match=r"not a number at step \d+ .*lower training\.learning_rate"):
        fit(wild, tmp_path, digit_shards)


def test_a_fold_that_fails_says_to_resume_the_run_that_it_belongs_to(
    tiny_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.exceptions import RayError

    from raydiff.distributed import train

    def lost(_: object) -> None:
        raise RayError("gone")

    monkeypatch.setattr(train, "_check_resources", lambda _: None)
    monkeypatch.setattr(train, "in_a_thread", lost)
    config = tiny_config.override({"contamination.max_share": 0.1})
    with pytest.raises(WorkerError) as caught:
        train.fit(config, tmp_path / "run", digit_shards)
    assert str(caught.value).startswith(f"{tmp_path / 'run/folds/0'}: the cluster was lost")
    assert str(caught.value).endswith(f"resume with: raydiff fit --resume {tmp_path / 'run'}")


@pytest.mark.usefixtures("ray_cluster")
def test_more_workers_than_cpus_are_refused(
    tiny_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"num_workers is 16, with 1 CPU each; .* have room for 4; ask for less"):
        fit(tiny_config.override({"execution.num_workers": 16}), tmp_path, digit_shards)
    with pytest.raises(ConfigError, match=r"with 1 CPU and 1 GPU each; .* have room for 0"):
        fit(tiny_config.override({"execution.use_gpu": True}), tmp_path, digit_shards)


def test_ctrl_c_and_resume_equal_an_uninterrupted_run(
    tiny_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path
) -> None:
    """As a user does it: ``raydiff fit``, Ctrl-C after the second checkpoint, ``raydiff fit --resume``."""
    config = tiny_config.override(
        {"training.num_steps": 1000, "training.checkpoint_every": 40, "training.log_every": 10,
         "data.shards": digit_shards.uri}
    )  # fmt: skip
    whole = fit_locally(config, tmp_path / "whole", digit_shards)
    path, out = tmp_path / "config.yaml", tmp_path / "cut"
    path.write_text(yaml.safe_dump(config.to_dict()))
    command = [sys.executable, "-m", "raydiff", "fit"]
    # Its own session, as a terminal gives a command its own process group: the signal reaches the command alone.
    running = subprocess.Popen(
        [*command, str(path), "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not any(line["step"] >= 90 for line in read_metrics(out)):
        assert time.monotonic() < deadline, "training did not start"
        assert running.poll() is None, running.communicate()
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, stderr = running.communicate(timeout=120)
    assert running.returncode == 130, stderr
    assert f"Go on with: raydiff fit --resume {out}" in stderr
    assert not (out / "artifact").exists(), "it was interrupted before the end"
    done = subprocess.run([*command, "--resume", str(out)], capture_output=True, text=True, check=True, timeout=120)
    assert "resumed at step" in done.stdout
    assert same(whole.network.state_dict(), final_weights(out))  # type: ignore[attr-defined]
