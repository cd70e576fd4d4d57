"""JSON-lines files that survive ``kill -9``: whole lines are appended and synced, an unfinished last one is dropped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from raydiff.errors import StorageError

__all__ = ["append_lines", "read_lines"]


def append_lines(path: str | Path, lines: Iterable[str]) -> None:
    """Add lines (without their ends) in one write and sync them; what a killed process left unfinished is cut off.

    One process at a time may append to a file.

    Raises:
        StorageError: the file cannot be written.
    """
    target, text = Path(path), "".join(line + "\n" for line in lines)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("ab+") as file:
            file.seek(0)
            content = file.read()
            end = content.rfind(b"\n") + 1
            if end < len(content):
                if _is_whole(content[end:]):
                    text = "\n" + text
                else:
                    file.truncate(end)
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StorageError(f"{target}: cannot be written ({error.strerror}); choose another place") from error


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of every line that is not empty, without a last one that was never finished.

    Raises:
        OSError, UnicodeDecodeError: the file is missing or no text.
    """
    content = Path(path).read_bytes()
    end = content.rfind(b"\n") + 1
    whole = content if _is_whole(content[end:]) else content[:end]
    for number, line in enumerate(whole.decode("utf-8").splitlines(), start=1):
        if line.strip():
            yield number, line


def _is_whole(tail: bytes) -> bool:
    """Whether a line without its end is all there; a tail that is no text at all is left for the reader to refuse."""
    try:
        json.loads(tail)
    except UnicodeDecodeError:
        return b"{" not in tail[:1]
    except ValueError:
        return False
    return True
