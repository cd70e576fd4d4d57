"""The selection split: calibration normals and as many synthetic anomalies, equal parts of each kind."""

import numpy as np
import pytest
import torch

from raydiff import registry
from raydiff.core.metrics import image_auroc
from raydiff.errors import ShapeError
from raydiff.images import to_uint8
from raydiff.scorers import denoising_error
from raydiff.selection import judged, selection_set
from raydiff.testing import small_images

PIXELS = to_uint8(small_images(24, (16, 16)))
IDS = [f"image-{i}" for i in range(24)]


def test_normal_images_come_first_and_every_anomaly_is_marked():
    made = selection_set(PIXELS, IDS, seed=1)
    assert np.array_equal(made.images[:24], PIXELS)
    assert made.labels.tolist() == [False] * 24 + [True] * 24
    assert not made.masks[:24].any()
    assert made.masks[24:].any((1, 2)).all()
    changed = (made.images[24:] != PIXELS).any(-1)
    assert changed.any((1, 2)).all()
    assert not (changed & ~made.masks[24:]).any()


def test_every_kind_makes_an_equal_part():
    made = selection_set(PIXELS, IDS, seed=1)
    kinds = [name for name in registry.names("perturbations") if _build(name).kind == "anomaly"]
    assert kinds == ["blur_patch", "cut_paste", "noise_patch", "perlin_texture"]
    for name in kinds:
        own = _build(name, seed=1).apply(PIXELS, severity=3, ids=IDS).images
        assert (own == made.images[24:]).all((1, 2, 3)).sum() == 6, name


def test_the_order_of_the_images_does_not_matter_and_the_seed_does():
    made = selection_set(PIXELS, IDS)
    backwards = selection_set(PIXELS[::-1], IDS[::-1])
    assert np.array_equal(backwards.images[24:][::-1], made.images[24:])
    assert not np.array_equal(selection_set(PIXELS, IDS, seed=1).images, made.images)


def test_an_even_image_becomes_anomalous_too():
    for level in (0, 127, 255):
        made = selection_set(np.full((8, 12, 12, 3), level, dtype=np.uint8), IDS[:8])
        assert (made.images[8:] != level).any((1, 2, 3)).all()


def test_half_of_the_normals_are_not_told_from_the_other_half():
    """A density knows the images that it was fitted on; scored by others' statistics no half stands out."""
    scorer = build_scorer(density="kde")
    evidence = evidence_of(120, seed=1, num_steps=8)
    labels = np.repeat([False, True], 60)
    fitted = scorer.judge(evidence, scorer.fit(evidence[:60]), (8, 8)).image.numpy()
    assert image_auroc(fitted, labels) > 0.9
    low, high = judged(scorer, evidence[:60], evidence[60:], (8, 8))
    assert 0.35 < image_auroc(np.r_[low, high], labels) < 0.65


def test_each_image_and_its_twin_are_scored_without_it():
    scorer, normals = build_scorer(), evidence_of(11, seed=2)
    twins = normals * torch.linspace(1, 3, 11)[:, None, None, None]
    low, high = judged(scorer, normals, twins, (8, 8), num_folds=3)
    for row in range(11):
        statistics = scorer.fit(normals[torch.arange(11) % 3 != row % 3])
        expected = [float(scorer.judge(e[row : row + 1], statistics, (8, 8)).image) for e in (normals, twins)]
        assert [low[row], high[row]] == expected


def test_statistics_may_come_from_the_first_images_alone():
    scorer, normals = build_scorer(), evidence_of(11, seed=2)
    low, high = judged(scorer, normals, normals * 2, (8, 8), num_folds=3, num_fitted=7)
    for row in range(11):
        statistics = scorer.fit(normals[:7][torch.arange(7) % 3 != row % 3])
        expected = [float(scorer.judge(e[row : row + 1], statistics, (8, 8)).image) for e in (normals, normals * 2)]
        assert [low[row], high[row]] == expected


@pytest.mark.parametrize(
    ("count", "folds", "message"),
    [(5, 5, r"evidence is \(6, 2, 8, 8\) and its twins' \(5"), (6, 7, "6 images and 7 folds"), (6, 1, "and 1 folds")],
)
def test_what_cannot_be_cross_fitted(count, folds, message):
    with pytest.raises(ShapeError, match=message):
        judged(build_scorer(), evidence_of(6), evidence_of(count), (8, 8), num_folds=folds)


def test_there_are_no_more_folds_than_images_to_fit_on():
    with pytest.raises(ShapeError, match="there are 4 images and 5 folds"):
        judged(build_scorer(), evidence_of(9), evidence_of(9), (8, 8), num_folds=5, num_fitted=4)


def test_there_is_one_id_per_image():
    with pytest.raises(ShapeError, match="there are 24 images and 23 ids; give one id per image"):
        selection_set(PIXELS, IDS[1:])


def build_scorer(**fields):
    return denoising_error.build(denoising_error.Options(num_inference_steps=2, **fields))


def evidence_of(count, seed=0, num_steps=2):
    """Squares of normal numbers, (count, num_steps, 8, 8)."""
    return torch.randn(count, num_steps, 8, 8, generator=torch.Generator().manual_seed(seed)).square()


def _build(name, **fields):
    return registry.build("perturbations", registry.component("perturbations", name).Options(**fields))
