"""Compiled detectors: one graph per network whatever the batch, the same scores, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from raydiff.compiling import compiled
from raydiff.config import ExperimentConfig, component_options
from raydiff.detector import BaselineDetector, DiffusionDetector
from raydiff.errors import ConfigError, RaydiffError
from raydiff.service import ScoringService
from raydiff.testing import small_images

SPACES: dict[str, dict[str, Any]] = {
    "pixel": {},
    "latent": {"factor": 2, "latent_channels": 4, "width": 8, "num_steps": 3, "batch_size": 4},
    "rotnet": {"factor": 4, "width": 8, "num_steps": 3, "batch_size": 4, "num_components": 8},
}


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    """Dynamo remembers what it compiled for as long as the process lives."""
    torch._dynamo.reset()


def detector_in(space: str, config: ExperimentConfig, denoiser: str = "convnet") -> DiffusionDetector:
    fields = {"space": {"name": space, **SPACES[space]}, "denoiser": {"name": denoiser}}
    if denoiser == "convnet":
        fields["denoiser"] |= {"width": 16, "num_blocks": 2, "kernel_size": 1}
    detector = DiffusionDetector.create(config.override(fields), num_classes=1)
    if detector.space.num_fit_images:
        detector.space.fit(small_images(16))
    return detector.calibrate(small_images(16))


@pytest.mark.parametrize(("space", "networks"), [("pixel", 1), ("latent", 2), ("rotnet", 2)])
def test_each_network_is_one_graph_for_batches_of_any_size(
    tiny_config: ExperimentConfig, space: str, networks: int
) -> None:
    """No break in a graph, and nothing compiled again: shapes are stable."""
    graphs: list[fx.GraphModule] = []

    def counted(graph: fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    detector = detector_in(space, tiny_config)
    quick = compiled(detector, backend=counted)
    for count in (1, 3, 16, 17):
        images = small_images(count, seed=count)
        assert torch.equal(quick.score(images).image, detector.score(images).image)
    assert len(graphs) == networks


def test_the_artefact_is_the_same(tiny_config: ExperimentConfig, tmp_path: Path) -> None:
    detector = detector_in("rotnet", tiny_config)
    first = detector.save(tmp_path / "first")
    second = compiled(detector, backend="eager").save(tmp_path / "second")
    assert first.artifact_digest == second.artifact_digest


def test_a_process_that_had_many_artefacts_still_compiles(
    tiny_config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch gives up after eight of a class, with a warning; here there are more, and then an error."""
    graphs: list[fx.GraphModule] = []

    def counted(graph: fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    def artefact(width: int) -> DiffusionDetector:
        denoiser = {"name": "convnet", "width": width, "num_blocks": 1, "kernel_size": 1}
        return DiffusionDetector.create(tiny_config.override({"denoiser": denoiser}), num_classes=1)

    for number in range(1, 11):
        compiled(artefact(4 * number).calibrate(small_images(8)), backend=counted)
    assert len(graphs) == 10
    monkeypatch.setattr("raydiff.compiling._MOST_SHAPES", 10)
    with pytest.raises(ConfigError, match=r"cannot be compiled here .*leave --compile out"):
        compiled(artefact(64).calibrate(small_images(8)), backend=counted)


@pytest.mark.slow
@pytest.mark.parametrize("denoiser", ["convnet", "dit", "unet"])
def test_scores_agree_to_rounding(tiny_config: ExperimentConfig, denoiser: str) -> None:
    detector = detector_in("pixel", tiny_config, denoiser)
    images = small_images(20, seed=3)
    found, expected = compiled(detector).score(images).image, detector.score(images).image
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_an_endpoint_compiles_before_it_answers(tiny_config: ExperimentConfig, tmp_path: Path) -> None:
    detector = detector_in("pixel", tiny_config).save(tmp_path / "artifact")
    service = ScoringService(tmp_path / "artifact", compile=True, max_batch=4)
    assert service.artifact_id == detector.artifact_digest
    assert type(service._roll.lineup.live.detector.network).__name__ == "_Compiled"  # type: ignore[attr-defined]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_gives_the_networks_results_from_any_thread(tiny_config: ExperimentConfig) -> None:
    from concurrent.futures import ThreadPoolExecutor

    detector = replace(detector_in("rotnet", tiny_config), device="cuda")
    detector.network.to("cuda")
    quick = compiled(detector)
    batches = [small_images(count, seed=count) for count in (1, 3, 16, 17)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda images: quick.score(images).image, batches))
    for images, scores in zip(batches, found, strict=True):
        torch.testing.assert_close(scores, detector.score(images).image, rtol=1e-3, atol=1e-4)


def test_what_is_refused(tiny_config: ExperimentConfig) -> None:
    baseline = BaselineDetector.fit(tiny_config, component_options("baselines", "knn"), small_images(20))
    with pytest.raises(ConfigError, match=r"^knn: only diffusion models are compiled; leave --compile out"):
        compiled(baseline)

    def wrong(graph: fx.GraphModule, _: list[Tensor]) -> Any:
        return lambda *arguments: [1.5 * part for part in graph.forward(*arguments)]

    with pytest.raises(RaydiffError, match=r"compiled it scores \S+ otherwise, more than 0.0001"):
        compiled(detector_in("latent", tiny_config), backend=wrong)

    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler")

    with pytest.raises(ConfigError, match=r"cannot be compiled here \(.*no compiler.*leave --compile out"):
        compiled(detector_in("pixel", tiny_config), backend=broken)
