"""The hosts that the on-prem test stands on: apart from each other, opened by their key alone, gone without a trace."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.clusters.hosts import CHECKOUT, Site, hosts, why_not


@pytest.fixture(autouse=True)
def _namespaces() -> None:
    if reason := why_not():
        pytest.skip(f"no hosts can be made here: {reason}")


def processes_of(folder: Path) -> list[str]:
    """Command lines on this machine of the site's holders, first processes and sshds: they name its folder."""
    lines = [
        (each.info["name"], " ".join(each.info["cmdline"] or [])) for each in psutil.process_iter(["name", "cmdline"])
    ]
    return [line for name, line in lines if name in ("unshare", "bash", "sshd") and str(folder) in line]


def reachable(site: Site, address: str) -> bool:
    (host,) = (host for host in site.machines if host.address == address)
    return "yes" in site.ssh(host, "echo yes", check=False)


def test_a_host_has_its_own_name_address_processes_and_tmp(tmp_path: Path) -> None:
    with hosts(2, tmp_path / "site") as site:
        one, two = site.machines
        assert site.ssh(one, "hostname; hostname -I").split() == ["host1", "10.77.0.11"]
        assert site.ssh(one, f"ssh -i {site.key} -o StrictHostKeyChecking=no {two.address} hostname 2>/dev/null") == (
            "host2\n"
        )
        site.ssh(
            one, f"touch /tmp/mine /root/mine /dev/shm/mine {site.shared}/ours; setsid -f sleep 77 > /dev/null 2>&1"
        )
        assert site.ssh(two, f"ls /tmp/mine /root/mine /dev/shm/mine {site.shared}/ours 2>/dev/null || true") == (
            f"{site.shared}/ours\n"
        )
        assert "sleep 77" in one.run("ps", "axo", "args")
        assert "sleep 77" not in two.run("ps", "axo", "args")
        assert "Read-only" in site.ssh(one, f"touch {CHECKOUT}/mine 2>&1 || true")
        assert one.run(sys.executable, "-c", "import yaml; print('the same Python')") == "the same Python\n"
    assert not Path("/tmp/mine").exists()


def test_a_stranger_is_refused(tmp_path: Path) -> None:
    with hosts(1, tmp_path / "site") as site:
        (host,) = site.machines
        stranger = site.shared / "stranger"
        site.desk.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", stranger)
        command = [str(stranger) if part == str(site.key) else part for part in site.ssh_command(host)]
        assert "Permission denied (publickey)" in site.desk.run(*command, "true", check=False)


def test_a_host_is_cut_off_and_comes_back(tmp_path: Path) -> None:
    with hosts(2, tmp_path / "site") as site:
        one, two = site.machines
        site.cut(one)
        assert not reachable(site, one.address)
        assert reachable(site, two.address)
        assert one.run("hostname") == "host1\n"  # its console still works: the network is gone, not the host
        site.mend(one)
        assert reachable(site, one.address)


def test_nothing_is_left_after_an_error(tmp_path: Path) -> None:
    devices = set(psutil.net_if_addrs())

    def fail() -> None:
        with hosts(1, tmp_path / "site") as site:
            assert len(processes_of(tmp_path)) >= 5  # holder and first process of desk and host, the host's sshd
            site.machines[0].run("false")

    with pytest.raises(RuntimeError, match="host1: false: exit code 1"):
        fail()
    assert not processes_of(tmp_path)
    assert set(psutil.net_if_addrs()) == devices
    assert str(tmp_path) not in Path("/proc/mounts").read_text()


def test_nothing_is_left_when_the_holder_is_killed(tmp_path: Path) -> None:
    """kill -9 of the process that made the hosts: the kernel closes its pipes, and the hosts end."""
    script = f"""
import pathlib, time
from tests.clusters.hosts import hosts
with hosts(1, pathlib.Path({str(tmp_path / "site")!r})) as site:
    site.machines[0].run("setsid", "-f", "bash", "-c", "exec sleep 88 > /dev/null 2>&1")
    print("up", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=CHECKOUT)
    assert holder.stdout is not None
    with holder.stdout:
        assert holder.stdout.readline() == "up\n"
        assert processes_of(tmp_path)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    deadline = time.monotonic() + 60
    while processes_of(tmp_path):
        assert time.monotonic() < deadline, processes_of(tmp_path)
        time.sleep(0.1)
