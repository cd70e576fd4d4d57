"""The pictures of a folder in the order of the numbers in their names, those that still come too."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raydiff.errors import DataError
from raydiff.images import SUFFIXES, ImageSpec, decode

__all__ = ["POLL", "Order", "listed", "order_of", "pictures", "read", "recorded"]

POLL = 0.05
"""Seconds between two looks whether more has been written."""

Order = tuple[list[int], str]


def recorded(file: Path) -> str:
    """A picture's name as it stands in a row: one line of text, whatever the file system allows."""
    return re.sub(r"[\r\n\ud800-\udfff]", "?", file.name)


def order_of(name: str) -> Order:
    """What a picture is sorted by, from its name as it is recorded."""
    return [int(number) for number in re.findall(r"\d+", Path(name).stem)], name


def pictures(path: Path) -> list[Path]:
    """The pictures directly in a folder, in order."""
    files = [file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")]
    return sorted(files, key=lambda file: order_of(recorded(file)))


def listed(path: Path, follow: float, done: str | None = None) -> Iterator[Path]:
    """The pictures behind ``done`` in order, and those that come while the next is no more than ``follow`` s away."""
    given: set[Path] = set()
    if done is not None:
        given.update(file for file in pictures(path) if order_of(recorded(file)) <= order_of(done))
    deadline = time.monotonic() + follow
    while True:
        new = [file for file in pictures(path) if file not in given]
        for file in new:
            given.add(file)
            yield file
        if new:
            deadline = time.monotonic() + follow
        elif time.monotonic() >= deadline:
            return
        else:
            time.sleep(POLL)


def read(file: Path, spec: ImageSpec, follow: float) -> NDArray[np.uint8]:
    """A picture's pixels; one that is still being written is waited for while it is no whole file.

    Raises:
        DataError: it cannot be read or decoded.
    """
    deadline = time.monotonic() + follow
    while True:
        try:
            return decode(file.read_bytes(), spec, str(file))
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror})") from error
        except DataError:  # half written, it may be
            if time.monotonic() >= deadline:
                raise
            time.sleep(POLL)
