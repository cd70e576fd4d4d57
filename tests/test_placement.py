"""Parts at any angle, turned level: drawn nails, whose pose is known."""

from __future__ import annotations

import io
import math
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pydantic import ValidationError

from raydiff.config import DataConfig, ExperimentConfig, component_options
from raydiff.ensembling import ensemble_of
from raydiff.errors import ConfigError, DataError
from raydiff.evaluation import evaluate
from raydiff.fitting import calibrated, fit_baseline, placement_notes, statistics_notes
from raydiff.images import decode, decode_file, decode_mask, encode_png
from raydiff.placement import ImageSpec, Placement, Pose, find_part, place
from raydiff.service.decoding import receive
from raydiff.service.explaining import HeatScale, draw, find_boxes
from raydiff.shards import write_shards

SIDE = 128
CANVAS = ImageSpec((64, 128), 1, aligned_width=1.0)


def spot(angle: float, row: float, column: float, along: float, across: float = 0.0) -> tuple[float, float]:
    """Column and row of a place of the nail, ``along`` pixels from its middle towards the tip."""
    return (
        column + along * math.cos(angle) - across * math.sin(angle),
        row + along * math.sin(angle) + across * math.cos(angle),
    )


def nail(
    angle: float = 0.0, row: float = 63.5, column: float = 63.5, *, length: float = 80, mark: float | None = None,
    side: int = SIDE, light: int = 0,
) -> Image.Image:  # fmt: skip
    """A dark nail on a light ground, its head at the end where ``angle`` does not point; drawn four times as large."""
    image = Image.new("L", (4 * side, 4 * side), 200 + light)
    pen = ImageDraw.Draw(image)
    end = length / 2

    def polygon(corners: list[tuple[float, float]], grey: int) -> None:
        placed = [spot(angle, row, column, along, across) for along, across in corners]
        pen.polygon([(4 * x + 2, 4 * y + 2) for x, y in placed], fill=grey)

    polygon([(-end, -4), (end - 8, -4), (end, 0), (end - 8, 4), (-end, 4)], 60 + light)
    polygon([(-end, -12), (-end + 8, -12), (-end + 8, 12), (-end, 12)], 60 + light)
    if mark is not None:
        polygon([(mark - 3, -3), (mark + 3, -3), (mark + 3, 3), (mark - 3, 3)], 140)
    return image.resize((side, side), Image.Resampling.BOX)


def file_of(image: Image.Image) -> bytes:
    return encode_png(np.asarray(image))


def far(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Mean difference of pixels, over the contrast of a nail."""
    return float(np.abs(one.astype(float) - other.astype(float)).mean()) / 140


@given(
    angle=st.floats(-math.pi, math.pi), row=st.floats(52, 76), column=st.floats(52, 76),
    light=st.integers(-40, 40),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_a_nail_at_any_angle_and_place_is_the_same_picture(angle: float, row: float, column: float, light: int) -> None:
    found = find_part(nail(angle, row, column, light=light))
    assert found is not None
    assert abs((found.angle - angle + math.pi) % (2 * math.pi) - math.pi) < math.radians(1.5)
    assert math.hypot(found.row - row, found.column - column) < 2
    level = decode(file_of(nail()), CANVAS, "a")
    assert far(decode(file_of(nail(angle, row, column)), CANVAS, "a"), level) < 0.02


def test_unaligned_they_are_other_pictures() -> None:
    plain = ImageSpec((64, 128), 1)
    assert far(decode(file_of(nail(1.0)), plain, "a"), decode(file_of(nail()), plain, "a")) > 0.05


def test_the_head_lies_left_and_the_nail_in_the_middle() -> None:
    dark = decode(file_of(nail(2.3)), CANVAS, "a")[:, :, 0] < 130
    rows, columns = np.nonzero(dark)
    assert abs(columns.min() + columns.max() - 127) <= 4
    assert abs(rows.mean() - 31.5) < 1
    assert dark[:, :63].sum() > dark[:, 64:].sum()


def test_the_scale_is_that_of_the_image() -> None:
    """A nail that is too short looks too short, and ``aligned_width`` says how much is shown."""

    def length(image: Image.Image, spec: ImageSpec) -> int:
        return int((decode(file_of(image), spec, "a")[:, :, 0] < 130).any(0).sum())

    assert abs(length(nail(0.7), CANVAS) - 80) <= 1
    assert abs(length(nail(0.7, length=60), CANVAS) - 60) <= 1
    assert abs(length(nail(0.7), ImageSpec((64, 128), 1, aligned_width=0.75)) - 107) <= 2
    assert abs(length(nail(0.7, 127.5, 127.5, side=256), CANVAS) - 40) <= 1
    wide = Image.new("L", (256, 128), 200)
    wide.paste(nail(0.7), (60, 0))
    assert abs(length(wide, CANVAS) - 40) <= 1


def test_a_large_image_is_filtered_before_it_is_turned() -> None:
    fine = np.asarray(nail(0.4, 63.5, 63.5).resize((1024, 1024))).copy()
    fine[::2, ::2] = 255 - fine[::2, ::2]  # what a sampler without a filter would fold into stripes
    image = Image.fromarray(fine)
    found = find_part(image)
    assert found is not None
    assert found.angle == pytest.approx(0.4, abs=0.03)
    ground = decode(file_of(image), CANVAS, "a")[:8, :, 0].astype(float)
    assert ground.std() < 4


@pytest.mark.parametrize("thickness", [3, 5, 9])
def test_thin_parts_are_found_at_every_angle(thickness: int) -> None:
    """Parts are looked for at half of this resolution."""
    for angle in np.linspace(-3, 3, 9):
        image = Image.new("L", (4 * SIDE, 4 * SIDE), 200)
        (x0, y0), (x1, y1) = (spot(angle, 255, 255, along) for along in (-180, 180))
        pen = ImageDraw.Draw(image)
        pen.line((x0, y0, x1, y1), fill=40, width=thickness)
        pen.ellipse((x0 - 14, y0 - 14, x0 + 14, y0 + 14), fill=40)
        found = find_part(image)
        assert found is not None
        assert abs((found.angle - angle + math.pi) % (2 * math.pi) - math.pi) < math.radians(2)


@pytest.mark.parametrize(("size", "width"), [((64, 128), 1.0), ((32, 64), 1.0), ((160, 320), 1.0), ((96, 96), 0.75)])
def test_there_and_back(size: tuple[int, int], width: float) -> None:
    """A spot of the photo, on the canvas, and back again, at scales from a half to two and a half."""
    angle, row, column = 2.0, 60.0, 70.0
    x, y = (round(place) for place in spot(angle, row, column, 20))
    spec = ImageSpec(size, 1, aligned_width=width)
    image = decode_file(file_of(nail(angle, row, column, mark=20)), spec, "a")
    scale = size[1] / (width * SIDE)
    assert image.placement.scale == pytest.approx(scale)
    mask = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(mask).rectangle((x - 4, y - 4, x + 4, y + 4), fill=255)
    turned = decode_mask(file_of(mask), spec, "m", image=image)
    assert turned.sum() * image.placement.pixel_area == pytest.approx(81, rel=0.15)
    boxes, count = find_boxes(turned.astype(float), turned, image.placement)
    assert count == len(boxes) == 1
    assert abs(boxes[0].x + boxes[0].width / 2 - x - 0.5) < 1.5
    assert abs(boxes[0].y + boxes[0].height / 2 - y - 0.5) < 1.5
    assert 8 <= boxes[0].width <= 11 + 4 / scale
    back = image.placement.back(turned[..., None].astype(float), (SIDE, SIDE))
    assert np.abs(np.argwhere(back[..., 0] > 0.5).mean(0) - [y, x]).max() < 1


def test_a_pixel_goes_back_to_where_it_was() -> None:
    """By hand: a quarter turn, twice as large."""
    placement = Placement(8, 8, 0, 0, 8, 16, Pose(3.5, 3.5, math.pi / 2), 2.0)
    values = np.zeros((8, 16, 1))
    values[2:4, 4:6] = 1  # down -1.25 to -0.75 and along -1.75 to -1.25 of the middle, in pixels of the original
    back = placement.back(values, (8, 8))
    assert np.argwhere(back[..., 0] > 0.5).tolist() == [[2, 4]]
    region = values[..., 0] > 0
    assert placement.box(region[2:4, 4:6], 2, 4) == (4, 2, 1, 1)
    assert placement.pixel_area == 0.25


def test_a_hot_pixel_of_a_large_canvas_is_seen_on_a_small_picture() -> None:
    placement = Placement(64, 64, 0, 0, 512, 512, Pose(31.5, 31.5), 8.0)
    values = np.zeros((512, 512, 1))
    values[101, 203] = 1
    shown = placement.back(values, (64, 64))[..., 0]
    assert np.unravel_index(shown.argmax(), shown.shape) == (12, 25)
    assert shown.max() > 0.9


def test_a_large_region_is_boxed_by_its_outline() -> None:
    placement = Placement(4000, 3000, 0, 0, 1024, 1024, Pose(2000, 1500, 0.3), 0.3)
    everything = np.ones((1024, 1024), bool)
    kept = placement.on_original(everything)
    assert 0 < kept.sum() < everything.sum()
    assert kept.sum() * placement.pixel_area <= 4000 * 3000
    assert placement.box(kept, 0, 0) == (0, placement.box(kept, 0, 0)[1], 3000, placement.box(kept, 0, 0)[3])


def test_finding_a_part_leaves_the_filters_of_warnings_alone() -> None:
    before = list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(find_part, [nail(angle) for angle in np.linspace(0, 3, 24)]))
    assert list(warnings.filters) == before


def test_a_mask_is_turned_as_its_image() -> None:
    angle, row, column = 2.0, 60.0, 70.0
    x, y = spot(angle, row, column, 20)
    mask = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(mask).ellipse((x - 3, y - 3, x + 3, y + 3), fill=255)
    image = decode_file(file_of(nail(angle, row, column, mark=20)), CANVAS, "a")
    turned = decode_mask(file_of(mask), CANVAS, "m", image=image)
    assert 25 <= turned.sum() <= 55
    assert image.pixels[turned].mean() == pytest.approx(140, abs=15)
    middle = np.argwhere(turned).mean(0)
    assert np.abs(middle - [31.5, 63.5 + 20]).max() < 1.5
    with pytest.raises(DataError, match=r"^m: a mask is turned as its image is, and there is none; give the image too"):
        decode_mask(file_of(mask), CANVAS, "m")


def test_boxes_and_pictures_lie_on_the_original() -> None:
    angle, row, column = -2.0, 60.0, 70.0
    image = receive(file_of(nail(angle, row, column, mark=20)), CANVAS)
    values = np.zeros((64, 128))
    values[28:36, 80:88] = 2.0
    [box], count = find_boxes(values, values > 1, image.image.placement)
    x, y = spot(angle, row, column, 20)
    assert count == 1
    assert box.x + box.width / 2 == pytest.approx(x + 0.5, abs=1.5)
    assert box.y + box.height / 2 == pytest.approx(y + 0.5, abs=1.5)
    assert 8 <= min(box.width, box.height) <= max(box.width, box.height) <= 14
    assert box.area == pytest.approx(64)
    rebuilt = np.full((64, 128, 1), 77, np.uint8)
    pictures = draw(image, values, HeatScale.of(1.0), rebuilt)
    layer = np.asarray(Image.open(io.BytesIO(pictures.heat_layer or b"")))
    assert layer.shape == (SIDE, SIDE, 4)
    hot = np.argwhere(layer[..., 3] > 200).mean(0)
    assert np.abs(hot - [y, x]).max() < 1.5
    shown = np.asarray(Image.open(io.BytesIO(pictures.reconstruction or b"")))
    assert abs(int(shown[round(row), round(column)].max()) - 77) <= 1
    assert abs(int(shown[2, 2].max()) - 200) <= 1  # beyond the canvas: the original
    assert np.asarray(Image.open(io.BytesIO(pictures.heat_map or b""))).shape == (SIDE, SIDE, 3)


def test_what_lies_off_the_original_has_no_box() -> None:
    placement = place(CANVAS, nail(math.pi / 2, 63.5, 14.0))
    region = np.zeros((64, 128), bool)
    region[60:, :] = True
    rows = np.ones((64, 128))
    assert find_boxes(rows, region, placement) == ([], 0)


@pytest.mark.parametrize("pixels", [np.full((SIDE, SIDE), 90), np.random.default_rng(0).integers(86, 94, (SIDE, SIDE))])
def test_an_image_without_a_part_is_shown_as_it_lies(pixels: NDArray[Any]) -> None:
    image = Image.fromarray(pixels.astype(np.uint8))
    assert find_part(image) is None
    same = decode(file_of(image), ImageSpec((SIDE, SIDE), 1, aligned_width=1.0), "a")
    assert np.array_equal(same[:, :, 0], pixels)


def test_a_round_part_is_centred_and_not_turned() -> None:
    image = Image.new("L", (SIDE, SIDE), 200)
    ImageDraw.Draw(image).ellipse((20, 50, 60, 90), fill=50)
    found = find_part(image)
    assert found is not None
    assert (found.row, found.column, found.angle) == (pytest.approx(70, abs=1), pytest.approx(40, abs=1), 0.0)


def test_the_smallest_images_are_taken() -> None:
    for size in [(1, 1), (1, 40), (3, 2)]:
        assert decode(file_of(Image.new("L", size, 9)), CANVAS, "a").shape == (64, 128, 1)
    speck = Image.new("L", (16, 16), 200)
    speck.putpixel((5, 5), 0)
    assert find_part(speck) is None  # a single pixel has no axis
    assert decode(file_of(speck), CANVAS, "a").shape == (64, 128, 1)


def test_colour_stands_out_too() -> None:
    pixels = np.full((SIDE, SIDE, 3), (90, 150, 90), np.uint8)
    pixels[np.asarray(nail(0.9)) < 130] = (150, 90, 90)
    found = find_part(Image.fromarray(pixels))
    assert found is not None
    assert found.angle == pytest.approx(0.9, abs=0.03)


def test_fields_that_contradict_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"align is principal_axis and resize pad; .* leave data.resize out"):
        DataConfig(align="principal_axis", resize="pad")
    with pytest.raises(ValidationError, match=r"aligned_width is 0.5 and align none; set data.align"):
        DataConfig(aligned_width=0.5)
    assert ImageSpec.of(DataConfig(align="principal_axis", aligned_width=0.5)).aligned_width == 0.5
    assert ImageSpec.of(DataConfig()).aligned_width is None


def nails(folder: Path) -> ExperimentConfig:
    """Nails at random angles, of which some test ones have a mark."""
    rng = np.random.default_rng(0)

    def some(place: str, count: int, *, mark: bool) -> None:
        (folder / place).mkdir(parents=True)
        for i in range(count):
            pose = (rng.uniform(-math.pi, math.pi), *rng.uniform(56, 72, 2))
            nail(*pose, mark=rng.uniform(-20, 20) if mark else None).save(folder / place / f"{i:02}.png")

    some("train/good", 60, mark=False)
    some("test/good", 12, mark=False)
    some("test/marked", 12, mark=True)
    return ExperimentConfig.model_validate(
        {"data": {"dataset": {"name": "folder", "source": str(folder)}, "image_size": [16, 32], "channels": 1}}
    )


def test_marks_on_nails_are_found_once_these_lie_level(tmp_path: Path) -> None:
    """Nearest neighbours in pixels, of which unaligned nails are as far from each other as marked ones."""
    plain = nails(tmp_path)
    level = plain.override({"data.align": "principal_axis"})
    shards = write_shards(plain.data, str(tmp_path / "shards"))
    shards.check(level.data)  # the same files: parts are turned when they are read
    found = {}
    for name, config in (("plain", plain), ("level", level)):
        detector = calibrated(fit_baseline(config, shards, component_options("baselines", "knn")), shards)
        found[name] = evaluate(detector, shards, num_pictures=0, num_draws=10).rows[0].metrics["auroc"].value
    assert found["plain"] < 0.75
    assert found["level"] > 0.95
    raw = write_shards(level.override({"data.shard_format": "raw"}).data, str(tmp_path / "raw"))
    with pytest.raises(DataError, match=r"data\.align"):
        raw.check(plain.override({"data.shard_format": "raw"}).data)


def test_fit_says_what_is_wrong_with_the_canvas(tmp_path: Path) -> None:
    plain = nails(tmp_path)
    for i in range(3):
        Image.new("L", (SIDE, SIDE), 200).save(tmp_path / "train" / "good" / f"empty{i}.png")
    shards = write_shards(plain.data, str(tmp_path / "shards"))
    level = plain.override({"data.align": "principal_axis", "data.calibration_fraction": 0.05})
    assert list(placement_notes(plain, shards)) == []
    raw = write_shards(level.override({"data.shard_format": "raw"}).data, str(tmp_path / "raw"))
    assert list(placement_notes(level, raw)) == []
    [note] = placement_notes(level, shards)
    assert re.match(r"in [123] of \d+ training images no part stands out .*; leave them out, or set data\.align", note)
    _, cut = placement_notes(level.override({"data.aligned_width": 0.4}), shards)
    assert re.match(r"in \d\d of \d+ training images the part is larger .*; raise data\.aligned_width", cut)


def test_fit_says_where_cells_have_too_few_images_for_statistics_of_their_own(tmp_path: Path) -> None:
    plain = nails(tmp_path)
    shards = write_shards(plain.data, str(tmp_path / "shards"))
    config = plain.override({"space": {"name": "feature", "statistics": "per_cell", "num_components": 64}})
    [note] = statistics_notes(config, shards)
    assert re.match(r"space.statistics is per_cell, and \d+ training images say little of 64 x 64 .* leave", note)
    assert list(statistics_notes(config.override({"space.num_components": 4}), shards)) == []
    assert list(statistics_notes(plain, shards)) == []
    [note] = statistics_notes(config.override({"space.num_components": 4, "augmentation.shift": 0.2}), shards)
    assert "augmentation.shift moves parts to other places" in note


def test_an_ensemble_sees_one_part_of_an_image(tmp_path: Path) -> None:
    plain = nails(tmp_path)
    shards = write_shards(plain.data, str(tmp_path / "shards"))
    options = component_options("baselines", "knn")
    level = plain.override({"data.align": "principal_axis"})
    other = level.override({"data.image_size": [16, 16]})
    colour = level.override({"data.channels": 3})
    alike = level.override({"data.image_size": [8, 16]})
    found = [
        calibrated(fit_baseline(config, shards, options), shards) for config in (level, plain, other, colour, alike)
    ]
    for odd in found[1:4]:
        with pytest.raises(ConfigError, match=r"^data\.align, .* differs .* train them with the same$"):
            ensemble_of([found[0], odd], shards)
    assert ensemble_of([found[0], found[4]], shards).image_spec.aligned_width == 1.0
