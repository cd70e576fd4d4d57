"""Space ``rotnet``: it learns what is up, by its seed alone, and a turned image lies far from normal ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional as F

from raydiff.config import ExperimentConfig
from raydiff.contracts import TrainedSpace
from raydiff.detector import DiffusionDetector, load_detector
from raydiff.errors import ArtifactError, ConfigError, RaydiffError, TrainingError
from raydiff.experiment import fit_locally
from raydiff.exported import load_exported
from raydiff.exporting import export
from raydiff.images import to_tensor, to_uint8
from raydiff.shards import ShardSet
from raydiff.spaces.rotnet import Options, RotNetSpace, build
from raydiff.testing import small_images

SIZE = (8, 8)
QUICK: dict[str, Any] = {
    "factor": 4, "width": 16, "num_steps": 120, "batch_size": 16, "learning_rate": 0.05, "num_components": 16,
    "horizontal_flip": False,
}  # fmt: skip


def fours() -> Tensor:
    """Handwritten fours, (181, 1, 8, 8) in [-1, 1]: no turn of one is another."""
    digits = load_digits()
    return torch.from_numpy(digits.images[digits.target == 4] / 8 - 1).float()[:, None]


def fitted(images: Tensor | None = None, **fields: object) -> RotNetSpace:
    images = fours()[:120] if images is None else images
    space = build(
        Options.model_validate(QUICK | fields),
        channels=images.shape[1],
        image_size=(images.shape[2], images.shape[3]),
    )
    space.fit(images)
    return space


@pytest.fixture(scope="module")
def space() -> RotNetSpace:
    return fitted()


def test_a_turned_image_lies_far_from_the_normal_ones(space: RotNetSpace) -> None:
    """Which it does not in pixels' principal axes, however they are divided: measured beside it."""
    known, new = fours()[:120], fours()[120:]
    turned = torch.rot90(new, 2, (-2, -1))

    def far(encode: Any) -> float:
        normals = encode(known).flatten(1)
        scores = [torch.cdist(encode(rows).flatten(1), normals).amin(1) for rows in (new, turned)]
        labels = torch.cat([torch.zeros(len(new)), torch.ones(len(new))])
        return float(roc_auc_score(labels, torch.cat(scores)))

    assert far(space.encode) > 0.97
    assert far(fitted(num_steps=1, learning_rate=1e-9).encode) < far(space.encode)


def test_latents_are_normalised(space: RotNetSpace) -> None:
    latents = space.encode(fours()[:120])
    assert latents.shape == (120, 16, 1, 1)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(16), rtol=0, atol=1e-3)
    assert float(latents.square().mean()) == pytest.approx(1, abs=1e-3)
    assert space.decode(latents) is None


def test_it_learns_the_same_bits_by_its_seed() -> None:
    short: dict[str, Any] = {"num_steps": 5}
    first, again, other = fitted(**short).state(), fitted(**short, seed=0).state(), fitted(**short, seed=1).state()
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert not all(torch.equal(value, other[key]) for key, value in first.items())


def test_it_says_how_far_it_is_and_the_loss_falls() -> None:
    lines: list[dict[str, Any]] = []
    space = build(Options.model_validate(QUICK), channels=1, image_size=SIZE)
    assert isinstance(space, TrainedSpace)
    space.fit_with_progress(fours(), lambda line: lines.append(dict(line)))
    assert [line["space_step"] for line in lines] == list(range(12, 121, 12))
    assert lines[-1]["space_loss"] < 0.5 * lines[0]["space_loss"]
    assert lines[0]["space_loss"] < 1.2 * torch.tensor(4.0).log()  # four turns


def test_cells_say_where(space: RotNetSpace) -> None:
    """What changes in the top left corner moves that cell most, in whichever turn it was seen."""
    large = F.interpolate(fours()[:60], size=(32, 32), mode="bilinear")
    grid = fitted(large, cells=4, num_steps=20, factor=8, num_components=64)
    assert grid.shape == (64, 4, 4)
    changed = large[:8].clone()
    changed[..., :8, :8] *= -1
    moved = (grid.encode(changed) - grid.encode(large[:8])).square().sum(1).mean(0)  # (4, 4)
    assert moved.flatten().argmax() == 0
    for turn in (1, 2, 3):  # of the image: the features of the four turns change places, the places stay
        turned = grid._features(torch.rot90(large[:8], turn, (-2, -1)))
        blocks = torch.rot90(grid._features(large[:8]), turn, (-2, -1)).chunk(4, 1)
        torch.testing.assert_close(turned, torch.cat([blocks[(turn + k) % 4] for k in range(4)], 1))


def test_images_that_are_not_square_have_two_turns() -> None:
    space = fitted(small_images(40, (16, 8)), num_steps=3)
    assert {tuple(value.shape) for key, value in space.state().items() if key.endswith("head.weight")} == {(2, 32)}
    assert space.encode(small_images(3, (16, 8))).shape == (3, 16, 1, 1)


def test_half_precision_is_of_the_training_alone() -> None:
    half, whole = fitted(precision="bfloat16", num_steps=20), fitted(num_steps=20)
    assert {value.dtype for value in half.state().values()} == {torch.float32, torch.int64}
    assert half.encode(fours()[:2]).dtype == torch.float32
    assert not torch.equal(half.encode(fours()[:2]), whole.encode(fours()[:2]))


def test_gradients_flow_to_the_image_alone(space: RotNetSpace) -> None:
    images = fours()[:3].requires_grad_()
    (gradient,) = torch.autograd.grad(space.encode(images)[0].square().sum(), images)
    assert bool(gradient[0].any())
    assert not bool(gradient[1:].any())
    assert not space.encode(images.detach()).requires_grad


def test_what_is_refused(space: RotNetSpace) -> None:
    with pytest.raises(ConfigError, match=r"space.cells is 3; images of \(8, 8\) have 2 features a side"):
        build(Options.model_validate(QUICK | {"cells": 3}), channels=1, image_size=SIZE)
    with pytest.raises(ConfigError, match=r"space.num_components is 129; the network has 128 features in all turns"):
        build(Options.model_validate(QUICK | {"num_components": 129}), channels=1, image_size=SIZE)
    with pytest.raises(ValidationError, match="factor is 6; it must be a power of two"):
        Options(factor=6)
    for alike in (fours()[:1], fours()[:1].expand(5, -1, -1, -1)):
        with pytest.raises(ConfigError, match=r"space rotnet got \d training image\(s\), none of which differs"):
            fitted(alike)
    fresh = build(Options.model_validate(QUICK | {"num_components": 8}), channels=1, image_size=SIZE)
    with pytest.raises(RaydiffError, match="has learnt nothing yet"):
        fresh.encode(fours()[:1])
    for state in ({}, space.state()):
        with pytest.raises(ArtifactError, match="does not fit its options; fit it again"):
            fresh.load_state(state)
    with pytest.raises(TrainingError, match=r"not a number at step \d+; lower space.learning_rate"):
        fitted(num_steps=20, learning_rate=1e30)


@pytest.fixture(scope="module")
def run(tiny_config: ExperimentConfig, digit_shards: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From shards to an artefact."""
    place = tmp_path_factory.mktemp("rotnet")
    space = {"name": "rotnet", **QUICK, "num_steps": 30}
    denoiser = {"name": "convnet", "width": 16, "num_blocks": 2, "kernel_size": 1}
    scoring = {"name": "denoising_error", "num_inference_steps": 2}
    changed = tiny_config.override({"space": space, "denoiser": denoiser, "scoring": scoring})
    fit_locally(changed, place, digit_shards)
    return place


def test_the_whole_way(run: Path, digit_images: Tensor) -> None:
    """Alone or in a batch the same bits; one cell is no map."""
    detector = load_detector(run / "artifact")
    assert isinstance(detector, DiffusionDetector)
    assert (detector.num_evaluations, detector.pretrained) == (2, None)
    scores = detector.score(digit_images)
    alone = [detector.score(digit_images[i : i + 1]) for i in range(len(digit_images))]
    assert torch.equal(torch.cat([part.image for part in alone]), scores.image)
    assert scores.map is None


@pytest.mark.slow
def test_it_is_one_file(run: Path, digit_images: Tensor) -> None:
    detector = load_detector(run / "artifact")
    assert export(detector, run / "detector.pt2").difference < 1e-4
    pixels = to_tensor(to_uint8(digit_images))
    exported = load_exported(run / "detector.pt2").score(pixels)
    torch.testing.assert_close(exported.image, detector.score(pixels).image, rtol=1e-3, atol=1e-4)
