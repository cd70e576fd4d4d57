"""One Ray for every test in this folder; starting it takes five seconds."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ |= {
    "RAY_AUTH_MODE": "disabled",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray: two CPUs, the spare ones of :mod:`raydiff.distributed.cluster`, 300 MB of object store."""
    from raydiff.distributed.cluster import connect

    with connect(num_cpus=2, object_store_mb=300):
        yield
