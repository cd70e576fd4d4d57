"""Frames of a clip, of a folder of pictures, or of a stream, one at a time, as a detector takes its images.

A frame becomes pixels as a PNG of it would (:func:`raydiff.images.fitted`), so ``raydiff score`` of that PNG gives the
same score. Its time is when it is shown: of a clip the presentation time, so a variable frame rate is what it is. Clips
and streams are decoded by PyAV, FFmpeg's libraries as a package (``pip install 'raydiff[video]'``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raydiff.errors import ConfigError, DataError
from raydiff.images import SUFFIXES, ImageSpec, fitted
from raydiff.uri import label_of
from raydiff.video.pictures import POLL, listed, pictures, read, recorded

if TYPE_CHECKING:
    from io import BufferedReader

__all__ = ["Frame", "FrameSource", "Place", "av_library", "is_stream", "open_frames"]

DEFAULT_FPS = 25.0
"""Frames a second of a folder of pictures, and of a clip that does not say."""

_INDEXED = {"mov", "mp4", "matroska", "webm"}
"""FFmpeg's names of containers in which seeking finds the key frame before a time; other files are read from 0."""

_STREAM_TIMEOUT = (20.0, 20.0)
"""Seconds that a stream may take to open, and to send its next frame."""


@dataclass(frozen=True, eq=False)
class Frame:
    """``pixels`` uint8 (H, W, C) at the detector's size; ``time`` in seconds from the source's beginning.

    ``index`` counts from 0 over all frames of the source, those that are left out too. ``dropped`` are those given up
    since the frame before, because scoring did not keep up. ``file`` is the name of a folder's picture, else empty.
    """

    index: int
    time: float
    pixels: NDArray[np.uint8]
    dropped: int = 0
    file: str = ""


Frames = Generator[Frame, None, None]


@dataclass(frozen=True)
class Place:
    """A frame that was scored already: where another run goes on.

    ``file`` is the last picture of a folder, in the folder's order; without it the index is the place in the folder.
    """

    index: int
    time: float
    file: str | None = None


class FrameSource:
    """An iterator of :class:`Frame`, to be closed; ``interval`` is the usual time between two, in seconds.

    ``num_bad`` counts what could not be decoded and was left out.
    """

    def __init__(self, name: str, interval: float, frames: Callable[[Self], Frames], *, live: bool) -> None:
        self.name, self.interval, self.live = name, interval, live
        self.num_bad = 0
        self._frames = frames(self)

    def __iter__(self) -> Iterator[Frame]:
        return self._frames

    def close(self) -> None:
        """Let go of the file or the connection; of a silent stream once the thread that waits for it is told."""
        with suppress(ValueError):  # another thread is in it
            self._frames.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def bad(self, what: str, error: Exception, skip: bool) -> None:
        """Count what cannot be decoded, or refuse it.

        Raises:
            DataError: it is not to be skipped.
        """
        if not skip and isinstance(error, DataError):
            raise error
        if not skip:
            raise DataError(
                f"{what}: cannot be decoded ({_line(error)}); leave such frames out with --skip-bad"
            ) from error
        self.num_bad += 1


def is_stream(source: str) -> bool:
    """Whether a source is an address, such as ``rtsp://camera/1``, and no file or folder."""
    return "://" in source


def open_frames(
    source: str | Path, spec: ImageSpec, *, fps: float | None = None, follow: float = 0.0, skip_bad: bool = False,
    done: Place | None = None, offset: float = 0.0,
) -> FrameSource:  # fmt: skip
    """The frames of a source, which is looked at at once and read as they are asked for.

    Args:
        source: a video file, a folder of pictures in the order of the numbers in their names, or a stream's address.
        spec: of the detector.
        fps: frames a second, in place of the source's own times; of a folder 25 by default.
        follow: seconds to wait for more at the end of a file or folder that is still being written.
        skip_bad: leave out what cannot be decoded, and count it.
        done: the last frame of a file or folder that is not wanted any more; of a stream, the one to count on from.
        offset: seconds added to a stream's times.

    Raises:
        DataError: there is no such source, no video in it, or a frame cannot be decoded.
        ConfigError: PyAV is not installed, or an argument is outside its range.
    """
    if fps is not None and not 0 < fps < 1e6:
        raise ConfigError(f"--fps is {fps:g}; give frames a second, above 0")
    if is_stream(str(source)):
        return _Clip(str(source), label_of(str(source)), spec, fps, skip_bad).frames(done, offset)
    path = Path(source)
    if path.is_dir():
        return _folder(path, spec, fps or DEFAULT_FPS, follow, skip_bad, done)
    if not path.is_file():
        raise DataError(
            f"{path}: no such clip or folder; give a video file, a folder of pictures or a stream's address"
        )
    if not follow:
        return _Clip(str(path), str(path), spec, fps, skip_bad).frames(done, 0.0)
    return _Clip(_Growing(path, follow), str(path), spec, fps, skip_bad).frames(done, 0.0)


def av_library() -> Any:
    """PyAV.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ConfigError("video needs PyAV, which is not installed; pip install 'raydiff[video]'") from error
    return av


def _folder(path: Path, spec: ImageSpec, fps: float, follow: float, skip_bad: bool, done: Place | None) -> FrameSource:
    """Pictures directly in a folder; one that is still being written is waited for while it is no whole file."""
    if not follow and not pictures(path):
        raise DataError(f"{path}: holds no pictures; their names end in {', '.join(SUFFIXES)}")
    name = None if done is None else done.file

    def frames(source: FrameSource) -> Frames:
        first = 0 if done is None or name is None else done.index + 1
        for index, file in enumerate(listed(path, follow, name), start=first):
            if done is not None and index <= done.index:
                continue
            try:
                pixels = read(file, spec, follow)
            except DataError as error:
                source.bad(str(file), error, skip_bad)
                continue
            yield Frame(index, index / fps, pixels, file=recorded(file))

    return FrameSource(str(path), 1 / fps, frames, live=False)


class _Growing:
    """A file that is still being written, for PyAV: its end is where nothing comes for ``patience`` seconds."""

    def __init__(self, path: Path, patience: float) -> None:
        self._file: BufferedReader = path.open("rb")
        self._patience = patience

    def read(self, size: int) -> bytes:
        deadline = time.monotonic() + self._patience
        while not (data := self._file.read(size)) and time.monotonic() < deadline:
            time.sleep(POLL)
        return data

    def close(self) -> None:
        self._file.close()


class _Clip:
    """What PyAV opens: a path, an address or a file that grows."""

    def __init__(self, what: str | _Growing, name: str, spec: ImageSpec, fps: float | None, skip_bad: bool) -> None:
        self._what, self._name, self._spec, self._skip_bad = what, name, spec, skip_bad
        self._fps = fps
        self._av = av_library()
        self._grows = isinstance(what, _Growing)
        self._open()

    def _open(self) -> None:
        """At the beginning.

        Raises:
            DataError: it cannot be opened, or holds no video.
        """
        options = {"analyzeduration": "1000000", "probesize": "500000"} if self._grows else {}
        timeout = _STREAM_TIMEOUT if self._live else None
        try:
            self._container = self._av.open(self._what, options=options, timeout=timeout)
        except (self._av.FFmpegError, OSError) as error:
            raise DataError(
                f"{self._name}: cannot be opened as video ({_line(error)}); give another clip or address"
            ) from error
        if not self._container.streams.video:
            self._container.close()
            raise DataError(f"{self._name}: holds no video; give another clip")
        self._stream = self._container.streams.video[0]

    def frames(self, done: Place | None, offset: float) -> FrameSource:
        """From behind ``done``."""
        rate = self._fps or float(self._stream.average_rate or self._stream.guessed_rate or DEFAULT_FPS)
        return FrameSource(self._name, 1 / rate, lambda source: self._decoded(source, done, offset), live=self._live)

    def _decoded(self, source: FrameSource, done: Place | None, offset: float) -> Frames:
        try:
            index, last, frames = 0, -np.inf, None
            if done is not None and (source.live or (frames := self._sought(source, done)) is not None):
                index, last = done.index + 1, done.time
            first = index if source.live else 0
            clock = _Clock(source.interval, offset, self._start(), first, last, own_times=self._fps is None)
            for frame in frames or self._raw(source):
                shown = clock.time(frame.time, index)
                if done is not None and index <= done.index:
                    source.num_bad = 0  # those before it were counted when it was scored
                else:
                    name = f"{self._name} at {shown:.3f} s"
                    yield Frame(index, shown, fitted(Image.fromarray(self._upright(frame)), self._spec, name))
                index += 1
        finally:
            self._container.close()
            if isinstance(self._what, _Growing):
                self._what.close()

    @property
    def _live(self) -> bool:
        return isinstance(self._what, str) and is_stream(self._what)

    def _sought(self, source: FrameSource, done: Place) -> Iterator[Any] | None:
        """The frames behind ``done`` by way of the key frame before it.

        None, and the file is at its beginning, where that is not certain to give the very frames that reading on
        would: not as many as counted are shown up to that time, or what is found there is another frame.
        """
        if self._grows or self._fps is not None or self._stream.start_time is None:
            return None
        if not _INDEXED & set(self._container.format.name.split(",")):
            return None
        wanted = self._stream.start_time + round(done.time / self._stream.time_base)
        with suppress(self._av.FFmpegError, DataError):
            if self._shown_until(wanted) == done.index + 1:
                self._container.seek(wanted, stream=self._stream)
                frames = self._raw(source)
                for frame in frames:
                    source.num_bad = 0
                    if frame.pts == wanted:
                        return frames
                    if frame.pts is None or frame.pts > wanted:
                        break
        self._container.close()
        self._open()
        source.num_bad = 0
        return None

    def _shown_until(self, wanted: int) -> int:
        """How many packets hold what is shown up to a time: read, not decoded."""
        number = 0
        for packet in self._container.demux(self._stream):
            if packet.dts is not None and packet.dts > wanted:
                break
            number += packet.pts is not None and packet.pts <= wanted and not packet.is_discard
        return number

    def _start(self) -> float | None:
        """The time of the first frame, where a file says it; a stream's clock may have run for days."""
        if self._live or self._stream.start_time is None:
            return None
        return float(self._stream.start_time * self._stream.time_base)

    def _raw(self, source: FrameSource) -> Iterator[Any]:
        """FFmpeg's frames; what it cannot decode is left out or refused."""
        try:
            for packet in self._container.demux(self._stream):
                try:
                    yield from packet.decode()
                except self._av.InvalidDataError as error:
                    source.bad(self._name, error, self._skip_bad)
        except self._av.EOFError:
            return
        except self._av.FFmpegError as error:
            if source.live and isinstance(error, (self._av.ExitError, OSError)):
                return  # the sender is silent, or has gone
            raise DataError(f"{self._name}: cannot be read on ({_line(error)}); see the source") from error

    def _upright(self, frame: Any) -> NDArray[np.uint8]:
        grey = frame.format.name.startswith("gray")
        pixels: NDArray[np.uint8] = frame.to_ndarray(format="gray" if grey else "rgb24")
        return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))


class _Clock:
    """Times that begin at the offset and rise, whatever the source says; frame ``first`` is at the offset."""

    def __init__(
        self, interval: float, offset: float, start: float | None, first: int, last: float, *, own_times: bool
    ) -> None:
        self._interval, self._offset, self._shift = interval, offset, offset
        self._start, self._first, self._last, self._own = start, first, last, own_times

    def time(self, shown: float | None, index: int) -> float:
        """Of a frame that is shown at ``shown``; where its time falls back, one interval after the frame before."""
        later = self._last + self._interval
        if not self._own or shown is None:
            found = self._offset + (index - self._first) * self._interval
            self._last = found if found > self._last else later
            return self._last
        if self._start is None:
            self._start = shown
        found = shown - self._start + self._shift
        if found <= self._last:
            self._shift += later - found
            found = later
        self._last = found
        return found


def _line(error: Exception) -> str:
    """What went wrong; FFmpeg's own words without the address, which may hold a password."""
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:160]
