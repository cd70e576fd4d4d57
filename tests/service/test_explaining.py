"""Boxes in the original's pixels, and pictures on the artefact's scale."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raydiff.images import ImageSpec, encode_png
from raydiff.placement import Placement, place
from raydiff.service.decoding import ReceivedImage, receive
from raydiff.service.explaining import MAX_BOXES, HeatScale, draw, find_boxes


def lies(spec: ImageSpec, height: int, width: int) -> Placement:
    return place(spec, Image.new("L", (width, height)))


def received(height: int, width: int, spec: ImageSpec) -> ReceivedImage:
    return receive(encode_png(np.full((height, width), 100, np.uint8)), spec)


def opened(picture: bytes | None) -> Any:
    assert picture is not None
    return np.asarray(Image.open(io.BytesIO(picture)))


def test_boxes_are_in_the_originals_pixels_and_ordered_by_peak() -> None:
    values = np.zeros((10, 20))
    values[2:4, 3:6] = 2.0
    values[8, 18] = 5.0
    boxes, count = find_boxes(values, values > 1, lies(ImageSpec((10, 20), 1), 100, 400))
    assert count == 2
    assert [(b.x, b.y, b.width, b.height, b.peak, b.area) for b in boxes] == [
        (360, 80, 20, 10, 5.0, 200.0),
        (60, 20, 60, 20, 2.0, 1200.0),
    ]


def test_regions_that_touch_at_a_corner_are_one() -> None:
    assert find_boxes(np.eye(5), np.eye(5, dtype=bool), lies(ImageSpec((5, 5), 1), 5, 5))[1] == 1


def test_a_box_of_a_smaller_original_covers_whole_pixels_within_it() -> None:
    values = np.zeros((10, 10))
    values[9, 4] = 1
    [box], _ = find_boxes(values, values > 0, lies(ImageSpec((10, 10), 1), 3, 4))
    assert (box.x, box.y, box.width, box.height) == (1, 2, 1, 1)
    assert box.area == pytest.approx(0.12)


@pytest.mark.parametrize(("height", "width"), [(20, 80), (80, 20), (37, 91), (16, 16), (1, 50)])
def test_padding_is_left_out(height: int, width: int) -> None:
    """A region over the whole canvas is the whole image, and the edge of the padding is the edge of the image."""
    spec = ImageSpec((16, 16), 1, "pad")
    everywhere = np.ones((16, 16))
    [box], count = find_boxes(everywhere, everywhere > 0, lies(spec, height, width))
    assert (box.x, box.y, box.width, box.height, count) == (0, 0, width, height, 1)
    assert box.area == pytest.approx(height * width)
    if width == 80:
        only_padding = np.zeros((16, 16), bool)
        only_padding[:5] = True
        assert find_boxes(everywhere, only_padding, lies(spec, height, width)) == ([], 0)


def test_a_planted_region_is_found_where_it_was(tmp_path: Any) -> None:
    """The image's own brightness as the map: the fitted pixels and the boxes agree on where things are."""
    for resize in ("stretch", "pad"):
        pixels = np.zeros((60, 120), np.uint8)
        pixels[30:45, 80:110] = 255
        spec = ImageSpec((32, 32), 1, resize)  # type: ignore[arg-type]
        image = receive(encode_png(pixels), spec).image
        values = image.pixels[:, :, 0].astype(float)
        [box], _ = find_boxes(values, values > 127, image.placement)
        assert abs(box.x - 80) <= 4
        assert abs(box.y - 30) <= 4
        assert abs(box.width - 30) <= 8
        assert abs(box.height - 15) <= 8


def test_many_regions_are_counted_and_the_highest_given() -> None:
    values = np.zeros((40, 40))
    values[::2, ::2] = np.arange(400).reshape(20, 20) + 1
    boxes, count = find_boxes(values, values > 0, lies(ImageSpec((40, 40), 1), 40, 40))
    assert (count, len(boxes)) == (400, MAX_BOXES)
    assert [box.peak for box in boxes] == list(range(400, 300, -1))


def test_no_region() -> None:
    assert find_boxes(np.ones((4, 4)), np.zeros((4, 4), bool), lies(ImageSpec((4, 4), 1), 4, 4)) == ([], 0)


@pytest.mark.parametrize("threshold", [3.0, -2.0, 0.0])
def test_the_threshold_is_half_way_up_the_scale(threshold: float) -> None:
    scale = HeatScale.of(threshold)
    assert scale.level(np.array([threshold])) == 0.5
    assert scale.low < threshold < scale.high
    assert scale.level(np.array([-1e9, 1e9])).tolist() == [0, 1]
    if threshold > 0:
        assert (scale.low, scale.high) == (0, 2 * threshold)


def test_the_same_value_has_the_same_colour_in_every_picture() -> None:
    spec, scale = ImageSpec((8, 8), 1), HeatScale.of(3.0)
    calm, wild = np.full((8, 8), 2.0), np.full((8, 8), 2.0)
    wild[:4] = 50.0
    image = received(8, 8, spec)
    first, second = (draw(image, values, scale, None) for values in (calm, wild))
    assert np.array_equal(opened(first.heat_map)[-1], opened(second.heat_map)[-1])
    assert np.array_equal(opened(first.heat_layer)[-1], opened(second.heat_layer)[-1])
    assert (opened(second.heat_layer)[0, :, 3] > 220).all()
    assert first.reconstruction is None


def test_pictures_show_what_the_original_shows() -> None:
    spec = ImageSpec((16, 16), 1, "pad")
    values = np.zeros((16, 16))
    values[4:12] = 9.0
    pictures = draw(received(20, 40, spec), values, HeatScale.of(1.0), np.full((16, 16, 1), 7, np.uint8))
    for picture in vars(pictures).values():
        assert opened(picture).shape[:2] == (64, 128)
    assert (opened(pictures.heat_layer)[..., 3] > 220).all()
    assert (opened(pictures.reconstruction) == 7).all()


def test_without_a_map_there_is_no_heat_map() -> None:
    pictures = draw(received(8, 8, ImageSpec((8, 8), 1)), None, None, np.zeros((8, 8, 1), np.uint8))
    assert pictures.heat_map is pictures.heat_layer is None
    assert pictures.reconstruction is not None
