from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest

from raydiff.planning.profile import Profile
from raydiff.planning.speed import encodings, reading_share, row_group_rows, score_seconds, step
from raydiff.planning.target import Run
from raydiff.shards import TrainingOrder, layout
from raydiff.shards.order import Share
from tests.planning.conftest import STUDENT, run_on, target, with_images


def a_step(profile: Profile, workers: int = 1, fields: dict[str, Any] | None = None, **options: Any) -> Any:
    return step(profile, run_on(profile, workers, **(fields or {})), target(profile, workers=workers, **options))


def test_one_worker_takes_what_was_measured(round_profile: Profile) -> None:
    found = a_step(round_profile, fields={"data__cache_mb": 10**6})
    assert found.seconds == pytest.approx(0.010 + 64 * 0.001)
    assert found.all_reduce == found.decode == found.read == 0


def test_workers_that_share_cores_take_turns(round_profile: Profile) -> None:
    two, three = (a_step(round_profile, workers).compute for workers in (2, 3))
    assert two == pytest.approx((0.010 + 32 * 0.001) * 1.2)  # a core each; what two slow each other counts
    assert three == pytest.approx((0.010 + 22 * 0.001) * 1.2 * 3 / 2)  # and three of them on two cores
    assert a_step(round_profile, 3, cpus=3).compute == pytest.approx(three * 2 / 3)


def test_a_slowdown_that_is_only_shared_cores_is_not_counted_twice(round_profile: Profile) -> None:
    single = replace(round_profile, cores=1, pair=replace(round_profile.pair, slowdown=2.0))  # type: ignore[type-var]
    assert a_step(single, 2, cpus=1).slowdown == pytest.approx(2.0)
    assert a_step(single, 2, cpus=2).slowdown == pytest.approx(1.0)


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_the_ring_sends_two_shares_less_one(round_profile: Profile, workers: int) -> None:
    """A million weights: 4 MB; the profile's sums take 1 ms and 1 ns a byte where 2 (W - 1) / W is 1."""
    found = a_step(round_profile, workers, cpus=workers)
    assert found.all_reduce == pytest.approx((workers - 1) * 0.001 + 2 * (workers - 1) / workers * 4e6 * 1e-9)
    assert found.exposed == found.all_reduce  # the cores that would send are those that compute


def test_gradients_hide_behind_the_backward_pass_of_a_gpu(round_profile: Profile) -> None:
    gpus = {"gpus": 1, "gpu_type": "a100-80gb", "nodes": 2}
    large = replace(round_profile, num_parameters=100_000_000)
    quick, slow = (a_step(large, 2, network_gbit=rate, **gpus) for rate in (1e4, 1.0))
    assert slow.all_reduce == pytest.approx(4e8 / 1.25e8, rel=0.01)
    assert slow.exposed == pytest.approx(slow.all_reduce - 2 / 3 * slow.compute)
    assert quick.exposed == pytest.approx(quick.all_reduce * 25 * 2**20 / 4e8)  # the last bucket


def test_a_gpu_is_arithmetic_and_memory_or_the_start_of_kernels(round_profile: Profile) -> None:
    gpu = {"gpus": 1, "gpu_type": "a100-80gb", "utilisation": 0.5}
    found = a_step(round_profile, fields={"training__batch_size": 1000}, **gpu)
    assert found.arithmetic == pytest.approx(1000 * (2e9 / 156e12 + 1e9 / 19.5e12) / 0.5)
    assert found.memory == pytest.approx((5 * 1000 * 1e6 + 5 * 0.1e6 + 13 * 4e6) / 2.039e12, rel=1e-3)
    assert found.compute == pytest.approx(found.arithmetic + found.memory)
    few = a_step(round_profile, fields={"training__batch_size": 1}, **gpu)
    assert few.compute == few.launch == pytest.approx((400 + 2) * 8e-6)
    fast = a_step(round_profile, fields={"training__batch_size": 1000, "training__precision": "bfloat16"}, **gpu)
    assert fast.arithmetic == pytest.approx(1000 * 3e9 / 312e12 / 0.5)


def test_a_profile_from_a_gpu_is_taken_as_it_is(round_profile: Profile) -> None:
    found = a_step(replace(round_profile, device="cuda", pair=None), 4, gpus=4)
    assert found.compute == pytest.approx(0.010 + 16 * 0.001)
    assert found.launch == 0


def test_decoding_takes_the_cores_that_are_left(round_profile: Profile) -> None:
    """64 images of 2 ms: 0.128 core-seconds a step."""
    streamed = {"data__cache_mb": 0}
    assert a_step(round_profile, fields=streamed, gpus=1, gpu_type="h100", cpus=9).seconds == pytest.approx(0.128 / 8)
    on_cpu = a_step(round_profile, fields=streamed)  # two cores, one of them trains for 74 ms
    assert on_cpu.seconds == pytest.approx((0.128 + 0.074) / 2)
    assert a_step(round_profile, fields=streamed | {"data__shard_format": "raw"}).decode == 0


@pytest.mark.parametrize("workers", [1, 2, 5, 40])
def test_the_share_that_a_worker_reads_is_that_of_the_real_order(round_profile: Profile, workers: int) -> None:
    """Row groups that a worker touches, counted over five epochs of the order that training uses."""
    group, num_groups, batch = 16, 60, 80
    order = TrainingOrder((group,) * num_groups, seed=0, window=group * 20)
    touched = []
    for epoch in range(5):
        for rank in range(workers):
            share = Share(batch, 0, rank, workers)
            rows = np.concatenate([share.of(order, window)[0] for window in order.epoch(epoch)])
            touched.append(len(np.unique(order.locate(rows)[0])) / num_groups)
    expected = reading_share(run_on(round_profile, workers), group)
    assert np.mean(touched) == pytest.approx(expected, rel=0.04)


def test_row_groups_are_those_of_the_shards() -> None:
    assert row_group_rows(1) == layout._MAX_GROUP_ROWS
    assert row_group_rows(100_000) == layout._MAX_GROUP_BYTES // 100_000
    assert row_group_rows(10**8) == 1


@pytest.mark.parametrize(("workers", "fields"), [(1, {}), (4, {}), (4, {"training__horizontal_flip": True})])
def test_a_costly_space_encodes_what_a_worker_meets(
    round_profile: Profile, workers: int, fields: dict[str, Any]
) -> None:
    """Against the real order: different images, each as it is or flipped, that rank 0 meets in the run."""
    profile = with_images(replace(round_profile, costly_space=True), num_train=640)
    run = run_on(profile, workers, training__num_steps=30, **fields)
    order = TrainingOrder((64,) * 10, seed=0, window=640)
    share, met = Share(64, 0, 0, workers), set()
    rng = np.random.default_rng(0)
    for window in islice(order.windows(), 3):
        rows = share.of(order, window)[0]
        flips = rng.integers(0, 2, len(rows)) if fields else np.zeros(len(rows), dtype=int)
        met |= set(zip(rows.tolist(), flips.tolist(), strict=True))
    assert encodings(profile, run) == pytest.approx(len(met), rel=0.05)
    assert encodings(round_profile, run) == 0


def test_without_room_a_costly_space_encodes_every_time(round_profile: Profile) -> None:
    profile = with_images(replace(round_profile, costly_space=True), num_train=640)
    run = run_on(profile, 1, training__num_steps=30, data__cache_mb=0)
    assert encodings(profile, run) == 30 * 64


def test_kept_grids_are_encoded_once_by_all_workers(round_profile: Profile) -> None:
    profile = with_images(replace(round_profile, costly_space=True), num_train=640)
    fields = {"training__horizontal_flip": True, "training__num_steps": 300, "data__cache_mb": 0}
    assert encodings(profile, run_on(profile, 2, data__grids="run", **fields)) == 640
    assert encodings(profile, run_on(profile, 2, **fields)) > 640


def test_scores_on_a_gpu_follow_from_operations(round_profile: Profile) -> None:
    gpu = target(round_profile, gpus=1, gpu_type="a100-80gb", utilisation=0.5)
    run = run_on(round_profile, 1)
    assert score_seconds(round_profile, run, gpu) == pytest.approx(max(8e9 / 9.75e12, 8 * 150 * 8e-6 / 16))
    assert score_seconds(round_profile, run, target(round_profile)) == 0.004


def test_scores_on_a_gpu_encode_every_tile(round_profile: Profile) -> None:
    """16 tiles, one evaluation each: all of them are encoded."""
    costly = replace(round_profile, evaluations=16, forward_flops=1e9, encode_flops=1e11, costly_space=True)
    gpu = target(costly, gpus=1, gpu_type="a100-80gb", utilisation=0.5)
    run = run_on(costly, 1, data__image_size=[32, 32], tiles={"size": [8, 8], "overlap": 0.0})
    assert score_seconds(costly, run, gpu) == pytest.approx(16 * (1e9 + 1e11) / 9.75e12)
    assert score_seconds(costly, run_on(costly, 1), gpu) == pytest.approx((16 * 1e9 + 1e11) / 9.75e12)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_students_step_takes_its_teachers_evaluations(round_profile: Profile, workers: int) -> None:
    """A forward pass is a third of a step, and there are six more."""
    alone, taught = (a_step(round_profile, workers, fields) for fields in ({}, STUDENT))
    assert taught.compute == pytest.approx(alone.compute * (1 + 6 / 3))
    assert taught.teacher == pytest.approx(2 * alone.compute)
    assert alone.teacher == 0


def test_a_teacher_on_a_gpu_is_in_float32_and_hides_no_gradients(round_profile: Profile) -> None:
    gpu = {"gpus": 1, "gpu_type": "a100-80gb", "utilisation": 0.5, "nodes": 2, "network_gbit": 0.1}
    fields = {"training__batch_size": 2000, "training__precision": "bfloat16"}
    alone, taught = (a_step(round_profile, 2, fields | more, **gpu) for more in ({}, STUDENT))
    assert taught.arithmetic - alone.arithmetic == pytest.approx(1000 * 6 * 1e9 / 19.5e12 / 0.5)
    assert taught.memory - alone.memory == pytest.approx(6 * 2 * (1000 * 1e6 + 0.1e6) / 2.039e12)
    assert taught.launch - alone.launch == pytest.approx(6 * 150 * 8e-6)
    assert taught.teacher == pytest.approx(taught.compute - alone.compute)
    assert taught.exposed == alone.exposed


def test_uneven_shares_count_the_largest(round_profile: Profile) -> None:
    run: Run = run_on(round_profile, 3)
    assert (run.rows, run.rows_at_once) == (22, 22)
    assert run_on(round_profile, 3, training__accumulation_steps=4).rows_at_once == 6
