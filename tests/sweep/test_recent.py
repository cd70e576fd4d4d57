"""What is forgotten, and when."""

from __future__ import annotations

from raydiff.sweep.recent import Recent


def test_what_was_not_asked_for_longest_makes_room() -> None:
    memory = Recent[str](10)
    for key in "abc":
        memory.put(key, key.upper(), 3)
    assert memory.get("a") == "A"
    memory.put("d", "D", 4)
    assert [memory.get(key) for key in "abcd"] == ["A", None, "C", "D"]
    assert memory.nbytes == 10


def test_a_key_has_one_value() -> None:
    memory = Recent[str](10)
    memory.put("a", "first", 6)
    memory.put("a", "second", 8)
    assert memory.get("a") == "second"
    assert memory.nbytes == 8


def test_what_is_too_large_is_not_kept() -> None:
    memory = Recent[str](10)
    memory.put("a", "A", 3)
    memory.put("b", "B", 11)
    assert memory.get("b") is None
    assert memory.get("a") == "A"
