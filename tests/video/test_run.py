"""A clip scored into a folder: the same scores as of pictures, the onset, resumed, in real time, drawn."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from raydiff.batch import score_files
from raydiff.core.calibration import Calibration, fit_threshold
from raydiff.detector import DiffusionDetector
from raydiff.errors import ConfigError, DataError, NotCalibratedError
from raydiff.video import Event, VideoOptions, VideoSummary, batches, onset_detector, open_frames, run, score_video
from raydiff.video.frames import Frame
from raydiff.video.onset import Moment, OnsetDetector
from raydiff.video.recording import KEY_FRAMES, Recorder, read_rows
from raydiff.video.scoring import ScoredFrame
from raydiff.video.smoothing import Unsmoothed

Pictures = NDArray[np.uint8]
QUICK = VideoOptions(smooth="none", false_alarm_every="1min", coherence="0.2s")


@pytest.fixture(scope="module")
def scored(
    detector: DiffusionDetector, clip: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, VideoSummary]:
    out = tmp_path_factory.mktemp("scored") / "out"
    options = VideoOptions(**{**vars(QUICK), "annotate": True, "parquet": True})
    return out, score_video(detector, clip, out, options)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "frames.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_frame_scores_what_a_picture_of_it_scores(
    scored: tuple[Path, VideoSummary], detector: DiffusionDetector, clip_pictures: Pictures, tmp_path: Path
) -> None:
    for i in (0, 3, 41, 59):
        Image.fromarray(clip_pictures[i]).convert("RGB").save(tmp_path / f"{i:02d}.png")
    score_files(detector, [tmp_path], tmp_path / "scores.jsonl")
    expected = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    rows = rows_of(scored[0])
    for line, i in zip(expected, (0, 3, 41, 59), strict=True):
        assert (float(rows[i]["score"]), float(rows[i]["p_value"])) == (line["score"], line["p_value"])
        assert rows[i]["is_anomaly"] == str(line["is_anomaly"])


def test_the_onset_of_negatives_is_found(scored: tuple[Path, VideoSummary]) -> None:
    out, summary = scored
    (event,) = summary.events
    assert abs(event.onset - 1.0) <= 2 / 25  # to two frames
    assert 1.0 <= event.detected <= 1.0 + 15 / 25
    assert event.end is None
    assert summary.frames.scored == 60
    record = json.loads((out / "events.json").read_text())
    assert record["finished"]
    assert record["events"][0]["onset"] == event.onset
    assert record["frames"] == {"scored": 60, "anomalous": summary.frames.anomalous, "dropped": 0, "bad": 0}
    assert [row["event"] for row in rows_of(out)].count("1") == round((2.4 - event.detected) * 25)


def test_the_rows_are_parquet_too(scored: tuple[Path, VideoSummary]) -> None:
    table = pq.read_table(scored[0] / "frames.parquet").to_pylist()
    assert table == [dict(row) for row in read_rows(scored[0])]


def test_key_frames_and_the_page_show_the_event(scored: tuple[Path, VideoSummary], clip_pictures: Pictures) -> None:
    out, _ = scored
    names = {path.name for path in (out / "key_frames").iterdir()}
    whats = ("event-001-onset", "event-001-peak", "highest")
    assert names == {f"{what}{suffix}" for what in whats for suffix in (".png", ".heatmap.png")}
    page = (out / "video.html").read_text()
    assert "1 anomalous interval, the first from " in page
    assert page.count("data:image/png;base64,") == 4
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "<svg" in page


def test_the_annotated_clip_has_every_frame_at_its_time(scored: tuple[Path, VideoSummary]) -> None:
    import av

    with av.open(str(scored[0] / "annotated.mp4")) as container:
        frames = list(container.decode(video=0))
    assert [frame.time for frame in frames] == pytest.approx([i / 25 for i in range(60)], abs=1e-3)
    assert frames[0].height > frames[0].width == 256
    red = [frame.to_ndarray(format="rgb24")[1, 5:250].astype(int) for frame in frames]
    assert np.abs(red[-1] - [213, 94, 0]).mean() < 40 < np.abs(red[0] - [213, 94, 0]).mean()


def test_an_interrupted_video_keeps_its_rows_and_goes_on_as_if_nothing_had_been(
    scored: tuple[Path, VideoSummary], detector: DiffusionDetector, clip: Path, tmp_path: Path
) -> None:
    out, seen = tmp_path / "out", list[Event]()

    def stop(event: Event) -> None:
        seen.append(event)
        raise KeyboardInterrupt

    options = VideoOptions(**{**vars(QUICK), "batch_size": 8})
    with pytest.raises(KeyboardInterrupt):
        score_video(detector, clip, out, options, on_event=stop)
    before = rows_of(out)
    assert 25 < len(before) < 60
    record = json.loads((out / "events.json").read_text())
    assert not record["finished"]
    assert len(record["events"]) == 1
    assert "interrupted" in (out / "video.html").read_text()
    with (out / "frames.csv").open("a") as file:
        file.write("57,2.28,0.1")  # the process was killed while it wrote
    with pytest.raises(ConfigError, match="holds a scored video already; add --resume"):
        score_video(detector, clip, out, options)
    with pytest.raises(ConfigError, match=r"options\.smooth is none there and median:0\.2s now"):
        score_video(detector, clip, out, VideoOptions(), resume=True)
    summary = score_video(detector, clip, out, options, resume=True)
    assert rows_of(out) == rows_of(scored[0])
    assert summary.events == scored[1].events
    assert summary.frames == scored[1].frames
    with pytest.raises(DataError, match="holds no scored video"):
        score_video(detector, clip, tmp_path / "none", options, resume=True)


def test_key_frames_stay_those_of_the_highest_scores_when_a_video_is_resumed(tmp_path: Path) -> None:
    scores = [0.0] * 5 + [9.0, 15.0, 15.0, 14.0, 12.0, 13.0] + [0.0] * 5
    normals = np.random.default_rng(0).gumbel(size=300)

    def record(folder: Path, first: int, last: int) -> None:
        onset = OnsetDetector.of(normals, false_alarm_every=3600, interval=1)
        with Recorder(folder, {}, mask_threshold=None, resume=first > 0) as recorder:
            if first:
                recorder.replay(Unsmoothed(), onset)
            for i in range(first, last):
                frame = Frame(i, float(i), np.full((8, 8, 1), 10 * i, np.uint8))
                moment = onset.update(frame.time, scores[i])
                recorder.add(ScoredFrame(frame, scores[i], 0.5, False, scores[i], moment, None))
            recorder.finish(finished=last == len(scores))

    record(tmp_path / "whole", 0, len(scores))
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole" / KEY_FRAMES).iterdir()}
    assert set(whole) == {"event-001-onset.png", "event-001-peak.png", "highest.png"}
    for stop in (3, 9, 14):
        record(tmp_path / f"{stop}", 0, stop)
        record(tmp_path / f"{stop}", stop, len(scores))
        assert {path.name: path.read_bytes() for path in (tmp_path / f"{stop}" / KEY_FRAMES).iterdir()} == whole


def interrupted(
    detector: DiffusionDetector, source: Path, out: Path, options: VideoOptions, after: int, *, killed: bool = False
) -> None:
    """A command that ends after some frames; killed, it leaves the folder as it was written to until then."""
    given = run.score_frames

    def stopping(*args: Any, **keywords: Any) -> Iterator[ScoredFrame]:
        for number, one in enumerate(given(*args, **keywords)):
            if number == after:
                raise KeyboardInterrupt
            yield one

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "score_frames", stopping)
        if killed:
            patch.setattr(Recorder, "finish", lambda *_, **__: None)
            patch.setattr(run, "_write_page", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            score_video(detector, source, out, options)


def test_a_video_killed_before_its_first_event_goes_on(
    scored: tuple[Path, VideoSummary], detector: DiffusionDetector, clip: Path, tmp_path: Path
) -> None:
    out, options = tmp_path / "out", VideoOptions(**{**vars(QUICK), "batch_size": 8})
    interrupted(detector, clip, out, options, 10, killed=True)
    assert len(rows_of(out)) == 10
    assert not json.loads((out / "events.json").read_text())["finished"]
    with pytest.raises(ConfigError, match="holds a scored video already; add --resume"):
        score_video(detector, clip, out, options)
    assert score_video(detector, clip, out, options, resume=True).frames == scored[1].frames
    assert rows_of(out) == rows_of(scored[0])
    (out / "events.json").unlink()  # as versions before this one left it
    with pytest.raises(ConfigError, match=r"rows of a video \(frames\.csv\) that cannot be resumed"):
        score_video(detector, clip, out, options)
    assert rows_of(out) == rows_of(scored[0])


def test_a_video_killed_before_its_first_row_goes_on(
    scored: tuple[Path, VideoSummary], detector: DiffusionDetector, clip: Path, tmp_path: Path
) -> None:
    interrupted(detector, clip, tmp_path, QUICK, 0, killed=True)
    (tmp_path / "frames.csv").unlink()
    score_video(detector, clip, tmp_path, QUICK, resume=True)
    assert rows_of(tmp_path) == rows_of(scored[0])


def test_counts_are_written_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scored_then() -> int:
        return int(json.loads((tmp_path / "events.json").read_text())["frames"]["scored"])

    frame = Frame(0, 0.0, np.zeros((8, 8, 1), np.uint8))
    with Recorder(tmp_path, {}, mask_threshold=None) as recorder:
        recorder.add(ScoredFrame(frame, 0.0, 0.5, False, 0.0, Moment(0.0, None), None))
        recorder.flush()
        assert scored_then() == 0
        monkeypatch.setattr("raydiff.video.recording._FRESH_S", 0.0)
        recorder.flush()
        assert scored_then() == 1


def test_two_that_go_on_at_once_write_no_row_twice(
    scored: tuple[Path, VideoSummary], detector: DiffusionDetector, clip: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    interrupted(detector, clip, tmp_path, QUICK, 20)
    locked, others = run.alone_in, [QUICK]

    @contextmanager
    def second(folder: Path) -> Iterator[None]:  # another command is done just before this one has the lock
        if others:
            score_video(detector, clip, folder, others.pop(), resume=True)
        with locked(folder):
            yield

    monkeypatch.setattr(run, "alone_in", second)
    score_video(detector, clip, tmp_path, QUICK, resume=True)
    assert rows_of(tmp_path) == rows_of(scored[0])


def test_a_folder_whose_pictures_change_goes_on_behind_the_last_one(
    detector: DiffusionDetector, clip_pictures: Pictures, tmp_path: Path
) -> None:
    source, out = tmp_path / "frames", tmp_path / "out"
    source.mkdir()
    for i in range(20):
        Image.fromarray(clip_pictures[i]).save(source / f"{i}.png")
    interrupted(detector, source, out, QUICK, 10)
    shutil.copytree(out, tmp_path / "old")
    for i in range(5):
        (source / f"{i}.png").unlink()
    score_video(detector, source, out, QUICK, resume=True)
    assert [(row["frame"], row["file"]) for row in rows_of(out)] == [(str(i), f"{i}.png") for i in range(20)]
    kept = [line.rsplit(",", 1)[0] + "\r\n" for line in (tmp_path / "old" / "frames.csv").read_text().splitlines()]
    (tmp_path / "old" / "frames.csv").write_text("".join(kept), newline="")  # as it was before names were kept
    score_video(detector, source, tmp_path / "old", VideoOptions(**{**vars(QUICK), "parquet": True}), resume=True)
    assert [row["frame"] for row in rows_of(tmp_path / "old")] == [str(i) for i in range(15)]
    assert "file" not in rows_of(tmp_path / "old")[-1]


FILLED = """
import resource, sys
import numpy as np
from pathlib import Path
from raydiff.errors import StorageError
from raydiff.video.annotating import Annotator
from raydiff.video.frames import Frame
from raydiff.video.onset import Moment
from raydiff.video.scoring import ScoredFrame

def write(frames, limit, error=None):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    random = np.random.default_rng(0)
    with Annotator(Path(sys.argv[1]) / f"{frames}.mp4", 0.04, None) as annotator:
        for i in range(frames):
            pixels = random.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            annotator.add(ScoredFrame(Frame(i, i / 25, pixels), 0.0, 1.0, False, 0.0, Moment(0.0, None), None))
        if error is not None:
            raise error

for arguments in ((40, 2000), (400, 20000), (41, 2000, KeyError("first"))):
    try:
        write(*arguments)
        print("no error")
    except (StorageError, KeyError) as error:
        print(type(error).__name__, error)
"""


def test_a_full_disk_under_the_annotated_clip_is_told(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FILLED, str(tmp_path)], capture_output=True, text=True, check=True)
    closed, added, before = done.stdout.splitlines()
    said = "cannot be written (File too large); choose another --out"
    assert closed == f"StorageError {tmp_path / '40.mp4'}: {said}"
    assert added == f"StorageError {tmp_path / '400.mp4'}: {said}"
    assert before == "KeyError 'first'"


def test_every_third_frame_is_scored(
    scored: tuple[Path, VideoSummary], detector: DiffusionDetector, clip: Path, tmp_path: Path
) -> None:
    score_video(detector, clip, tmp_path / "out", VideoOptions(**{**vars(QUICK), "every": 3}))
    kept = ("frame", "time", "score", "p_value")
    thinned = [{name: row[name] for name in kept} for row in rows_of(scored[0])[::3]]
    assert [{name: row[name] for name in kept} for row in rows_of(tmp_path / "out")] == thinned


def test_in_real_time_frames_are_dropped_and_counted(clip: Path, detector: DiffusionDetector) -> None:
    source = open_frames(clip, detector.image_spec)
    late = threading.Event()
    taken = batches(source, 2, real_time=True)
    found = []
    for batch in taken:
        found += batch
        late.wait(0.2)  # a slow detector: five frames pass
    assert all(len(batch) for batch in found[0].pixels)
    assert len(found) + sum(frame.dropped for frame in found) == 60
    assert sum(frame.dropped for frame in found) > 20
    assert found[-1].index == 59


def test_a_normal_clip_takes_the_place_of_calibration(
    detector: DiffusionDetector, normals: Pictures, clip: Path, tmp_path: Path, make_clip: Callable[..., Path]
) -> None:
    order = np.random.default_rng(0).integers(0, len(normals), 300)
    quiet = make_clip(tmp_path / "quiet.mkv", normals[order])
    options: dict[str, Any] = {"smooth": "none", "false_alarm_every": "1min", "normal": str(quiet)}
    summary = score_video(detector, clip, tmp_path / "out", VideoOptions(**options))
    settings = json.loads((tmp_path / "out" / "events.json").read_text())["test"]
    assert settings["num_normals"] > 100  # frames drawn at random are views of their own
    assert settings["coherence"] < 0.12
    assert summary.events[0].onset == pytest.approx(1.0, abs=0.08)


def test_views_of_a_calibration_image_are_no_independent_normals(detector: DiffusionDetector) -> None:
    drawn = torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64).sort().values

    def of_views(scores: torch.Tensor, images: int) -> DiffusionDetector:
        known = Calibration(fit_threshold(scores, 0.1, num_images=images), scores, None, None)
        return replace(detector, calibration=known)

    assert onset_detector(of_views(drawn, 25), QUICK, 0.04).settings.num_normals == 25
    with pytest.raises(ConfigError, match=r"calibrated on 4 images; .* give --normal CLIP"):
        onset_detector(of_views(drawn[:32], 4), QUICK, 0.04)


def test_options_outside_their_ranges_are_refused() -> None:
    for fields in ({"every": 0}, {"batch_size": 0}, {"follow": -1.0}, {"confidence": 1.0}):
        with pytest.raises(ConfigError, match="--"):
            VideoOptions(**fields)  # type: ignore[arg-type]


def test_an_empty_stream_leaves_a_folder_that_says_so(detector: DiffusionDetector, tmp_path: Path) -> None:
    (tmp_path / "frames").mkdir()
    summary = score_video(detector, tmp_path / "frames", tmp_path / "out", VideoOptions(follow=0.1))
    assert summary.frames.scored == 0
    assert "in 0 frames" in (tmp_path / "out" / "video.html").read_text()


def test_an_uncalibrated_detector_is_refused(detector: DiffusionDetector, clip: Path, tmp_path: Path) -> None:
    bare = detector.with_scoring(detector.config.scoring)
    with pytest.raises(NotCalibratedError, match="has no threshold"):
        score_video(bare, clip, tmp_path / "out")
    assert not (tmp_path / "out").exists()
