"""Members on one backbone call it once, to the bits that each would give alone; members on others do not."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, fx, nn

from raydiff.backbone import Backbone, BackboneOptions, has_weights, pooled
from raydiff.compiling import compiled
from raydiff.config import ExperimentConfig, component_options
from raydiff.detector import BaselineDetector, Detector, DiffusionDetector, EnsembleDetector, load_detector
from raydiff.detector.ensemble import _seen_by
from raydiff.service.artifacts import load_artifact
from raydiff.testing import small_images

SIZE = (64, 64)
LEVELS: dict[str, dict[str, Any]] = {
    "fine": {"levels": [0, 1], "num_components": 12},
    "deep": {"levels": [1, 3], "num_components": 8, "neighbourhood": 3},
}
Weights = Callable[[str], str]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """A file of a tiny timm network's random weights."""
    import timm

    folder = tmp_path_factory.mktemp("weights")

    def made(name: str) -> str:
        path = folder / f"{name}.safetensors"
        if not path.exists():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(3)
                save_file(timm.create_model(name).state_dict(), path)
        return str(path)

    return made


def member(space: dict[str, Any], seed: int = 0, **fields: Any) -> DiffusionDetector:
    """A detector in the features of a backbone whose denoiser is no longer at its start; not calibrated."""
    config = ExperimentConfig().override(
        {
            "data.image_size": list(SIZE), "data.channels": 3, "objective.prediction_type": "sample", "seed": seed,
            "space": {"name": "feature", "grid": 8, **space},
            "denoiser": {"name": "convnet", "width": 16, "num_blocks": 1},
            "scoring": {"name": "denoising_error", "num_inference_steps": 2, "blur": 0.7},
        }
        | fields
    )  # fmt: skip
    detector = DiffusionDetector.create(config, num_classes=1)
    detector.space.fit(small_images(16, config.model_size, 3))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in detector.network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return detector


def together(*members: Detector, **options: Any) -> EnsembleDetector:
    size = members[0].config.data.image_size
    return EnsembleDetector.create(members, "mean", {}, **options).calibrate(small_images(8, size, 3, seed=1))


@pytest.fixture(scope="module")
def both(weights: Weights) -> EnsembleDetector:
    backbone = {"backbone": "test_efficientnet", "weights": weights("test_efficientnet")}
    return together(*(member({**backbone, **LEVELS[name]}, seed) for seed, name in enumerate(("fine", "deep"))))


@contextmanager
def counted_passes() -> Iterator[list[nn.Module]]:
    """The calls of backbones within."""
    calls: list[nn.Module] = []
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, *_: calls.append(module) if hasattr(module, "out_indices") else None
    )
    try:
        yield calls
    finally:
        hook.remove()


def check(ensemble: EnsembleDetector, images: Tensor, passes: int) -> None:
    """The scores of the members scored apart, bit for bit, in so many calls of a backbone for one image."""
    expected = ensemble.combined([one.score(_seen_by(one, images)) for one in ensemble.members])
    found = ensemble.score(images)
    assert torch.equal(found.image, expected.image)
    assert found.map is not None
    assert expected.map is not None
    assert torch.equal(found.map, expected.map)
    with counted_passes() as calls:
        alone = ensemble.score(images[1:2])
    assert len(calls) == passes
    assert torch.equal(alone.image, found.image[1:2])


@pytest.mark.parametrize("threads", [1, 2])
def test_fine_and_deep_features_are_one_pass(both: EnsembleDetector, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(both, small_images(18, SIZE, 3, seed=2), passes=1)
    finally:
        torch.set_num_threads(before)


def test_with_real_weights() -> None:
    name = "tf_efficientnet_lite2"
    if not has_weights(BackboneOptions(backbone=name)):
        pytest.skip(f"the weights of {name} are not installed")
    fine, deep = {"levels": [1, 2, 3], "num_components": 24}, {"levels": [3, 4], "num_components": 32}
    first = member({"backbone": name, **fine}, 0)
    second = member({"backbone": name, **deep, "neighbourhood": 3}, 1)
    check(together(first, second), small_images(3, SIZE, 3, seed=2), passes=1)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_byobnet"])
def test_a_network_cut_off_later_gives_the_same_earlier_maps(weights: Weights, name: str) -> None:
    size = {"test_vit": (160, 160)}.get(name, SIZE)
    fine, deep = (
        Backbone(BackboneOptions(backbone=name, weights=weights(name), levels=levels)).load()
        for levels in ((0, 1), (2, 3))
    )
    assert deep.covers(fine)
    assert not fine.covers(deep)
    images = small_images(2, size, 3, seed=2)
    found = deep.with_levels((0, 1, 2, 3)).each(images, [((0, 1), pooled), ((2, 3), pooled)])
    for backbone, maps in zip((fine, deep), found, strict=True):
        assert torch.equal(backbone(images, pooled), maps)
    assert deep.options.levels == (2, 3)


def test_weights_that_differ_in_one_tensor_are_not_shared(both: EnsembleDetector) -> None:
    fine, deep = both.members
    assert isinstance(fine, DiffusionDetector)
    state = fine.space.state()
    name = next(key for key in state if key.startswith("backbone.") and key.endswith("conv_stem.weight"))
    state[name] = state[name].clone()
    state[name].view(-1)[0] += 1e-6
    other = DiffusionDetector.create(fine.config, num_classes=1, space_state=state)
    check(together(other, deep), small_images(3, SIZE, 3, seed=2), passes=2)


def test_members_of_other_sizes_or_networks_are_not_shared(both: EnsembleDetector, weights: Weights) -> None:
    fine, deep = both.members
    space = {**LEVELS["fine"], "backbone": "test_efficientnet", "weights": weights("test_efficientnet")}
    larger = member(space, **{"data.image_size": [80, 80]})
    ensemble = together(larger, deep, fine)
    check(ensemble, small_images(3, (80, 80), 3, seed=2), passes=2)
    grouped = [group.numbers for group in ensemble._shared]
    assert grouped == [(1, 2)]
    resnet = member({**LEVELS["fine"], "backbone": "test_resnet", "weights": weights("test_resnet")})
    check(together(resnet, deep), small_images(3, SIZE, 3, seed=2), passes=2)


def test_patch_knn_shares_too(both: EnsembleDetector, weights: Weights) -> None:
    options = {"name": "patch_knn", "backbone": "test_efficientnet", "weights": weights("test_efficientnet"),
               "levels": [0, 3], "grid": 8}  # fmt: skip
    deep = both.members[1]
    knn = BaselineDetector.fit(deep.config, component_options("baselines", options), small_images(8, SIZE, 3))
    for combine in ("mean", "fisher"):
        ensemble = EnsembleDetector.create([knn, deep], combine, {}).calibrate(small_images(8, SIZE, 3, seed=1))
        check(ensemble, small_images(3, SIZE, 3, seed=2), passes=1)


def test_calibration_is_that_of_members_seen_apart(both: EnsembleDetector, monkeypatch: pytest.MonkeyPatch) -> None:
    images = small_images(8, SIZE, 3, seed=1)
    with counted_passes() as calls:
        one = EnsembleDetector.create(both.members, "mean", {}).calibrate(images)
    assert len(calls) == 1
    monkeypatch.setattr("raydiff.detector.ensemble.sharing", lambda _: ())
    with counted_passes() as calls:
        apart = EnsembleDetector.create(both.members, "mean", {}).calibrate(images)
    assert len(calls) == 2
    assert one.files() == apart.files()


def test_tiles_are_shared_where_they_are_the_same(weights: Weights) -> None:
    tiled = {"data.image_size": [96, 112], "tiles.size": list(SIZE)}
    backbone = {"backbone": "test_efficientnet", "weights": weights("test_efficientnet")}
    fine, deep = (member({**backbone, **LEVELS[name]}, **tiled) for name in ("fine", "deep"))
    images = small_images(2, (96, 112), 3, seed=2)
    check(together(fine, deep), images, passes=1)  # all tiles of an image in one call
    denser = member({**backbone, **LEVELS["deep"]}, **tiled, **{"tiles.overlap": 0.6})
    check(together(fine, denser), images, passes=2)


def test_a_member_may_stop_early(both: EnsembleDetector) -> None:
    fine, deep = both.members
    assert isinstance(fine, DiffusionDetector)
    scoring = {"name": "denoising_error", "num_inference_steps": 3, "early_exit": 0.3, "blur": 0.7}
    hasty = fine.with_scoring(component_options("scorers", scoring))
    check(together(hasty, deep), small_images(6, SIZE, 3, seed=2), passes=1)


def test_it_holds_for_what_is_loaded_and_served_in_threads(both: EnsembleDetector, tmp_path: Path) -> None:
    saved = both.save(tmp_path / "artifact")
    images = small_images(8, SIZE, 3, seed=2)
    expected = saved.predict(images)
    served = load_artifact(tmp_path / "artifact").detector
    loaded = load_detector(tmp_path / "artifact")  # asked by several threads at once before it knows what it shares
    for detector in (served, loaded):
        with ThreadPoolExecutor(4) as pool, counted_passes() as calls:
            found = list(pool.map(lambda image, one=detector: one.predict(image[None]), images))
        assert len(calls) == len(images)
        assert torch.equal(torch.cat([one.pred_score for one in found]), expected.pred_score)


def test_nothing_of_an_image_is_kept(both: EnsembleDetector) -> None:
    images = small_images(2, SIZE, 3, seed=2)
    kept = [weakref.ref(part) for part in (images, both.score(images).image)]
    del images
    gc.collect()
    assert [one() for one in kept] == [None, None]


def test_the_shared_network_takes_no_memory_of_its_own(both: EnsembleDetector) -> None:
    (group,) = both._shared
    deep = both.members[1]
    assert isinstance(deep, DiffusionDetector)
    own = {value.data_ptr() for value in deep.space.backbone._folded.parameters()}  # type: ignore[attr-defined]
    assert {value.data_ptr() for value in group.backbone._folded.parameters()} == own  # type: ignore[union-attr]


def test_compiled_the_backbone_is_compiled_once(both: EnsembleDetector) -> None:
    torch._dynamo.reset()
    graphs: list[fx.GraphModule] = []

    def counted(graph: fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    quick = compiled(both, backend=counted)
    images = small_images(3, SIZE, 3, seed=2)
    found, expected = quick.score(images), both.score(images)
    torch.testing.assert_close(found.image, expected.image, rtol=1e-5, atol=1e-6)
    assert len(graphs) == 3  # two denoisers
    moved = quick.with_target_fpr(0.3)  # as a live endpoint is asked to: what was compiled is kept
    assert isinstance(quick, EnsembleDetector)
    assert isinstance(moved, EnsembleDetector)
    assert moved._shared[0].backbone is quick._shared[0].backbone
    assert quick.files() == both.files()


@pytest.mark.parametrize("number", [0, 1])
def test_the_map_is_one_members_and_the_score_is_not(both: EnsembleDetector, tmp_path: Path, number: int) -> None:
    images = small_images(4, SIZE, 3, seed=2)
    one = together(*both.members, map_from=number)
    one.save(tmp_path / "artifact")
    loaded = load_detector(tmp_path / "artifact")
    found, expected = loaded.predict(images), one.members[number].predict(images)
    assert found.anomaly_map is not None
    assert found.pred_mask is not None
    assert expected.anomaly_map is not None
    assert expected.pred_mask is not None
    assert torch.equal(found.anomaly_map, expected.anomaly_map)
    assert torch.equal(found.pred_mask, expected.pred_mask)
    assert torch.equal(found.pred_score, both.predict(images).pred_score)
    assert loaded.calibration is not None
    assert both.calibration is not None
    member_calibration = one.members[number].calibration
    assert member_calibration is not None
    assert loaded.calibration.mask_threshold == member_calibration.mask_threshold
    assert loaded.calibration.mask_threshold != both.calibration.mask_threshold
    assert loaded.calibration.threshold == both.calibration.threshold
    assert loaded.name.endswith(f", map of {number + 1}")
    assert loaded.files() == one.files()


def test_a_shown_map_is_enlarged_to_the_ensembles_size(both: EnsembleDetector, weights: Weights) -> None:
    space = {**LEVELS["fine"], "backbone": "test_efficientnet", "weights": weights("test_efficientnet")}
    larger = member(space, **{"data.image_size": [80, 80]})
    one = together(larger, both.members[1], map_from=1)
    found = one.predict(small_images(2, (80, 80), 3, seed=2))
    assert found.anomaly_map is not None
    assert found.anomaly_map.shape == (2, 1, 80, 80)


def test_the_lower_target_makes_the_higher_mask_threshold(both: EnsembleDetector) -> None:
    """The mask's threshold answers the ensemble's false-positive rate, not the member's."""
    fresh = EnsembleDetector.create(both.members, "mean", {}, 0)
    cuts = []
    for rate in (0.5, 0.2):
        config = fresh.config.override({"calibration.target_fpr": rate})
        calibration = replace(fresh, config=config).calibrate(small_images(8, SIZE, 3, seed=1)).calibration
        assert calibration is not None
        assert calibration.mask_threshold is not None
        cuts.append(calibration.mask_threshold)
    assert cuts[0] < cuts[1]
