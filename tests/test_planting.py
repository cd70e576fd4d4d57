"""Planted anomalies: as many of each kind and severity, the same each time, and none of the selection split's."""

from __future__ import annotations

import numpy as np
import pytest

from raydiff.errors import ConfigError
from raydiff.images import to_uint8
from raydiff.planting import Plants, anomalies, check_kinds, planted
from raydiff.selection import selection_set
from raydiff.testing import small_images

PIXELS = to_uint8(small_images(12, (16, 16)))
EVERY = ("blur_patch", "cut_paste", "noise_patch", "perlin_texture")


def test_every_anomaly_is_marked_where_it_changed_its_image() -> None:
    made, masks = planted(PIXELS, Plants(12, 30, (), (1, 2, 3)), seed=0)
    assert made.shape == (30, 16, 16, 1)
    assert masks.any((1, 2)).all()
    changed = (made != PIXELS[np.arange(30) % 12]).any(-1)
    assert changed.any((1, 2)).all()
    assert not (changed & ~masks).any()


def test_the_seed_decides_and_each_image_has_one_at_least() -> None:
    few = Plants(12, 1, (), (3,))
    made, _ = planted(PIXELS, few, seed=0)
    assert len(made) == 12
    assert np.array_equal(planted(PIXELS, few, seed=0)[0], made)
    assert not np.array_equal(planted(PIXELS, few, seed=1)[0], made)


def test_kinds_and_severities_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def counted(seed: int, kinds: tuple[str, ...]) -> dict[str, object]:
        found = anomalies(seed, kinds)
        for name, one in found.items():
            apply = one.apply

            def noted(
                *given: object, severity: int, _name: str = name, _apply: object = apply, **more: object
            ) -> object:
                asked.append((_name, severity))
                return _apply(*given, severity=severity, **more)  # type: ignore[operator]

            monkeypatch.setattr(one, "apply", noted)
        return dict(found)

    monkeypatch.setattr("raydiff.planting.anomalies", counted)
    planted(PIXELS, Plants(12, 36, ("cut_paste", "blur_patch"), (1, 2, 5)), seed=0)
    assert {pair: asked.count(pair) for pair in asked} == {
        (kind, severity): 6 for kind in ("cut_paste", "blur_patch") for severity in (1, 2, 5)
    }


def test_no_anomaly_is_the_selection_splits() -> None:
    """Even of the same images, at the same severity, under the same seed."""
    made, _ = planted(PIXELS, Plants(12, 48, (), (3,)), seed=0)
    chosen = selection_set(PIXELS, [f"plant {i}" for i in range(12)], seed=0).images[12:]
    assert not (made[:, None] == chosen[None]).all((2, 3, 4)).any()


def test_the_selection_split_may_leave_kinds_out() -> None:
    ids = [f"{i}" for i in range(12)]
    some = selection_set(PIXELS, ids, kinds=("cut_paste", "noise_patch"))
    own = [
        anomalies(0, (name,))[name].apply(PIXELS, severity=3, ids=ids).images for name in ("cut_paste", "noise_patch")
    ]
    assert [int((images == some.images[12:]).all((1, 2, 3)).sum()) for images in own] == [6, 6]


def test_what_is_no_anomaly_is_refused() -> None:
    assert tuple(anomalies(0)) == EVERY
    check_kinds((), "scoring.kinds")
    with pytest.raises(
        ConfigError, match=r"scoring\.kinds: no perturbation is called 'cutpaste'; did you mean 'cut_paste"
    ):
        check_kinds(("cutpaste",), "scoring.kinds")
    with pytest.raises(ConfigError, match=r"scoring\.kinds: jpeg makes no anomaly; name some of blur_patch"):
        check_kinds(("cut_paste", "jpeg"), "scoring.kinds")
