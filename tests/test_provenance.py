import platform
import re

import torch

from raydiff.provenance import hardware, source_commit, versions


def test_versions_name_python_and_the_build_of_torch():
    found = versions()
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert "raydiff" in found


def test_hardware_names_processor_cores_and_threads():
    assert re.search(r".+, \d+ cores?, \d+ threads?$", hardware("cpu"))


def test_hardware_is_told_of_the_threads_at_the_moment():
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(hardware("cpu").rpartition(", ")[2])
    finally:
        torch.set_num_threads(before)
    assert found == ["1 thread", "2 threads"]


def test_the_commit_is_short_and_says_when_the_tree_differs():
    assert re.fullmatch(r"[0-9a-f]{12}( \+ changes)?", source_commit() or "0" * 12)
