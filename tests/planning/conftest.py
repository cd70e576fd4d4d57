"""A profile whose figures are round, so that what follows from it can be worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from raydiff.config import ExperimentConfig
from raydiff.planning.profile import Images, Pair, Profile, workload
from raydiff.planning.target import Run, Target, target_of


@pytest.fixture
def round_profile() -> Profile:
    """One million weights; 10 ms and 1 ms an image for a step; two processes slow each other by 1.2."""
    return Profile(
        workload=workload(ExperimentConfig()), machine="a machine of two cores", device="cpu", cores=2, threads=1,
        num_parameters=1_000_000, space_bytes=0, latent_values=64, step_seconds={8: 0.018, 32: 0.042},
        saved_bytes={2: 2_100_000, 3: 3_100_000}, flops={"convolution": 2e9, "matmul": 1e9}, forward_flops=1e9,
        operations={2: 400, 3: 400}, forward_operations=150, encode_seconds=0.0, encode_flops=0.0, costly_space=False,
        evaluations=8, score_seconds=0.004, score_rows=16, checkpoint_bytes=16_000_000, checkpoint_seconds=0.1,
        artifact_bytes=4_000_000, process_bytes=500_000_000,
        images=Images("a data set", 32, 100_000.0, 0.002, 60_000, 20_000, 100_000),
        evidence_values=8 * 64, pair=Pair(1.2, {65_536: 0.001065536, 4_194_304: 0.005194304}), seconds=60.0,
    )  # fmt: skip


STUDENT = {"distillation": {"teacher": "0" * 64, "num_evaluations": 6}}
"""What ``raydiff distill`` writes into a config."""


@pytest.fixture
def config() -> ExperimentConfig:
    return ExperimentConfig()


def target(profile: Profile, config: ExperimentConfig | None = None, **options: Any) -> Target:
    """As ``raydiff plan`` with these options."""
    return target_of(config or ExperimentConfig(), profile, **options)


def run_on(profile: Profile, workers: int, **fields: Any) -> Run:
    """The defaults with some fields changed: ``training__batch_size=256``."""
    changes = {name.replace("__", "."): value for name, value in fields.items()}
    return Run.of(ExperimentConfig().override(changes), profile, None, workers)


def with_images(profile: Profile, **changes: Any) -> Profile:
    return replace(profile, images=replace(profile.images, **changes))
