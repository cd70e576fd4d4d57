"""Benchmarks for real: cells that run once, in any order; failures, kill -9, and what is refused beforehand."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image

from raydiff.artifact import read_folder
from raydiff.benchmark import finished_cells, is_trained, plan, run_benchmark
from raydiff.cells import Changed, run_training
from raydiff.cli import main
from raydiff.errors import ConfigError, DataError, RaydiffError, StorageError
from raydiff.journal import alone_in
from raydiff.lock import LOCK
from raydiff.mirror import Mirror, on_node
from raydiff.plan import Plan
from raydiff.results import Result, read_results, read_robustness
from raydiff.shards import write_shards
from raydiff.storage import Storage
from raydiff.tracking import read_metrics
from tests.test_suite import TINY, write

QUICK = TINY | {"cost": {"batch_sizes": [1, 2], "num_images": 2}}
CLASSIC = {"methods": {name: TINY["methods"][name] for name in ("OCSVM", "near")}}


def rows_of(out: Path) -> dict[tuple[str | None, str], Result]:
    return {(row.cell, row.subset): row for row in read_results(out / "results.jsonl")}


def comparable(out: Path) -> dict[tuple[str | None, str], dict[str, Any]]:
    return {key: row.comparable() for key, row in rows_of(out).items()}


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Two digits, two scorers on one network each, two baselines."""
    return plan(write(tmp_path_factory.mktemp("suite") / "suite.yaml", QUICK))


@pytest.fixture(scope="module")
def finished(suite: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of it run in this process."""
    out = tmp_path_factory.mktemp("benchmark") / "out"
    result = run_benchmark(suite, out, command="raydiff benchmark suite.yaml")
    assert not result.failed
    assert result.finished == list(suite.cells)
    return out


def test_every_cell_has_rows_that_name_an_artefact_that_is_there(suite: Plan, finished: Path) -> None:
    rows = rows_of(finished)
    for cell in suite.cells:
        row = rows[cell.cell_id, "all"]
        assert (row.detector, row.dataset, row.category, row.seed) == (
            cell.method, cell.dataset, cell.category, cell.seed,
        )  # fmt: skip
        assert read_folder(finished / "cells" / cell.cell_id / "artifact").digest == row.artifact_digest
        assert row.command == "raydiff benchmark suite.yaml"
        assert row.config_digest == cell.config.digest()
        for cost in (row.training_seconds, row.ms_per_image_best, row.model_mb):
            assert cost is not None
            assert cost > 0
        assert row.best_batch_size in (1, 2)
    assert len(list((finished / "trainings").iterdir())) == 2, "scorers share a training"
    both = [rows[cell.cell_id, "all"].training_seconds for cell in suite.cells[:2]]
    assert both[0] == both[1]


def test_finished_cells_are_never_run_again(suite: Plan, finished: Path) -> None:
    before = (finished / "results.jsonl").read_bytes()

    def workers(tasks: object) -> Any:
        raise AssertionError(f"nobody is needed for {tasks}")

    result = run_benchmark(suite, finished, workers)
    assert (result.num_before, result.finished, result.failed) == (len(suite.cells), [], {})
    assert (finished / "results.jsonl").read_bytes() == before


@pytest.mark.parametrize("loss", ["row", "artefact", "half a row"])
def test_a_lost_cell_alone_runs_again_and_gives_the_same_row(
    suite: Plan, finished: Path, tmp_path: Path, loss: str
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    lost = suite.cells[0]
    path = out / "results.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    mine = [line for line in lines if json.loads(line)["cell"] == lost.cell_id]
    if loss == "artefact":
        shutil.rmtree(out / "cells" / lost.cell_id)
    else:
        half = mine[0][: len(mine[0]) // 2] if loss == "half a row" else ""
        path.write_text("".join(line for line in lines if line not in mine) + half)
    result = run_benchmark(suite, out)
    assert result.finished == [lost]
    assert comparable(out) == comparable(finished)


def test_the_order_of_cells_changes_no_row(suite: Plan, finished: Path, tmp_path: Path) -> None:
    backwards = suite.of([cell for cell in reversed(suite.cells) if cell.category == "1"])
    run_benchmark(backwards, tmp_path / "out")
    expected = comparable(finished)
    found = comparable(tmp_path / "out")
    assert len({cell for cell, _ in found}) == 4
    assert found == {key: expected[key] for key in found}


def test_the_report_of_a_benchmark_can_be_drawn_from_its_rows(finished: Path, tmp_path: Path) -> None:
    page = tmp_path / "again.html"
    drawn = CliRunner().invoke(main, ["report", str(finished / "results.jsonl"), "--out", str(page), "--title", "Two"])
    assert drawn.exit_code == 0, drawn.output
    assert "overview-auroc" in page.read_text()
    assert (tmp_path / "tables" / "overview-auroc.csv").exists(), "the tables of a benchmark"


@pytest.mark.parametrize("content", ["", '{"seconds": 1', '{"seconds": null}', "[]"])
def test_a_training_whose_time_was_cut_off_is_done_again(
    suite: Plan, finished: Path, tmp_path: Path, content: str
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    cell = suite.cells[0]
    training = suite.trainings[str(cell.training)]
    folder = out / "trainings" / training.key
    (folder / "training_seconds.json").write_text(content)
    shutil.rmtree(out / "cells" / cell.cell_id)
    assert not is_trained(training, out)
    result = run_benchmark(suite, out)
    assert (result.finished, result.failed) == ([cell], {})
    assert is_trained(training, out)
    assert not list(folder.glob("*.partial"))


def test_a_training_begun_with_another_config_starts_anew(suite: Plan, finished: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    cell = suite.cells[0]
    folder = out / "trainings" / str(cell.training)
    (folder / "training_seconds.json").unlink()
    shutil.rmtree(out / "cells" / cell.cell_id)
    begun = yaml.safe_load((folder / "config.yaml").read_text())
    begun["data"]["dataset"]["normal"] = ["7"]
    (folder / "config.yaml").write_text(yaml.safe_dump(begun))
    for position in folder.glob("checkpoints/*/training.json"):
        position.write_text("{}")  # whoever opens it fails
    assert run_benchmark(suite, out).finished == [cell]
    assert comparable(out) == comparable(finished)


def test_one_benchmark_at_a_time_writes_in_a_folder(suite: Plan, finished: Path, tmp_path: Path) -> None:
    refused = pytest.raises(ConfigError, match=r"another raydiff command runs in .*/out; .* another --out")
    with alone_in(finished), refused:
        run_benchmark(suite, finished)
    assert not run_benchmark(suite, finished).failed
    seen = []

    def try_too(_: object) -> None:
        with pytest.raises(ConfigError, match="another raydiff command runs"):
            run_benchmark(suite, tmp_path / "new")
        seen.append(True)

    assert not run_benchmark(suite.only("near/*/1/0"), tmp_path / "new", on_progress=try_too).failed
    assert seen


def test_rows_that_are_no_text_are_named(suite: Plan, tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_bytes(b"\xff\xfe\x00\n")
    with pytest.raises(DataError, match=r"results.jsonl: cannot be read \(not UTF-8 text\); restore it"):
        run_benchmark(suite, tmp_path)


def test_a_mark_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "cells").write_text("in the way")
    with pytest.raises(StorageError, match=r"robustness.json: cannot be written"):
        Changed("a", "{}", []).mark(tmp_path)


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Two kinds of parts in the MVTec-AD layout, 8 px: noise that is darker where it is anomalous; no masks."""
    rng = np.random.default_rng(0)
    for kind in ("whole", "torn"):
        for folder, count, top in (("train/good", 16, 256), ("test/good", 6, 256), ("test/dark", 6, 60)):
            target = tmp_path / "parts" / kind / folder
            target.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, top, (8, 8)).astype(np.uint8)).save(target / f"{i:02d}.png")
    return tmp_path / "parts"


def add_masks(parts: Path, *categories: str) -> None:
    for category in categories or ("torn", "whole"):
        folder = parts / category / "ground_truth" / "dark"
        folder.mkdir(parents=True)
        for i in range(6):
            Image.fromarray(np.full((8, 8), 255, np.uint8)).save(folder / f"{i:02d}_mask.png")


def of_parts(parts: Path, **changes: Any) -> Plan:
    dataset = {
        "config": {"data": {"dataset": {"name": "folder", "source": "parts"}}},
        "each": {"data.dataset.category": ["torn", "whole"]},
    }
    return plan(write(parts.parent / "suite.yaml", QUICK | CLASSIC | {"datasets": {"parts": dataset}} | changes),
                parts.parent)  # fmt: skip


def test_a_failure_takes_its_own_cells_alone_and_is_tried_again(parts: Path, tmp_path: Path) -> None:
    torn = parts / "torn" / "train" / "good" / "07.png"
    whole = torn.read_bytes()
    torn.write_bytes(whole[:40])
    command = ["benchmark", str(tmp_path / "suite.yaml"), "--data", str(tmp_path), "--out", str(tmp_path / "out"),
               "--serial"]  # fmt: skip
    found = of_parts(parts)
    first = CliRunner().invoke(main, command)
    assert first.exit_code == 1, first.output
    assert "2 cells run now, 0 were done before" in first.stdout
    assert "failed: shards of parts/torn: ImageError" in first.stderr
    assert "[5/6, 3 failed" in first.stderr or "[6/6, 3 failed" in first.stderr
    assert "Error: 3 task(s) failed; tracebacks are in" in first.stderr
    lines = [json.loads(line) for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    assert [line["type"] for line in lines] == ["ImageError"] * 3
    assert all("07.png" in line["message"] for line in lines)
    assert {line["cell"] for line in lines} >= {cell.cell_id for cell in found.cells if cell.category == "torn"}
    assert "Traceback" in lines[0]["traceback"]
    torn.write_bytes(whole)
    second = CliRunner().invoke(main, command)
    assert second.exit_code == 0, second.output
    assert "2 cells run now, 2 were done before" in second.stdout
    assert (tmp_path / "out" / "report.html").exists()


def test_killed_half_way_it_goes_on_with_the_rest(tmp_path: Path) -> None:
    path = write(tmp_path / "suite.yaml", QUICK | {"datasets": {"digits": {}}})
    out = tmp_path / "out"
    command = [sys.executable, "-m", "raydiff", "benchmark", str(path), "--serial", "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while len(finished_cells(out)) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    before = finished_cells(out)
    created = {key: row.created for key, row in rows_of(out).items()}
    assert 2 <= len(before) < 4
    with (out / "results.jsonl").open("a") as file:
        file.write('{"run": "cut off in the mid')
    listed = CliRunner().invoke(main, ["benchmark", str(path), "--out", str(out), "--dry-run"])
    assert f"{len(before)} of 4 cells done" in listed.output
    result = run_benchmark(plan(path), out)
    assert {cell.cell_id for cell in result.finished} == {cell.cell_id for cell in plan(path).cells} - before
    assert created.items() <= {key: row.created for key, row in rows_of(out).items()}.items()


def test_robustness_runs_once_and_again_when_more_is_asked(parts: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"methods": ["near"], "perturbations": ["brightness"], "severities": [1, 5]}
    found = of_parts(parts, robustness=asked).only("*/whole/0")
    out = tmp_path / "out"
    assert not run_benchmark(found, out).failed
    rows = read_robustness(out / "robustness.jsonl")
    assert [(row.detector, row.category, row.perturbation, row.severity) for row in rows] == [
        ("near", "whole", "none", 0), ("near", "whole", "brightness", 1), ("near", "whole", "brightness", 5),
    ]  # fmt: skip
    before = (out / "results.jsonl").read_bytes()
    run_benchmark(found, out)
    assert len((out / "robustness.jsonl").read_text().splitlines()) == 3
    run_benchmark(of_parts(parts, robustness=asked | {"severities": [1, 3, 5]}).only("*/whole/0"), out)
    assert [row.severity for row in read_robustness(out / "robustness.jsonl")] == [0, 1, 3, 5]
    shutil.rmtree(out / "shards")
    less = of_parts(parts, robustness=asked | {"severities": [3]}).only("*/whole/0")
    assert not run_benchmark(less, out).failed
    assert [row.severity for row in read_robustness(out / "robustness.jsonl")] == [0, 3], "the last ask alone"
    assert (out / "results.jsonl").read_bytes() == before


METHOD = TINY["methods"]["errors"]
CONTRAST = {"methods": {"turns": {"training": "unet", "scoring": "contrast"}}}
PATCHES = {"methods": {"patches": {"baseline": {"name": "patch_knn", "weights": "gone.pth"}}}}
NO_MAPS = {"methods": {"near": {"baseline": "knn"}}}
ONE_CELL = {
    "trainings": {"whole": {"space": {"name": "rotnet", "num_steps": 1}, "denoiser": {"name": "convnet", "width": 8}}},
    "methods": {"head": {"training": "whole", "scoring": {"name": "discriminative", "num_steps": 1}}},
}


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"metrics": ["auroc", "aupro"]}, ConfigError, "metrics names aupro, which needs masks, and datasets.parts"),
        (
            {"masks": "whole", "metrics": ["aupro"]},
            ConfigError,
            r"metrics names aupro, which needs masks, and datasets.parts \(torn\) has none",
        ),
        ({"each": "gone"}, ConfigError, r"datasets.parts \(gone\): .*has these categories: torn, whole"),
        (
            {"source": "elsewhere"},
            DataError,
            r"datasets.parts \(torn\): .*no such folder.*\(and 1 more: datasets.parts",
        ),
        ({"empty": "test/dark"}, DataError, r"datasets.parts \(torn\): .*0 anomalous"),
        (CONTRAST, ConfigError, "methods.turns on datasets.parts: .*condition"),
        (PATCHES, ConfigError, r"methods.patches on datasets.parts: .*gone.pth: cannot be read"),
        ({"robustness": {"perturbations": ["blurr"]}}, ConfigError, "robustness.perturbations: .*did you mean 'blur'"),
        ({"robustness": {"perturbations": ["cut_paste"]}}, ConfigError, "cut_paste makes an image anomalous"),
        ({"robustness": {"severities": [6]}}, ConfigError, "robustness.severities holds 6"),
        ({"robustness": {"attacks": [3.0]}}, ConfigError, r"robustness.attacks holds 3\.0"),
        (
            {"masks": "torn whole", "metrics": ["aupro"]} | NO_MAPS,
            ConfigError,
            "needs anomaly maps, and no method on .* draws any \\(near\\)",
        ),
        (
            {"masks": "torn whole", "metrics": ["aupro"]} | ONE_CELL,
            ConfigError,
            "needs anomaly maps, and no method on .* draws any \\(head\\)",
        ),
        ({"methods": {"near": METHOD | {"resources": {"num_gpus": 64}}}}, ConfigError, "ask for 64 GPU"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(
    parts: Path, tmp_path: Path, changes: dict[str, Any], kind: type[RaydiffError], message: str
) -> None:
    changes = dict(changes)
    if masks := changes.pop("masks", ""):
        add_masks(parts, *masks.split())
    if folder := changes.pop("empty", None):
        shutil.rmtree(parts / "torn" / folder)
    dataset = {
        "config": {"data": {"dataset": {"name": "folder", "source": changes.pop("source", "parts")}}},
        "each": {"data.dataset.category": [changes.pop("each", "torn"), "whole"]},
    }
    found = of_parts(parts, datasets={"parts": dataset}, **changes)
    with pytest.raises(kind, match=message) as caught:
        run_benchmark(found, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_map_metric_needs_one_method_with_maps_among_all(parts: Path, tmp_path: Path) -> None:
    add_masks(parts)
    found = of_parts(parts, metrics=["aupro"], methods={name: TINY["methods"][name] for name in ("errors", "near")})
    assert not run_benchmark(found.only("near/*/whole/0"), tmp_path / "out").failed


def test_a_wrong_suite_is_one_line_and_exit_code_two(tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(QUICK | {"metrics": ["auprof"]}))
    result = CliRunner().invoke(main, ["benchmark", str(tmp_path / "suite.yaml"), "--serial"])
    assert result.exit_code == 2
    assert [line for line in result.stderr.splitlines() if line.startswith("Error: ")] == result.stderr.splitlines()


def test_a_benchmark_in_a_bucket_is_the_same_and_goes_on_from_another_machine(
    finished: Path, object_store: Callable[[str], str], tmp_path: Path
) -> None:
    """Every byte that is kept lies in the bucket; the folders of this machine are removed."""
    methods = {name: QUICK["methods"][name] for name in ("errors", "near")}
    suite = str(write(tmp_path / "suite.yaml", QUICK | {"methods": methods}))
    place = object_store(f"store/{tmp_path.name}")
    store = Storage.of(place)
    command = ["benchmark", suite, "--out", place, "--serial", "--only", "*/0/0"]
    looked = CliRunner().invoke(main, [*command, "--dry-run"])
    assert "0 of 2 cells done" in looked.output
    assert store.files() == {}
    first = CliRunner().invoke(main, command)
    assert first.exit_code == 0, first.output
    assert "2 cells run now, 0 were done before" in first.output
    assert f"report: s3://store/{tmp_path.name}/report.html" in first.output
    files = store.files()
    assert not [name for name in files if "/checkpoints/" in name or name == LOCK]
    assert not [name for name in files if b"secret" in store.read(name)]
    lost = next(name for name in files if name.startswith("cells/") and name.endswith("manifest.json"))
    store.delete(lost)
    again = CliRunner().invoke(main, command)
    assert "1 cells run now, 1 were done before" in again.output, again.output
    copy = store.fetch(tmp_path / "copy")
    expected = comparable(finished)
    assert comparable(copy) == {key: row for key, row in expected.items() if key in comparable(copy)}
    assert len({cell for cell, _ in comparable(copy)}) == 2
    for cell in (copy / "cells").iterdir():
        assert read_folder(cell / "artifact").digest == read_folder(finished / "cells" / cell.name / "artifact").digest


def test_a_bucket_that_is_not_there_is_refused_before_anything_runs(
    object_store: Callable[[str], str], tmp_path: Path
) -> None:
    suite = str(write(tmp_path / "suite.yaml", QUICK))
    refused = CliRunner().invoke(main, ["benchmark", suite, "--out", object_store("nowhere/x")])
    assert refused.exit_code == 1
    assert re.match(r"Error: s3://nowhere/x/\S+: cannot be written \(.*\); .*change --out\n$", refused.output)


def test_a_training_goes_on_from_the_checkpoint_in_the_bucket(
    suite: Plan, finished: Path, object_store: Callable[[str], str], tmp_path: Path
) -> None:
    """Of a node that is lost nothing is left but what was put; the next one has the same weights in the end."""
    place = object_store(f"store/{tmp_path.name}")
    training = next(iter(suite.trainings.values()))
    every = training.config.override({"training.checkpoint_every": 2, "training.log_every": 1})
    slow = replace(training, config=every)
    write_shards(suite.shards[training.shards], Storage.of(place).child(f"shards/{training.shards}").uri)
    shards = Storage.of(place).child(f"shards/{training.shards}").uri

    class Lost(BaseException):
        pass

    def lose() -> None:
        mirror.put()
        if list(mirror.folder.glob("trainings/*/checkpoints/step-00000004/manifest.json")):
            raise Lost

    mirror = Mirror(Storage.of(place), tmp_path)
    with pytest.raises(Lost):
        run_training(slow, mirror.folder, shards=shards, keep=lose)
    with on_node(place, f"trainings/{training.key}") as there:
        run_training(slow, there.folder, shards=shards, keep=there.put_now_and_then)
        lines = list(read_metrics(there.folder / "trainings" / training.key))
        assert [line["step"] for line in lines if line.get("resumed")] == [4]
        mine = there.folder / "trainings" / training.key / "artifact" / "weights.safetensors"
        alone = finished / "trainings" / training.key / "artifact" / "weights.safetensors"
        assert mine.read_bytes() == alone.read_bytes()
    assert Storage.of(place).exists(f"trainings/{training.key}/training_seconds.json")


def test_a_method_is_distilled_and_measured_beside_its_teacher(tmp_path: Path) -> None:
    scoring = {"name": "denoising_error", "num_inference_steps": 4, "blur": 0.5}
    methods = {
        "ten": {"training": "unet", "scoring": scoring},
        "student": {"training": "unet", "scoring": scoring, "distil": {"num_steps": 4, "warmup_steps": 0}},
    }
    changes = {"methods": methods, "datasets": {"digits": {}}}
    suite, out = plan(write(tmp_path / "suite.yaml", QUICK | changes)), tmp_path / "out"
    result = run_benchmark(suite, out)
    assert not result.failed
    ten, student = (next(row for row in rows_of(out).values() if row.detector == name) for name in methods)
    assert (ten.num_evaluations, student.num_evaluations) == (4, 1)
    assert student.training_seconds is not None
    assert ten.training_seconds is not None
    assert student.training_seconds > ten.training_seconds
    assert run_benchmark(suite, out).num_before == 2
    refused = {"student": {"training": "unet", "scoring": scoring | {"num_inference_steps": 1}, "distil": {}}}
    with pytest.raises(ConfigError, match=r"methods\.student .*needs one network evaluation per score already"):
        run_benchmark(plan(write(tmp_path / "other.yaml", QUICK | changes | {"methods": refused})), tmp_path / "other")


def test_methods_share_a_network_and_those_with_the_same_head_share_that(tmp_path: Path) -> None:
    head = {"name": "discriminative", "num_steps": 4, "num_anomalies": 8, "num_fit_images": 8, "width": 8, "start": 0.3}
    scorings = {"head": head | {"combine": "head"}, "both": head | {"blur": 0.5}, "other": head | {"sees": "image"}}
    methods = {name: {"training": "unet", "scoring": scoring} for name, scoring in scorings.items()}
    changes = {"methods": methods, "datasets": {"digits": {}}}
    suite, out = plan(write(tmp_path / "suite.yaml", QUICK | changes)), tmp_path / "out"
    result = run_benchmark(suite, out)
    assert not result.failed
    (training,) = suite.trainings
    assert len(list((out / "trainings" / training / "heads").iterdir())) == 2
    folders = {cell.method: read_folder(out / "cells" / cell.cell_id / "artifact") for cell in suite.cells}
    weights = {name: folder.tensors("weights.safetensors") for name, folder in folders.items()}
    first = "scorer.head.enter.weight"
    assert torch.equal(weights["head"][first], weights["both"][first])
    assert weights["other"][first].shape != weights["both"][first].shape
    network = json.loads((out / "trainings" / training / "training_seconds.json").read_text())["seconds"]
    seconds = {row.detector: row.training_seconds for row in rows_of(out).values() if row.subset_kind == "all"}
    assert seconds["head"] == seconds["both"]
    assert all(took > network for took in seconds.values())


def test_a_student_of_a_run_with_folds_is_refused_before_anything_runs(tmp_path: Path) -> None:
    scoring = {"name": "denoising_error", "num_inference_steps": 4}
    for changes, message in (
        ({"contamination": {"max_share": 0.1}}, "set contamination.max_share to 0"),
        ({"data": {"calibration_fraction": 0}}, "data.calibration_fraction is 0"),
    ):
        student = {"training": "unet", "scoring": scoring, "distil": {}}
        found = QUICK | {
            "methods": {"student": student}, "datasets": {"digits": {}},
            "trainings": {"unet": QUICK["trainings"]["unet"] | changes},
        }  # fmt: skip
        with pytest.raises(ConfigError, match=rf"methods\.student on datasets\.digits: .*{message}"):
            run_benchmark(plan(write(tmp_path / "suite.yaml", found)), tmp_path / "out")
