"""Frames are what ``raydiff score`` sees of a PNG of them, at the times when they are shown."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from raydiff.errors import ConfigError, DataError
from raydiff.images import ImageSpec, decode, encode_png
from raydiff.video import frames as frames_module
from raydiff.video.frames import Frame, Place, open_frames
from tests.ports import free_ports

SPEC = ImageSpec((8, 8), 1)
Pictures = NDArray[np.uint8]


def frames_of(source: str | Path, **options: object) -> list[Frame]:
    with open_frames(source, SPEC, **options) as frames:  # type: ignore[arg-type]
        return list(frames)


def test_a_frame_is_the_pixels_of_a_png_of_it(clip: Path, clip_pictures: Pictures) -> None:
    found = frames_of(clip)
    assert [frame.index for frame in found] == list(range(60))
    assert [frame.time for frame in found] == pytest.approx([i / 25 for i in range(60)])
    for frame, picture in zip(found, clip_pictures, strict=True):
        assert np.array_equal(frame.pixels, decode(encode_png(np.repeat(picture[:, :, None], 3, 2)), SPEC, "png"))


@pytest.mark.parametrize(("codec", "name"), [("libx264", "a.mp4"), ("mpeg4", "a.avi"), ("libx264", "a.ts")])
def test_what_cameras_write_is_read(
    codec: str, name: str, clip_pictures: Pictures, tmp_path: Path, make_clip: Callable[..., Path]
) -> None:
    found = frames_of(make_clip(tmp_path / name, clip_pictures[:12], codec=codec))
    assert len(found) == 12
    assert found[0].time == 0
    assert np.diff([frame.time for frame in found]) == pytest.approx(0.04, abs=0.002)


def test_a_variable_frame_rate_keeps_presentation_times(
    clip_pictures: Pictures, tmp_path: Path, make_clip: Callable[..., Path]
) -> None:
    times = [0.0, 0.04, 0.5, 0.54, 3.0]
    found = frames_of(make_clip(tmp_path / "variable.mkv", clip_pictures[:5], times=times))
    assert [frame.time for frame in found] == pytest.approx(times)
    assert [frame.time for frame in frames_of(tmp_path / "variable.mkv", fps=10)] == pytest.approx(
        [0, 0.1, 0.2, 0.3, 0.4]
    )


def test_a_turned_clip_is_set_upright(clip_pictures: Pictures, tmp_path: Path, make_clip: Callable[..., Path]) -> None:
    spec = ImageSpec((32, 32), 1)
    made = make_clip(tmp_path / "turned.mp4", clip_pictures[:3], codec="libx264", rotate=True)
    with open_frames(made, spec) as frames:
        first = next(iter(frames)).pixels[:, :, 0].astype(float)
    upright = np.rot90(clip_pictures[0]).astype(float)
    others = [np.rot90(clip_pictures[0], k).astype(float) for k in (0, 2, 3)]
    distance = np.abs(first - upright).mean()
    assert distance < 0.3 * min(np.abs(first - other).mean() for other in others)


def test_a_folder_is_read_in_the_order_of_its_numbers(clip_pictures: Pictures, tmp_path: Path) -> None:
    for i in (0, 2, 10, 9):
        Image.fromarray(clip_pictures[i]).save(tmp_path / f"frame{i}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    found = frames_of(tmp_path, fps=2)
    assert [frame.time for frame in found] == [0, 0.5, 1, 1.5]
    for frame, i in zip(found, (0, 2, 9, 10), strict=True):
        assert np.array_equal(frame.pixels, decode(encode_png(clip_pictures[i]), SPEC, "png"))


def test_a_clip_and_a_folder_that_grow_are_followed(
    clip_pictures: Pictures, tmp_path: Path, make_clip: Callable[..., Path]
) -> None:
    whole = make_clip(tmp_path / "whole.ts", clip_pictures[:40], codec="libx264").read_bytes()
    growing, folder = tmp_path / "growing.ts", tmp_path / "folder"
    growing.write_bytes(whole[: len(whole) // 2])
    folder.mkdir()

    def write() -> None:
        time.sleep(0.2)
        with growing.open("ab") as file:
            file.write(whole[len(whole) // 2 :])
        Image.fromarray(clip_pictures[0]).save(folder / "0.png")

    writer = threading.Thread(target=write)
    writer.start()
    assert len(frames_of(folder, follow=0.5)) == 1
    writer.join()
    assert len(frames_of(growing, follow=0.2)) == 40
    assert len(frames_of(growing, follow=0.2, done=Place(29, 29 / 25))) == 10


def goes_on(source: Path, places: tuple[int, ...], seeks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Going on behind any of the places gives what follows it, after seeking or after reading all before it."""
    whole, gone_through = frames_of(source), list[int]()
    told = frames_module._Clock.time

    def counted(clock: object, shown: float | None, index: int) -> float:
        gone_through.append(index)
        return told(clock, shown, index)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(frames_module._Clock, "time", counted)
        for place in places:
            gone_through.clear()
            rest = frames_of(source, done=Place(whole[place].index, whole[place].time))
            assert [(a.index, a.time) for a in rest] == [(b.index, b.time) for b in whole[place + 1 :]]
            assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(rest, whole[place + 1 :], strict=True))
            assert gone_through[:1] == (list(range(place + 1, len(whole)))[:1] if seeks else [0])


@pytest.mark.parametrize(
    ("name", "codec", "seeks"),
    [
        ("a.mkv", "ffv1", True), ("a.mkv", "libx264", True), ("a.mp4", "libx264", True), ("a.mov", "mpeg4", True),
        ("a.flv", "libx264", False), ("a.ts", "libx264", False), ("a.mpg", "mpeg2video", False),
        ("a.avi", "mpeg4", False), ("a.h264", "libx264", False), ("a.mjpeg", "mjpeg", False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("b_frames", [0, 2])
def test_going_on_begins_behind_what_is_done(
    name: str, codec: str, seeks: bool, b_frames: int, clip_pictures: Pictures, tmp_path: Path,
    make_clip: Callable[..., Path], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    options = {} if codec in ("ffv1", "mjpeg") else {"g": "25", "bf": str(b_frames)}
    made = make_clip(tmp_path / name, np.concatenate([clip_pictures] * 2), codec=codec, options=options)
    goes_on(made, (0, 24, 37, 80, 119), seeks, monkeypatch)


def test_going_on_is_right_where_times_fall_back(
    clip_pictures: Pictures, tmp_path: Path, make_clip: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"g": "10", "bf": "0"}
    part = make_clip(tmp_path / "part.ts", clip_pictures, codec="libx264", options=options).read_bytes()
    (tmp_path / "joined.ts").write_bytes(part * 2)
    assert len(frames_of(tmp_path / "joined.ts")) == 120
    goes_on(tmp_path / "joined.ts", (30, 59, 80), False, monkeypatch)
    times = [i / 25 for i in range(60)]
    times[20:] = times[19:-1]  # one time twice: those behind it are shown later than the file says
    again = make_clip(tmp_path / "twice.mkv", clip_pictures, times=times)
    goes_on(again, (20, 40, 59), False, monkeypatch)
    goes_on(again, (10,), True, monkeypatch)


def test_a_file_that_cannot_be_sought_in_is_read_from_its_beginning(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import av

    def broken(*_: object) -> int:
        raise av.error.InvalidDataError(1, "no index")

    monkeypatch.setattr(frames_module._Clip, "_shown_until", broken)
    goes_on(clip, (30,), False, monkeypatch)


def test_what_could_not_be_decoded_before_is_not_counted_again(
    clip_pictures: Pictures, tmp_path: Path, make_clip: Callable[..., Path]
) -> None:
    content = bytearray(make_clip(tmp_path / "a.mov", clip_pictures[:30], codec="png").read_bytes())
    starts = [found.start() for found in re.finditer(b"\x89PNG", content)]
    for broken in (5, 20):
        content[starts[broken]] = 0
    (tmp_path / "a.mov").write_bytes(content)

    def left_out(done: Place | None, fps: float | None = None) -> tuple[int, int]:
        with open_frames(tmp_path / "a.mov", SPEC, skip_bad=True, done=done, fps=fps) as frames:
            return len(list(frames)), frames.num_bad

    assert left_out(None) == (28, 2)
    assert left_out(Place(4, 4 / 25)) == (23, 2)
    assert left_out(Place(9, 10 / 25)) == (18, 1)
    assert left_out(Place(9, 9 / 25), fps=25) == (18, 1)


@pytest.mark.parametrize("fps", [None, 25.0])
def test_a_stream_that_is_gone_on_with_counts_its_times_from_then(clip: Path, fps: float | None) -> None:
    address = f"file://{clip}"
    found = frames_of(address, fps=fps, done=Place(89_999, 3599.96), offset=3605.0)
    assert [frame.index for frame in found[:2]] == [90_000, 90_001]
    assert [frame.time for frame in found[:2]] == pytest.approx([3605, 3605.04])
    late = frames_of(address, fps=fps, done=Place(89_999, 3599.96), offset=3000.0)  # slower than --fps says
    assert [frame.time for frame in late[:2]] == pytest.approx([3600, 3600.04])


def test_a_folder_goes_on_behind_the_last_picture(clip_pictures: Pictures, tmp_path: Path) -> None:
    def draw(number: int) -> None:
        Image.fromarray(clip_pictures[number]).save(tmp_path / f"{number}.png")

    for number in (8, 9, 11):
        draw(number)
    first = frames_of(tmp_path)
    assert [frame.file for frame in first] == ["8.png", "9.png", "11.png"]
    for number in (10, 12, 13):  # one came late
        draw(number)
    done = Place(first[2].index, first[2].time, first[2].file)
    rest = frames_of(tmp_path, done=done)
    assert [(frame.index, frame.file) for frame in rest] == [(3, "12.png"), (4, "13.png")]
    assert [frame.time for frame in rest] == [3 / 25, 4 / 25]
    for number in (8, 9, 10, 11):  # and the oldest are deleted
        (tmp_path / f"{number}.png").unlink()
    assert [(frame.index, frame.file) for frame in frames_of(tmp_path, done=done)] == [(3, "12.png"), (4, "13.png")]
    assert [frame.file for frame in frames_of(tmp_path, done=Place(0, 0.0))] == ["13.png"]  # of before names were kept


def test_a_stream_is_read_as_it_comes(clip: Path) -> None:
    import av

    address = "tcp://127.0.0.1:{port}"
    (port,) = free_ports(1)

    def send() -> None:
        with av.open(str(clip)) as given, av.open(address.format(port=port), "w", format="matroska") as sent:
            stream = sent.add_stream_from_template(given.streams.video[0])
            for packet in given.demux(given.streams.video[0]):
                if packet.dts is not None:
                    packet.stream = stream
                    sent.mux(packet)

    sender = threading.Timer(0.3, send)
    sender.start()
    found = frames_of(address.format(port=port) + "?listen=1", offset=100.0, done=Place(9, 1.0))
    sender.join()
    assert [frame.index for frame in found] == list(range(10, 70))
    assert [frame.time for frame in found[:2]] == pytest.approx([100, 100.04])


def test_what_cannot_be_decoded_is_refused_or_counted(clip_pictures: Pictures, tmp_path: Path) -> None:
    for i in range(3):
        Image.fromarray(clip_pictures[i]).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:-20])
    with pytest.raises(DataError, match=r"1\.png: cannot be decoded"):
        frames_of(tmp_path)
    with open_frames(tmp_path, SPEC, skip_bad=True) as frames:
        assert [frame.index for frame in frames] == [0, 2]
        assert frames.num_bad == 1


def test_what_is_no_video_is_named(tmp_path: Path, clip: Path) -> None:
    (tmp_path / "note.mp4").write_text("nothing to see")
    (tmp_path / "empty").mkdir()
    for source, said in (
        (tmp_path / "note.mp4", r"note\.mp4: cannot be opened as video"),
        (tmp_path / "gone.mp4", r"gone\.mp4: no such clip or folder"),
        (tmp_path / "empty", "empty: holds no pictures"),
        ("tcp://127.0.0.1:9/x", "cannot be opened as video"),
    ):
        with pytest.raises(DataError, match=said):
            frames_of(source)
    with pytest.raises(DataError) as refused:
        frames_of("tcp://someone:secret@127.0.0.1:9/x")
    assert "secret" not in str(refused.value)
    with pytest.raises(ConfigError, match="--fps is 0"):
        frames_of(clip, fps=0.0)
    with pytest.raises(DataError, match=r"more than data\.max_pixels"):
        list(open_frames(clip, ImageSpec((8, 8), 1, max_pixels=100)))
