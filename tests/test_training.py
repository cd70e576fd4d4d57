"""Contracts 6 and 7 in one process: exact resume, nothing depends on what ran before, clear ends."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from raydiff.artifact import read_folder
from raydiff.config import ExperimentConfig
from raydiff.detector import build_space, load_detector
from raydiff.errors import ArtifactError, ConfigError, NotCalibratedError, TrainingError
from raydiff.experiment import cached, fit_locally, held_out_images, provenance_of
from raydiff.runtime import CHECKPOINTS, LocalRuntime
from raydiff.shards import ShardSet, TrainingBatch
from raydiff.testing import small_images
from raydiff.tracking import read_metrics
from raydiff.training import Stream, learning_rate, train


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A small network with random weights, as options."""
    import timm

    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        save_file(timm.create_model("test_efficientnet").state_dict(), path)
    return {"backbone": "test_efficientnet", "weights": str(path)}


def run(
    config: ExperimentConfig,
    shards: ShardSet,
    path: Path,
    stream: Stream | None = None,
    space_state: Mapping[str, torch.Tensor] | None = None,
) -> list[dict[str, Any]]:
    """Train with a local runtime; the metrics in order."""
    lines: list[dict[str, Any]] = []
    runtime = LocalRuntime(path, on_metrics=lambda line: lines.append(dict(line)))
    train(
        config, stream or cached(config, shards), held_out_images(config, shards), runtime,
        num_classes=1, space_state=space_state,
    )  # fmt: skip
    return lines


def weights(path: Path) -> dict[str, torch.Tensor]:
    """The averaged weights and the whole training state of the newest checkpoint."""
    newest = sorted((path / CHECKPOINTS).iterdir())[-1]
    folder = read_folder(newest)
    return folder.tensors("weights.safetensors") | folder.tensors("training.safetensors")


def same(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def breaking_at(stream: Stream, step: int) -> Stream:
    """The stream of a run that is interrupted before optimiser step ``step``."""

    def interrupted(start: int) -> Iterator[TrainingBatch]:
        for number, batch in enumerate(stream(start), start):
            if number == step:
                raise KeyboardInterrupt
            yield batch

    return interrupted


def test_learning_rate_warms_up_and_falls(tiny_config: ExperimentConfig) -> None:
    settings = tiny_config.training
    rates = [learning_rate(step, settings) for step in range(settings.num_steps)]
    peak = rates.index(max(rates))
    assert peak in (settings.warmup_steps - 1, settings.warmup_steps)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 0.05 * settings.learning_rate
    constant = settings.model_copy(update={"lr_schedule": "constant"})
    assert learning_rate(settings.num_steps - 1, constant) == settings.learning_rate


def test_it_learns(tiny_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path) -> None:
    config = tiny_config.override({"training.num_steps": 60, "training.validate_every": 10})
    losses = [line["held_out_loss"] for line in run(config, digit_shards, tmp_path) if "held_out_loss" in line]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    "extra", [{}, {"denoiser.dropout": 0.2, "training.horizontal_flip": True}], ids=["plain", "dropout"]
)
def test_interrupted_and_resumed_equals_uninterrupted(
    tiny_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path, extra: dict[str, Any]
) -> None:
    config = tiny_config.override(extra)
    run(config, digit_shards, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(config, digit_shards, tmp_path / "cut", breaking_at(cached(config, digit_shards), 13))
    torch.rand(17)  # what else happens in between does not matter
    lines = run(config, digit_shards, tmp_path / "cut")
    assert lines[0] == {"step": 8, "resumed": True}
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_a_run_goes_on_in_the_space_that_it_began_in(
    tiny_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path, tiny_backbone: dict[str, str]
) -> None:
    """Whatever fitted space lies there by then; the latents that are remembered are those of the first too."""
    space = {"name": "feature", **tiny_backbone, "levels": [0, 1], "grid": [4, 4], "num_components": 6}
    config = tiny_config.override({"space": space, "training.num_steps": 12, "training.checkpoint_every": 4})
    states = []
    for images in (small_images(30, (8, 8), seed=1), small_images(30, (8, 8), seed=2)):
        fitted = build_space(config)
        fitted.fit(images)
        states.append(fitted.state())
    run(config, digit_shards, tmp_path / "whole", space_state=states[0])
    with pytest.raises(KeyboardInterrupt):
        run(config, digit_shards, tmp_path / "cut", breaking_at(cached(config, digit_shards), 6), states[0])
    lines = run(config, digit_shards, tmp_path / "cut", space_state=states[1])
    assert lines[0] == {"step": 4, "resumed": True}
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert lines[-1]["held_out_loss"] > 0


def test_a_finished_run_is_left_alone(tiny_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path) -> None:
    run(tiny_config, digit_shards, tmp_path)
    before = weights(tmp_path)
    assert run(tiny_config, digit_shards, tmp_path) == [{"step": 24, "resumed": True}]
    assert same(before, weights(tmp_path))


def test_metrics_read_as_if_nothing_had_happened(
    tiny_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path
) -> None:
    fit_locally(tiny_config, tmp_path / "whole", digit_shards)
    (tmp_path / "cut").mkdir()
    from raydiff.tracking import MetricsLog

    log = MetricsLog(tmp_path / "cut", batch_size=tiny_config.training.batch_size)
    runtime = LocalRuntime(tmp_path / "cut", on_metrics=log)
    with pytest.raises(KeyboardInterrupt):
        train(
            tiny_config, breaking_at(cached(tiny_config, digit_shards), 15), held_out_images(tiny_config, digit_shards),
            runtime, num_classes=1, provenance=provenance_of(digit_shards),
        )  # fmt: skip
    fit_locally(tiny_config, tmp_path / "cut", digit_shards)
    whole, cut = list(read_metrics(tmp_path / "whole")), list(read_metrics(tmp_path / "cut"))
    note = [line for line in cut if line.get("resumed")]
    assert note == [{"step": 8, "resumed": True, "images_repeated": 4 * 16}], "step 12 was logged, 8 was kept"
    losses = [(line["step"], line["loss"]) for line in whole]
    assert [(line["step"], line["loss"]) for line in cut if "loss" in line] == losses
    assert list((tmp_path / "cut" / "tensorboard").glob("events.*"))


def test_old_checkpoints_are_pruned(run_dir: Path) -> None:
    assert sorted(p.name for p in (run_dir / CHECKPOINTS).iterdir()) == ["step-00000016", "step-00000024"]


def test_a_checkpoint_is_a_detector_without_a_threshold(run_dir: Path, digit_images: torch.Tensor) -> None:
    detector = load_detector(run_dir / CHECKPOINTS / "step-00000024")
    with pytest.raises(NotCalibratedError):
        detector.predict(digit_images)


def test_another_config_cannot_resume(tiny_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path) -> None:
    run(tiny_config, digit_shards, tmp_path)
    with pytest.raises(ArtifactError, match="written by a run with another config"):
        run(tiny_config.override({"training.learning_rate": 0.5}), digit_shards, tmp_path)
    more_logs = tiny_config.override({"training.log_every": 3})
    assert run(more_logs, digit_shards, tmp_path)[0]["resumed"], "what cannot move a weight may change"


def test_other_images_cannot_resume(tiny_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path) -> None:
    def train_on(digest: str) -> None:
        train(
            tiny_config, cached(tiny_config, digit_shards), held_out_images(tiny_config, digit_shards),
            LocalRuntime(tmp_path), num_classes=1, provenance={"data_digest": digest},
        )  # fmt: skip

    train_on("one")
    train_on("one")
    with pytest.raises(ArtifactError, match="trained on other images than there are now"):
        train_on("two")


def test_a_restart_before_the_first_checkpoint_leaves_no_trace(
    tiny_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path
) -> None:
    from raydiff.tracking import MetricsLog

    runtime = LocalRuntime(tmp_path, on_metrics=MetricsLog(tmp_path, batch_size=16))
    with pytest.raises(KeyboardInterrupt):
        train(
            tiny_config, breaking_at(cached(tiny_config, digit_shards), 6), held_out_images(tiny_config, digit_shards),
            runtime, num_classes=1,
        )  # fmt: skip
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed while it wrote a line
    shown: list[dict[str, Any]] = []
    fit_locally(tiny_config, tmp_path, digit_shards, on_metrics=lambda line: shown.append(dict(line)))
    assert shown[0] == {"step": 0, "resumed": True, "images_repeated": 64}
    assert list(read_metrics(tmp_path)) == shown
    assert [line["step"] for line in shown] == [0, 4, 8, 12, 16, 20, 24]


def test_accumulation_changes_memory_not_meaning(
    tiny_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path
) -> None:
    short = tiny_config.override({"training.num_steps": 6, "training.log_every": 1})
    one = run(short, digit_shards, tmp_path / "1")
    for parts in (4, 5):  # 5: pieces of unequal size
        many = run(short.override({"training.accumulation_steps": parts}), digit_shards, tmp_path / str(parts))
        assert [a["loss"] for a in one[1:]] == pytest.approx([b["loss"] for b in many[1:]], rel=1e-4)


def test_a_loss_that_is_not_a_number_stops_the_run(
    tiny_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path
) -> None:
    """A weight is NaN from step 9 on: the run stops there, and the checkpoint of step 8 is the newest."""
    calls = count()

    def poison(network: torch.nn.Module, _: Any) -> None:
        if next(calls) == 9:
            next(network.parameters()).data.fill_(float("nan"))

    class Runtime(LocalRuntime):
        def wrap(self, network: torch.nn.Module) -> torch.nn.Module:
            network.register_forward_pre_hook(poison)
            return network

    stream, held_out = cached(tiny_config, digit_shards), held_out_images(tiny_config, digit_shards)
    with pytest.raises(TrainingError, match=r"not a number at step 9 .*lower training\.learning_rate"):
        train(tiny_config, stream, held_out, Runtime(tmp_path), num_classes=1)
    assert [p.name for p in (tmp_path / CHECKPOINTS).iterdir()] == ["step-00000008"]


@pytest.mark.parametrize(
    "options",
    [
        {"objective.prediction_type": "v_prediction", "schedule.rescale_to_zero_terminal_snr": True},
        {"objective.prediction_type": "sample", "objective.loss_weighting": "min_snr"},
        {"objective.loss_weighting": "min_snr", "schedule.beta_schedule": "sigmoid"},
        {"training.precision": "bfloat16", "training.channels_last": True},
        {"training.ema_decay": 0, "training.lr_schedule": "constant", "training.weight_decay": 0.1},
    ],
    ids=lambda options: ",".join(str(value) for value in options.values()),
)
def test_options_train(
    tiny_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path, options: dict[str, Any]
) -> None:
    detector = fit_locally(tiny_config.override(options), tmp_path, digit_shards)
    lines = list(read_metrics(tmp_path))
    assert lines[-1]["held_out_loss"] > 0
    assert detector.calibration is not None


def test_class_conditional_training_and_scoring(
    tiny_config: ExperimentConfig, tmp_path: Path, digit_images: torch.Tensor
) -> None:
    from raydiff.shards import write_shards

    config = tiny_config.override(
        {"data.dataset.normal": ["0", "8"], "objective.condition": "class", "scoring.classes": "minimum"}
    )
    detector = fit_locally(config, tmp_path / "run", write_shards(config.data, str(tmp_path / "shards")))
    assert detector.num_evaluations == 16, "eight steps for each of two classes"
    whole = detector.score(digit_images)
    assert torch.equal(whole.image[3:4], detector.score(digit_images[3:4]).image)


def test_full_disk_during_a_checkpoint_keeps_the_one_before(
    tiny_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path
) -> None:
    """The kernel refuses files above a limit that is set after the first checkpoint; then the run is resumed."""
    script = f"""
import json, resource, signal
from pathlib import Path
from raydiff.config import ExperimentConfig
from raydiff.errors import StorageError
from raydiff.experiment import cached, held_out_images
from raydiff.runtime import LocalRuntime
from raydiff.shards import ShardSet
from raydiff.training import train
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
config = ExperimentConfig.model_validate(json.loads(input()))
shards = ShardSet.open({digit_shards.uri!r})
def filled(line):
    if line["step"] == 12:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
runtime = LocalRuntime(Path({str(tmp_path / "cut")!r}), on_metrics=filled)
try:
    train(config, cached(config, shards), held_out_images(config, shards), runtime, num_classes=1)
except StorageError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(tiny_config.to_dict()),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "step-00000016: cannot be written (File too large); free space" in done.stdout
    assert [p.name for p in (tmp_path / "cut" / CHECKPOINTS).iterdir()] == ["step-00000008"]
    run(tiny_config, digit_shards, tmp_path / "whole")
    assert run(tiny_config, digit_shards, tmp_path / "cut")[0]["step"] == 8
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_only_the_steps_of_the_range_are_trained(
    tiny_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raydiff.denoisers import unet

    seen: list[torch.Tensor] = []
    forward = unet.UNet.forward

    def spied(self: unet.UNet, x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        seen.append(t)
        return forward(self, x, t, condition)

    monkeypatch.setattr(unet.UNet, "forward", spied)
    config = tiny_config.override({"objective.step_range": [0.3, 0.5], "scoring.start": 0.3, "scoring.stop": 0.5})
    fit_locally(config, tmp_path, digit_shards)
    steps = torch.cat(seen)
    steps = steps[steps > 0]  # a chunk that is filled up has steps 0
    assert int(steps.min()) >= 300
    assert int(steps.max()) <= 500
    assert len(steps.unique()) > 100


def test_a_scorer_that_looks_beyond_the_trained_steps_is_refused(
    tiny_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path
) -> None:
    config = tiny_config.override({"objective.step_range": [0.3, 0.5]})
    with pytest.raises(ConfigError, match=r"scoring denoising_error looks at step 100 of 1000; objective.step_r"):
        fit_locally(config, tmp_path, digit_shards)


def test_images_are_turned_and_the_denoiser_told_by_how_much(
    tiny_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path, digit_images: torch.Tensor
) -> None:
    config = tiny_config.override({"objective.condition": "rotation", "scoring": {"name": "contrast"}})
    detector = fit_locally(config, tmp_path, digit_shards)
    assert detector.num_evaluations == 16, "four steps for each of four turns"
    assert detector.score(digit_images).image.isfinite().all()
