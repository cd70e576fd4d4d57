"""``Entry.fingerprint`` of data that lies in files."""

from __future__ import annotations

from pathlib import Path

__all__ = ["fingerprint"]


def fingerprint(path: Path) -> str:
    """Size in bytes and time of the last change, without opening the file; raises OSError where there is none."""
    status = path.stat()
    return f"{status.st_size}:{status.st_mtime_ns}"
