from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of unpacked larger data sets that ``RAYDIFF_DATA`` names; skips where it names none."""
    folder = os.environ.get("RAYDIFF_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("RAYDIFF_DATA names no folder of unpacked data sets")
    return Path(folder)
