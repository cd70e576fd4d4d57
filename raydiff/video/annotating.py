"""The clip once more with heat maps over it: what raised an alarm, and where.

It is written as frames are scored, in fragments, so that what is there plays after an interruption too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from raydiff.errors import StorageError
from raydiff.heatmap import enlarge, overlay
from raydiff.video.frames import av_library
from raydiff.video.scoring import ScoredFrame

if TYPE_CHECKING:
    from io import FileIO

__all__ = ["Annotator"]

_TICKS = 10_000
"""Of the time base, a second: presentation times are kept to 0.1 ms."""

_STRIP, _BORDER = 22, 4
_ALARM = (213, 94, 0)


class _File:
    """For PyAV, made with the first bytes; ``error`` is why some could not be written, which FFmpeg may not tell."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: FileIO | None = None
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        left = memoryview(data)
        try:
            self._file = self._file or self._path.open("wb", buffering=0)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self.error = error
            raise
        return len(data)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class Annotator:
    """Writes an MP4 at the detector's image size, enlarged to 256 pixels, with a line of text below."""

    def __init__(self, path: Path, interval: float, mask_threshold: float | None) -> None:
        self._path, self._interval, self._mask_threshold = path, interval, mask_threshold
        self._av = av_library()
        self._file = _File(path)
        self._container: Any = None
        self._stream: Any = None
        self._ticks = -1

    def add(self, scored: ScoredFrame) -> None:
        """Append a frame at its own time.

        Raises:
            StorageError: it cannot be written.
        """
        picture = self._drawn(scored)
        with self._named():
            if self._container is None:
                self._open(picture)
            frame = self._av.VideoFrame.from_ndarray(picture, format="rgb24")
            self._ticks = max(self._ticks + 1, round(scored.frame.time * _TICKS))
            frame.pts, frame.time_base = self._ticks, Fraction(1, _TICKS)
            self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Write what the encoder still holds.

        Raises:
            StorageError: it cannot be written.
        """
        container, self._container = self._container, None
        if container is None:
            return
        with self._named():
            try:
                if self._stream is not None:
                    container.mux(self._stream.encode())
            finally:
                container.close()
                self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with suppress(*([] if kind is None else [StorageError])):  # what is under way says more
            self.close()

    @contextmanager
    def _named(self) -> Iterator[None]:
        """An error of the writing within names the file; FFmpeg goes on without a word where the disk is full."""
        try:
            yield
            if self._file.error is not None:
                raise self._file.error
        except (OSError, self._av.FFmpegError) as error:
            said = self._file.error or error
            raise StorageError(
                f"{self._path}: cannot be written ({said.strerror or said}); choose another --out"
            ) from error

    def _open(self, picture: NDArray[np.uint8]) -> None:
        codec = "libx264" if "libx264" in self._av.codecs_available else "mpeg4"
        flags = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
        self._container = self._av.open(self._file, "w", format="mp4", options=flags)
        rate = Fraction(1 / self._interval).limit_denominator(1001)
        self._stream = self._container.add_stream(codec, rate=rate, options={"bf": "0"})  # times stay what they are
        self._stream.height, self._stream.width = picture.shape[:2]
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = Fraction(1, _TICKS)

    def _drawn(self, scored: ScoredFrame) -> NDArray[np.uint8]:
        """The heat map over the frame, framed while an event lasts, with time and score below: sides are even."""
        pixels = scored.frame.pixels
        if scored.anomaly_map is None:
            picture = np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels
        else:
            picture = overlay(pixels, scored.anomaly_map, self._mask_threshold)
        large = enlarge(picture, 256)
        height, width = large.shape[:2]
        canvas = Image.new("RGB", (width + width % 2, height + height % 2 + _STRIP))
        canvas.paste(Image.fromarray(large), (0, 0))
        draw = ImageDraw.Draw(canvas)
        event = None if scored.moment.ended else scored.moment.event
        text = f"{scored.frame.time:.2f} s  {scored.smoothed:.3g}"
        if event is not None:
            draw.rectangle((0, 0, width - 1, height - 1), outline=_ALARM, width=_BORDER)
            text += f"  anomaly {event.number} since {event.onset:.2f} s"
        colour = (255, 255, 255) if event is None else _ALARM
        draw.text((4, height + 4), text, fill=colour, font=ImageFont.load_default(12))
        return np.asarray(canvas)
