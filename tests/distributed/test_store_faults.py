"""Benchmarks, sweeps and batch scoring on nodes that share no folder, while nodes are lost, killed and held up.

Every node has scratch and cache folders of its own, which go with it; all that is kept lies in a bucket.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
import yaml
from optuna.trial import TrialState
from ray.cluster_utils import Cluster

from raydiff.batch import score_files
from raydiff.batch.plan import read_scores
from raydiff.benchmark import plan, run_benchmark
from raydiff.detector import load_detector
from raydiff.results import read_results
from raydiff.storage import Storage
from raydiff.sweep_records import read_final, read_settings, read_trainings
from raydiff.tracking import read_metrics
from tests.object_store import Store
from tests.test_suite import TINY, write

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

HEALTH = {
    "health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_timeout_ms": 10_000,
    "health_check_failure_threshold": 5,
}  # fmt: skip
"""A node that is gone refuses at once; one on a busy machine may take its time."""
TRAINING = {"num_steps": 300, "batch_size": 16, "checkpoint_every": 20, "log_every": 10, "validate_every": 20}
SUITE = TINY | {
    "base": TINY["base"] | {"training": TRAINING},
    "methods": {name: TINY["methods"][name] for name in ("errors", "near")},
    "cost": {"batch_sizes": [1], "num_images": 2},
}
CONFIG = {
    "data": {"dataset": {"name": "digits", "normal": ["8"]}, "image_size": [8, 8], "channels": 1},
    "denoiser": {"name": "convnet", "width": 8, "num_blocks": 1},
    "training": {**TRAINING, "num_steps": 500},
    "scoring": {"name": "denoising_error", "num_inference_steps": 2, "blur": 0},
}
SPACE = {
    "title": "tiny",
    "parameters": {
        "training.learning_rate": {"float": [1e-4, 1e-2], "log": True},
        "scoring.num_inference_steps": {"int": [1, 4]},
    },
    "trials": 4,
    "settings_per_training": 3,
    "around": {"values": 2, "seeds": [1]},
    "refit_seeds": [100],
}


@dataclass
class Nodes:
    """A head that computes nothing and nodes of one CPU, each with a disk of its own."""

    cluster: Cluster
    root: Path
    alive: list[Any] = field(default_factory=list)
    count: int = 0

    def fill(self, size: int = 2) -> None:
        """In the main thread: Ray wants that."""
        for node in [node for node in self.alive if node.all_processes["raylet"][0].process.poll() is not None]:
            self.lose(node)
        while len(self.alive) < size:
            disk = self.root / f"node-{self.count}"
            (disk / "tmp").mkdir(parents=True)
            own = {"TMPDIR": str(disk / "tmp"), "XDG_CACHE_HOME": str(disk / "cache")}
            node = self.cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20, env_vars=own)
            node.disk = disk
            self.alive.append(node)
            self.count += 1
        self.cluster.wait_for_nodes()

    def lose(self, node: Any) -> None:
        """With all its processes at once, and its disk."""
        self.alive.remove(node)
        workers = psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True)
        self.cluster.remove_node(node, allow_graceful=False)
        for worker in workers:  # they would end by themselves soon, and meanwhile tell that their disk has gone
            with suppress(psutil.Error):
                worker.kill()
        psutil.wait_procs(workers, timeout=10)
        shutil.rmtree(node.disk, ignore_errors=True)

    def workers(self, node: Any) -> list[int]:
        """Processes of a node that run something of ours."""
        raylet = node.all_processes["raylet"][0].process.pid
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
                title = (place / "cmdline").read_text()
                if parent == raylet and title.startswith("ray::") and not title.startswith("ray::IDLE"):
                    found.append(int(place.name))
        return found


@pytest.fixture(scope="module")
def all_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    head = {"num_cpus": 0, "object_store_memory": 100 * 2**20, "_system_config": HEALTH}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield Nodes(made, tmp_path_factory.mktemp("disks"))
    finally:
        made.shutdown()


@pytest.fixture
def nodes(all_nodes: Nodes) -> Nodes:
    all_nodes.fill()
    return all_nodes


@contextmanager
def command(nodes: Nodes, *arguments: str) -> Iterator[Callable[[], str]]:
    """``raydiff`` on the cluster: call it to wait for the end, and get what was said."""
    environment = os.environ | {"RAY_ADDRESS": nodes.cluster.address}
    with subprocess.Popen(
        [sys.executable, "-m", "raydiff", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=environment,
    ) as process:  # fmt: skip

        def ended() -> str:
            said, _ = process.communicate(timeout=400)
            assert process.returncode == 0, said
            return said

        try:
            yield ended
        finally:
            process.kill()


def until(condition: Callable[[], object], seconds: float = 200) -> Any:
    start = time.monotonic()
    while not (found := condition()):
        assert time.monotonic() - start < seconds
        time.sleep(0.1)
    return found


def having(store: Storage, part: str) -> list[str]:
    return [name for name in store.files() if part in name]


def check_rows(copy: Path, suite: Path, tmp_path: Path) -> None:
    """Every row of a run that nothing disturbed, once."""
    alone = tmp_path / "alone"
    assert not run_benchmark(plan(suite), alone).failed
    rows = [(row.cell, row.subset) for row in read_results(copy / "results.jsonl")]
    lines = (copy / "results.jsonl").read_text().splitlines()
    assert len(lines) == len(rows), "none doubled"
    expected = {(row.cell, row.subset): row.comparable() for row in read_results(alone / "results.jsonl")}
    assert {(row.cell, row.subset): row.comparable() for row in read_results(copy / "results.jsonl")} == expected


@pytest.mark.slow
def test_a_benchmark_goes_on_without_a_node_from_what_it_had_put(
    nodes: Nodes, object_store: Callable[[str], str], tmp_path: Path
) -> None:
    suite, place = write(tmp_path / "suite.yaml", SUITE), object_store(f"store/{tmp_path.name}")
    store = Storage.of(place)
    with command(nodes, "benchmark", str(suite), "--out", place) as ended:
        until(lambda: len({name.split("/")[1] for name in having(store, "/checkpoints/")}) == 2)
        nodes.lose(nodes.alive[-1])
        lost = time.monotonic()
        until(lambda: any(b'"resumed": true' in store.read(name) for name in having(store, "metrics.jsonl")))
        print(f"a node was lost; its training went on elsewhere after {time.monotonic() - lost:.1f} s")
        said = ended()
    assert "4 cells run now, 0 were done before" in said
    copy = store.fetch(tmp_path / "copy")
    resumed = [line for run in (copy / "trainings").iterdir() for line in read_metrics(run) if line.get("resumed")]
    assert len(resumed) == 1
    print(f"{resumed[0]['images_repeated']} images were repeated, from step {resumed[0]['step']} on")
    check_rows(copy, suite, tmp_path)


@pytest.mark.slow
def test_a_killed_worker_of_a_benchmark_costs_its_task_a_second_try(
    nodes: Nodes, object_store: Callable[[str], str], tmp_path: Path
) -> None:
    suite, place = write(tmp_path / "suite.yaml", SUITE), object_store(f"store/{tmp_path.name}")
    store = Storage.of(place)
    with command(nodes, "benchmark", str(suite), "--out", place) as ended:
        until(lambda: having(store, "/checkpoints/"))
        victims = until(lambda: nodes.workers(nodes.alive[0]))
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        ended()
    check_rows(store.fetch(tmp_path / "copy"), suite, tmp_path)


@pytest.mark.slow
def test_a_benchmark_goes_on_from_another_machine_after_kill_minus_nine(
    nodes: Nodes, object_store: Callable[[str], str], tmp_path: Path
) -> None:
    suite, place = write(tmp_path / "suite.yaml", SUITE), object_store(f"store/{tmp_path.name}")
    store = Storage.of(place)
    arguments = ["benchmark", str(suite), "--out", place]
    with command(nodes, *arguments) as ended:
        until(lambda: store.exists("results.jsonl"))
    before = store.fetch(tmp_path / "before")
    done = {row.cell for row in read_results(before / "results.jsonl")}
    with command(nodes, *arguments) as ended:
        said = ended()
    assert f"{4 - len(done)} cells run now, {len(done)} were done before" in said
    check_rows(store.fetch(tmp_path / "copy"), suite, tmp_path)


@pytest.mark.slow
def test_a_slow_node_holds_up_its_own_tasks_alone(
    nodes: Nodes, object_store: Callable[[str], str], tmp_path: Path
) -> None:
    quick = SUITE | {"methods": {name: TINY["methods"][name] for name in ("errors", "near", "OCSVM")}}
    suite, place = write(tmp_path / "suite.yaml", quick), object_store(f"store/{tmp_path.name}")
    store = Storage.of(place)
    with command(nodes, "benchmark", str(suite), "--out", place) as ended:
        until(lambda: len({name.split("/")[1] for name in having(store, "/checkpoints/")}) == 2)
        held = nodes.workers(nodes.alive[0])
        before = len(having(store, "cells/"))
        for pid in held:
            os.kill(pid, signal.SIGSTOP)
        try:
            until(lambda: len(having(store, "results.jsonl")) and len(having(store, "cells/")) > before)
            rows = store.read("results.jsonl").count(b"\n")
        finally:
            for pid in held:
                os.kill(pid, signal.SIGCONT)
        assert rows
        ended()
    check_rows(store.fetch(tmp_path / "copy"), suite, tmp_path)


def sweep_arguments(tmp_path: Path, place: str) -> list[str]:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(SPACE))
    return ["sweep", str(tmp_path / "space.yaml"), "--config", str(tmp_path / "config.yaml"), "--out", place]


def check_sweep(copy: Path) -> None:
    """Every trial complete, every setting of it there once, the winner refitted."""
    study = optuna.load_study(study_name="space", storage=f"sqlite:///{copy / 'study.db'}")
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 4
    settings = [row for row in read_settings(copy) if row.phase == "search"]
    for trial in study.trials:
        own = [row for row in settings if row.training == trial.user_attrs["key"]]
        assert trial.value == max(row.values["selection_auroc"] for row in own)
        assert len(own) == trial.user_attrs["num_settings"]
    texts = [json.dumps([row.training, dict(row.params)], sort_keys=True) for row in settings]
    assert max(Counter(texts).values()) == 1
    assert {row.state for row in read_trainings(copy)} == {"complete"}
    final = read_final(copy)
    assert final is not None
    assert [len(final.winner), len(final.start)] == [1, 1]
    assert final.winner[0].test["auroc"] > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("what", ["benchmark", "sweep"])
def test_a_store_that_is_away_for_a_minute_is_waited_for(nodes: Nodes, tmp_path: Path, what: str) -> None:
    server = Store(tmp_path)
    try:
        place = server.uri(f"store/{what}")
        store = Storage.of(place)
        suite = write(tmp_path / "suite.yaml", SUITE)
        arguments = sweep_arguments(tmp_path, place) if what == "sweep" else ["benchmark", str(suite), "--out", place]
        with command(nodes, *arguments) as ended:
            until(lambda: having(store, "/checkpoints/"))
            server.kill()
            time.sleep(60)
            server.start()
            ended()
        copy = store.fetch(tmp_path / "copy")
    finally:
        server.kill()
    if what == "sweep":
        check_sweep(copy)
    else:
        check_rows(copy, suite, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["a node is lost", "a worker is killed", "a node is slow"])
def test_a_sweep_goes_on(nodes: Nodes, object_store: Callable[[str], str], tmp_path: Path, fault: str) -> None:
    place = object_store(f"store/{tmp_path.name}")
    store = Storage.of(place)
    held: list[int] = []
    with command(nodes, *sweep_arguments(tmp_path, place)) as ended:
        until(lambda: len({name.split("/")[1] for name in having(store, "/checkpoints/")}) == 2)
        if fault == "a node is lost":
            nodes.lose(nodes.alive[-1])
        else:
            held = nodes.workers(nodes.alive[0])
            assert held
            for pid in held:
                os.kill(pid, signal.SIGKILL if "killed" in fault else signal.SIGSTOP)
        if fault == "a node is slow":
            trained = len(having(store, "/artifact/manifest.json"))
            until(lambda: len(having(store, "/artifact/manifest.json")) > trained)
            for pid in held:
                os.kill(pid, signal.SIGCONT)
        said = ended()
    assert f"winner: s3://store/{tmp_path.name}/winner.yaml" in said
    copy = store.fetch(tmp_path / "copy")
    assert not having(store, "/checkpoints/")
    assert not [name for name in store.files() if b"secret" in store.read(name)]
    check_sweep(copy)


@pytest.mark.slow
def test_a_sweep_goes_on_from_another_machine_after_kill_minus_nine(
    nodes: Nodes, object_store: Callable[[str], str], tmp_path: Path
) -> None:
    place = object_store(f"store/{tmp_path.name}")
    store = Storage.of(place)
    arguments = sweep_arguments(tmp_path, place)
    environment = os.environ | {"RAY_ADDRESS": nodes.cluster.address}
    with subprocess.Popen(
        [sys.executable, "-m", "raydiff", *arguments], stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("[2/4]"):
                break
        process.kill()
    done = store.fetch(tmp_path / "before")
    before = optuna.load_study(study_name="space", storage=f"sqlite:///{done / 'study.db'}")
    kept = {trial.number: trial.value for trial in before.trials if trial.state == TrialState.COMPLETE}
    assert len(kept) >= 2
    with command(nodes, *arguments, "--status") as ended:
        assert f"{len(kept)} complete" in ended()
    with command(nodes, *arguments) as ended:
        ended()
    copy = store.fetch(tmp_path / "copy")
    check_sweep(copy)
    after = optuna.load_study(study_name="space", storage=f"sqlite:///{copy / 'study.db'}")
    assert {number: after.trials[number].value for number in kept} == kept


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["a node is lost", "a node is slow"])
def test_batch_scoring_goes_on(
    nodes: Nodes, object_store: Callable[[str], str], tmp_path: Path, run_dir: Path, digit_images: Any, fault: str
) -> None:
    from raydiff.images import encode_png, to_uint8

    images = tmp_path / "images"
    images.mkdir()
    for i, pixels in enumerate(to_uint8(digit_images)):
        for number in range(20):
            (images / f"{number:02d}-{i:02d}.png").write_bytes(encode_png(pixels))
    score_files(load_detector(run_dir / "artifact"), [images], tmp_path / "alone.jsonl")
    place = object_store(f"store/{tmp_path.name}")
    store = Storage.of(place)
    with command(nodes, "score", str(run_dir), str(images), "--out", place, "--images-per-part", "2") as ended:
        until(lambda: len(having(store, "part-")) > 4)
        held = nodes.workers(nodes.alive[0])
        if fault == "a node is lost":
            nodes.lose(nodes.alive[0])
        else:
            for pid in held:
                os.kill(pid, signal.SIGSTOP)
            time.sleep(20)  # whether the others go on meanwhile is Ray Data's to say: here they did not
            for pid in held:
                os.kill(pid, signal.SIGCONT)
        ended()
    expected = [json.loads(line) for line in (tmp_path / "alone.jsonl").read_text().splitlines()]
    assert read_scores(place).to_pylist() == expected
