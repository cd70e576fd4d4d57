"""``raydiff serve``: check everything that can be checked, start the application, and stay until told to stop.

Fault by fault: a replica that ends is replaced and its images are scored by another; the door and the board are
restarted. Without a cluster (``RAY_ADDRESS``) a local one is started on loopback. A cluster has one Serve with one
port, which ends with this command: where Serve runs already it refuses, and ``serve deploy`` is the way in.
"""

from __future__ import annotations

import ipaddress
import logging
import math
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
import torch
import yaml
from ray import serve
from ray.exceptions import RayError
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.exceptions import RayServeException
from ray.serve.schema import LoggingConfig

from raydiff.distributed.cluster import connect
from raydiff.distributed.room import wait_for_room
from raydiff.distributed.serve_app import build
from raydiff.distributed.serve_requests import Keys
from raydiff.distributed.serve_settings import ServeSettings
from raydiff.errors import ConfigError, StorageError, WorkerError
from raydiff.experiment import artifact_of
from raydiff.service.artifacts import load_artifact

__all__ = ["APPLICATION", "check", "config_yaml", "is_loopback", "run", "serving"]

APPLICATION = "raydiff"
_GRACE_S = 5.0
"""Serve's own time-out comes so much after the door's, which answers in our words."""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check(settings: ServeSettings, host: str, port: int) -> str:
    """Everything that would fail later, now; the artefact's id.

    Raises:
        ArtifactError, NotCalibratedError: an artefact cannot serve.
        ConfigError: a setting cannot be used, there is no such device, or the port is taken.
        StorageError: a file cannot be read.
    """
    device = "cpu" if os.environ.get("RAY_ADDRESS") else settings.device  # a cluster's GPUs are elsewhere
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"num_gpus is {settings.num_gpus:g} and this machine has no GPU that torch can use; leave out --num-gpus, "
            f"or name a cluster that has some in RAY_ADDRESS"
        )
    artifact_id = load_artifact(settings.artifact, device=device, max_batch=1).artifact_id
    if settings.shadow is not None:
        load_artifact(settings.shadow, device=device, max_batch=1)
    Keys.read(settings.api_key_file)
    if settings.artifact_root is not None and not Path(settings.artifact_root).is_dir():
        raise ConfigError(f"artifact_root {settings.artifact_root}: is no folder; make it, or leave the option out")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise ConfigError(f"{host}:{port}: cannot be listened on ({error.strerror}); choose another --port") from error
    return artifact_id


@contextmanager
def serving(settings: ServeSettings, host: str = "127.0.0.1", port: int = 8000) -> Iterator[str]:
    """The application, answering, for the time of a ``with`` block; its address.

    Raises:
        WorkerError: Serve runs on the cluster already, it has no room for one replica, or the application does not
            start.
    """
    cpus = max(os.cpu_count() or 1, math.ceil(settings.max_replicas * settings.num_cpus))
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    with connect(num_cpus=cpus, polite=False):
        _refuse_if_serve_runs()
        amounts = {"CPU": settings.num_cpus, "GPU": settings.num_gpus}
        least = max(1, settings.min_replicas)
        if any(amounts.values()) and wait_for_room(amounts, least)[0] < least:
            raise WorkerError(
                f"the cluster has no room for {least} replica(s) of {settings.num_cpus:g} CPU "
                f"and {settings.num_gpus:g} GPU; lower --min-replicas, --num-cpus or --num-gpus"
            )
        try:
            serve.start(
                proxy_location="HeadOnly",
                http_options=_http_options(settings, host, port),
                logging_config=LoggingConfig(enable_access_log=False),
            )
            serve.run(build(settings.model_dump()), name=APPLICATION, route_prefix="/")
        except BaseException as error:  # also Ctrl-C: what was begun must not stay on the cluster
            with suppress(Exception):
                serve.shutdown()
            if not isinstance(error, RuntimeError | RayServeException | RayError):
                raise
            raise WorkerError(f"the endpoint does not start ({_last_line(error)}); see Ray's log of Serve") from error
        try:
            yield f"http://{f'[{host}]' if ':' in host else host}:{port}"
        finally:
            _drain(settings.timeout_s)
            serve.shutdown()


def run(settings: ServeSettings, host: str, port: int, on_ready: Callable[[str], None], stop: threading.Event) -> None:
    """Serve until ``stop`` is set, then drain and end; :func:`check` first.

    Raises:
        WorkerError: as :func:`serving`; or the application failed.
    """
    with serving(settings, host, port) as address:
        on_ready(address)
        while not stop.wait(1.0):
            if not ray.is_initialized():
                raise WorkerError("the Ray cluster is gone; start it, and the endpoint, again")


def config_yaml(settings: ServeSettings, host: str, port: int) -> str:
    """The same application as a config file for ``serve deploy``.

    Raises:
        ArtifactError: there is no artefact, or it is damaged.
    """
    artifact_of(settings.artifact)
    config = {
        "proxy_location": "HeadOnly",
        "http_options": _http_options(settings, host, port),
        "logging_config": {"enable_access_log": False},
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": "raydiff.distributed.serve_app:build",
                "args": settings.model_dump(exclude_none=True),
            }
        ],
    }
    return yaml.safe_dump(config, sort_keys=False)


def write_config(settings: ServeSettings, host: str, port: int, path: Path) -> None:
    """Write :func:`config_yaml`.

    Raises:
        StorageError: the file cannot be written.
    """
    try:
        path.write_text(config_yaml(settings, host, port), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror}); choose another place") from error


def _refuse_if_serve_runs() -> None:
    """Its address would not be ours, and ending ours would end the applications of others."""
    try:
        ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return
    raise WorkerError(
        "Serve runs on this cluster already; write a config with --write-config and use `serve deploy`, or end what "
        "runs there with `serve shutdown`"
    )


def _drain(within: float) -> None:
    """Take no more requests, and wait for the answers under way: Serve's own shutdown ends the proxy at once."""
    with suppress(Exception):  # of an application that has failed already
        serve.get_app_handle(APPLICATION).drain.remote(within).result(timeout_s=within + _GRACE_S)


def _http_options(settings: ServeSettings, host: str, port: int) -> dict[str, Any]:
    roll_s = 0.0 if settings.artifact_root is None else settings.roll_timeout_s
    return {"host": host, "port": port, "request_timeout_s": max(2 * settings.timeout_s, roll_s) + _GRACE_S}


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else type(error).__name__
