"""A key that is given twice is an error, and what YAML allows is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from raydiff.config import load_config
from raydiff.errors import ConfigError
from raydiff.suite import load_suite
from raydiff.yaml_file import read_mapping


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: a is given twice, first in line 1; keep one of them"),
        ("a:\n  b: {c: 1, c: 2}\n", "line 2: c is given twice, first in line 2"),
        ("- {x: 1, x: 1}\n", "line 1: x is given twice"),
    ],
)
def test_repeated_keys_are_refused_with_their_lines(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(text)
    for read in (load_suite, load_config):
        with pytest.raises(ConfigError, match=message) as caught:
            read(path)
        assert str(caught.value).startswith(str(path))


def test_the_same_key_elsewhere_and_over_a_merged_one_is_fine(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n1: one\n'1': text\n")
    assert read_mapping(path, "config", "") == {
        "a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}, 1: "one", "1": "text",
    }  # fmt: skip


def test_an_empty_file_is_an_empty_mapping(tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text("# nothing\n")
    assert read_mapping(tmp_path / "file.yaml", "config", "") == {}
