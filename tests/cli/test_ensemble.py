"""``raydiff ensemble`` as a user types it, and what takes its artefact."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

from raydiff.cli import main
from raydiff.config import ExperimentConfig
from raydiff.detector import DiffusionDetector, load_detector
from raydiff.experiment import fit_baselines
from raydiff.images import to_uint8
from raydiff.results import read_results
from raydiff.shards import ShardSet, write_shards


@pytest.fixture
def runs(
    detector: DiffusionDetector, tiny_config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path
) -> list[str]:
    """A run, and a baseline's artefact."""
    config = detector.config.override({"data.shards": digit_shards.uri})
    replace(detector, config=config).save(tmp_path / "run" / "artifact")
    next(iter(fit_baselines(tiny_config, digit_shards, ["isolation_forest"]))).save(tmp_path / "forest")
    return [str(tmp_path / "run"), str(tmp_path / "forest")]


def test_two_runs_become_one_that_scores_and_is_evaluated(
    runs: list[str], digit_images: Tensor, tmp_path: Path
) -> None:
    out = str(tmp_path / "both")
    done = CliRunner().invoke(main, ["ensemble", *runs, "--out", out, "--combine", "fisher", "--target-fpr", "0.1"])
    assert done.exit_code == 0, done.output
    assert "ensemble of 2: fisher of unet/denoising_error + isolation_forest" in done.output
    assert "false-positive rate of 0.1" in done.output
    Image.fromarray(to_uint8(digit_images)[0, :, :, 0]).save(tmp_path / "part.png")
    table = tmp_path / "scores.csv"
    scored = CliRunner().invoke(main, ["score", out, f"{tmp_path}/part.png", "--out", str(table)])
    assert scored.exit_code == 0, scored.output
    (row,) = csv.DictReader(table.read_text().splitlines())
    loaded = load_detector(tmp_path / "both" / "artifact")
    assert float(row["score"]) == float(loaded.score(digit_images[:1]).image)
    again = CliRunner().invoke(main, ["ensemble", *runs, "--out", out])
    assert again.exit_code == 2
    assert "already holds an artefact" in again.output


def test_an_ensemble_is_evaluated_on_the_data_of_its_first_run(
    runs: list[str], tiny_config: ExperimentConfig, tmp_path: Path
) -> None:
    small = write_shards(tiny_config.override({"data.max_test_images": 30}).data, str(tmp_path / "small"))
    assert CliRunner().invoke(main, ["ensemble", *runs, "--out", str(tmp_path / "both")]).exit_code == 0
    done = CliRunner().invoke(main, ["evaluate", str(tmp_path / "both"), small.uri])
    assert done.exit_code == 0, done.output
    (row, *_) = read_results(tmp_path / "both" / "results.jsonl")
    assert row.detector == "mean of unet/denoising_error + isolation_forest"
    assert row.num_evaluations == 8
    assert (tmp_path / "both" / "report.html").exists()


def test_the_map_of_one_run_is_scored_and_evaluated(
    runs: list[str], tiny_config: ExperimentConfig, digit_images: Tensor, tmp_path: Path
) -> None:
    out = str(tmp_path / "both")
    done = CliRunner().invoke(main, ["ensemble", *runs, "--out", out, "--map-from", "1"])
    assert done.exit_code == 0, done.output
    loaded, first = load_detector(tmp_path / "both" / "artifact"), load_detector(tmp_path / "run" / "artifact")
    found, own = loaded.explain(digit_images[:3]), first.explain(digit_images[:3])
    assert found.anomaly_map is not None
    assert own.anomaly_map is not None
    assert found.anomaly_map.shape == own.anomaly_map.shape
    assert not found.pred_score.equal(own.pred_score)
    small = write_shards(tiny_config.override({"data.max_test_images": 12}).data, str(tmp_path / "small"))
    done = CliRunner().invoke(main, ["evaluate", out, small.uri])
    assert done.exit_code == 0, done.output
    (row, *_) = read_results(tmp_path / "both" / "results.jsonl")
    assert row.detector == "mean of unet/denoising_error + isolation_forest, map of 1"
    for number, message in {"0": "not in the range", "2": "isolation_forest, run 2, has no map to show",
                            "3": "--map-from is 3, of 2 runs; give 1 to 2"}.items():  # fmt: skip
        refused = CliRunner().invoke(main, ["ensemble", *runs, "--out", str(tmp_path / number), "--map-from", number])
        assert refused.exit_code == 2
        assert message in refused.output
        assert not (tmp_path / number).exists()


def test_one_run_is_no_ensemble(runs: list[str], tmp_path: Path) -> None:
    refused = CliRunner().invoke(main, ["ensemble", runs[0], "--out", str(tmp_path / "both")])
    assert refused.exit_code == 2
    assert "give two or more runs" in refused.output
