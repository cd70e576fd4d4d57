"""A video, scored into a folder: what ``raydiff video`` does, for Python."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from raydiff.core.sequential import MIN_NORMALS
from raydiff.detector import Detector
from raydiff.errors import ConfigError, NotCalibratedError
from raydiff.images import images_per_batch
from raydiff.journal import alone_in
from raydiff.report.video_page import write_video_page
from raydiff.uri import label_of
from raydiff.video.annotating import Annotator
from raydiff.video.durations import seconds_of
from raydiff.video.frames import FrameSource, is_stream, open_frames
from raydiff.video.onset import Event, OnsetDetector
from raydiff.video.pacing import batches
from raydiff.video.recording import (
    KEY_FRAMES,
    Recorder,
    Tally,
    last_place,
    read_columns,
    read_events,
    refuse_scored,
)
from raydiff.video.scoring import ScoredFrame, normal_scores, score_frames
from raydiff.video.smoothing import Smoother, smoother_of

__all__ = ["PAGE", "VideoOptions", "VideoSummary", "onset_detector", "score_video"]

PAGE = "video.html"
ANNOTATED = "annotated.mp4"
COHERENCE = 1.0
"""Seconds after which a view counts as another, where nothing is known of the source."""

_LIVE_BATCH = 4
"""Frames of a batch in real time: no alarm waits for more."""

_FLUSH_S = 0.2
_NOT_OF_ROWS = ("real_time", "follow", "annotate", "parquet", "batch_size")


@dataclass(frozen=True)
class VideoOptions:
    """How a video is read and judged; see ``raydiff video --help``. Times are as :func:`seconds_of` reads them.

    ``normal`` is a clip in which all is normal, in place of the calibration images; ``coherence`` is then measured
    in it, unless it is set.
    """

    every: int = 1
    real_time: bool = False
    fps: float | None = None
    follow: float = 0.0
    skip_bad: bool = False
    smooth: str = "median:0.2s"
    false_alarm_every: str = "8h"
    confidence: float = 0.9
    coherence: str | None = None
    normal: str | None = None
    annotate: bool = False
    parquet: bool = False
    batch_size: int | None = None

    def __post_init__(self) -> None:
        """See that numbers are in their ranges; times are read where they are used.

        Raises:
            ConfigError: one is not.
        """
        if self.every < 1 or (self.batch_size is not None and self.batch_size < 1):
            raise ConfigError(f"--every is {self.every} and --batch-size {self.batch_size}; both must be 1 or more")
        if not 0 <= self.follow < math.inf:
            raise ConfigError(f"--follow is {self.follow:g}; give seconds, 0 or more")
        if not 0 < self.confidence < 1:
            raise ConfigError(f"--confidence is {self.confidence:g}; give a share between 0 and 1")


@dataclass(frozen=True)
class VideoSummary:
    """Counts and events of the whole folder, and the seconds that this call took."""

    frames: Tally
    events: tuple[Event, ...]
    seconds: float
    rule: str


def score_video(
    detector: Detector, source: str | Path, out: str | Path, options: VideoOptions | None = None, *,
    resume: bool = False, on_event: Callable[[Event], None] | None = None,
    on_progress: Callable[[Tally, float], None] | None = None,
) -> VideoSummary:  # fmt: skip
    """Score a clip, a folder of pictures or a stream into a folder (:mod:`raydiff.video.recording`).

    Whatever ends it, a KeyboardInterrupt too, rows, events and the page are written before it is raised again.

    Args:
        detector: calibrated.
        source: see :func:`raydiff.video.frames.open_frames`.
        out: the folder.
        options: how; the defaults if None.
        resume: go on behind the last row of the folder.
        on_event: called when an alarm is raised, and again when the event is over (``end`` is set then).
        on_progress: called now and then with the counts and the time reached.

    Raises:
        NotCalibratedError, ConfigError, DataError, ScoreError, StorageError: one line says what cannot be done.
    """
    options = options or VideoOptions()
    if detector.calibration is None:
        raise NotCalibratedError(f"{detector.name} has no threshold; calibrate it before it scores video")
    begun, folder, in_time = time.monotonic(), Path(out), options.real_time or is_stream(str(source))
    mask_threshold = detector.calibration.mask_threshold
    with ExitStack() as stack:
        open_folder = _gone_on_with if resume else _begun
        frames, smoother, onset, recorder = open_folder(stack, detector, source, folder, options)
        annotator = None
        if options.annotate:
            annotator = stack.enter_context(Annotator(_free(folder / ANNOTATED), frames.interval, mask_threshold))
        size = options.batch_size or (_LIVE_BATCH if in_time else images_per_batch(detector.config))
        taken = stack.enter_context(closing(batches(frames, size, every=options.every, real_time=in_time)))
        scored = score_frames(detector, taken, smoother=smoother, onset=onset)
        finished = False
        try:
            _write(scored, recorder, annotator, frames, on_event, on_progress)
            finished = True
        finally:
            recorder.finish(finished=finished, parquet=options.parquet)
            _write_page(folder)
    return VideoSummary(recorder.tally, tuple(recorder.events.values()), time.monotonic() - begun, onset.settings.rule)


_Opened = tuple[FrameSource, Smoother, OnsetDetector, Recorder]


def _begun(
    stack: ExitStack, detector: Detector, source: str | Path, folder: Path, options: VideoOptions
) -> _Opened:  # fmt: skip
    """A folder that holds no rows; nothing is made before the source and the test are known to work."""
    refuse_scored(folder)
    frames = stack.enter_context(_frames(detector, source, options))
    onset = onset_detector(detector, options, frames.interval)
    stack.enter_context(alone_in(folder))
    refuse_scored(folder)  # another command may have come first
    recorder = stack.enter_context(_recorder(detector, source, folder, options, onset))
    return frames, smoother_of(options.smooth), onset, recorder


def _gone_on_with(
    stack: ExitStack, detector: Detector, source: str | Path, folder: Path, options: VideoOptions
) -> _Opened:  # fmt: skip
    """A folder that holds rows, behind its last; the smoother and the test are where they were."""
    read_events(folder)  # a folder that is not there is not made by its lock
    stack.enter_context(alone_in(folder))
    last, age = last_place(folder)
    frames = stack.enter_context(_frames(detector, source, options, done=last, offset=age))
    smoother, onset = smoother_of(options.smooth), onset_detector(detector, options, frames.interval)
    recorder = stack.enter_context(_recorder(detector, source, folder, options, onset, resume=True))
    recorder.replay(smoother, onset)
    return frames, smoother, onset, recorder


def _frames(
    detector: Detector, source: str | Path, options: VideoOptions, **behind: Any
) -> FrameSource:  # fmt: skip
    return open_frames(
        source, detector.image_spec, fps=options.fps, follow=options.follow, skip_bad=options.skip_bad, **behind
    )


def _recorder(
    detector: Detector, source: str | Path, folder: Path, options: VideoOptions, onset: OnsetDetector, *,
    resume: bool = False,
) -> Recorder:  # fmt: skip
    assert detector.calibration is not None  # noqa: S101
    about = _about(detector, source, options, onset)
    return Recorder(folder, about, mask_threshold=detector.calibration.mask_threshold, resume=resume)


def onset_detector(detector: Detector, options: VideoOptions, interval: float) -> OnsetDetector:
    """The test for a source whose frames are ``interval`` seconds apart, from calibration scores or a normal clip.

    Raises:
        ConfigError, DataError: an option, or the normal clip, cannot be used.
    """
    assert detector.calibration is not None  # noqa: S101
    every = seconds_of(options.false_alarm_every, "--false-alarm-every")
    coherence = None if options.coherence is None else seconds_of(options.coherence, "--coherence")
    interval *= options.every
    if options.normal is None:
        images = detector.calibration.threshold.num_images  # several views of one are one
        if images < MIN_NORMALS:
            raise ConfigError(
                f"{detector.name} was calibrated on {images} image{'s' * (images > 1)}; the test needs {MIN_NORMALS}"
                " independent ones: give --normal CLIP, in which all is normal, or calibrate on more"
            )
        return OnsetDetector.of(
            detector.calibration.scores.numpy(), false_alarm_every=every, interval=interval, num_normals=images,
            coherence=COHERENCE if coherence is None else coherence, confidence=options.confidence,
        )  # fmt: skip
    frames = open_frames(options.normal, detector.image_spec, fps=options.fps, skip_bad=options.skip_bad)
    size = options.batch_size or images_per_batch(detector.config)
    times, scores = normal_scores(
        detector, batches(frames, size, every=options.every), smoother=smoother_of(options.smooth)
    )
    return OnsetDetector.of_clip(
        times, scores, false_alarm_every=every, interval=interval, coherence=coherence, confidence=options.confidence
    )


def _write(
    scored: Iterator[ScoredFrame], recorder: Recorder, annotator: Annotator | None, frames: FrameSource,
    on_event: Callable[[Event], None] | None, on_progress: Callable[[Tally, float], None] | None,
) -> None:  # fmt: skip
    flushed = time.monotonic()
    before = recorder.tally.bad
    for one in scored:
        recorder.tally.bad = before + frames.num_bad
        recorder.add(one)
        if annotator is not None:
            annotator.add(one)
        if on_event is not None and one.moment.event is not None and (one.moment.began or one.moment.ended):
            on_event(one.moment.event)
        if time.monotonic() - flushed > _FLUSH_S:
            recorder.flush()
            flushed = time.monotonic()
            if on_progress is not None:
                on_progress(recorder.tally, one.frame.time)
    recorder.tally.bad = before + frames.num_bad


def _about(
    detector: Detector, source: str | Path, options: VideoOptions, onset: OnsetDetector
) -> dict[str, Any]:  # fmt: skip
    """What a row depends on: where one of these differs, rows of two commands do not fit together."""
    assert detector.calibration is not None  # noqa: S101
    name = label_of(str(source)) if is_stream(str(source)) else str(Path(source).resolve())
    read = {key: value for key, value in asdict(options).items() if key not in _NOT_OF_ROWS}
    threshold = detector.calibration.threshold
    return {
        "source": name, "detector": detector.name, "artifact": detector.artifact_digest,
        "threshold": threshold.value, "target_fpr": threshold.target_fpr, "options": read,
        "test": asdict(onset.settings), "rule": onset.settings.rule,
    }  # fmt: skip


def _write_page(folder: Path) -> None:
    rows = read_columns(folder, ("time", "smoothed", "statistic"))
    pictures = {path.name: path.read_bytes() for path in sorted((folder / KEY_FRAMES).glob("*.png"))}
    write_video_page(folder / PAGE, read_events(folder), rows, pictures)


def _free(path: Path) -> Path:
    """The path, or the first of ``-2``, ``-3`` ... that is not there: what another command wrote stays."""
    names = (path.with_stem(f"{path.stem}{'' if i == 1 else f'-{i}'}") for i in count(1))
    return next(name for name in names if not name.exists())
