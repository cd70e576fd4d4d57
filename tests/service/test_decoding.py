"""Hostile and unusual images, made of real bytes: each is taken in the stated way, or refused with what to do."""

from __future__ import annotations

import io
import struct
import time
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raydiff.images import ImageError, ImageSpec, decode, encode_png
from raydiff.service import Limits, ProblemError, receive
from raydiff.service.decoding import quiet_decoders
from raydiff.service.headers import MAX_JPEG_SCANS, check_header
from raydiff.service.problems import PROBLEM_TYPES

SPEC = ImageSpec((16, 16), 3)


def picture(height: int = 40, width: int = 50) -> Any:
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 5 % 256, columns * 5 % 256, (rows + columns) % 256], axis=2).astype(np.uint8)


def file_of(image: Any, kind: str, **options: Any) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def problem_of(data: bytes, spec: ImageSpec = SPEC, limits: Limits | None = None) -> ProblemError:
    with pytest.raises(ProblemError) as caught:
        receive(data, spec, limits)
    problem = caught.value
    assert problem.type in PROBLEM_TYPES
    assert problem.to_dict() == {
        "type": problem.type, "title": problem.title, "status": problem.status, "detail": problem.detail,
    }  # fmt: skip
    assert 400 <= problem.status < 500
    assert not any(word in problem.detail for word in ("/", "Traceback", "0x", "data.", "BytesIO", "\n"))
    assert "send" in problem.detail or "save" in problem.detail or "flatten" in problem.detail
    return problem


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def directory(entries: list[tuple[int, int, int, int]], following: int = 0, start: int = 8) -> bytes:
    """A TIFF head with one directory of (tag, kind, count, value) entries."""
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\x00" + struct.pack("<I", start) + struct.pack("<H", len(entries)) + body + struct.pack("<I", following)


# --- what is taken ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("resize", ["stretch", "pad"])
def test_the_pixels_are_those_of_scoring_files(kind: str, resize: Any) -> None:
    data = file_of(picture(), kind)
    spec = ImageSpec((16, 24), 3, resize)
    received = receive(data, spec)
    assert np.array_equal(received.image.pixels, decode(data, spec, "a"))
    assert (received.image.format, received.image.size) == (kind.lower(), (40, 50))
    assert received.decode_ms > 0
    assert received.data is data


def test_one_pixel() -> None:
    assert (receive(encode_png(np.full((1, 1), 7, np.uint8)), SPEC).image.pixels == 7).all()


def test_a_format_is_known_by_its_content() -> None:
    """A PNG that is sent as a JPEG: there is no name to be wrong."""
    assert receive(file_of(picture(), "PNG"), SPEC).image.format == "png"


def test_exif_turns_the_image_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = receive(file_of(picture(20, 50), "JPEG", exif=exif), SPEC).image
    assert image.size == (50, 20)


def test_sixteen_bits_are_scaled_over_the_full_range() -> None:
    wide = np.array([[0, 65535], [32768, 257]], np.uint16)
    taken = receive(file_of(Image.fromarray(wide), "TIFF"), ImageSpec((2, 2), 1)).image.pixels[:, :, 0]
    assert taken.tolist() == [[0, 255], [128, 1]]


def test_cmyk_becomes_rgb() -> None:
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    pixel = receive(file_of(cyan, "JPEG", quality=95), SPEC).image.pixels[4, 4]
    assert pixel[0] < 20
    assert pixel[1:].min() > 235


def test_alpha_is_taken_where_it_is_opaque() -> None:
    opaque = np.concatenate([picture(), np.full((40, 50, 1), 255, np.uint8)], axis=2)
    assert np.array_equal(
        receive(file_of(opaque, "PNG"), SPEC).image.pixels, receive(file_of(picture(), "PNG"), SPEC).image.pixels
    )


def test_much_exif_is_no_reason_to_refuse() -> None:
    exif = Image.Exif()
    exif[0x010E] = "x" * 60_000
    assert receive(file_of(picture(), "JPEG", exif=exif), SPEC).image.size[1] == 50
    exif[0x010E] = "x" * 6_000_000
    for kind in ("PNG", "WEBP"):
        assert receive(file_of(picture(), kind, exif=exif), SPEC).image.size[1] == 50


# --- what is refused --------------------------------------------------------------------------------------------------


def test_nothing() -> None:
    assert problem_of(b"").type == "empty-body"


def test_too_many_bytes_are_not_looked_at() -> None:
    problem = problem_of(b"\0" * 1001, limits=Limits(max_bytes=1000))
    assert (problem.type, problem.status) == ("body-too-large", 413)
    assert "1001 bytes and at most 1000" in problem.detail


def zip_file() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("image.png", file_of(picture(), "PNG"))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [zip_file(), bytes(10_000_000), b"<svg xmlns=''/>", b"%PDF-1.7", file_of(picture(), "GIF")],
    ids=["zip", "zeros", "svg", "pdf", "gif"],
)  # fmt: skip
def test_other_formats(data: bytes) -> None:
    problem = problem_of(data)
    assert (problem.type, problem.status) == ("unsupported-format", 415)


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    lines = zlib.compressobj(9)
    body = b"".join(lines.compress(bytes(2501)) for _ in range(20_000)) + lines.flush()
    head = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")
    assert len(bomb) < 60_000
    started = time.process_time()
    problem = problem_of(bomb)
    assert time.process_time() - started < 0.1
    assert problem.type == "too-many-pixels"
    assert "20000 x 20000" in problem.detail


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_the_limit_of_pixels_is_the_lesser_one(kind: str) -> None:
    data = file_of(picture(), kind)
    assert problem_of(data, limits=Limits(max_pixels=1999)).type == "too-many-pixels"
    assert problem_of(data, ImageSpec((16, 16), 3, max_pixels=1999)).type == "too-many-pixels"
    assert receive(data, SPEC, Limits(max_pixels=2000)).image.size[1] == 50


def test_a_webp_that_only_claims_to_be_large() -> None:
    canvas = struct.pack("<I", 16_382)[:3] * 2
    chunk = b"VP8X" + struct.pack("<I", 10) + bytes(4) + canvas
    data = b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk
    assert problem_of(data).type in ("too-many-pixels", "damaged-image")


@pytest.mark.parametrize("kind", ["WEBP", "TIFF", "PNG"])
def test_animations_and_pages(kind: str) -> None:
    frames = [Image.fromarray(np.roll(picture(), shift, axis=0)) for shift in (0, 5, 9)]
    assert problem_of(file_of(frames[0], kind, save_all=True, append_images=frames[1:])).type == "several-frames"


def test_a_palette_with_transparency() -> None:
    image = Image.fromarray(picture()).quantize(8)
    assert problem_of(file_of(image, "PNG", transparency=image.getpixel((0, 0)))).type == "transparent-image"


def test_thirty_two_bits() -> None:
    assert problem_of(file_of(Image.new("F", (8, 8), 0.5), "TIFF")).type == "unknown-range"


def test_a_strict_detector_says_what_it_takes() -> None:
    problem = problem_of(file_of(picture(), "PNG"), ImageSpec((16, 24), 1, "strict"))
    assert problem.type == "wrong-size"
    assert "grey images of 24 x 16 pixels" in problem.detail


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_truncated_anywhere(kind: str) -> None:
    data = file_of(picture(), kind)
    whole, refused = receive(data, SPEC).image.pixels, 0
    for length in range(0, len(data), max(1, len(data) // 60)):
        try:
            assert np.array_equal(receive(data[:length], SPEC).image.pixels, whole)
        except ProblemError:
            refused += 1
    assert refused > 50
    assert problem_of(data[: len(data) // 2]).type == "damaged-image"


CUT = {
    "png": ("PNG", {}),
    "png-grey": ("PNG", {}),
    "png-turned-at-the-end": ("PNG", {"exif": 6}),
    "jpeg": ("JPEG", {}),
    "jpeg-progressive": ("JPEG", {"progressive": True}),
    "webp": ("WEBP", {"lossless": True, "exif": 6}),
    "tiff": ("TIFF", {}),
    "tiff-packed": ("TIFF", {"compression": "tiff_deflate"}),
}


def whole_file(name: str) -> bytes:
    """Noise, so that compression leaves many places to cut at; a PNG's EXIF is moved to after its pixels."""
    kind, options = CUT[name]
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    if "exif" in options:
        exif = Image.Exif()
        exif[0x0112] = options["exif"]
        options = options | {"exif": exif}
    data = file_of(pixels[:, :, 0] if "grey" in name else pixels, kind, **options)
    if name == "png-turned-at-the-end":
        start = data.index(b"eXIf") - 4
        end = start + 12 + struct.unpack_from(">I", data, start)[0]
        data = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    return data


@pytest.mark.parametrize("name", CUT)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow's, for half an EXIF directory
def test_a_file_that_was_cut_is_refused_wherever_it_was(name: str) -> None:
    """Also in its last bytes, where the decoder has had all pixels already: by files and by the service alike."""
    data = whole_file(name)
    whole = receive(data, SPEC).image
    assert np.array_equal(whole.pixels, decode(data, SPEC, "a"))
    assert whole.size[0] == (50 if name in ("png-turned-at-the-end", "webp") else 40)
    for length in {*range(1, len(data), 50), *range(max(1, len(data) - 60), len(data))}:
        with pytest.raises(ImageError) as refused:
            decode(data[:length], SPEC, "a")
        assert refused.value.reason in ("damaged", "format")
        assert problem_of(data[:length]).type in ("damaged-image", "unsupported-format")
    assert np.array_equal(receive(data + b"what follows the image", SPEC).image.pixels, whole.pixels)


@pytest.mark.parametrize("place", ["pixels", "adler", "checksum", "end"])
def test_a_png_with_a_wrong_checksum_is_refused(place: str) -> None:
    data = bytearray(whole_file("png"))
    last = data.rindex(b"IDAT") + 4
    after = last + struct.unpack_from(">I", data, last - 8)[0]  # of its content; the checksum follows
    data[{"pixels": last + 9, "adler": after - 1, "checksum": after, "end": len(data) - 1}[place]] ^= 1
    assert problem_of(bytes(data)).type == "damaged-image"


def test_bmp_rows_may_lack_their_padding() -> None:
    data = file_of(picture(40, 50), "BMP")  # 150 bytes in a row of 152, and the lowest row is first
    assert np.array_equal(receive(data[:-2], SPEC).image.pixels, receive(data, SPEC).image.pixels)
    assert problem_of(data[:-3]).type == "damaged-image"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_garbled_bytes_raise_nothing_else(kind: str) -> None:
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 3, "a description"
    data = file_of(picture(12, 12), kind, **({} if kind == "BMP" else {"exif": exif}))
    for _ in range(300):
        changed = bytearray(data)
        for position in rng.integers(0, len(data), size=rng.integers(1, 6)):
            changed[position] = rng.integers(256)
        try:
            receive(bytes(changed), SPEC)
        except ProblemError as problem:
            assert problem.type in PROBLEM_TYPES  # noqa: PT017


# --- what would cost more than an image -------------------------------------------------------------------------------


def claims(count: int, size: int) -> bytes:
    """A directory of entries that all claim the same ``size`` bytes."""
    return directory([(1000 + i, 7, size, 0) for i in range(count)]) + bytes(size)


@pytest.mark.parametrize("where", ["tiff", "png", "webp"])
def test_directories_that_claim_the_same_bytes_again_and_again(where: str) -> None:
    """Read naively, 1 MB asks for 5 GB."""
    exif = claims(5000, 1_000_000)
    if where == "tiff":
        data = exif
    elif where == "png":
        image = encode_png(picture())
        data = image[:33] + png_chunk(b"eXIf", exif) + image[33:]
    else:
        image = file_of(picture(), "WEBP", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0")
        at = image.index(b"EXIF")
        data = image[:at] + b"EXIF" + struct.pack("<I", len(exif)) + exif
        data = data[:4] + struct.pack("<I", len(data) - 8) + data[8:]
    started = time.process_time()
    problem = problem_of(data)
    assert time.process_time() - started < 0.5
    assert problem.type == "damaged-image"
    assert "beside its pixels" in problem.detail


def test_a_chain_of_pages_is_not_walked() -> None:
    """A million pages of 18 bytes each."""
    pages = b"".join(struct.pack("<HHHIII", 1, 256, 3, 1, 1, 8 + 18 * (i + 1)) for i in range(200_000))
    started = time.process_time()
    assert problem_of(b"II*\x00" + struct.pack("<I", 8) + pages).type == "several-frames"
    assert time.process_time() - started < 0.5


def test_a_jpeg_of_endless_scans() -> None:
    data = file_of(picture(), "JPEG", progressive=True)
    scan = data.rindex(b"\xff\xda")
    assert data.count(b"\xff\xda") <= 12
    repeated = data[:-2] + data[scan:-2] * (MAX_JPEG_SCANS + 1) + data[-2:]
    assert "scans" in problem_of(repeated).detail


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_endless_empty_chunks(kind: str) -> None:
    data = file_of(picture(), kind)
    if kind == "PNG":
        data = data[:33] + png_chunk(b"prIv", b"") * 200_000 + data[33:]
    elif kind == "JPEG":
        data = data[:2] + b"\xff\xe5\x00\x02" * 200_000 + data[2:]
    else:
        data = data + b"PRIV\0\0\0\0" * 200_000
    started = time.process_time()
    assert "more than 20000" in problem_of(data).detail
    assert time.process_time() - started < 1


def test_the_size_in_the_head_is_the_decoders() -> None:
    for kind in ("PNG", "JPEG", "TIFF"):
        assert check_header(file_of(picture(), kind)) == (40, 50)
    assert check_header(file_of(picture(), "JPEG", exif=Image.Exif(), progressive=True)) == (40, 50)


def test_odd_exif_warns_nobody_and_changes_nothing() -> None:
    """Pillow warns of it: an error in other tests, and memory that fills where warnings are remembered."""
    exif = b"Exif\0\0" + directory([(0x010E, 2, 50_000, 60_000)])
    data = file_of(picture(), "JPEG", exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert problem_of(data).type == "damaged-image"
        quiet_decoders()
        received = receive(data, SPEC)
    assert np.array_equal(received.image.pixels, receive(file_of(picture(), "JPEG"), SPEC).image.pixels)


def test_decoding_from_many_threads_is_the_same() -> None:
    files = [file_of(picture(30 + i, 40), kind) for i in range(6) for kind in ("PNG", "JPEG", "WEBP")]
    alone = [receive(data, SPEC).image.pixels for data in files]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda data: receive(data, SPEC).image.pixels, files * 3))
    assert all(np.array_equal(a, b) for a, b in zip(alone * 3, together, strict=True))
