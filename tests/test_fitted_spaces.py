"""Fitted spaces are found where they were left: the same bits, one fit, and never one that is not quite the same."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from raydiff.artifact import read_folder
from raydiff.benchmark import plan, run_benchmark
from raydiff.config import ExperimentConfig
from raydiff.config import Options as SpaceOptions
from raydiff.crossfit import parts_of
from raydiff.errors import ConfigError, StorageError
from raydiff.experiment import fit_locally, open_run
from raydiff.fitted_spaces import FittedSpace, fitted_space, takes_long
from raydiff.journal import alone_in
from raydiff.results import Result, read_results
from raydiff.search_space import SearchSpace
from raydiff.shards import ShardSet, write_shards
from raydiff.spaces._learning import LearntSpace
from raydiff.spaces.feature import FeatureSpace
from raydiff.storage import Storage
from raydiff.sweep.final import refit
from raydiff.sweep.jobs import Job, train_networks
from raydiff.tracking import progress_line
from tests.test_suite import TINY as SUITE
from tests.test_suite import write

ROTNET = {"name": "rotnet", "factor": 4, "width": 8, "num_steps": 4, "batch_size": 8, "num_components": 8}
LATENT = {"name": "latent", "factor": 4, "width": 4, "num_steps": 2, "batch_size": 4, "latent_channels": 4}
CONVNET = {"name": "convnet", "width": 8, "num_blocks": 1, "kernel_size": 1}

Lines = list[Mapping[str, Any]]


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the spaces that are fitted, each time."""
    names: list[str] = []
    train, project = LearntSpace.fit_with_progress, FeatureSpace.fit

    def counted(self: LearntSpace[Any, Any], images: Tensor, report: Callable[[Mapping[str, Any]], None]) -> None:
        names.append(self.options.name)
        train(self, images, report)

    def counted_too(self: FeatureSpace, images: Tensor) -> None:
        names.append("feature")
        project(self, images)

    monkeypatch.setattr(LearntSpace, "fit_with_progress", counted)
    monkeypatch.setattr(FeatureSpace, "fit", counted_too)
    return names


@pytest.fixture(scope="module")
def config(tiny_config: ExperimentConfig) -> ExperimentConfig:
    return tiny_config.override({"space": ROTNET, "denoiser": CONVNET})


@pytest.fixture(scope="module")
def latent(tiny_config: ExperimentConfig) -> ExperimentConfig:
    return tiny_config.override({"space": LATENT, "denoiser": CONVNET})


def same(first: FittedSpace, second: FittedSpace) -> bool:
    return first.state.keys() == second.state.keys() and all(
        torch.equal(value, second.state[name]) for name, value in first.state.items()
    )


def bytes_of(run: Path) -> list[bytes]:
    names = ("artifact/weights.safetensors", "artifact/calibration.json", "space/space.safetensors")
    return [(run / name).read_bytes() for name in names]


def test_the_second_run_finds_what_the_first_learnt(
    config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path, fits: list[str]
) -> None:
    """Another schedule and network, the same space; and of the same config the very same artefact."""
    shared = config.override({"data.spaces": str(tmp_path / "spaces")})
    said: dict[str, Lines] = {"first": [], "again": [], "other": []}
    fit_locally(config, tmp_path / "alone", digit_shards)
    fit_locally(shared, tmp_path / "first", digit_shards, on_metrics=said["first"].append)
    fit_locally(shared, tmp_path / "again", digit_shards, on_metrics=said["again"].append)
    other = shared.override({"schedule.beta_schedule": "linear", "denoiser.width": 16, "training.num_steps": 8})
    fit_locally(other, tmp_path / "other", digit_shards, on_metrics=said["other"].append)
    assert fits == ["rotnet", "rotnet"], "of the run alone, and of the first"
    assert bytes_of(tmp_path / "alone") == bytes_of(tmp_path / "first") == bytes_of(tmp_path / "again")
    assert bytes_of(tmp_path / "other")[2] == bytes_of(tmp_path / "first")[2]
    progress = [json.loads((tmp_path / name / "space" / "progress.json").read_text()) for name in ("first", "again")]
    assert progress[0] == progress[1]
    assert [line["space_step"] for line in progress[0]] == [1, 2, 3, 4]
    assert not [line for line in said["first"] if "space_found" in line]
    for name in ("again", "other"):
        (line,) = (line for line in said[name] if any(field.startswith("space_") for field in line))
        assert line["space_seconds"] > line["space_waited"]
        (place,) = (tmp_path / "spaces").iterdir()
        assert progress_line(line, 24, 16) == f"space: found in {place}; fitting it took 0:00"


def test_what_moves_a_bit_of_the_fit_moves_the_key_and_nothing_else_does(
    latent: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path, fits: list[str]
) -> None:
    spaces = str(tmp_path / "spaces")
    first = fitted_space(latent, digit_shards, spaces=spaces)
    for path, value in {
        "denoiser.width": 16, "schedule.num_train_timesteps": 50, "training.horizontal_flip": True, "scoring.blur": 1.0,
        "training.batch_size": 4, "objective.prediction_type": "sample", "space.seed": 0, "data.cache_mb": 0,
    }.items():  # fmt: skip
        assert same(first, fitted_space(latent.override({path: value}), digit_shards, spaces=spaces)), path
    assert fits == ["latent"]
    changes: list[Mapping[str, Any]] = [
        {"seed": 1}, {"space.num_steps": 3}, {"space.noise": 0.2}, {"space.num_fit_images": 50},
        {"data.image_size": [16, 16]}, {"data.channels": 3}, {"augmentation.rotation": 10, "augmentation.views": 2},
        {"augmentation.rotation": 10, "augmentation.views": 2, "seed": 1}, {"tiles.size": [4, 4]},
    ]  # fmt: skip
    for number, change in enumerate(changes, start=2):
        other = fitted_space(latent.override(change), digit_shards, spaces=spaces)
        assert (len(fits), same(first, other)) == (number, False), change
    number = len(fits)
    for part in parts_of(latent, digit_shards)[:2]:  # folds
        fitted_space(latent, digit_shards, without=part, spaces=spaces)
    assert len(fits) == number + 2
    torch.set_num_threads(2)
    try:
        fitted_space(latent, digit_shards, spaces=spaces)
    finally:
        torch.set_num_threads(1)
    assert len(fits) == number + 3
    assert same(first, fitted_space(latent, digit_shards, spaces=spaces))
    assert len(fits) == number + 3


def test_pretrained_weights_are_told_apart_by_what_they_hold(
    feature_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path, fits: list[str]
) -> None:
    weights, spaces = tmp_path / "weights.safetensors", str(tmp_path / "spaces")
    shutil.copy(str(feature_config.to_dict()["space"]["weights"]), weights)
    config = feature_config.override({"space.weights": str(weights)})
    first = fitted_space(config, digit_shards, spaces=spaces)
    assert same(first, fitted_space(config, digit_shards, spaces=spaces))
    assert fits == ["feature"]
    held = load_file(weights)
    held["conv_stem.weight"] = held["conv_stem.weight"] * 1.5
    save_file(held, weights)
    assert not same(first, fitted_space(config, digit_shards, spaces=spaces))
    assert fits == ["feature", "feature"]


def damage(fit: Path, way: str) -> None:
    path = fit / "space.safetensors"
    content = path.read_bytes()
    if way in ("changed", "truncated"):
        path.unlink()  # what was read of it is still mapped
        path.write_bytes(content[:-9] if way == "truncated" else content[:-1] + bytes([content[-1] ^ 1]))
    elif way == "unfinished":
        (fit / "manifest.json").unlink()
    else:  # killed while it wrote
        fit.rename(fit.with_name(f".{fit.name}.tmp"))


@pytest.mark.parametrize("way", ["changed", "truncated", "unfinished", "killed"])
def test_what_is_not_whole_is_fitted_anew(
    latent: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path, fits: list[str], way: str
) -> None:
    spaces = tmp_path / "spaces"
    first = fitted_space(latent, digit_shards, spaces=str(spaces))
    ((fit,),) = ([child for child in space.iterdir() if child.is_dir()] for space in spaces.iterdir())
    damage(fit, way)
    assert same(first, fitted_space(latent, digit_shards, spaces=str(spaces)))
    assert same(first, fitted_space(latent, digit_shards, spaces=str(spaces)))
    assert len(fits) == 2
    ((left,),) = ([child for child in space.iterdir() if child.is_dir()] for space in spaces.iterdir())
    assert read_folder(left).kind == "space"


def test_what_the_system_fails_to_read_is_not_removed(
    latent: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path, fits: list[str]
) -> None:
    """Such an error may pass, as with too many open files; here a link to itself is one."""
    spaces = str(tmp_path / "spaces")
    first = fitted_space(latent, digit_shards, spaces=spaces)
    (manifest,) = (tmp_path / "spaces").glob("*/*/manifest.json")
    content = manifest.read_bytes()
    manifest.unlink()
    manifest.symlink_to(manifest.name)
    assert same(first, fitted_space(latent, digit_shards, spaces=spaces))
    assert len(fits) == 2
    manifest.unlink()
    manifest.write_bytes(content)
    assert read_folder(manifest.parent).kind == "space"
    assert same(first, fitted_space(latent, digit_shards, spaces=spaces))
    assert len(fits) == 2


def test_a_fit_that_cannot_be_kept_is_not_lost(
    latent: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path, fits: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The place goes while the space is fitted; then one that is there and takes nothing."""
    spaces, first = tmp_path / "spaces", fitted_space(latent, digit_shards)

    def spoil(_: Mapping[str, Any]) -> None:
        (place,) = spaces.iterdir()
        if place.is_dir():
            shutil.rmtree(place)
            place.write_text("")

    for place, report in ((str(spaces), spoil), ("/proc", lambda _: None)):
        caplog.clear()
        assert same(first, fitted_space(latent, digit_shards, spaces=place, report=report))
        assert f"{place}/latent-" in caplog.text
        assert "make room in data.spaces, or set it to a place that can be written" in caplog.text
    assert len(fits) == 3


def test_of_several_at_once_one_fits_and_the_others_wait(
    config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path, fits: list[str]
) -> None:
    config = config.override({"space.num_steps": 40})
    spaces, lines = str(tmp_path / "spaces"), Lines()
    found: list[FittedSpace] = []

    def work() -> None:
        found.append(fitted_space(config, digit_shards, spaces=spaces, report=lines.append))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fits == ["rotnet"]
    assert len(found) == 3
    assert same(found[0], found[1])
    assert same(found[0], found[2])
    assert len([line for line in lines if "space_found" in line]) == 2
    awaited = [progress_line(line, 1, 1) for line in lines if "space_awaited" in line]
    assert 1 <= len(awaited) <= 2, "the one that fits it awaits nobody"
    assert awaited[0].startswith(f"space: another process is fitting it, for {spaces}/rotnet-")


ENDLESS = """
import sys
from raydiff.config import ExperimentConfig
from raydiff.fitted_spaces import fitted_space
from raydiff.shards import ShardSet
from raydiff.spaces._learning import LearntSpace
import time

LearntSpace._losses = lambda self, network, images: time.sleep(600)  # a fit that is at it for long
config = ExperimentConfig.model_validate_json(sys.argv[1])
import torch; torch.set_num_threads(1)
fitted_space(config, ShardSet.open(sys.argv[2]), spaces=sys.argv[3])
"""


@pytest.fixture
def process(config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """One that fits the config's space, and does not come to an end."""
    command = [sys.executable, "-c", ENDLESS, config.model_dump_json(), digit_shards.uri, str(tmp_path / "spaces")]
    with subprocess.Popen(command) as begun:
        yield begun
        begun.kill()


def test_who_waits_goes_on_when_the_process_that_fits_is_killed(
    process: subprocess.Popen[bytes], config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path, fits: list[str]
) -> None:
    spaces, lines = tmp_path / "spaces", Lines()
    deadline = time.monotonic() + 60
    while not is_locked(spaces):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)

    def heed(line: Mapping[str, Any]) -> None:
        lines.append(line)
        if "space_awaited" in line:
            assert not fits
            process.send_signal(signal.SIGKILL)

    fitted_space(config, digit_shards, spaces=str(spaces), report=heed)
    assert fits == ["rotnet"]
    assert "space_awaited" in lines[0]
    assert [line["space_step"] for line in lines[1:]] == [1, 2, 3, 4]


def is_locked(spaces: Path) -> bool:
    for space in spaces.glob("rotnet-*"):
        try:
            with alone_in(space):
                return False
        except ConfigError:
            return True
    return False


def test_a_store_keeps_them_too(
    latent: ExperimentConfig,
    digit_shards: ShardSet,
    object_store: Callable[[str], str],
    tmp_path: Path,
    fits: list[str],
) -> None:
    spaces, lines = object_store(f"store/{tmp_path.name}/spaces"), Lines()
    first = fitted_space(latent, digit_shards, spaces=spaces)
    assert same(first, fitted_space(latent, digit_shards, spaces=spaces, report=lines.append))
    assert fits == ["latent"]
    assert [line["space_found"].startswith(f"s3://store/{tmp_path.name}/spaces/latent-") for line in lines] == [True]
    assert "secret" not in str(lines)
    place = Storage.of(spaces) / Storage.of(spaces).folders()[0]
    fit = place / place.folders()[0]
    fit.delete("manifest.json")
    fit.write("manifest.json/is a folder", b"")  # and no file that can be read
    assert same(first, fitted_space(latent, digit_shards, spaces=spaces))
    assert fits == ["latent", "latent"]


def test_folds_learn_spaces_of_their_own_and_find_them(
    latent: ExperimentConfig, tmp_path: Path, fits: list[str]
) -> None:
    config = latent.override(
        {
            "data.calibration_fraction": 0, "data.max_train_images": 12, "cross_fitting.folds": 2,
            "training.num_steps": 2, "training.batch_size": 4, "data.spaces": str(tmp_path / "spaces"),
        }
    )  # fmt: skip
    shards, lines = write_shards(config.data, str(tmp_path / "shards")), Lines()
    fit_locally(config, tmp_path / "first", shards)
    assert (len(fits), len(list((tmp_path / "spaces").iterdir()))) == (3, 3)
    fit_locally(config, tmp_path / "second", shards, on_metrics=lines.append)
    assert len(fits) == 3
    assert [line.get("fold") for line in lines if "space_found" in line] == ["0", "1", None]
    first, second = (read_folder(tmp_path / name / "artifact").digest for name in ("first", "second"))
    assert first == second


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One digit, two networks in the same space, three methods."""
    scoring = {"name": "denoising_error", "num_inference_steps": 2, "blur": 0}
    denoisers = {"narrow": CONVNET, "wide": CONVNET | {"width": 16}}
    return SUITE | {
        "datasets": {"digits": {}},
        "trainings": {name: {"space": ROTNET, "denoiser": network} for name, network in denoisers.items()},
        "methods": {
            **{name: {"training": name, "scoring": scoring} for name in denoisers},
            "narrow, more": {"training": "narrow", "scoring": scoring | {"num_inference_steps": 4}},
        },
        "cost": {"batch_sizes": [1], "num_images": 2},
    }


def rows_of(out: Path) -> dict[str, Result]:
    return {row.detector: row for row in read_results(out / "results.jsonl") if row.subset_kind == "all"}


def test_a_benchmarks_trainings_share_a_space(suite: dict[str, Any], tmp_path: Path, fits: list[str]) -> None:
    """Its artefacts are those of trainings that fitted their own, and every row counts the fit."""
    planned, said = plan(write(tmp_path / "suite.yaml", suite)), list[str]()
    result = run_benchmark(planned, tmp_path / "out", on_progress=lambda progress: said.append(progress.task.kind))
    assert not result.failed
    assert fits == ["rotnet"]
    assert said[:2] == ["shards", "space"]
    (space,) = (tmp_path / "out" / "spaces").iterdir()
    (fit,) = (child for child in space.iterdir() if child.is_dir())
    took = json.loads((fit / "progress.json").read_text())["seconds"]
    for training in planned.trainings.values():
        folder = tmp_path / "out" / "trainings" / training.key
        assert json.loads((folder / "training_seconds.json").read_text())["seconds"] > took
        shards = ShardSet.open(str(tmp_path / "out" / "shards" / training.shards))
        alone = fit_locally(training.config, tmp_path / f"alone-{training.key}", shards)
        assert read_folder(folder / "artifact").digest == alone.artifact_digest
    assert all(row.training_seconds > took for row in rows_of(tmp_path / "out").values())
    assert fits == ["rotnet"] * 3, "the two alone"
    before = {name: row.comparable() for name, row in rows_of(tmp_path / "out").items()}
    for name in ("trainings", "cells", "results.jsonl"):
        place = tmp_path / "out" / name
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    ended = list[Any]()
    run_benchmark(planned, tmp_path / "out", on_progress=lambda progress: ended.append(progress.outcome.value))
    assert len(fits) == 3
    assert ended[0] == f"found in {space}"
    assert {name: row.comparable() for name, row in rows_of(tmp_path / "out").items()} == before


def test_which_trainings_have_one_task_for_their_space(suite: dict[str, Any], tmp_path: Path) -> None:
    def groups(changes: Mapping[str, Any], base: Mapping[str, Any]) -> list[str | None]:
        trainings = {name: fields | changes.get(name, {}) for name, fields in suite["trainings"].items()}
        content = suite | {"trainings": trainings, "base": {**suite["base"], **base}}
        return [training.space for training in plan(write(tmp_path / "suite.yaml", content)).trainings.values()]

    narrow, wide = groups({"wide": {"schedule": {"num_train_timesteps": 100}}}, {})
    assert narrow == wide
    for changes in (
        {"wide": {"space": ROTNET | {"width": 4}}},
        {"wide": {"resources": {"num_cpus": 2}}},
        {"wide": {"augmentation": {"rotation": 10, "views": 2}}},
    ):
        narrow, wide = groups(changes, {})
        assert None not in (narrow, wide)
        assert narrow != wide
    suspicious = {"contamination": {"max_share": 0.1}, "cross_fitting": {"folds": 2}}
    assert groups({}, suspicious) == [None, None], "which images it learns from is known when the folds are trained"
    assert groups({name: {"space": {"name": "pixel"}} for name in suite["trainings"]}, {}) == [None, None]


def test_a_space_with_a_seed_of_its_own_is_one_for_all_seeds(suite: dict[str, Any], tmp_path: Path) -> None:
    """Unless views of the images are learnt from, which are drawn from the run's seed."""

    def spaces(fields: Mapping[str, Any]) -> int:
        narrow = suite["trainings"]["narrow"]
        content = suite | {"seeds": [0, 1], "trainings": {"narrow": narrow | fields}, "methods": {}}
        content["methods"] = {"narrow": suite["methods"]["narrow"]}
        trainings = plan(write(tmp_path / "suite.yaml", content)).trainings.values()
        assert len(trainings) == 2
        return len({training.space for training in trainings})

    views = {"augmentation": {"rotation": 10, "views": 2}}
    assert [spaces({}), spaces({"space": ROTNET | {"seed": 7}})] == [2, 1]
    assert spaces({"space": ROTNET | {"seed": 7}, "tiles": {"size": [4, 4]}}) == 1
    assert spaces({"space": ROTNET | {"seed": 7}, **views}) == 2


def test_tiles_of_a_space_with_a_seed_of_its_own_are_the_same_for_all_seeds(
    latent: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path, fits: list[str]
) -> None:
    config = latent.override({"space.seed": 7, "tiles.size": [4, 4]})
    found = [fitted_space(config.override({"seed": s}), digit_shards, spaces=str(tmp_path)) for s in (0, 1)]
    assert same(*found)
    assert fits == ["latent"]


def test_a_space_takes_long_where_it_is_trained(
    config: ExperimentConfig, feature_config: ExperimentConfig, latent: ExperimentConfig
) -> None:
    class Iterative(SpaceOptions):
        """Options of a space that is no network, with an option that is called as one of a training is."""

        name: str = "iterative"
        num_steps: int = 3

    assert [takes_long(each) for each in (config, latent, feature_config)] == [True, True, False]
    assert not takes_long(config.model_copy(update={"space": Iterative()}))


def test_a_sweeps_networks_share_a_space_and_each_row_counts_it(
    config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path, fits: list[str]
) -> None:
    search = SearchSpace.model_validate(
        {
            "objectives": ["loss"], "trials": 2, "seeds": [0],
            "parameters": {"schedule.beta_schedule": {"choices": ["linear", "sigmoid"]}},
        }
    )  # fmt: skip
    config = config.override({"space.num_steps": 60, "training.num_steps": 2})
    seconds = []
    for schedule in ("linear", "sigmoid"):
        job = Job(tmp_path, digit_shards.uri, search, config, {"schedule.beta_schedule": schedule}, (0,))
        seconds.append(train_networks(job).rows[0].seconds)
    assert fits == ["rotnet"]
    (progress,) = (tmp_path / "spaces").glob("*/*/progress.json")
    assert min(seconds) > json.loads(progress.read_text())["seconds"]


def test_winner_and_start_share_a_space_and_each_counts_it(
    config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path, fits: list[str]
) -> None:
    search = SearchSpace.model_validate(
        {
            "objectives": ["loss"], "trials": 1, "seeds": [0],
            "parameters": {"schedule.beta_schedule": {"choices": ["linear", "sigmoid"]}},
        }
    )  # fmt: skip
    config = config.override({"space.num_steps": 80, "training.num_steps": 2})
    job, seconds = Job(tmp_path, digit_shards.uri, search, config, {}, (0,)), []
    for which, params in (("winner", {"schedule.beta_schedule": "linear"}), ("start", {})):
        done = refit(job, job.scored(params, 100), tmp_path / which, digit_shards, ["loss"], test=False)
        seconds.append(done.selection["training_seconds"])
    assert fits == ["rotnet"]
    (progress,) = (tmp_path / "spaces").glob("*/*/progress.json")
    assert min(seconds) > json.loads(progress.read_text())["seconds"]


def test_a_place_that_cannot_be_is_refused(
    latent: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file/latent-\w+: cannot be made \(.*\); change data.spaces"):
        fitted_space(latent, digit_shards, spaces=str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"data: spaces is empty; give a folder or s3://\.\.\., or null for none"):
        latent.override({"data.spaces": ""})
    monkeypatch.chdir(tmp_path)
    assert open_run(tmp_path / "run", latent.override({"data.spaces": "kept"}), resume=False).data.spaces == str(
        tmp_path / "kept"
    )
