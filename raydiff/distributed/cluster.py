"""Ray, started or joined: the settings that every command needs, in one place.

With ``RAY_ADDRESS`` set (or an address given) a command joins that cluster, from one of its nodes; without, it starts
one in this process, on loopback only, and stops it at the end, even where ``ray start`` has been called on the machine.
From a machine that is no node the command goes there as a job (``raydiff submit``), where Ray sets ``RAY_ADDRESS``.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from urllib.parse import urlsplit

import ray
from ray.exceptions import AuthenticationError

from raydiff.distributed.head_watch import head_watched
from raydiff.errors import ConfigError, StorageError, WorkerError

__all__ = ["connect", "room_for"]

_SPARE_CPUS = 2
"""Logical CPUs beyond the machine's, for read tasks beside training workers that hold all the real ones."""
_FOR_WORKERS = (
    "HF_HUB_OFFLINE",
    "RAYDIFF_STORAGE_PATIENCE_S",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO",
    "RAY_DATA_DISABLE_PROGRESS_BARS",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S",
    "RAY_TRAIN_ENABLE_PRINT_PATCH",
)
"""Settings of this package that the processes of a cluster that was joined must have too; a local one inherits them."""


@contextmanager
def connect(
    address: str | None = None,
    *,
    num_cpus: int | None = None,
    spare_cpus: int = _SPARE_CPUS,
    object_store_mb: int = 512,
    dashboard: bool = False,
    polite: bool = True,
) -> Iterator[None]:
    """Ray for the time of a ``with`` block; left as it was found if it was running already.

    Args:
        address: of a cluster, as ``ray.init`` takes it; ``RAY_ADDRESS`` by default, else (or where that is "local") one
            is started.
        num_cpus: logical CPUs of a local cluster; all of the machine's by default.
        spare_cpus: logical CPUs of a local cluster beyond those.
        object_store_mb: shared memory of a local cluster.
        dashboard: start a local cluster's dashboard, on loopback; Ray Train inside Ray Tune needs it to free resources.
        polite: workers of a local cluster leave the processor to others, as Ray has it (niceness 15, or what
            ``RAY_worker_niceness`` says); else they have as much of it as any program.

    Raises:
        ConfigError: the address is none that a command can join.
        WorkerError: the cluster does not answer, or runs another Ray.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    joined = address if address and address != "local" else None
    with _explained(joined):
        if joined:
            _see_that_it_can_be_joined(joined)
            ray.init(address=joined, runtime_env={"env_vars": _settings()}, **quiet)
        else:
            cpus = (num_cpus or os.cpu_count() or 1) + spare_cpus
            with nullcontext() if polite else _as_any_program():
                ray.init("local", num_cpus=cpus, object_store_memory=object_store_mb * 2**20,
                         include_dashboard=dashboard, **quiet)  # fmt: skip
    try:
        with head_watched(ray.get_runtime_context().gcs_address) if joined else nullcontext():
            yield
    finally:
        ray.shutdown()


@contextmanager
def _explained(address: str | None) -> Iterator[None]:
    """What Ray raises where a cluster cannot be joined (at ``address``) or started, as an error with a remedy."""
    try:
        yield
    except ConnectionError as error:
        raise WorkerError(
            f"RAY_ADDRESS {address}: no Ray cluster answers there ({error}); start it or unset it, and where the"
            " cluster wants a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        ) from error
    except AuthenticationError as error:
        raise WorkerError(
            f"RAY_ADDRESS {address}: the cluster wants a token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or"
            " RAY_AUTH_TOKEN_PATH, to that of its head"
        ) from error
    except RuntimeError as error:  # another version of Ray or Python; this machine is no node of it
        if not address:
            raise
        raise WorkerError(
            f"RAY_ADDRESS {address}: cannot be joined ({' '.join(str(error).split())[:300]}); from a machine"
            " that is no node of it, or has another Ray: raydiff submit --address http://HEAD:8265 -- ..."
        ) from error
    except OSError as error:
        raise StorageError(f"Ray cannot start ({error}); see that its temporary folder can be written") from error


@contextmanager
def _as_any_program() -> Iterator[None]:
    """Ray's processes that start meanwhile, and their workers later, are not polite; what is set outside wins."""
    name = "RAY_worker_niceness"
    given = name in os.environ
    os.environ.setdefault(name, "0")
    try:
        yield
    finally:
        if not given:
            del os.environ[name]


def _see_that_it_can_be_joined(address: str) -> None:
    if "://" not in address:
        _see_that_it_listens(address)
        return
    scheme, host = urlsplit(address).scheme, urlsplit(address).hostname or "HEAD"
    dashboard = address if scheme in ("http", "https") else f"http://{host}:8265"
    raise ConfigError(
        f"RAY_ADDRESS {address}: a command joins host:port from a node of the cluster; from anywhere else send it:"
        f" raydiff submit --address {dashboard} -- ..."
    )


def _see_that_it_listens(address: str) -> None:
    """Now: Ray tries for half a minute, and its words do not say what it tried."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()):
        raise ConfigError(f"RAY_ADDRESS {address}: is no address of a Ray cluster; give host:6379, or unset it")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(str(error)) from error


def _settings() -> dict[str, str]:
    """This process's settings for a cluster's workers, less what its job has set: Ray refuses one that is set twice."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    given = ((job.get("runtime_env") or {}).get("env_vars")) or {}
    return {name: os.environ[name] for name in _FOR_WORKERS if name in os.environ and name not in given}


def room_for(amounts: Mapping[str, float]) -> tuple[int, int]:
    """How many tasks that hold so much ("CPU", "GPU") fit on the cluster's nodes at a time, and how many nodes.

    What asks for more than any node has would wait for ever.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    wanted = {name: amount for name, amount in amounts.items() if amount > 0}
    return sum(min(int(node.get(name, 0) / amount) for name, amount in wanted.items()) for node in nodes), len(nodes)
