"""Which addresses a command joins, and what it says of the others; in a process of its own, where no Ray runs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

pytestmark = pytest.mark.distributed

SCRIPT = """
import sys, time
from raydiff.distributed.cluster import connect
from raydiff.errors import RaydiffError
for address in sys.argv[1:]:
    started = time.monotonic()
    try:
        with connect(address):
            print("joined")
    except RaydiffError as error:
        print(error.exit_code, error)
    assert time.monotonic() - started < 30
"""

NICENESS = """
import os, ray
from raydiff.distributed.cluster import connect
for polite in (True, False, True):
    with connect(num_cpus=1, spare_cpus=0, object_store_mb=80, polite=polite):
        print(ray.get(ray.remote(lambda: os.nice(0)).remote()) - os.nice(0))
"""


def test_an_endpoint_has_as_much_of_a_busy_machine_as_any_program() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_worker_niceness"}
    command = [sys.executable, "-c", NICENESS]
    result = subprocess.run(
        command, env=environment | {"RAY_ADDRESS": ""}, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(polite := min(15, 19 - os.nice(0))), "0", str(polite)]


def test_addresses_that_cannot_be_joined_are_refused_with_the_way_in() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    addresses = ["http://head:8265", "ray://head:10001", f"127.0.0.1:{port}", "nonsense"]
    command, environment = [sys.executable, "-c", SCRIPT, *addresses], os.environ | {"RAY_ADDRESS": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    way_in = "a command joins host:port from a node of the cluster; from anywhere else send it:"
    assert lines[0] == f"2 RAY_ADDRESS http://head:8265: {way_in} raydiff submit --address http://head:8265 -- ..."
    assert lines[1] == f"2 RAY_ADDRESS ray://head:10001: {way_in} raydiff submit --address http://head:8265 -- ..."
    assert lines[2].startswith(f"1 RAY_ADDRESS 127.0.0.1:{port}: no Ray cluster answers there")
    assert lines[3].startswith("2 RAY_ADDRESS nonsense: is no address of a Ray cluster")
