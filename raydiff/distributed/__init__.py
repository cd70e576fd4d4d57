"""The only package that imports Ray. Nothing here computes: it spreads plain functions over machines."""

from __future__ import annotations

import os
import socket


def _is_on_loopback_only(address: str) -> bool:
    """Whether a cluster at a loopback address is not at this machine's address in the network too.

    Ray takes 127.0.0.1 for the latter, and would wait for ever where ``ray start`` bound loopback only.
    """
    host, _, port = address.rpartition(":")
    if host not in ("127.0.0.1", "localhost", "[::1]") or not port.isdecimal():
        return False
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outward:
            outward.connect(("8.8.8.8", 80))  # sends nothing; Ray finds the address in the same way
            own = outward.getsockname()[0]
        socket.create_connection((own, int(port)), timeout=2).close()
    except (OSError, OverflowError):
        return True
    return False


# Read by Ray when it is imported or starts processes, so set before any module here imports it; one set outside wins.
for _name, _value in {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else every line that a worker prints appears twice
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",  # 10 by default: replicas would come late
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",  # 10 by default: after three such a proxy that ended is replaced
    "HF_HUB_OFFLINE": "1",
}.items():
    os.environ.setdefault(_name, _value)
if (_address := os.environ.get("RAY_ADDRESS") or "local") == "local" or _is_on_loopback_only(_address):
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # binds 127.0.0.1, not the network's address
