"""The command line as a user meets it: what it does, what it prints, and how it refuses."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result
from PIL import Image
from sklearn.datasets import load_digits

from raydiff.cli import main
from raydiff.cli.options import command_line
from raydiff.config import ExperimentConfig
from raydiff.lock import alone_at
from raydiff.results import load_evaluations, read_results
from raydiff.shards import ShardSet, write_shards

QUICK = ["--set", "training.num_steps=20", "--set", "denoiser.block_out_channels=[8, 16]"]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(code: int, *arguments: str | Path) -> str:
    """The one line of a command that must fail with this exit code."""
    result = run(*arguments)
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.exit_code == code, result.output
    assert len(lines) == 1, result.output
    assert "Traceback" not in result.output
    return lines[0]


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A folder in the MVTec-AD layout: 24 + 6 real digits of one kind, 6 of another as defects, 32 px, with masks."""
    digits, target = load_digits(), tmp_path / "parts"
    for folder, digit, first, count in (("train/good", 1, 0, 24), ("test/good", 1, 24, 6), ("test/seven", 7, 0, 6)):
        (target / folder).mkdir(parents=True)
        for i, image in enumerate(digits.images[digits.target == digit][first : first + count]):
            pixels = (image * 15.9).astype(np.uint8).repeat(4, 0).repeat(4, 1)
            Image.fromarray(pixels).save(target / folder / f"{i:03d}.png")
    (target / "ground_truth" / "seven").mkdir(parents=True)
    for i in range(6):
        Image.fromarray(np.full((32, 32), 255, np.uint8)).save(target / "ground_truth" / "seven" / f"{i:03d}_mask.png")
    return target


def folder_config(parts: Path) -> list[str]:
    fields = {"data.dataset": f"{{name: folder, source: {parts}}}", "data.image_size": "[32, 32]"}
    return [item for path, value in fields.items() for item in ("--set", f"{path}={value}")]


def test_help_is_quick_and_complete() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for command in ("prepare", "fit", "evaluate", "score", "report", "demo"):
        assert command in result.output
        shown = run(command, "--help")
        assert shown.exit_code == 0
        assert "\\b" not in shown.output
    script = "import sys, raydiff.cli; print([m for m in ('torch', 'ray', 'pydantic', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", "the command line imports what it needs when it runs"


@pytest.mark.distributed
@pytest.mark.usefixtures("ray_cluster")
def test_demo_from_digits_to_report(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    result = run("demo", "--out", out, *QUICK)
    assert result.exit_code == 0, result.output
    detectors = ["unet/denoising_error", "isolation_forest", "ocsvm", "copod", "knn"]
    for name in [*detectors, "AUROC [95 %]", "2 Ray Train worker(s)", f"report: {out / 'report.html'}"]:
        assert name in result.output
    rows = [row for row in read_results(out / "results.jsonl") if row.subset == "all"]
    assert [row.detector for row in rows] == detectors
    assert rows[0].metrics["auroc"].value > 0.5
    assert (out / "report.html").stat().st_size > 50_000
    assert "already holds a run" in refused(2, "demo", "--out", out, *QUICK)
    # every row names an artefact that exists and hashes equal
    from raydiff.artifact import read_folder

    saved = [out / "artifact", *(out / "baselines" / name for name in detectors[1:])]
    assert [row.artifact_digest for row in rows] == [read_folder(folder).digest for folder in saved]


@pytest.mark.distributed
@pytest.mark.usefixtures("ray_cluster")
def test_own_folder_prepare_fit_evaluate_score_report(parts: Path, tmp_path: Path) -> None:
    shards, out = tmp_path / "shards", tmp_path / "run"
    prepared = run("prepare", "--out", shards, *folder_config(parts))
    assert "18 train, 6 calibration, 12 test images" in prepared.output
    fitted = run("fit", "--out", out, *QUICK, *folder_config(parts), "--set", f"data.shards={shards}")
    assert fitted.exit_code == 0, fitted.output
    assert "finite-sample quantile of 6 calibration normals" in fitted.output
    evaluated = run("evaluate", out, "--out", tmp_path / "results")
    assert evaluated.exit_code == 0, evaluated.output
    assert "aupro" in read_results(tmp_path / "results" / "results.jsonl")[0].metrics
    again = run("evaluate", out / "artifact", parts, "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    first, second = (load_evaluations(tmp_path / name / "results.jsonl")[0] for name in ("results", "again"))
    assert first.predictions is not None
    assert second.predictions is not None
    assert first.predictions.scores.tolist() == second.predictions.scores.tolist()
    scored = run("score", out, parts / "test", "--out", tmp_path / "s.csv", "--maps", tmp_path / "maps")
    assert scored.exit_code == 0, scored.output
    with (tmp_path / "s.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert [float(row["score"]) for row in rows] == pytest.approx(first.predictions.scores.tolist(), rel=1e-6)
    assert len(list((tmp_path / "maps").rglob("*.heatmap.png"))) == 12
    drawn = run("report", tmp_path / "results" / "results.jsonl", "--out", tmp_path / "r.html", "--title", "Parts")
    assert drawn.exit_code == 0
    assert "<title>Parts" in (tmp_path / "r.html").read_text()


@pytest.mark.distributed
@pytest.mark.usefixtures("ray_cluster")
def test_prepare_takes_a_name(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    more = ["--set", "data.max_train_images=12", "--set", "data.max_test_images=6"]
    assert "9 train, 3 calibration, 6 test images" in run("prepare", "folder", "--source", parts, *more).output
    assert ShardSet.is_finished("shards/folder")
    assert run("prepare", "folder", "--source", parts, *more).exit_code == 0
    message = refused(1, "prepare", "folder", "--source", parts)
    assert "was prepared with data.max_test_images = 6" in message


def test_prepare_says_what_it_cannot_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "did you mean 'mnist'" in refused(2, "prepare", "mnits", "--source", "x")
    assert "data.dataset.source is missing" in refused(2, "prepare", "mnist")
    assert "nothing here can fetch mvtec_ad; MVTec" in refused(2, "prepare", "mvtec_ad", "--download", "data")
    assert "is not a data set that is published" in refused(2, "prepare", "digits", "--download", "data")
    assert "give one of them" in refused(2, "prepare", "mnist", "--download", "data", "--source", "data")
    assert "needs a data set's name" in refused(2, "prepare", "--download", "data")
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    assert "MNIST could not be fetched" in refused(1, "prepare", "mnist", "--download", "data")
    assert not (tmp_path / "shards").exists()


@pytest.mark.distributed
@pytest.mark.usefixtures("ray_cluster")
def test_prepared_shards_are_never_replaced_and_need_no_source(parts: Path, tmp_path: Path) -> None:
    shards, out = tmp_path / "shards", tmp_path / "run"
    run("prepare", "--out", shards, *folder_config(parts))
    before = ShardSet.open(str(shards)).digest
    message = refused(1, "fit", "--out", out, *QUICK, "--set", f"data.shards={shards}")  # the data set was forgotten
    assert "was prepared with data.dataset" in message
    assert ShardSet.open(str(shards)).digest == before
    config = folder_config(parts)
    parts.rename(tmp_path / "moved")
    fitted = run("fit", "--out", out, *QUICK, *config, "--set", f"data.shards={shards}")
    assert fitted.exit_code == 0, fitted.output
    assert "already holds a run" in refused(2, "fit", "--out", out, *QUICK)


@pytest.mark.distributed
@pytest.mark.usefixtures("ray_cluster")
def test_a_truncated_image_stops_before_training_or_is_counted(parts: Path, tmp_path: Path) -> None:
    bad = parts / "train" / "good" / "003.png"
    bad.write_bytes(bad.read_bytes()[:80])
    message = refused(1, "fit", "--out", tmp_path / "run", *QUICK, *folder_config(parts))
    assert "train/good/003.png" in message
    assert not (tmp_path / "run" / "checkpoints").exists(), "training did not start"
    skipped = run("prepare", "--out", tmp_path / "s", *folder_config(parts), "--set", "data.on_bad_image=skip")
    assert skipped.exit_code == 0, skipped.output
    assert "left out: train/good/003.png" in skipped.stderr
    assert [item.image_id for item in ShardSet.open(str(tmp_path / "s")).skipped] == ["train/good/003.png"]


@pytest.mark.distributed
@pytest.mark.usefixtures("ray_cluster")
def test_data_that_cannot_be_used(parts: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    prepare = ["prepare", "--out", tmp_path / "s"]
    assert "empty" in refused(1, *prepare, *folder_config(tmp_path / "empty"))
    assert "no such" in refused(1, *prepare, *folder_config(tmp_path / "nothing"))
    Image.new("L", (16, 16)).save(parts / "train" / "good" / "zz.png")
    message = refused(1, *prepare, *folder_config(parts), "--set", "data.resize=strict")
    assert "zz.png" in message
    assert "16" in message
    assert "data.resize" in message
    shutil.rmtree(parts / "train")
    assert "normal" in refused(1, *prepare, *folder_config(parts))


@pytest.mark.distributed
@pytest.mark.usefixtures("ray_cluster")
def test_a_truncated_shard_is_named(tiny_config: ExperimentConfig, tmp_path: Path) -> None:
    shards = write_shards(tiny_config.data, str(tmp_path / "shards"))
    path = tmp_path / "shards" / shards.shard_names("test")[0]
    path.write_bytes(path.read_bytes()[:-100])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny_config.to_dict()))
    fit_locally_into(tiny_config, tmp_path)
    message = refused(1, "evaluate", tmp_path / "run", tmp_path / "shards")
    assert "test-00000.parquet" in message
    assert "raydiff prepare" in message


def fit_locally_into(config: ExperimentConfig, path: Path) -> None:
    from raydiff.experiment import fit_locally

    fit_locally(config, path / "run", write_shards(config.data, str(path / "good-shards")))


def test_a_damaged_artefact_is_refused(run_dir: Path, parts: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir / "artifact", tmp_path / "a")
    weights = tmp_path / "a" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    message = refused(1, "score", tmp_path / "a", parts, "--out", tmp_path / "s.csv")
    assert "weights.safetensors: was altered" in message
    assert not (tmp_path / "s.csv").exists()


def test_commands_that_cannot_be_used(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert "did you mean 'num_steps'?" in refused(2, "fit", "--out", out, "--set", "training.num_step=3")
    assert "training.num_steps is 'many'" in refused(2, "fit", "--out", out, "--set", "training.num_steps=many")
    assert "did you mean 'unet'?" in refused(2, "fit", "--out", out, "--set", "denoiser=unett")
    assert "holds no run to resume" in refused(2, "fit", "--resume", out)
    assert "s3://bucket/run: must be a local path" in refused(2, "demo", "--out", "s3://bucket/run?secret=hush")
    assert "leave out the config" in refused(2, "fit", "--resume", run_dir, "--out", out)
    assert "--set seed=1: changes what the run" in refused(2, "fit", "--resume", run_dir, "--set", "seed=1")
    assert "is neither a folder nor" in refused(2, "demo", "--data", "digitz", "--out", out)
    assert "no such folder" in refused(1, "score", tmp_path / "no", tmp_path, "--out", tmp_path / "s.csv")
    assert not out.exists(), "nothing was begun"
    (tmp_path / "file").write_text("in the way")
    assert "cannot be made" in refused(1, "fit", "--out", tmp_path / "file" / "run", *QUICK)


def test_a_second_fit_of_a_run_is_refused(run_dir: Path, tmp_path: Path) -> None:
    run = shutil.copytree(run_dir, tmp_path / "run")
    with alone_at(run):
        assert f"another raydiff command runs in {run}; wait for it to end" in refused(2, "fit", "--resume", run)


def test_what_was_typed_is_told_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = ["sweep", "a.yaml", "--out", "s3://key:secret@bucket/x?scheme=http", "--set", "data.shards=gs://open/path/"]
    monkeypatch.setattr(sys, "argv", ["raydiff", *typed])
    assert command_line() == "raydiff sweep a.yaml --out s3://bucket/x... --set data.shards=gs://open/path/"


def test_a_bucket_that_is_not_there_is_refused_before_anything_is_read(object_store: Callable[[str], str]) -> None:
    uri = object_store("nowhere/run")
    message = refused(1, "fit", "--out", uri, *QUICK, "--set", "data.shards=/not/there")
    assert message.startswith("Error: s3://nowhere/run/_write-test: cannot be written (")
    assert message.endswith("change --out")
    assert "secret" not in message
    assert "s3://nowhere/run: holds no run to resume" in refused(2, "fit", "--resume", uri)
    assert "s3://nowhere/run: there is no such folder" in refused(1, "evaluate", uri)
    assert "s3://nowhere/run: there is no such folder" in refused(1, "score", uri, ".", "--out", "s.csv")


def test_a_run_in_a_store_is_measured_and_scores(
    tiny_config: ExperimentConfig, digit_shards: ShardSet, object_store: Callable[[str], str], parts: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from raydiff.experiment import fit_locally
    from raydiff.storage import Storage

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    uri = object_store(f"store/{tmp_path.name}/run")
    storage = Storage.of(uri)
    fit_locally(tiny_config.override({"data.shards": digit_shards.uri}), storage, digit_shards)
    result = run("evaluate", uri)
    assert result.exit_code == 0, result.output
    assert f"report: s3://store/{tmp_path.name}/run/report.html" in result.output
    assert "secret" not in result.output
    before = storage.read("report.html")
    storage.delete("report.html")
    assert run("report", storage.child("results.jsonl").uri, "--title", "Another").exit_code == 0
    again = storage.read("report.html")
    assert (b"Another" in before, b"Another" in again) == (False, True)
    scored = run("score", uri, parts / "test", "--out", tmp_path / "s.csv")
    assert scored.exit_code == 0, scored.output
    assert len((tmp_path / "s.csv").read_text().splitlines()) == 1 + 12


def test_debug_shows_the_traceback() -> None:
    result = CliRunner().invoke(main, ["--debug", "fit", "--resume", "nowhere"])
    assert result.exception is not None
    assert type(result.exception).__name__ == "ConfigError"
