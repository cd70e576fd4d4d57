"""Feature space: what the projection does to normal images, what it keeps of the backbone, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from raydiff import backbone
from raydiff.config import ExperimentConfig
from raydiff.detector import build_space
from raydiff.errors import ArtifactError, ConfigError, DataError, RaydiffError
from raydiff.spaces.feature import FeatureSpace, Options, build
from raydiff.testing import check_space, small_images

SIZE = (32, 32)
PER_CELL = {"statistics": "per_cell", "num_components": 6, "shrinkage": 0.1}


def fitted(**fields: object) -> FeatureSpace:
    options = Options.model_validate({"backbone": "tf_efficientnet_lite0", "grid": 8, "num_components": 24} | fields)
    space = build(options, channels=1, image_size=SIZE)
    space.fit(small_images(64, SIZE, seed=1))
    return space


@pytest.fixture(scope="module")
def space() -> FeatureSpace:
    return fitted()


def test_normal_images_have_mean_0_and_variance_1(space: FeatureSpace) -> None:
    latents = space.encode(small_images(64, SIZE, seed=1))
    assert latents.shape == (64, 24, 4, 4)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(24), rtol=0, atol=1e-3)
    assert float(latents.square().mean()) == pytest.approx(1, abs=1e-3)


def test_whitening_lies_between_the_plain_axes_and_equal_ones() -> None:
    """The ratio of the first axis' deviation to the twelfth's, to the power of 1 - whitening."""
    ratios = []
    for whitening in (0.0, 0.5, 1.0):
        space = fitted(whitening=whitening, num_components=12)
        deviation = space.encode(small_images(64, SIZE, seed=1)).std((0, 2, 3))
        ratios.append(float(deviation[0] / deviation[-1]))
    assert ratios[0] > 2
    assert ratios[1] == pytest.approx(ratios[0] ** 0.5, rel=0.01)
    assert ratios[2] == pytest.approx(1, rel=0.01)


def test_axes_are_uncorrelated(space: FeatureSpace) -> None:
    cells = space.encode(small_images(64, SIZE, seed=1)).movedim(1, -1).flatten(0, 2)  # (n, 24)
    correlation = torch.corrcoef(cells.T) - torch.eye(24)
    assert float(correlation.abs().max()) < 0.01


@pytest.mark.parametrize(
    ("image_size", "grid", "expected"),
    [((256, 256), 16, (16, 16)), ((8, 8), 16, (1, 1)), ((64, 20), 16, (4, 1)), ((256, 256), (12, 20), (12, 20))],
)
def test_the_grid(image_size: tuple[int, int], grid: int | tuple[int, int], expected: tuple[int, int]) -> None:
    assert build(Options(grid=grid), channels=3, image_size=image_size).shape == (96, *expected)


def test_rows_stand_alone_in_larger_images_with_other_options() -> None:
    fields = {"grid": (5, 3), "levels": (0, 1), "num_components": 8, "num_fit_images": 8, "num_fit_cells": 50}
    check_space("feature", image_size=(48, 32), channels=3, **fields, whitening=1.0)


def test_a_neighbourhood_is_averaged_on_each_levels_own_cells() -> None:
    """A change of one pixel reaches cells that it does not reach without; a plain image stays as it is."""
    image = small_images(1, SIZE, seed=3)
    other = image.clone()
    other[..., 0, 0] = 1 - other[..., 0, 0]
    changed = []
    for side in (1, 3):
        space = fitted(neighbourhood=side, levels=(1,))
        changed.append(int((space.encode(image) - space.encode(other)).abs().amax((0, 1)).gt(1e-4).sum()))
    assert 0 < changed[0] < changed[1]
    with pytest.raises(ValidationError, match="neighbourhood is 2; it must be odd"):
        Options(neighbourhood=2)


def marked(count: int, left: int, seed: int) -> Tensor:
    """Images with some noise and a bright square, whose left edge is at ``left``."""
    images = 0.1 * torch.randn(count, 1, *SIZE, generator=torch.Generator().manual_seed(seed))
    images[:, :, 12:20, left : left + 8] += 0.8
    return images.clamp(-1, 1)


def test_per_cell_a_part_in_another_place_is_odd() -> None:
    """To statistics that all cells share it is a square like any other."""
    ratios = {}
    kinds: tuple[Literal["shared", "per_cell"], ...] = ("shared", "per_cell")
    for statistics in kinds:
        space = build(Options(num_components=6, statistics=statistics), channels=1, image_size=SIZE)
        space.fit(marked(64, 4, 0))
        usual, moved = (space.encode(marked(8, left, 1)).square().sum(1).amax((1, 2)).median() for left in (4, 20))
        ratios[statistics] = float(moved / usual)
    assert ratios["shared"] < 3
    assert ratios["per_cell"] > 3 * ratios["shared"]


def test_per_cell_normal_images_have_mean_0_and_variance_1_in_every_cell() -> None:
    space = fitted(**PER_CELL)
    latents = space.encode(small_images(64, SIZE, seed=1))
    torch.testing.assert_close(latents.mean(0), torch.zeros(latents.shape[1:]), rtol=0, atol=1e-3)
    assert float(latents.square().mean()) == pytest.approx(1, abs=1e-3)
    per_cell = latents.square().mean((0, 1))
    assert float(per_cell.max() / per_cell.min()) < 1.3


@pytest.mark.parametrize("statistics", ["shared", "per_cell"])
def test_grids_that_are_not_kept_give_the_same_bits(
    statistics: Literal["shared", "per_cell"], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = small_images(40, SIZE, seed=3)  # more than are worked on at a time
    options = Options(num_components=6, num_fit_cells=300, statistics=statistics)
    kept, made = (build(options, channels=1, image_size=SIZE) for _ in range(2))
    kept.fit(images)
    weight = kept.fit_bytes(40)
    monkeypatch.setattr("raydiff.spaces.feature._KEPT_BYTES", 0)
    made.fit(images)
    assert made.fit_bytes(40) < weight
    assert made.fit_bytes(40) == made.fit_bytes(10**6)
    assert all(torch.equal(value, made.state()[name]) for name, value in kept.state().items())


def test_per_cell_keeps_its_state_and_the_contract() -> None:
    space = fitted(**PER_CELL)
    restored = build(space.options, channels=1, image_size=SIZE)
    restored.load_state(space.state())
    assert torch.equal(restored.encode(small_images(3, SIZE)), space.encode(small_images(3, SIZE)))
    check_space("feature", image_size=(48, 32), channels=3, levels=(0, 1), **(PER_CELL | {"standardise": True}))


def test_per_cell_what_is_refused() -> None:
    space = build(Options.model_validate(PER_CELL), channels=1, image_size=SIZE)
    with pytest.raises(ConfigError, match="statistics is per_cell and it is fitted on 1 image, which has no cov"):
        space.fit(small_images(1, SIZE))
    with pytest.raises(DataError, match="the 8 training images that cells are learnt from are all the same"):
        space.fit(small_images(1, SIZE).expand(8, -1, -1, -1))
    with pytest.raises(ArtifactError, match="does not fit its statistics; fit it again"):
        space.load_state(fitted(num_components=6).state())
    with pytest.raises(ValidationError, match=r"shrinkage is 0\.2 and statistics shared; leave it out"):
        Options(shrinkage=0.2)


def test_per_cell_wants_more_images_unless_told() -> None:
    assert build(Options(statistics="per_cell"), channels=3, image_size=SIZE).num_fit_images == 1000
    assert build(Options(statistics="per_cell", num_fit_images=50), channels=3, image_size=SIZE).num_fit_images == 50
    assert build(Options(), channels=3, image_size=SIZE).num_fit_images == 200
    config = ExperimentConfig().override({"space": {"name": "feature", "statistics": "per_cell"}})
    assert build_space(config.override({"space.statistics": "shared"})).num_fit_images == 200


@pytest.mark.parametrize(
    "more",
    [
        "tiles.size=[64, 64]",
        "training.horizontal_flip=true",
        "objective.condition=rotation",
        "augmentation.vertical_flip=true",
        "augmentation.quarter_turns=true",
    ],
)
def test_per_cell_a_place_must_be_the_same_place(more: str) -> None:
    config = ExperimentConfig().override(["data.image_size=[128, 128]", more])
    with pytest.raises(
        ConfigError, match=r"statistics is per_cell, where each place has its own, and \w+\.\w+.* shows"
    ):
        config.override({"space": {"name": "feature", "statistics": "per_cell"}})


def test_per_cell_new_images_are_not_far_longer_where_there_are_enough() -> None:
    """Of 6 components and 200 images; with as many components as images they are."""
    longer = []
    for count, components in ((200, 6), (12, 12)):
        space = build(Options(statistics="per_cell", num_components=components), channels=1, image_size=SIZE)
        space.fit(marked(count, 4, 0))
        longer.append(float(space.encode(marked(64, 4, 1)).square().mean()))
    assert longer[0] < 1.5
    assert longer[1] > 5


def test_gradients_flow_back_to_images(space: FeatureSpace) -> None:
    images = small_images(2, SIZE).requires_grad_()
    (gradient,) = torch.autograd.grad(space.encode(images)[0].square().sum(), images)
    assert bool(gradient[0].any())
    assert not bool(gradient[1].any())


def test_it_fits_to_the_same_bits_twice(space: FeatureSpace) -> None:
    again = fitted().state()
    assert all(torch.equal(value, again[key]) for key, value in space.state().items())


def test_it_names_its_weights_and_loads_without_them(space: FeatureSpace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone, "_weights_path", lambda _: Path("/nowhere"))
    restored = build(space.options, channels=1, image_size=SIZE)
    restored.load_state(space.state())
    assert torch.equal(restored.encode(small_images(3, SIZE)), space.encode(small_images(3, SIZE)))
    assert restored.pretrained == "tf_efficientnet_lite0"


def test_what_is_refused(space: FeatureSpace) -> None:
    fresh = build(Options(num_components=193), channels=1, image_size=SIZE)
    with pytest.raises(ConfigError, match=r"space.num_components is 193; levels .* have 192 channels together"):
        fresh.check()
    with pytest.raises(RaydiffError, match="has learnt nothing yet"):
        fresh.encode(small_images(1, SIZE))
    for state in ({}, space.state()):
        with pytest.raises(ArtifactError, match="does not fit its options; fit it again"):
            fresh.load_state(state)
    for grid in (0, (0, 4)):
        with pytest.raises(ValidationError, match="grid"):
            Options.model_validate({"grid": grid})
