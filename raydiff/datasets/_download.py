"""Fetching a data set with torchvision's downloader, which knows where the files are published and their checksums."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from raydiff.errors import DataError

__all__ = ["fetch"]


def fetch(name: str, folder: Path) -> Path:
    """Download ``torchvision.datasets.<name>`` into ``folder``, unless it is there, and give the folder back.

    Raises:
        DataError: the network fails, or what came has another checksum; one line.
    """
    import torchvision

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stdout(io.StringIO()):
            getattr(torchvision.datasets, name)(str(folder), download=True)
    except (OSError, RuntimeError, EOFError) as error:  # URLError is an OSError; a wrong checksum is a RuntimeError
        reason = [line.strip() for line in str(error).splitlines() if line.strip()][-1:] or [type(error).__name__]
        raise DataError(
            f"--download {folder}: {name} could not be fetched ({reason[0]}); check the network, or copy the files"
            f" here from another machine and give their folder with --source"
        ) from error
    return folder
