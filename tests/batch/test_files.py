"""Scoring loose files: rows in order, in three formats; bad images named or counted."""

import csv
import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageDraw

from raydiff.batch import ScoreSummary, score_files
from raydiff.config import ExperimentConfig
from raydiff.contracts import Scores
from raydiff.detector import BaselineDetector, Detector
from raydiff.errors import ConfigError, DataError, NotCalibratedError, ScoreError, StorageError
from raydiff.images import encode_png, to_uint8
from raydiff.testing import planted_defect, small_images

COLUMNS = ["path", "score", "threshold", "p_value", "is_anomaly", "error"]


@dataclass(frozen=True, eq=False, kw_only=True)
class BrightnessDetector(Detector):
    """The brightest pixel; a map of brightness; the reconstruction is black. A wholly white image scores NaN."""

    num_evaluations = None
    name = "brightness"

    def _score(self, images):
        maps = images.mean(1, keepdim=True)
        scores = maps.flatten(1).amax(1)
        return Scores(torch.where(maps.flatten(1).amin(1) == 1, torch.nan, scores), maps)

    def _reconstruct(self, images):
        return torch.full_like(images, -1.0)

    def calibrate(self, images, *, data_digest=None):
        return replace(self, calibration=self._make_calibration(self.score(images), data_digest))

    def _describe(self):
        return {}

    def _weights(self):
        return {}


@pytest.fixture(scope="module")
def detector():
    return BrightnessDetector(config=ExperimentConfig()).calibrate(small_images(20) * 0.3)


@pytest.fixture
def folder(tmp_path):
    images, _ = planted_defect(small_images(7))
    for i, pixels in enumerate(to_uint8(images)):
        path = tmp_path / "in" / ("a" if i < 4 else "b") / f"{i % 4}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(pixels))
    return tmp_path / "in"


def read(path: Path) -> list[dict]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    kinds = dict.fromkeys(COLUMNS[1:4], float) | {"is_anomaly": "True".__eq__}
    rows = csv.DictReader(path.read_text().splitlines())
    return [{k: None if v == "" else kinds.get(k, str)(v) for k, v in row.items()} for row in rows]


def test_the_three_formats_hold_the_same_rows_in_order(detector, folder, tmp_path):
    (folder / "b" / "bad.png").write_bytes(b"not an image")
    tables = []
    for suffix in (".csv", ".jsonl", ".parquet"):
        out = tmp_path / "out" / f"scores{suffix}"
        summary = score_files(detector, [folder], out, on_bad_image="skip", batch_size=3)
        tables.append(read(out))
        assert list(out.parent.glob("*.partial")) == []
    assert tables[0] == tables[1] == tables[2]
    rows = tables[0]
    assert list(rows[0]) == COLUMNS
    assert [row["path"] for row in rows] == sorted(str(path) for path in folder.rglob("*.png"))
    assert summary == ScoreSummary(8, sum(bool(row["is_anomaly"]) for row in rows), 1)
    bad = next(row for row in rows if "bad" in row["path"])
    assert "bad.png: is not a PNG" in bad["error"]
    assert bad["score"] is bad["p_value"] is bad["is_anomaly"] is None
    for row in rows:
        if row["error"] is None:
            assert row["is_anomaly"] == (row["score"] > row["threshold"] == detector.calibration.threshold.value)
            assert 0 < row["p_value"] <= 1


def test_the_batch_size_changes_nothing_but_the_progress(detector, folder, tmp_path):
    seen, texts = [], set()
    for size in (1, 3, 64):
        score_files(detector, [folder], tmp_path / "s.csv", batch_size=size, progress=lambda *at: seen.append(at))
        texts.add((tmp_path / "s.csv").read_text())
    assert len(texts) == 1
    assert seen[7:10] == [(3, 7), (6, 7), (7, 7)]


def test_heat_maps_and_reconstructions_carry_the_names_of_their_images(detector, folder, tmp_path):
    score_files(detector, [folder], tmp_path / "s.jsonl", maps_dir=tmp_path / "maps", batch_size=4)
    made = sorted(path.relative_to(tmp_path / "maps").as_posix() for path in (tmp_path / "maps").rglob("*.png"))
    expected = [f"{path.relative_to(folder).as_posix()}.{what}.png"
                for path in folder.rglob("*.png") for what in ("heatmap", "reconstruction")]  # fmt: skip
    assert made == sorted(expected)
    heat_map = np.asarray(Image.open(tmp_path / "maps" / "a" / "0.png.heatmap.png"))
    assert heat_map.shape == (128, 128, 3)
    assert not np.asarray(Image.open(tmp_path / "maps" / "a" / "0.png.reconstruction.png")).any()
    score_files(detector, [folder / "a" / "0.png"], tmp_path / "s.jsonl", maps_dir=tmp_path / "one")
    alone = np.asarray(Image.open(tmp_path / "one" / "0.png.heatmap.png"))
    assert np.array_equal(alone, heat_map)  # a heat map does not depend on its neighbours


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.copy()


def test_pictures_show_the_photo_and_not_the_canvas(tmp_path):
    """A light bar that lies askew, with a white end: the colours are where that is, as in an answer of ``serve``."""
    photo = Image.new("L", (96, 72), 40)
    pen = ImageDraw.Draw(photo)
    pen.line((20, 15, 70, 55), fill=120, width=9)
    pen.ellipse((64, 49, 76, 61), fill=255)
    photo.save(tmp_path / "part.png")
    config = ExperimentConfig().override({"data.image_size": [32, 64], "data.align": "principal_axis"})
    asked = BrightnessDetector(config=config).calibrate(torch.rand(20, 1, 32, 64) * 0.3)
    score_files(asked, [tmp_path / "part.png"], tmp_path / "s.csv", maps_dir=tmp_path / "maps")
    shown = opened(tmp_path / "maps" / "part.png.heatmap.png")
    assert shown.width / shown.height == pytest.approx(96 / 72, rel=0.05)
    pixels = np.asarray(shown.resize((96, 72))).astype(int)
    coloured = np.argwhere(np.ptp(pixels, axis=-1) > 100)
    assert np.abs(coloured.mean(0) - [55, 70]).max() < 3
    assert opened(tmp_path / "maps" / "part.png.reconstruction.png").size == shown.size
    padded = BrightnessDetector(config=ExperimentConfig().override({"data.resize": "pad"}))
    padded = padded.calibrate(small_images(20) * 0.3)
    score_files(padded, [tmp_path / "part.png"], tmp_path / "s.csv", maps_dir=tmp_path / "padded")
    assert opened(tmp_path / "padded" / "part.png.heatmap.png").size == (128, 96)


def test_a_bad_image_stops_the_work_and_leaves_an_earlier_table_as_it_was(detector, folder, tmp_path):
    out = tmp_path / "s.csv"
    score_files(detector, [folder], out)
    before = out.read_bytes()
    (folder / "b" / "cut.png").write_bytes((folder / "a" / "0.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"b/cut\.png"):
        score_files(detector, [folder], out)
    assert out.read_bytes() == before
    assert not (tmp_path / "s.csv.partial").exists()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_bad_image_whose_name_is_no_text_becomes_a_row(detector, tmp_path, suffix):
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(b"not an image")
    out = tmp_path / f"scores{suffix}"
    assert score_files(detector, [tmp_path], out, on_bad_image="skip").num_bad == 1
    (row,) = read(out)
    assert row["path"] == f"{tmp_path}/\ufffd.png"
    assert row["error"].startswith(f"{tmp_path}/\ufffd.png: is not a PNG")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_an_interruption_keeps_the_rows_so_far_and_says_where(detector, folder, tmp_path, suffix):
    def interrupt(done, total):
        if done == 4:
            raise KeyboardInterrupt

    out = tmp_path / f"scores{suffix}"
    with pytest.raises(KeyboardInterrupt) as caught:
        score_files(detector, [folder], out, batch_size=2, progress=interrupt)
    partial = tmp_path / f"scores{suffix}.partial"
    assert caught.value.__notes__ == [f"the 4 rows so far are in {partial}"]
    whole = tmp_path / f"whole{suffix}"
    score_files(detector, [folder], whole)
    assert read(partial.rename(tmp_path / f"kept{suffix}")) == read(whole)[:4]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_bad_image_at_the_end_loses_no_row_before_it(detector, folder, tmp_path, suffix):
    whole = tmp_path / f"whole{suffix}"
    score_files(detector, [folder], whole)
    (folder / "zz.png").write_bytes(b"not an image")
    out, partial = tmp_path / f"scores{suffix}", tmp_path / f"scores{suffix}.partial"
    with pytest.raises(DataError) as caught:
        score_files(detector, [folder], out, batch_size=2)
    kept = read(partial.rename(tmp_path / f"kept{suffix}"))
    assert kept == read(whole)[: len(kept)]
    assert str(caught.value).endswith(f"on_bad_image: skip; the {len(kept)} rows before are in {partial}")
    assert "zz.png: is not a PNG" in str(caught.value)
    assert not out.exists()


def test_a_score_that_is_not_finite_is_never_skipped(detector, folder, tmp_path):
    (folder / "b" / "white.png").write_bytes(encode_png(np.full((8, 8), 255, np.uint8)))
    with pytest.raises(ScoreError, match=r"b/white\.png: its score is not finite"):
        score_files(detector, [folder], tmp_path / "s.csv", on_bad_image="skip")
    assert not (tmp_path / "s.csv").exists()


def test_only_bad_images_still_make_a_table(detector, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"")
    summary = score_files(detector, [tmp_path / "bad.png"], tmp_path / "s.parquet", on_bad_image="skip")
    assert summary == ScoreSummary(1, 0, 1)
    assert "is an empty file" in read(tmp_path / "s.parquet")[0]["error"]


def test_what_cannot_be_done_is_said_before_any_image_is_scored(detector, folder, tmp_path):
    with pytest.raises(ConfigError, match=r"s\.xlsx: its ending says no format; use one of \.csv, \.jsonl, \.parquet"):
        score_files(detector, [folder], tmp_path / "s.xlsx")
    with pytest.raises(NotCalibratedError, match="brightness has no threshold"):
        score_files(replace(detector, calibration=None), [folder], tmp_path / "s.csv")
    with pytest.raises(DataError, match="no such file or folder"):
        score_files(detector, [tmp_path / "nowhere"], tmp_path / "s.csv")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"file/s\.csv: cannot be written"):
        score_files(detector, [folder], tmp_path / "file" / "s.csv")
    with pytest.raises(StorageError, match=r"heatmap\.png: cannot be written"):
        score_files(detector, [folder], tmp_path / "s.csv", maps_dir=tmp_path / "file")


def test_an_error_of_the_work_is_not_blamed_on_the_table(detector, folder, tmp_path):
    def stumble(*_):
        raise OSError("the disk of images has gone")

    with pytest.raises(OSError, match="the disk of images has gone"):
        score_files(detector, [folder], tmp_path / "s.csv", progress=stumble)
    assert not list(tmp_path.glob("s.csv*"))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_full_disk_is_said(detector, folder, tmp_path, suffix):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    out, partial = tmp_path / f"s{suffix}", tmp_path / f"s{suffix}.partial"
    partial.symlink_to("/dev/full")
    with pytest.raises(StorageError, match=rf"s\{suffix}: cannot be written \(.*No space left on device"):
        score_files(detector, [folder], out)
    assert not list(tmp_path.glob("s.*"))
    if suffix != ".parquet":  # it writes at once
        partial.symlink_to("/dev/full")
        (folder / "bad.png").write_bytes(b"not an image")
        with pytest.raises(DataError, match=r"bad\.png"):  # what went wrong first is what is said
            score_files(detector, [folder], out, batch_size=2)


def test_maps_of_a_detector_that_draws_none(folder, tmp_path):
    from raydiff.config import component_options

    config = ExperimentConfig()
    plain = BaselineDetector.fit(config, component_options("baselines", "copod"), small_images(30))
    plain = plain.calibrate(small_images(20, seed=1))
    with pytest.raises(ConfigError, match="copod draws no anomaly maps"):
        score_files(plain, [folder], tmp_path / "s.csv", maps_dir=tmp_path / "maps")
    assert not (tmp_path / "s.csv").exists()
    score_files(plain, [folder], tmp_path / "s.csv")
    assert all(math.isfinite(row["score"]) for row in read(tmp_path / "s.csv"))
