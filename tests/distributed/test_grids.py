"""Kept grids with Ray Train: two workers make them together, and read what each needs of them."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from raydiff.artifact import read_folder
from raydiff.config import ExperimentConfig
from raydiff.shards import ShardSet
from raydiff.tracking import read_metrics

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def config(feature_config: ExperimentConfig) -> ExperimentConfig:
    """Two workers, three views of each digit."""
    views = {"augmentation.shift": 0.1, "augmentation.views": 3}
    return feature_config.override({"execution.num_workers": 2, **views})


def weights(path: Path) -> bytes:
    return (read_folder(path / "artifact").path / "weights.safetensors").read_bytes()


@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_end_with_the_same_bits(config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path) -> None:
    from raydiff.distributed.train import fit

    fit(config, tmp_path / "without", digit_shards)
    kept = config.override({"data.grids": str(tmp_path / "grids")})
    fit(kept, tmp_path / "kept", digit_shards)
    assert weights(tmp_path / "without") == weights(tmp_path / "kept")
    files = sorted((tmp_path / "grids").rglob("*.parquet"))
    assert sum(pq.ParquetFile(file).metadata.num_rows for file in files) == 3 * digit_shards.count("train")
    assert [line for line in read_metrics(tmp_path / "kept") if "grids_made" in line]


@pytest.mark.usefixtures("ray_cluster")
def test_what_one_process_made_two_workers_find(
    config: ExperimentConfig, digit_shards: ShardSet, tmp_path: Path
) -> None:
    from raydiff.distributed.train import fit
    from raydiff.experiment import fit_locally

    kept = config.override({"data.grids": str(tmp_path / "grids")})
    fit_locally(kept, tmp_path / "one", digit_shards)
    fit(kept, tmp_path / "two", digit_shards)
    assert not [line for line in read_metrics(tmp_path / "two") if "grids_made" in line]
