from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from raydiff.config import DataConfig
from raydiff.errors import DataError, ShapeError
from raydiff.images import (
    ImageError,
    ImageSpec,
    decode,
    decode_file,
    decode_mask,
    encode_png,
    find_images,
    images_in,
    shrunk,
    to_tensor,
    to_uint8,
)
from raydiff.placement import place

Pixels = NDArray[np.uint8]


def picture(height: int = 40, width: int = 50) -> Pixels:
    """A smooth colour picture, the same on every call."""
    rows, columns = np.mgrid[0:height, 0:width]
    red = 127 + 120 * np.sin(columns / 7)
    green = 127 + 120 * np.cos(rows / 5)
    return np.stack([red, green, (red + green) / 2], axis=2).astype(np.uint8)


def file_of(pixels: Any, kind: str = "PNG", **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def spec(height: int, width: int, channels: Any = 3, resize: Any = "stretch", **more: Any) -> ImageSpec:
    return ImageSpec((height, width), channels, resize, **more)


def test_spec_of_config() -> None:
    data = DataConfig(image_size=(16, 24), channels=3, resize="pad", max_pixels=1000)
    assert ImageSpec.of(data) == ImageSpec((16, 24), 3, "pad", 1000)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_give_the_pixels_back(kind: str) -> None:
    assert np.array_equal(decode(file_of(picture(), kind), spec(40, 50), "a"), picture())


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_formats_come_near(kind: str) -> None:
    decoded = decode(file_of(picture(), kind, quality=95), spec(40, 50), "a")
    assert np.abs(decoded.astype(int) - picture()).mean() < 4


def test_the_file_is_described_as_it_was() -> None:
    decoded = decode_file(file_of(picture()[:, :, 0]), spec(10, 10), "a")
    assert (decoded.format, decoded.size, decoded.channels) == ("png", (40, 50), 1)
    assert decoded.pixels.shape == (10, 10, 3)


def test_a_name_does_not_matter_the_content_does() -> None:
    assert decode_file(file_of(picture(), "JPEG"), spec(40, 50), "picture.png").format == "jpeg"


@pytest.mark.parametrize("kind", ["GIF", "PPM", "ICO"])
def test_other_formats_are_refused(kind: str) -> None:
    with pytest.raises(
        DataError, match=r"^a: is not a PNG, JPEG, WebP, BMP or TIFF image; replace the file, or leave it"
    ):
        decode(file_of(picture(), kind), spec(8, 8), "a")


def test_an_empty_file_is_refused() -> None:
    with pytest.raises(DataError, match=r"^a: is an empty file"):
        decode(b"", spec(8, 8), "a")


def test_a_decompression_bomb_is_refused_before_it_is_decoded() -> None:
    bomb = file_of(Image.new("1", (30_000, 30_000)))
    assert len(bomb) < 200_000
    with pytest.raises(
        DataError, match=r"^a: has 30000 x 30000 = 900000000 pixels, more than data.max_pixels \(64000000\)"
    ):
        decode(bomb, spec(8, 8), "a")


def test_the_limit_is_the_configs_not_pillows() -> None:
    large = file_of(Image.new("1", (10_000, 9_500)))  # Pillow would warn
    assert decode(large, spec(4, 4, 1, max_pixels=95_000_000), "a").max() == 0


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_truncated_at_any_place_is_refused_or_lossless(kind: str) -> None:
    content = file_of(picture(), kind)
    whole = decode(content, spec(40, 50), "a")
    refused = 0
    for length in range(0, len(content), 7):
        try:
            assert np.array_equal(decode(content[:length], spec(40, 50), "a"), whole)
        except DataError as error:
            assert str(error).startswith("a: ")  # noqa: PT017
            refused += 1
    assert refused > len(content) / 7 - 10


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_garbled_bytes_never_raise_anything_else(kind: str) -> None:
    rng = np.random.default_rng(0)
    content = file_of(picture(), kind)
    for _ in range(200):
        garbled = bytearray(content)
        for position in rng.integers(0, len(content), 3):
            garbled[position] = rng.integers(0, 256)
        try:
            assert decode(bytes(garbled), spec(40, 50, max_pixels=10_000), "a").shape == (40, 50, 3)
        except DataError as error:
            assert "\n" not in str(error)  # noqa: PT017


def test_a_machine_without_memory_is_no_fault_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(MemoryError):
        decode(file_of(picture()), spec(40, 50), "a.png")


def test_garbled_png_names_the_image() -> None:
    content = bytearray(file_of(picture()))
    content[len(content) // 2] ^= 0xFF
    with pytest.raises(DataError, match=r"^tiles/7.png: cannot be decoded .*data.on_bad_image: skip"):
        decode(bytes(content), spec(40, 50), "tiles/7.png")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(picture(48, 64))
    content = file_of(stored, kind, exif=exif.tobytes() if kind != "TIFF" else exif)
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # Image.Transpose that makes it upright
    upright = stored if orientation == 1 else stored.transpose(Image.Transpose(back[orientation]))
    decoded = decode_file(content, spec(upright.height, upright.width), "a")
    assert decoded.size == (upright.height, upright.width)
    assert np.abs(decoded.pixels.astype(int) - np.asarray(upright)).mean() < 8


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_over_the_full_range(kind: str) -> None:
    wide = np.array([[0, 128, 129, 257], [32767, 32768, 65407, 65535]], dtype=np.uint16)
    expected = np.rint(wide / 257).astype(np.uint8)
    assert np.array_equal(decode(file_of(wide, kind), spec(2, 4, 1), "a")[:, :, 0], expected)


def test_thirty_two_bits_are_refused() -> None:
    with pytest.raises(DataError, match=r"^a: has 32-bit pixels, whose range is not known; convert it to 8 or 16 bits"):
        decode(file_of(np.ones((4, 4), dtype=np.float32), "TIFF"), spec(4, 4), "a")


def test_palettes_and_bilevel_images_are_resolved() -> None:
    flat = np.zeros((8, 8, 3), dtype=np.uint8)
    flat[:4] = (200, 10, 30)
    palette = Image.fromarray(flat).convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
    assert np.array_equal(decode(file_of(palette), spec(8, 8), "a"), flat)
    bilevel = Image.fromarray(flat[:, :, 0] > 0)
    assert np.array_equal(decode(file_of(bilevel), spec(8, 8, 1), "a")[:, :, 0], (flat[:, :, 0] > 0) * 255)


def test_opaque_alpha_is_dropped_and_transparent_refused() -> None:
    opaque = np.dstack([picture(), np.full((40, 50), 255, dtype=np.uint8)])
    assert np.array_equal(decode(file_of(opaque), spec(40, 50), "a"), picture())
    grey = Image.fromarray(picture()[:, :, 0])
    grey.putalpha(255)
    assert decode_file(file_of(grey), spec(40, 50, 1), "a").channels == 1
    opaque[3, 3, 3] = 254
    with pytest.raises(DataError, match=r"^a: has transparent pixels; flatten it"):
        decode(file_of(opaque), spec(40, 50), "a")
    palette = Image.fromarray(picture()).convert("P")
    with pytest.raises(DataError, match=r"^a: has transparent pixels"):
        decode(file_of(palette, transparency=int(np.asarray(palette)[0, 0])), spec(40, 50), "a")


def test_several_frames_are_refused() -> None:
    frames = [Image.fromarray(picture()), Image.fromarray(255 - picture())]
    for kind in ("PNG", "TIFF", "WEBP"):
        with pytest.raises(DataError, match=r"^a: holds 2 frames"):
            decode(file_of(frames[0], kind, save_all=True, append_images=frames[1:]), spec(40, 50), "a")


def test_grey_becomes_colour_and_colour_grey() -> None:
    grey = picture()[:, :, 0]
    assert np.array_equal(decode(file_of(grey), spec(40, 50, 3), "a"), np.dstack([grey] * 3))
    assert np.array_equal(decode(file_of(np.dstack([grey] * 3)), spec(40, 50, 1), "a")[:, :, 0], grey)


def test_resizing_is_antialiased() -> None:
    stripes = np.zeros((64, 64), dtype=np.uint8)
    stripes[:, ::2] = 255
    small = decode(file_of(stripes), spec(16, 16, 1), "a")
    assert np.abs(small[:, 2:-2].astype(int) - 127).max() <= 12  # sampling single pixels would give 0 or 255


def test_pad_keeps_the_aspect_and_repeats_the_edge() -> None:
    wide = np.full((10, 40), 50, dtype=np.uint8)
    wide[0], wide[-1] = 10, 90
    padded = decode(file_of(wide), spec(40, 40, 1, "pad"), "a")[:, :, 0]
    assert np.array_equal(padded[15:25], wide)
    assert (padded[:15] == 10).all()
    assert (padded[25:] == 90).all()
    tall = decode(file_of(picture(90, 30)), spec(32, 48, 3, "pad"), "a")
    assert tall.shape == (32, 48, 3)
    assert (tall[:, :18] == tall[:, 18:19]).all()


def test_pictures_to_look_at_are_shrunk() -> None:
    large = picture(70, 101)
    small = shrunk(large, 40)
    assert small.shape == (24, 34, 3)
    assert np.abs(small[3, 5].astype(float) - large[9:12, 15:18].mean((0, 1))).max() <= 0.5
    assert shrunk(large, 101) is large
    mask = np.zeros((70, 101), np.bool_)
    mask[69, 100] = True
    assert np.argwhere(shrunk(mask, 40)).tolist() == [[23, 33]]


def placed(spec: ImageSpec, height: int, width: int) -> tuple[int, int, int, int]:
    found = place(spec, Image.new("RGB", (width, height)))
    return found.top, found.left, found.rows, found.columns


def test_own_keeps_the_resolution_of_what_fits() -> None:
    own = spec(40, 60, 3, "own")
    small = picture(20, 30)
    padded = decode(file_of(small), own, "a")
    assert np.array_equal(padded[10:30, 15:45], small)
    assert placed(own, 20, 30) == (10, 15, 20, 30)
    assert placed(own, 80, 60) == placed(spec(40, 60, 3, "pad"), 80, 60) == (0, 15, 40, 30)
    assert decode_mask(file_of(np.full((20, 30), 255, np.uint8)), own, "m").sum() == 600


@pytest.mark.parametrize(("size", "channels"), [((40, 49), 3), ((50, 40), 3), ((40, 50), 1)])
def test_strict_names_what_it_expected(size: tuple[int, int], channels: int) -> None:
    message = (
        rf"^a: is 40 x 50 with 3 channel\(s\); .* expects {size[0]} x {size[1]} with {channels}; set data.resize to"
    )
    with pytest.raises(DataError, match=message):
        decode(file_of(picture()), spec(*size, channels, "strict"), "a")


def test_strict_takes_what_fits() -> None:
    assert np.array_equal(decode(file_of(picture()), spec(40, 50, 3, "strict"), "a"), picture())


def test_mask_follows_its_image() -> None:
    mask = np.zeros((20, 40), dtype=np.uint8)
    mask[5:15, 10:30] = 255
    stretched = decode_mask(file_of(mask), spec(10, 10), "m")
    assert stretched.dtype == np.bool_
    assert stretched.sum() == 5 * 5
    padded = decode_mask(file_of(mask), spec(40, 40, 3, "pad"), "m")
    assert np.array_equal(padded[10:30], mask > 0)
    assert not padded[:10].any()
    assert not padded[30:].any()


def test_mask_is_true_above_one_half() -> None:
    grey = np.array([[0, 127, 128, 255]], dtype=np.uint8)
    assert decode_mask(file_of(grey), spec(1, 4), "m").tolist() == [[False, False, True, True]]
    wide = np.array([[0, 32767, 33000, 65535]], dtype=np.uint16)
    assert decode_mask(file_of(wide), spec(1, 4), "m").tolist() == [[False, False, True, True]]


def test_mask_of_zeros_and_ones_is_refused() -> None:
    with pytest.raises(DataError, match=r"^m: the brightest mask value is 1 of 255; write masks as 0 and 255"):
        decode_mask(file_of(np.eye(4, dtype=np.uint8)), spec(4, 4), "m")


def test_mask_of_another_size_is_refused() -> None:
    with pytest.raises(DataError, match=r"^m: the mask is 4 x 4 and its image 8 x 8; make them the same size"):
        decode_mask(
            file_of(np.zeros((4, 4), dtype=np.uint8)), spec(4, 4), "m",
            image=decode_file(file_of(picture(8, 8)), spec(4, 4), "a"),
        )  # fmt: skip
    with pytest.raises(DataError, match=r"^m: is 4 x 4; data.resize: strict expects 8 x 8"):
        decode_mask(file_of(np.zeros((4, 4), dtype=np.uint8)), spec(8, 8, 3, "strict"), "m")


def test_tensors_and_back() -> None:
    images = np.stack([picture(), 255 - picture()])
    images.flags.writeable = False
    tensor = to_tensor(images)
    assert tensor.shape == (2, 3, 40, 50)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    assert to_tensor(np.array([[[[0]], [[255]]]], dtype=np.uint8)).flatten().tolist() == [-1.0, 1.0]
    assert np.array_equal(to_uint8(tensor), images)
    assert to_uint8(torch.tensor([-3.0, 3.0]).reshape(1, 1, 1, 2)).flatten().tolist() == [0, 255]


def test_every_grey_value_survives_the_round_trip() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    assert np.array_equal(to_uint8(to_tensor(ramp)), ramp)


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (8, 8, 3)])
def test_encode_png_round_trip(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    channels = 3 if shape[-1] == 3 else 1
    assert np.array_equal(decode(encode_png(pixels), spec(8, 8, channels), "a").reshape(shape), pixels)


def test_encode_png_of_a_mask() -> None:
    mask = np.eye(5, dtype=np.bool_)
    assert np.array_equal(decode_mask(encode_png(mask), spec(5, 5), "m"), mask)


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ShapeError, match=r"float64 \(2, 2\)"):
        encode_png(np.zeros((2, 2)))  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"expected uint8 \(B, H, W, C\)"):
        to_tensor(np.zeros((2, 2), dtype=np.uint8))


def test_find_images(tmp_path: Path) -> None:
    for name in ("b.png", "a/c.JPG", "a/notes.txt", ".hidden.png", ".cache/d.png", "odd.name"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    expected = [tmp_path / "a/c.JPG", tmp_path / "b.png"]
    assert find_images([tmp_path, tmp_path / "b.png"]) == expected
    assert images_in(tmp_path) == expected
    assert find_images([tmp_path / "odd.name"]) == [tmp_path / "odd.name"]


def test_find_images_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such file or folder"):
        find_images([tmp_path / "nowhere"])
    with pytest.raises(DataError, match=r"no image found; expected files ending in .bmp"):
        find_images([tmp_path])
    with pytest.raises(DataError, match=r"\(no path given\): no image found"):
        find_images([])


def test_placement_is_where_the_pixels_come_to_lie() -> None:
    for height, width in ((10, 40), (40, 10), (7, 9), (30, 30), (1, 99)):
        top, left, rows, columns = placed(spec(16, 24, 1, "pad"), height, width)
        white = decode(file_of(np.full((height, width), 255, np.uint8)), spec(16, 24, 1, "pad"), "a")
        assert white.all()
        assert 0 <= top <= top + rows <= 16
        assert 0 <= left <= left + columns <= 24
        assert 16 - rows in (2 * top, 2 * top + 1)
        assert rows == 16 or columns == 24
        assert placed(spec(16, 24), height, width) == (0, 0, 16, 24)


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "empty"), (b"GIF89a", "format"), (file_of(picture())[:200], "damaged"), (file_of(picture()), "pixels")],
)
def test_an_error_says_in_one_word_why(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError) as caught:
        decode(data, spec(8, 8, max_pixels=1999 if reason == "pixels" else 10_000), "a")
    assert caught.value.reason == reason
    assert isinstance(caught.value, DataError)
