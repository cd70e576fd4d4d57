"""Small real things that many tests use: digits in shards, and a detector trained on them for a few seconds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor

from raydiff.config import ExperimentConfig
from raydiff.detector import DiffusionDetector
from raydiff.experiment import fit_locally, split_batches
from raydiff.shards import ShardSet, write_shards
from tests.object_store import make_bucket, uri_at

os.environ |= {
    "RAY_AUTH_MODE": "disabled",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback also where a test imports ray before raydiff.distributed
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_worker_niceness": "0",  # at 15 those here would wait for the tests that run beside them
    "OMP_NUM_THREADS": "1",
}
torch.set_num_threads(1)

TINY = {
    "denoiser.block_out_channels": [8, 16],
    "denoiser.attention_levels": [],
    "training.num_steps": 24,
    "training.batch_size": 16,
    "training.warmup_steps": 4,
    "training.ema_decay": 0.9,
    "training.checkpoint_every": 8,
    "training.validate_every": 12,
    "training.log_every": 4,
    "scoring.blur": 0.5,
}


@pytest.fixture(scope="session")
def tiny_config() -> ExperimentConfig:
    """Digits, a U-Net of 20,000 weights, 24 steps."""
    return ExperimentConfig().override(TINY)


@pytest.fixture(scope="session")
def feature_config(tiny_config: ExperimentConfig, tmp_path_factory: pytest.TempPathFactory) -> ExperimentConfig:
    """Two levels on a grid of 4 x 4 cells, 6 components; 16 images a step, 24 steps."""
    import timm

    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        save_file(timm.create_model("test_efficientnet").state_dict(), path)
    space: dict[str, Any] = {
        "name": "feature", "backbone": "test_efficientnet", "weights": str(path), "levels": [0, 1], "grid": [4, 4],
        "num_components": 6, "num_fit_images": 40,
    }  # fmt: skip
    network = {"name": "convnet", "width": 16, "num_blocks": 2, "kernel_size": 3}
    return tiny_config.override({"space": space, "denoiser": network})


@pytest.fixture(scope="session")
def digit_shards(tiny_config: ExperimentConfig, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return write_shards(tiny_config.data, str(tmp_path_factory.mktemp("digits") / "shards"))


@pytest.fixture(scope="session")
def uneven_config(tiny_config: ExperimentConfig, tmp_path_factory: pytest.TempPathFactory) -> ExperimentConfig:
    """Digits of two classes, 30 and 7 of them to learn from, that are balanced."""
    folder, digits = tmp_path_factory.mktemp("uneven"), load_digits()
    for name, digit, count in (("many", 0, 41), ("few", 1, 10)):
        (folder / name / "train/good").mkdir(parents=True)
        for number, image in enumerate(digits.images[digits.target == digit][:count]):
            path = folder / name / ("train/good" if number else "test/good") / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 15.9).astype("uint8")).save(path)
    dataset = {"name": "folder", "source": str(folder), "categories": ["many", "few"]}
    return tiny_config.override({"data.dataset": dataset, "training.balance_classes": True})


@pytest.fixture(scope="session")
def uneven_shards(uneven_config: ExperimentConfig, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return write_shards(uneven_config.data, str(tmp_path_factory.mktemp("uneven") / "shards"))


@pytest.fixture(scope="session")
def run_dir(tiny_config: ExperimentConfig, digit_shards: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: checkpoints, metrics and the calibrated artefact."""
    path = tmp_path_factory.mktemp("run")
    fit_locally(tiny_config, path, digit_shards)
    return path


@pytest.fixture(scope="session")
def detector(run_dir: Path) -> DiffusionDetector:
    from raydiff.detector import load_detector

    loaded = load_detector(run_dir / "artifact")
    assert isinstance(loaded, DiffusionDetector)
    return loaded


@pytest.fixture(scope="session")
def digit_images(tiny_config: ExperimentConfig, digit_shards: ShardSet) -> Tensor:
    """Twenty test images, float32 (20, 1, 8, 8) in [-1, 1]."""
    return next(split_batches(digit_shards, "test", tiny_config))[:20]


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray for all tests that ask for it: two CPUs and the spare ones, 300 MB of object store."""
    from raydiff.distributed.cluster import connect

    with connect(num_cpus=2, object_store_mb=300):
        yield


@pytest.fixture(scope="session")
def object_store() -> Iterator[Callable[[str], str]]:
    """An S3 server on this machine with a bucket ``store``: gives the URI of a path below it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host = ":".join(map(str, server.get_host_and_port()))
    make_bucket(host)
    yield lambda path: uri_at(host, path)
    server.stop()
