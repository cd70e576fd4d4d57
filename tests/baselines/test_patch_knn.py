"""Patch-kNN: the distances, the coreset, the weight of equation 7, the map."""

import pytest
import torch

from raydiff.baselines.patch_knn import Options, build, greedy_coreset
from raydiff.errors import ArtifactError, ConfigError, DataError, RaydiffError, ShapeError
from raydiff.testing import planted_defect, small_images

SIZE = (64, 64)


def fitted(**fields):
    baseline = build(Options(**({"levels": (1, 2), "grid": 4, "blur": 1.0} | fields)), seed=0)
    baseline.fit(small_images(12, SIZE, 3))
    return baseline


@pytest.fixture(scope="module")
def whole():
    """Every patch in the bank: 12 images of 16 x 16."""
    return fitted(coreset_share=1.0)


def test_a_training_image_is_at_no_distance_from_a_bank_that_holds_it_all(whole):
    assert whole.state()["bank"].shape == (12 * 16 * 16, 24 + 40)
    assert float(whole.score(small_images(12, SIZE, 3)).image.max()) < 1e-3
    assert float(whole.score(small_images(12, SIZE, 3, seed=5)).image.min()) > 0.1


def test_scores_are_the_largest_distance_to_the_nearest(whole):
    image = small_images(1, SIZE, 3, seed=5)
    patches = whole._patches(image).flatten(0, 2).double()
    distances = torch.cdist(patches, whole.state()["bank"].double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert float(whole.score(image).image) == pytest.approx(float(distances.min(1).values.max()), rel=1e-4)


def test_the_map_is_brightest_at_a_planted_defect(whole):
    images, masks = planted_defect(small_images(4, SIZE, 3))
    maps = whole.score(images).map
    assert maps.shape == (4, 1, *SIZE)
    assert all(float(heat[mask].mean()) > 2 * float(heat[~mask].mean()) for heat, mask in zip(maps, masks, strict=True))


def test_the_weight_is_equation_7(whole):
    """Beside a crowd of its neighbour's neighbours a patch keeps its score; alone with one of them it loses."""
    weighing = build(Options(levels=(1, 2), grid=4, blur=1.0, reweight=True, num_reweight=3), seed=0)
    weighing.load_state(whole.state())
    image = small_images(1, SIZE, 3, seed=5)
    patches, bank = whole._patches(image).flatten(0, 2), whole.state()["bank"]
    distances = torch.cdist(patches, bank)
    farthest = int(distances.min(1).values.argmax())
    nearest = int(distances[farthest].argmin())
    around = torch.cdist(bank[nearest][None], bank)[0].topk(3, largest=False).indices
    share = distances[farthest][around].softmax(0)[(around == nearest).nonzero()[0, 0]]
    expected = float(distances[farthest, nearest] * (1 - share))
    assert float(weighing.score(image).image) == pytest.approx(expected, rel=1e-2)


def test_a_surrogate_is_the_score_with_gradients(whole):
    images = small_images(2, SIZE, 3, seed=5).requires_grad_()
    surrogate = whole.surrogate(images)
    torch.testing.assert_close(surrogate, whole.score(images).image)
    (gradient,) = torch.autograd.grad(surrogate[0], images)
    assert bool(gradient[0].any())
    assert not bool(gradient[1].any())


def test_a_share_of_the_patches_is_kept_and_never_more_than_the_most():
    assert len(fitted(coreset_share=0.5).state()["bank"]) == 1536
    assert len(fitted(coreset_share=0.01).state()["bank"]) == 1000
    assert len(fitted(coreset_share=0.5, max_bank=70).state()["bank"]) == 70
    assert len(fitted(coreset_share=0.5, max_candidates=90).state()["bank"]) == 90


def test_a_coreset_reaches_every_cluster():
    generator = torch.Generator().manual_seed(0)
    crowd = torch.randn(500, 8, generator=generator) * 0.01
    others = torch.eye(8) * torch.arange(1, 9)[:, None]
    points = torch.cat([crowd, others])
    kept = greedy_coreset(points, 9, generator=generator, projected_dim=8)
    assert set(range(500, 508)) <= set(kept.tolist())
    assert len(set(greedy_coreset(points, 100, generator=generator, projected_dim=4).tolist())) == 100
    same = greedy_coreset(torch.zeros(10, 3), 5, generator=generator, projected_dim=8)
    assert len(set(same.tolist())) == 5


def test_what_is_refused(whole, tmp_path):
    fresh = build(Options(weights=str(tmp_path / "none.pth")), seed=0)
    with pytest.raises(ConfigError, match=r"none\.pth: cannot be read"):
        fresh.fit(small_images(2, SIZE))
    with pytest.raises(RaydiffError, match="has learnt nothing yet"):
        fresh.score(small_images(2, SIZE))
    with pytest.raises(DataError, match="got 0 training images"):
        fresh.fit(torch.zeros(0, 3, *SIZE))
    with pytest.raises(ShapeError, match=r"they must be \(n, C, H, W\)"):
        fresh.fit(torch.zeros(3, *SIZE))
    with pytest.raises(ShapeError, match=r"they must be \(B, 3, 64, 64\)"):
        whole.score(torch.zeros(1, 1, *SIZE))
    with pytest.raises(ArtifactError, match="the state of patch_knn has no 'bank'; fit it again"):
        fresh.load_state({})
    assert whole.score(torch.zeros(0, 3, *SIZE)).map.shape == (0, 1, *SIZE)
