"""Keeps Serve's replicas off the network where the cluster is on loopback.

Every replica of Ray Serve 2.60 opens a gRPC port on all interfaces (``ray/serve/_private/replica.py``,
``_on_initialized``: ``"[::]:0"``) and unpickles what comes in, without asking who sends it: whoever reaches the port
runs code. Handles do not use it unless ``RAY_SERVE_USE_GRPC_BY_DEFAULT`` is set. On a cluster whose node is at
127.0.0.1 nothing outside may reach it, so there it is opened on loopback only; a cluster of several machines belongs
behind a firewall, as Ray says: https://docs.ray.io/en/latest/ray-security/index.html.
"""

from __future__ import annotations

import ipaddress
from typing import Any

import ray
from ray.serve._private import replica

__all__ = ["keep_ports_local"]

_EVERYWHERE = ("[::]:", "0.0.0.0:")


def keep_ports_local() -> None:
    """To be called in a replica's constructor, before Serve opens the port; does nothing on a real network."""
    if not ipaddress.ip_address(ray.util.get_node_ip_address()).is_loopback:
        return
    original = replica.add_port_to_grpc_server

    def on_loopback(server: Any, address: str) -> Any:
        for everywhere in _EVERYWHERE:
            if address.startswith(everywhere):
                address = f"127.0.0.1:{address.removeprefix(everywhere)}"
        return original(server, address)

    replica.add_port_to_grpc_server = on_loopback
