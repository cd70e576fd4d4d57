"""Corruptions are the published ones: their statistics are measured on even and on real images."""

import io

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from raydiff import registry
from raydiff.errors import ConfigError, ShapeError
from raydiff.images import to_uint8
from raydiff.testing import small_images


def apply(name, images, severity, **fields):
    built = registry.build("perturbations", registry.component("perturbations", name).Options(**fields))
    return built.apply(images, severity=severity, ids=[f"image-{i}" for i in range(len(images))]).images


def even(level, size=200):
    return np.full((1, size, size, 1), level, dtype=np.uint8)


@pytest.mark.parametrize(("severity", "deviation"), [(1, 0.08), (3, 0.18)])
def test_gaussian_noise_has_the_published_deviation(severity, deviation):
    noisy = apply("gaussian_noise", even(128), severity).astype(float)
    assert noisy.std() / 255 == pytest.approx(deviation, rel=0.02)
    assert noisy.mean() == pytest.approx(128, abs=1)


@pytest.mark.parametrize(("severity", "photons"), [(1, 60), (3, 12)])
def test_shot_noise_has_a_variance_in_proportion_to_the_light(severity, photons):
    for level in (32, 96):
        noisy = apply("shot_noise", even(level), severity).astype(float) / 255
        assert noisy.mean() == pytest.approx(level / 255, rel=0.03)
        assert noisy.var() == pytest.approx(level / 255 / photons, rel=0.05)


@pytest.mark.parametrize(("side", "sigma"), [(224, 2.0), (112, 1.0), (16, 0.6)])
def test_blur_is_in_proportion_to_the_side_down_to_a_floor(side, sigma):
    images = to_uint8(small_images(2, (side, side + 6)))
    expected = [ndimage.gaussian_filter(image[..., 0].astype(float), sigma, mode="nearest") for image in images]
    assert np.abs(apply("blur", images, 2)[..., 0] - np.stack(expected)).max() <= 0.51


def test_jpeg_is_pillow_at_the_published_quality():
    images = to_uint8(small_images(2, (32, 24), 3))
    file = io.BytesIO()
    Image.fromarray(images[1]).save(file, "JPEG", quality=10)
    assert np.array_equal(apply("jpeg", images, 4)[1], np.asarray(Image.open(file)))


def test_brightness_adds_to_the_value_and_keeps_the_hue():
    pixel = np.array([[[[100, 50, 0]], [[0, 0, 0]], [[250, 125, 125]]]], dtype=np.uint8)  # (1, 3, 1, 3)
    lighter = apply("brightness", pixel, 2)[0, :, 0].tolist()
    assert lighter == [[151, 76, 0], [51, 51, 51], [255, 128, 128]]
    assert (apply("brightness", even(10), 1) == 36).all()  # 10 + 25.5, to even


def test_the_seed_changes_the_draw():
    assert not np.array_equal(apply("gaussian_noise", even(128), 1), apply("gaussian_noise", even(128), 1, seed=1))


@pytest.mark.parametrize(
    ("images", "severity", "error", "message"),
    [
        (even(0).astype(float), 1, ShapeError, r"images are float64 \(1, 200, 200, 1\); a perturbation takes uint8"),
        (even(0)[0], 1, ShapeError, r"images are uint8 \(200, 200, 1\)"),
        (even(0), 6, ConfigError, "severity is 6; it must be a whole number from 1 to 5"),
    ],
)
def test_bad_arguments_are_refused(images, severity, error, message):
    with pytest.raises(error, match=message):
        apply("blur", images, severity)


def test_no_images_are_no_images():
    assert apply("jpeg", even(0)[:0], 1).shape == (0, 200, 200, 1)
