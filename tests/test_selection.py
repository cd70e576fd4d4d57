"""The selection split: calibration normals and as many synthetic anomalies, equal parts of each kind."""

import numpy as np
import pytest

from raydiff import registry
from raydiff.errors import ShapeError
from raydiff.images import to_uint8
from raydiff.selection import selection_set
from raydiff.testing import small_images

PIXELS = to_uint8(small_images(24, (16, 16)))
IDS = [f"image-{i}" for i in range(24)]


def test_normal_images_come_first_and_every_anomaly_is_marked():
    made = selection_set(PIXELS, IDS, seed=1)
    assert np.array_equal(made.images[:24], PIXELS)
    assert made.labels.tolist() == [False] * 24 + [True] * 24
    assert not made.masks[:24].any()
    assert made.masks[24:].any((1, 2)).all()
    changed = (made.images[24:] != PIXELS).any(-1)
    assert changed.any((1, 2)).all()
    assert not (changed & ~made.masks[24:]).any()


def test_every_kind_makes_an_equal_part():
    made = selection_set(PIXELS, IDS, seed=1)
    kinds = [name for name in registry.names("perturbations") if _build(name).kind == "anomaly"]
    assert kinds == ["blur_patch", "cut_paste", "noise_patch", "perlin_texture"]
    for name in kinds:
        own = _build(name, seed=1).apply(PIXELS, severity=3, ids=IDS).images
        assert (own == made.images[24:]).all((1, 2, 3)).sum() == 6, name


def test_the_order_of_the_images_does_not_matter_and_the_seed_does():
    made = selection_set(PIXELS, IDS)
    backwards = selection_set(PIXELS[::-1], IDS[::-1])
    assert np.array_equal(backwards.images[24:][::-1], made.images[24:])
    assert not np.array_equal(selection_set(PIXELS, IDS, seed=1).images, made.images)


def test_an_even_image_becomes_anomalous_too():
    for level in (0, 127, 255):
        made = selection_set(np.full((8, 12, 12, 3), level, dtype=np.uint8), IDS[:8])
        assert (made.images[8:] != level).any((1, 2, 3)).all()


def test_there_is_one_id_per_image():
    with pytest.raises(ShapeError, match="there are 24 images and 23 ids; give one id per image"):
        selection_set(PIXELS, IDS[1:])


def _build(name, **fields):
    return registry.build("perturbations", registry.component("perturbations", name).Options(**fields))
