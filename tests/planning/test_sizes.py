from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from raydiff.config import ExperimentConfig
from raydiff.detector import DiffusionDetector
from raydiff.planning import sizes
from raydiff.planning.measuring import measure_graph
from raydiff.planning.profile import Line, Profile
from raydiff.planning.sizes import DeviceMemory, HostMemory, Network, device_memory, host_memory, network, storage
from raydiff.planning.speed import step
from tests.planning.conftest import STUDENT, run_on, target, with_images

NETWORKS: dict[str, dict[str, Any]] = {
    "unet": {"denoiser.name": "unet", "denoiser.block_out_channels": [8, 16]},
    "dit": {"denoiser.name": "dit", "denoiser.hidden_size": 32, "denoiser.num_heads": 2},
    "convnet": {"denoiser.name": "convnet", "denoiser.width": 16},
    "unet in bfloat16": {"denoiser.block_out_channels": [8, 16], "training.precision": "bfloat16"},
}


def device(profile: Profile, workers: int = 1, **options: Any) -> DeviceMemory:
    return device_memory(profile, run_on(profile, workers), target(profile, workers=workers, **options))


def test_what_stays_is_what_a_step_leaves_behind(round_profile: Profile) -> None:
    """Weights, gradients, AdamW's state and the average, counted on a real network after a real step."""
    network = torch.nn.Linear(100, 200)
    average = AveragedModel(network)
    optimiser = torch.optim.AdamW(network.parameters())
    network(torch.zeros(2, 100)).sum().backward()
    optimiser.step()
    moments = [v for values in optimiser.state.values() for v in values.values() if v.numel() > 1]
    tensors = [*network.parameters(), *(p.grad for p in network.parameters()), *average.module.parameters(), *moments]
    counted = sum(t.numel() * t.element_size() for t in tensors)
    found = device(replace(round_profile, num_parameters=sum(p.numel() for p in network.parameters())))
    assert found.total - found.activations == counted


def test_more_workers_keep_buckets_and_gpus_more(round_profile: Profile) -> None:
    assert device(round_profile, 2).buckets == 4e6
    on_gpu = device(round_profile, gpus=1, gpu_type="t4")
    assert (on_gpu.temporary, on_gpu.context) == (4e6, 0.6e9)


def test_a_student_has_its_teacher_beside_it(round_profile: Profile) -> None:
    """On a CPU with the space that it was loaded with; on a GPU that space stays where it is."""
    profile = replace(round_profile, space_bytes=1000)
    for options, more in (({}, 4e6 + 1000), ({"gpus": 1, "gpu_type": "t4"}, 4e6)):
        goal = target(profile, **options)
        alone, taught = (device_memory(profile, run_on(profile, 1, **fields), goal) for fields in ({}, STUDENT))
        assert taught.total == alone.total + more
        assert taught.teacher == more


@pytest.mark.parametrize("name", NETWORKS)
def test_activations_of_two_batches_foretell_a_larger_one(name: str) -> None:
    config = ExperimentConfig().override(NETWORKS[name])
    detector = DiffusionDetector.create(config, num_classes=1)
    kept = {rows: measure_graph(detector, rows).saved_bytes for rows in (2, 3)}
    assert Line.through(kept).at(16) == pytest.approx(measure_graph(detector, 16).saved_bytes, rel=0.01)
    assert kept[2] > 2 * 64 * 4 * 8  # more than a few copies of the images


def test_weights_are_no_activations() -> None:
    """A product y = x w keeps x for the gradient of w, and nothing of w: 2 rows of 64 numbers."""
    detector = DiffusionDetector.create(ExperimentConfig().override(NETWORKS["convnet"]), num_classes=1)
    layer = torch.nn.Conv2d(1, 1, 1, bias=False)

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
            return self.layer(x)  # type: ignore[no-any-return]

    graph = measure_graph(replace(detector, network=Wrapped()), 2)
    assert graph.saved_bytes == 2 * (2 * 64 * 4)  # x for the layer, its output for the square
    assert graph.forward_flops == 2 * 64  # a multiplication and an addition per pixel
    assert graph.flops == {"convolution": 2 * 2 * 64, "matmul": 0.0}  # no gradient of the images


def host(profile: Profile, workers: int, **fields: Any) -> HostMemory:
    run = run_on(profile, workers, **fields)
    goal = target(profile, workers=workers)
    return host_memory(profile, run, goal, device_memory(profile, run, goal))


def test_images_are_held_by_every_worker_or_streamed(round_profile: Profile) -> None:
    assert host(round_profile, 2).images == 2 * 60_000 * 64
    assert host(round_profile, 2).object_store == 0
    streamed = host(round_profile, 2, data__cache_mb=0)
    assert streamed.images == 2 * 2 * (4096 / 2 + 41) * 100_000
    assert streamed.object_store > 0


def test_a_space_is_fitted_before_the_workers_hold_anything(round_profile: Profile) -> None:
    feature = {"name": "feature", "num_fit_images": 100}
    before = host(round_profile, 2)
    assert before.fitting == 0
    few = host(replace(round_profile, space_fit_bytes=1000), 2, space=feature)
    assert few.fitting == 1000 + 5 * 100 * 64
    assert few.total == before.total
    much = host(replace(round_profile, space_fit_bytes=10**12), 2, space=feature)
    assert much.total == pytest.approx(before.processes + before.ray + 10**12, rel=1e-6)


def test_a_student_fits_no_space(round_profile: Profile) -> None:
    feature = {"name": "feature", "num_fit_images": 100}
    assert host(replace(round_profile, space_fit_bytes=10**12), 1, space=feature, **STUDENT).fitting == 0


def test_calibration_holds_the_evidence_of_all_that_it_scores(round_profile: Profile) -> None:
    """As float32 twice, without a fold once more, and that in float64; when the workers hold nothing any more."""
    found = host(round_profile, 2)
    assert found.calibrating == 24 * 20_000 * 8 * 64
    assert found.total == found.processes + found.ray + found.calibrating
    limited = host(round_profile, 2, calibration__max_images=100)
    assert limited.calibrating == 24 * 100 * 8 * 64
    training = limited.images + limited.latents + limited.networks + limited.object_store
    assert limited.total == limited.processes + limited.ray + training
    suspicious = {"contamination__max_share": 0.1, "calibration__max_images": 100}
    assert host(round_profile, 2, **suspicious).calibrating == 24 * 60_000 * 8 * 64


def test_streaming_is_bounded_whatever_the_number_of_images(round_profile: Profile) -> None:
    more = with_images(round_profile, num_train=10**9)
    assert host(more, 2, data__cache_mb=0) == host(round_profile, 2, data__cache_mb=0)


def test_the_constants_are_those_of_the_stream() -> None:
    data = pytest.importorskip("raydiff.distributed.data")
    assert (sizes._READ_AHEAD, sizes._BUFFERED, sizes._CHUNK_BYTES) == (
        data.READ_AHEAD, data._BUFFERED, data.CHUNK_BYTES,
    )  # fmt: skip


def traffic(profile: Profile, workers: int, **fields: Any) -> Network:
    run, goal = run_on(profile, workers, **fields), target(profile, workers=workers, nodes=workers)
    return network(profile, run, goal, step(profile, run, goal))


def test_storage_counts_all_splits_and_the_checkpoint_being_written(round_profile: Profile) -> None:
    found = storage(round_profile, run_on(round_profile, 1, training__keep_checkpoints=3))
    assert found.shards == 100_000 * 100_000
    assert found.checkpoints == 4 * 16_000_000
    raw = storage(round_profile, run_on(round_profile, 1, data__shard_format="raw"))
    assert raw.shards == 100_000 * 64


def test_traffic_of_shards_and_gradients(round_profile: Profile) -> None:
    held = traffic(round_profile, 4)
    assert held.gradients == 2 * 3 / 4 * 4e6
    assert (held.shards_read, held.shards_at_start, held.shards_per_s) == (4 * 6e9, 6e9, 0.0)
    alone = traffic(round_profile, 1, data__cache_mb=0, training__num_steps=60_000 // 64)
    assert alone.amplification == 1
    assert alone.shards_read == pytest.approx(6e9, rel=0.01)  # one epoch, read once
    assert alone.groups_per_s == pytest.approx(alone.shards_per_s / (41 * 100_000))
    many = traffic(round_profile, 64, data__cache_mb=0)
    assert 25 < many.amplification < 41  # at most the images of a row group, which 64 workers nearly reach
