"""Where a figure comes from: the machine, the versions of the libraries, the commit of the source."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

__all__ = ["hardware", "processor", "source_commit", "versions"]

_PACKAGES = ("raydiff", "diffusers", "timm", "scikit-learn", "pyod", "numpy", "ray")


def hardware(device: str) -> str:
    """The processor, its usable cores and the threads torch uses at the moment; the GPU where one is used."""
    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(torch.device(device)))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = torch.get_num_threads()
    return f"{processor()}, {cores} core{'s' * (cores != 1)}, {threads} thread{'s' * (threads != 1)}"


@cache
def processor() -> str:
    """The processor's name as the system tells it."""
    model = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return model


@cache
def versions() -> dict[str, str]:
    """Python and the libraries that can move a number."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # not installed here
            continue
    return found


@cache
def source_commit() -> str | None:
    """The source's commit, with "+ changes" where the tree differs from it; None outside a repository."""
    git, folder = shutil.which("git"), Path(__file__).parent
    if git is None or not (folder.parent / ".git").exists():
        return None

    def ask(*arguments: str) -> str:
        answer = subprocess.run([git, "-C", folder, *arguments], capture_output=True, text=True, check=False)
        return answer.stdout.strip()

    commit = ask("rev-parse", "--short=12", "HEAD")
    return (commit + (" + changes" if ask("status", "--porcelain", "--", ".") else "")) or None
