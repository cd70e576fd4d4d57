"""Synthetic anomalies: what is painted, where, and what is marked; and that the shipped check catches broken ones."""

import sys
from types import ModuleType
from typing import Literal

import numpy as np
import pytest

from raydiff import registry, testing
from raydiff.config import Options
from raydiff.contracts import Perturbed
from raydiff.images import to_uint8
from raydiff.perturbations._regions import perlin_region, soft_spot
from raydiff.testing import small_images

PIXELS = to_uint8(small_images(12, (64, 64), 3))
IDS = [f"image-{i}" for i in range(12)]


def apply(name, images=PIXELS, severity=3, **fields):
    built = registry.build("perturbations", registry.component("perturbations", name).Options(**fields))
    return built.apply(images, severity=severity, ids=IDS[: len(images)])


@pytest.mark.parametrize("name", ["blur_patch", "cut_paste", "noise_patch", "perlin_texture"])
def test_defects_are_of_the_size_that_the_severity_says(name):
    shares = [apply(name, severity=severity).masks.mean() for severity in (1, 3, 5)]
    assert 0 < shares[0] < shares[1] < shares[2] < 0.4


def test_a_pasted_patch_comes_from_the_image_itself():
    """Without colour: every value pasted lies within what brightness and contrast jittered by 10 % can reach."""
    image = np.zeros((1, 64, 64, 1), dtype=np.uint8)
    image[:, :, 32:] = 200
    made = apply("cut_paste", image, 5, shape="patch")
    values = made.images[made.masks].astype(int)
    assert ((values < 30) | (values > 150)).all()
    rows, columns = np.nonzero(made.masks[0])
    assert made.masks[0].sum() <= (np.ptp(rows) + 1) * (np.ptp(columns) + 1)


def test_a_scar_is_thinner_than_a_patch():
    assert apply("cut_paste", shape="scar").masks.mean() < apply("cut_paste", shape="patch").masks.mean()


def test_noise_may_be_grey_or_in_colour():
    grey = np.repeat(PIXELS[..., :1], 3, -1)
    made = apply("noise_patch", grey)
    coloured = (made.images.max(-1) != made.images.min(-1)).any((1, 2))
    assert 0 < coloured.sum() < len(coloured)


def test_soft_spots_have_about_the_area_asked_for():
    rng = np.random.default_rng(0)
    spots = [soft_spot((64, 64), 0.05, rng) for _ in range(60)]
    assert all(spot.max() == 1 and spot.min() == 0 for spot in spots)
    assert 0.03 < np.mean([(spot > 0).mean() for spot in spots]) < 0.055  # some are cut off by the border


@pytest.mark.parametrize("size", [(64, 64), (5, 40), (1, 1)])
def test_perlin_regions_have_the_area_asked_for(size):
    rng = np.random.default_rng(0)
    for share in (0.02, 0.3):
        region = perlin_region(size, share, rng)
        assert region.shape == size
        assert region.sum() >= max(1, round(share * region.size))
    regions = [perlin_region((64, 64), 0.3, rng) for _ in range(20)]
    edges = np.mean([np.abs(np.diff(region, axis=1)).mean() for region in regions])
    assert edges < 0.2  # in pieces: of independent pixels 0.42 would differ from their neighbour


class _Broken:
    kind = "anomaly"

    def apply(self, images, *, severity, ids):
        changed = images.copy()
        changed[:, :severity, :2] ^= 255
        return Perturbed(changed, self.marks((changed != images).any(-1)))

    def marks(self, changed):
        return changed


class _MarksHalf(_Broken):
    def marks(self, changed):
        return changed & (np.arange(changed.shape[2]) < 1)


class _NoMasks(_Broken):
    def marks(self, changed):
        return None


class _AverageOfTheBatch(_Broken):
    def apply(self, images, *, severity, ids):
        return Perturbed(np.uint8(images * 0.5 + images.mean(0) * 0.5), np.ones(images.shape[:3], bool))


class _WritesInto(_Broken):
    def apply(self, images, *, severity, ids):
        images[:, :severity] ^= 255
        return Perturbed(images, np.ones(images.shape[:3], bool))


class _Global(_Broken):
    def apply(self, images, *, severity, ids):
        np.random.normal()
        return super().apply(images, severity=severity, ids=ids)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (_MarksHalf, "changes pixels that it does not mark"),
        (_NoMasks, "makes anomalies, and its masks are not bool"),
        (_AverageOfTheBatch, "depends on order or batch-mates"),
        (_WritesInto, "writes into the images it is given"),
        (_Global, "draws from numpy's global generator"),
        (_Broken, "takes severity 0"),
    ],
)
def test_a_broken_perturbation_is_caught(monkeypatch, broken, message):
    class Planted(Options):
        name: Literal["planted"] = "planted"

    module = ModuleType("raydiff.perturbations.planted")
    module.Options, module.build = Planted, lambda options: broken()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    known = registry.names
    monkeypatch.setattr(registry, "names", lambda kind: (*known(kind), "planted"))
    with pytest.raises(AssertionError, match=f"perturbation 'planted': {message}"):
        testing.check_perturbation("planted")
