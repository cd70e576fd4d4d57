"""The same rows on Ray as in one process; shares that nobody can give are refused before anything runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray.exceptions import OutOfMemoryError

from raydiff.benchmark import finished_cells, plan, run_benchmark
from raydiff.distributed.benchmark import RayWorkers, failure_of
from raydiff.errors import ConfigError
from raydiff.results import read_results
from raydiff.suite import Resources
from raydiff.tasks import Task
from tests.test_suite import TINY, write

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

QUICK = TINY | {"cost": {"batch_sizes": [1], "num_images": 2}}


def comparable(out: Path) -> dict[tuple[str | None, str], dict[str, object]]:
    return {(row.cell, row.subset): row.comparable() for row in read_results(out / "results.jsonl")}


@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_give_the_rows_of_one_process(tmp_path: Path) -> None:
    methods = {name: QUICK["methods"][name] for name in ("errors", "OCSVM")}
    found = plan(write(tmp_path / "suite.yaml", QUICK | {"methods": methods}))
    alone, spread = tmp_path / "alone", tmp_path / "spread"
    assert not run_benchmark(found, alone).failed
    backwards = found.of(list(reversed(found.cells)))
    result = run_benchmark(backwards, spread, lambda tasks: RayWorkers(tasks, num_workers=2))
    assert not result.failed
    assert len(result.finished) == 4
    expected, given = comparable(alone), comparable(spread)
    assert given.keys() == expected.keys()
    for key, row in expected.items():
        assert given[key] == row


@pytest.mark.usefixtures("ray_cluster")
def test_a_task_that_fails_on_a_worker_is_reported_with_its_traceback(tmp_path: Path) -> None:
    found = plan(write(tmp_path / "suite.yaml", QUICK | {"methods": {"near": {"baseline": "knn"}}})).only("*/0/0")
    out = tmp_path / "out"
    run_benchmark(found, out)
    shards = next((out / "shards").iterdir())
    train = next(shards.glob("train-*.parquet"))
    train.write_bytes(b"\0" * train.stat().st_size)
    (out / "results.jsonl").unlink()
    result = run_benchmark(found, out, RayWorkers)
    assert list(result.failed) == ["near/digits/0/0"]
    failure = result.failed["near/digits/0/0"]
    assert failure.type == "DataError"
    assert train.name in failure.message
    assert "Traceback" in failure.traceback


@pytest.mark.usefixtures("ray_cluster")
def test_a_lost_worker_costs_its_task_a_second_try_and_no_more(tmp_path: Path) -> None:
    def dies_once() -> str:
        marker = tmp_path / "died"
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return "alive"

    task = Task("a", "baseline", "a task", (), Resources(), dies_once)
    workers = RayWorkers([task])
    workers.submit(task)
    outcome = workers.next()
    assert (outcome.value, outcome.failure) == ("alive", None)
    assert (tmp_path / "died").exists()


@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_lost_again_and_again_fails_its_task(tmp_path: Path) -> None:
    def dies() -> None:
        (tmp_path / f"{time.monotonic_ns()}").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    task = Task("a", "baseline", "a task", (), Resources(), dies)
    workers = RayWorkers([task])
    workers.submit(task)
    outcome = workers.next()
    assert outcome.failure is not None
    assert outcome.failure.type == "WorkerCrashedError"
    assert len(list(tmp_path.iterdir())) == 4, "once, and three times again"


@pytest.mark.usefixtures("ray_cluster")
def test_a_task_whose_last_node_is_gone_fails_after_a_while() -> None:
    workers = RayWorkers([], patience_s=2.0)
    workers.submit(Task("gone", "baseline", "gone", (), Resources(num_gpus=64), lambda: 1))
    outcome = workers.next()
    assert outcome.key == "gone"
    assert outcome.failure is not None
    assert "ask for 1 CPU and 64 GPU; none of the cluster's 1 node(s) has so much" in outcome.failure.message


def test_out_of_memory_says_what_to_ask_for() -> None:
    task = Task("a", "baseline", "a task", (), Resources(num_cpus=2), lambda: None)
    failure = failure_of(OutOfMemoryError("Task was killed due to\nthe node running low on memory."), task)
    assert failure.type == "OutOfMemoryError"
    assert failure.message.startswith("ran out of memory with resources.num_cpus 2; ask for more, so that fewer")
    assert "running low on memory" in failure.message


@pytest.mark.usefixtures("ray_cluster")
def test_what_no_node_can_give_is_refused(tmp_path: Path) -> None:
    asks = QUICK | {"resources": {"num_cpus": 1, "num_gpus": 64}}
    found = plan(write(tmp_path / "suite.yaml", asks))
    with pytest.raises(ConfigError, match=r"training unet/digits/0/0: resources ask for 1 CPU and 64 GPU; none of"):
        run_benchmark(found, tmp_path / "out", RayWorkers)
    assert not (tmp_path / "out").exists()


def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(tmp_path: Path) -> None:
    slow = {"unet": TINY["trainings"]["unet"] | {"training": {"num_steps": 100_000, "batch_size": 16}}}
    classic_first = {"methods": {name: QUICK["methods"][name] for name in ("OCSVM", "near", "errors")}}
    all_of_it = {"resources": {"num_cpus": os.cpu_count()}}  # one worker is one task at a time, not one CPU
    path = write(tmp_path / "suite.yaml", QUICK | {"trainings": slow} | classic_first | all_of_it)
    command = [sys.executable, "-m", "raydiff", "benchmark", str(path), "--out", str(tmp_path / "out"),
               "--num-workers", "1"]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    ) as process:
        deadline = time.monotonic() + 200
        while not finished_cells(tmp_path / "out") and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "Interrupted; finished cells are kept. Go on with: raydiff benchmark" in said
    assert "Traceback" not in said
    assert 1 <= len(finished_cells(tmp_path / "out")) < 6
