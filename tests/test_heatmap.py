import numpy as np
import pytest

from raydiff.errors import ShapeError
from raydiff.heatmap import blend, enlarge, heat, layer, overlay


def test_colour_begins_at_the_median_and_is_half_way_at_the_mask_threshold():
    values = np.array([[1.0, 1.0, 1.0], [1.0, 1.0, 3.0], [5.0, 9.0, 0.0]])
    level = heat(values, 3.0)
    assert level[0, 0] == 0
    assert level[1, 2] == 0.5
    assert (level[2] == [1, 1, 0]).all()


def test_without_a_threshold_above_the_median_the_maximum_is_the_end_of_the_scale():
    values = np.array([[0.0, 0.0, 0.0, 4.0, 8.0]])
    for threshold in (None, -1.0):
        assert heat(values, threshold).tolist() == [[0, 0, 0, 0.5, 1]]
    assert not heat(np.full((3, 3), 7.0), None).any()


def test_an_overlay_leaves_calm_pixels_grey_and_brightens_with_the_map():
    image = np.full((2, 2, 3), 100, np.uint8)
    image[..., 2] = 130
    shown = overlay(image, np.array([[0.0, 0.0], [0.0, 10.0]]), 2.0)
    assert shown[0, 0].tolist() == [110, 110, 110]
    assert shown[1, 1, 0] > 200 > shown[1, 1, 2] + 20
    assert shown.dtype == np.uint8


def test_an_overlay_of_a_map_of_another_size_is_refused():
    with pytest.raises(ShapeError, match=r"image is \(2, 2, 1\) and map \(3, 3\)"):
        overlay(np.zeros((2, 2, 1), np.uint8), np.zeros((3, 3)), None)


def test_enlarge_repeats_pixels():
    assert enlarge(np.zeros((8, 6, 3), np.uint8)).shape == (128, 96, 3)
    assert enlarge(np.zeros((200, 300, 1), np.uint8)).shape == (200, 300, 1)


def test_the_layer_over_grey_is_the_blend():
    level = np.linspace(0, 1, 20).reshape(4, 5)
    image = np.full((4, 5, 1), 90, np.uint8)
    rgba = layer(level).astype(float)
    assert rgba.shape == (4, 5, 4)
    assert (rgba[0, 0, 3], rgba[-1, -1, 3]) == (0, round(0.9 * 255))
    opacity = rgba[..., 3:] / 255
    assert np.abs(opacity * rgba[..., :3] + (1 - opacity) * 90 - blend(image, level)).max() < 1.5
