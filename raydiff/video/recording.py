"""The folder that ``raydiff video`` writes as it goes: rows, events, key frames; what is there after an interruption.

::

    frames.csv       a row per scored frame, appended and flushed batch by batch
    events.json      source, artefact, settings, counts and events; there from the first moment, whole at any time
    key_frames/      of each event the onset and the peak, and the highest of all, with heat maps
    frames.parquet   the rows once more, at the end (``--parquet``)
    annotated.mp4    the clip with heat maps over it (``--annotate``)
    video.html       score and test over time, events, key frames

The same command with ``--resume`` goes on behind the last row: smoothing and test are brought to where they were by the
rows themselves.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raydiff.errors import ConfigError, DataError, StorageError
from raydiff.heatmap import enlarge, overlay
from raydiff.images import encode_png
from raydiff.journal import write_whole
from raydiff.video.frames import Place
from raydiff.video.onset import Event, Moment, OnsetDetector
from raydiff.video.pictures import order_of
from raydiff.video.scoring import ScoredFrame
from raydiff.video.smoothing import Smoother

__all__ = [
    "COLUMNS", "EVENTS", "FRAMES", "KEY_FRAMES", "Recorder", "Tally", "last_place", "read_columns", "read_events",
    "read_rows", "refuse_scored",
]  # fmt: skip

FRAMES, EVENTS, KEY_FRAMES = "frames.csv", "events.json", "key_frames"

_SCHEMA = pa.schema(
    [
        ("frame", pa.int64()), ("time", pa.float64()), ("score", pa.float64()), ("p_value", pa.float64()),
        ("is_anomaly", pa.bool_()), ("smoothed", pa.float64()), ("statistic", pa.float64()), ("event", pa.int64()),
        ("dropped", pa.int64()), ("file", pa.string()),
    ]
)  # fmt: skip
COLUMNS = _SCHEMA.names
"""Of a row: its ``event`` is the number of the event that it is in, empty outside; ``dropped`` frames came before.

``file`` is the picture's name where the source is a folder; folders that were begun without this column go on so.
"""

_FRESH_S = 5.0
"""Seconds after which ``events.json`` is written anew with the rows."""


@dataclass
class Tally:
    """How many frames were scored, how many of them anomalous by themselves, dropped in real time, and undecodable."""

    scored: int = 0
    anomalous: int = 0
    dropped: int = 0
    bad: int = 0


@dataclass(frozen=True, eq=False)
class _Picture:
    """A frame kept to be shown."""

    pixels: NDArray[np.uint8]
    anomaly_map: NDArray[np.float32] | None

    @classmethod
    def of(cls, scored: ScoredFrame) -> _Picture:
        return cls(scored.frame.pixels, scored.anomaly_map)


class Recorder:
    """Writes the folder; a ``with`` block closes it. ``about`` says what is scored and how, and must fit to resume."""

    def __init__(
        self, folder: Path, about: Mapping[str, Any], *, mask_threshold: float | None, resume: bool = False
    ) -> None:
        self.folder, self._about, self._mask_threshold = folder, dict(about), mask_threshold
        self.tally, self.events = Tally(), dict[int, Event]()
        self._onset: _Picture | None = None
        self._peak: _Picture | None = None
        self._top: tuple[float, _Picture | None] | None = None
        self._highest = 0.0
        self._started, self._fresh = datetime.now(UTC), time.monotonic()
        if resume:
            self._check()
        with _named(folder):
            (folder / KEY_FRAMES).mkdir(parents=True, exist_ok=True)
            if resume:
                _cut_unfinished(folder / FRAMES)
            else:
                self.write_events(finished=False)  # a kill before the first event leaves what can be resumed
            columns = _header(folder / FRAMES) or COLUMNS
            self._file = (folder / FRAMES).open("a", encoding="utf-8", newline="")
            self._writer = csv.DictWriter(self._file, columns, extrasaction="ignore")
            if not self._file.tell():
                self._writer.writeheader()
                self._file.flush()

    def replay(self, smoother: Smoother, onset: OnsetDetector) -> None:
        """Take in the rows that are there, so that the next frame finds all as it was."""
        for row in read_rows(self.folder):
            smoothed = smoother.update(row["time"], row["score"])
            moment = onset.update(row["time"], smoothed)
            self._count(row["is_anomaly"], row["dropped"])
            self._keep(moment, smoothed, None)
            if moment.event is not None:
                self.events[moment.event.number] = moment.event
        self.write_events(finished=False)

    def add(self, scored: ScoredFrame) -> None:
        """Write a frame's row, and what it says of events.

        Raises:
            StorageError: it cannot be written.
        """
        moment, frame = scored.moment, scored.frame
        event = moment.event
        number = None if event is None or moment.ended else event.number
        values = (
            frame.index, frame.time, scored.score, scored.p_value, scored.is_anomaly, scored.smoothed, moment.statistic,
            number, frame.dropped, frame.file,
        )  # fmt: skip
        with _named(self.folder):
            self._writer.writerow(dict(zip(COLUMNS, values, strict=True)))  # None is empty, a float to its last bit
        self._count(scored.is_anomaly, frame.dropped)
        self._keep(moment, scored.smoothed, _Picture.of(scored))
        if event is None:
            return
        self.events[event.number] = event
        if moment.began:
            self._save(f"event-{event.number:03d}-onset", self._onset)
        if moment.began or moment.ended:
            self._save(f"event-{event.number:03d}-peak", self._peak)
        if moment.ended:
            self._onset = self._peak = None
        if moment.began or moment.ended:
            self.flush()
            self.write_events(finished=False)

    def flush(self) -> None:
        """Bring rows to the file, and now and then the counts."""
        with _named(self.folder):
            self._file.flush()
        if time.monotonic() - self._fresh > _FRESH_S:
            self.write_events(finished=False)

    def finish(self, *, finished: bool, parquet: bool = False) -> None:
        """Write what is left: events, the peak of an event that lasts, and rows as Parquet."""
        last = self.events.get(max(self.events, default=0))
        if last is not None and last.end is None:
            self._save(f"event-{last.number:03d}-peak", self._peak)
        if self._top is not None:
            self._save("highest", self._top[1])
        self.flush()
        self.write_events(finished=finished)
        if parquet:
            _to_parquet(self.folder)

    def write_events(self, *, finished: bool) -> None:
        """Bring ``events.json`` up to date."""
        content = {
            "version": 1, **self._about, "started": self._started.isoformat(timespec="milliseconds"),
            "finished": finished, "frames": asdict(self.tally),
            "events": [asdict(event) for event in self.events.values()],
        }  # fmt: skip
        write_whole(self.folder / EVENTS, json.dumps(content, indent=2) + "\n")
        self._fresh = time.monotonic()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._file.close()

    def _check(self) -> None:
        """See that what is there is of the same source and settings, and take over when it was begun."""
        there = read_events(self.folder)
        for key, value in self._about.items():
            before, now = there.get(key), json.loads(json.dumps(value))
            if before == now:
                continue
            if isinstance(before, dict) and isinstance(now, dict):  # the first that differs says it
                name = next(name for name in {**before, **now} if before.get(name) != now.get(name))
                key, before, now = f"{key}.{name}", before.get(name), now.get(name)
            raise ConfigError(
                f"{self.folder / EVENTS}: {key} is {before} there and {now} now; resume with what it was begun with, or"
                " choose another --out"
            )
        self._started = datetime.fromisoformat(there["started"])
        self.tally.bad = int(there["frames"]["bad"])

    def _count(self, is_anomaly: bool, dropped: int) -> None:
        self.tally = replace(
            self.tally, scored=self.tally.scored + 1, anomalous=self.tally.anomalous + is_anomaly,
            dropped=self.tally.dropped + dropped,
        )  # fmt: skip

    def _keep(self, moment: Moment, smoothed: float, picture: _Picture | None) -> None:
        """The frame that an event began with, should there be one, and its highest; without picture: as it was seen."""
        if self._top is None or smoothed > self._top[0]:
            self._top = smoothed, picture
        inside = moment.statistic > 0 or moment.event is not None
        if moment.fresh:
            self._onset = picture
        if moment.fresh or (inside and smoothed > self._highest):
            self._peak, self._highest = picture, smoothed

    def _save(self, name: str, picture: _Picture | None) -> None:
        """``<name>.png`` and its heat map; nothing where a resumed run never saw the frame."""
        if picture is None:
            return
        place = self.folder / KEY_FRAMES
        with _named(self.folder):
            (place / f"{name}.png").write_bytes(encode_png(enlarge(picture.pixels)))
            if picture.anomaly_map is not None:
                laid = overlay(picture.pixels, picture.anomaly_map, self._mask_threshold)
                (place / f"{name}.heatmap.png").write_bytes(encode_png(enlarge(laid)))


def refuse_scored(folder: Path) -> None:
    """See that a folder is free for a new video.

    Raises:
        ConfigError: it holds one.
    """
    if (folder / EVENTS).exists():
        raise ConfigError(f"{folder}: holds a scored video already; add --resume, or choose another --out")
    if (folder / FRAMES).exists():
        raise ConfigError(
            f"{folder}: holds the rows of a video ({FRAMES}) that cannot be resumed, for there is no {EVENTS}; remove"
            " them, or choose another --out"
        )


def last_place(folder: Path) -> tuple[Place | None, float]:
    """The last frame of which there is a row, of a folder with the last picture, and the seconds since the beginning.

    Raises:
        DataError: the folder holds no scored video, or it is damaged.
    """
    age = datetime.now(UTC) - datetime.fromisoformat(read_events(folder)["started"])
    last: Place | None = None
    file: str | None = None
    for row in read_rows(folder) if (folder / FRAMES).exists() else ():
        file = max((name for name in (file, row["file"]) if name), key=order_of, default=None)
        last = Place(row["frame"], row["time"], file)
    return last, age.total_seconds()


def read_columns(folder: Path, names: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Columns of ``frames.csv``, float64 (n,) each.

    Raises:
        DataError: the file is missing or damaged.
    """
    options = pa.csv.ConvertOptions(column_types=_SCHEMA, include_columns=list(names))
    try:
        table = pa.csv.read_csv(folder / FRAMES, convert_options=options)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{folder / FRAMES}: cannot be read ({error}); score the video anew") from error
    return {name: table[name].to_numpy().astype(np.float64) for name in names}


def read_events(folder: Path) -> dict[str, Any]:
    """The content of ``events.json``.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        found: dict[str, Any] = json.loads((folder / EVENTS).read_text(encoding="utf-8"))
        known = found["version"] == 1 and {"started", "frames", "events"} <= set(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder}: holds no scored video ({EVENTS}); leave out --resume, or give its folder"
        ) from error
    if not known:
        raise DataError(f"{folder / EVENTS}: is of another version of raydiff; score the video anew")
    return found


def read_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of ``frames.csv`` in order, with their types; an unfinished last one left out.

    Raises:
        DataError: the file is missing, or a row is damaged.
    """
    try:
        with (folder / FRAMES).open(encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.DictReader(line for line in file if line.endswith("\n")), start=2):
                yield _typed(row, folder, number)
    except OSError as error:
        raise DataError(f"{folder / FRAMES}: cannot be read ({error.strerror}); score the video anew") from error


def _typed(row: Mapping[str, str], folder: Path, number: int) -> dict[str, Any]:
    try:
        return {
            "frame": int(row["frame"]), "dropped": int(row["dropped"]), "is_anomaly": row["is_anomaly"] == "True",
            "event": int(row["event"]) if row["event"] else None, "file": row.get("file") or None,
            **{name: float(row[name]) for name in ("time", "score", "p_value", "smoothed", "statistic")},
        }  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / FRAMES} line {number}: is no row of frames; remove the lines from there") from error


def _header(path: Path) -> list[str]:
    """The columns that a file was begun with; none where there is no such file, or it is empty."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return next(csv.reader(file), [])


def _cut_unfinished(path: Path) -> None:
    """Drop a last line without its end."""
    if not path.exists():
        return
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        with path.open("r+b") as file:
            file.truncate(end)


def _to_parquet(folder: Path) -> None:
    options = pa.csv.ConvertOptions(column_types=_SCHEMA, strings_can_be_null=True)
    with _named(folder):
        table = pa.csv.read_csv(folder / FRAMES, convert_options=options)
        partial = folder / "frames.parquet.partial"
        pq.write_table(table, partial)
        partial.replace(folder / "frames.parquet")


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """An OSError of the writing within names the folder."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written ({error.strerror or error}); choose another --out") from error
