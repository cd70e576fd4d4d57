"""Lines that survive a process killed while it wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from raydiff.errors import ConfigError, StorageError
from raydiff.journal import alone_in, append_lines, read_lines, write_whole


def test_lines_come_back_with_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lines.jsonl"
    append_lines(path, ['{"a": 1}', '{"a": 2}'])
    append_lines(path, ['{"a": 3}'])
    assert list(read_lines(path, "")) == [(1, '{"a": 1}'), (2, '{"a": 2}'), (3, '{"a": 3}')]


@pytest.mark.parametrize("tail", ['{"a": ', '{"a": "\xe4'[:-1], '{"a": 2', "{"])
def test_an_unfinished_last_line_is_not_read_and_is_cut_off(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n' + tail)
    assert list(read_lines(path, "")) == [(1, '{"a": 1}')]
    append_lines(path, ['{"a": 3}'])
    assert path.read_text() == '{"a": 1}\n{"a": 3}\n'


def test_a_last_line_cut_inside_a_character_is_unfinished(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "\xc3')
    assert list(read_lines(path, "")) == [(1, '{"a": 1}')]


def test_a_last_line_that_only_lacks_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}')
    assert list(read_lines(path, "")) == [(1, '{"a": 1}')]
    append_lines(path, ['{"a": 2}'])
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n'


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        append_lines(tmp_path / "file" / "lines.jsonl", ["{}"])
    with pytest.raises(StorageError, match="cannot be written"):
        write_whole(tmp_path / "file" / "whole.json", "{}")
    with pytest.raises(StorageError, match="cannot be written"), alone_in(tmp_path / "file"):
        pass


def test_a_whole_file_replaces_the_one_before_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "new" / "whole.json"
    for text in ("a", "b"):
        write_whole(path, text)
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_is_one_writers_until_it_ends(tmp_path: Path) -> None:
    refused = pytest.raises(ConfigError, match="another raydiff command runs in")
    with alone_in(tmp_path / "new"), refused, alone_in(tmp_path / "new"):
        pass
    with alone_in(tmp_path / "new"):
        pass
