"""Attacks: small changes of an image, made with the detector's own gradient, that turn its score round.

Projected gradient descent within an L-infinity ball (Madry et al. 2018, arXiv:1706.06083): an anomalous image's score
is lowered, a normal one's raised. The attacker knows everything: weights, statistics and the noise that scores share.
Pixels are real numbers here and are not rounded to 256 levels, which an image file would do.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from raydiff.core.diffusion import keyed_seed
from raydiff.detector import Detector
from raydiff.errors import ConfigError, ScoreError, ShapeError

__all__ = ["pgd"]

_STEP_SHARE = 2.5  # of budget / num_steps: Madry et al.'s, enough to reach any corner of the ball and turn back

_IMAGES_AT_ONCE = 8  # activations of every network evaluation of so many images are held for the gradient


def pgd(
    detector: Detector,
    images: Tensor,
    is_anomaly: Tensor,
    *,
    budget: float,
    num_steps: int = 10,
    random_start: int | None = None,
) -> Tensor:
    """Attacked copies of the images, (B, C, H, W), in [-1, 1] and within ``budget`` of the originals.

    Of itself, the start and the ``num_steps`` points after it, each image keeps the one at which the detector's
    surrogate went furthest: an attack never makes the surrogate worse than doing nothing. Whether the score followed is
    for ``detector.score`` to say.

    Args:
        detector: with a gradient; see :attr:`Detector.has_gradient`.
        images: float32 (B, C, H, W) in [-1, 1].
        is_anomaly: bool (B,): True lowers the score of that image, False raises it.
        budget: largest change of a number, in units of [-1, 1]: 2 / 255 is one level of 256.
        num_steps: gradients taken; the surrogate is evaluated once more, twice with a random start.
        random_start: a seed: begin at a random point of the ball, the same for all images. None: at the image.

    Raises:
        ConfigError: the detector has no gradient, or ``budget`` or ``num_steps`` cannot be used.
        ShapeError: there is not one label for each image.
        ScoreError: a gradient is not finite.
    """
    if not 0 < budget <= 2:
        raise ConfigError(f"attack budget is {budget}; it must lie above 0 and not above 2 (images span -1 to 1)")
    if num_steps < 1:
        raise ConfigError(f"attack num_steps is {num_steps}; it must be at least 1")
    if is_anomaly.shape != (len(images),):
        raise ShapeError(f"is_anomaly is {tuple(is_anomaly.shape)}; it must be ({len(images)},), one per image")
    wanted = torch.where(is_anomaly.bool(), -1.0, 1.0).to(images)[:, None, None, None]  # (B, 1, 1, 1)
    step = _STEP_SHARE * budget / num_steps
    low, high = (images - budget).clamp(min=-1), (images + budget).clamp(max=1)
    point = _start(images, budget, random_start).clamp(low, high)
    best, furthest = images, torch.full((len(images),), -torch.inf, device=images.device)
    if random_start is not None:  # the start is another point then
        best, furthest = _further(best, furthest, images, _value(detector, images) * wanted.flatten())
    for _ in range(num_steps):
        value, gradient = _gradient(detector, point)
        best, furthest = _further(best, furthest, point, value * wanted.flatten())
        point = (point + step * wanted * gradient.sign()).clamp(low, high)
    return _further(best, furthest, point, _value(detector, point) * wanted.flatten())[0]


def _start(images: Tensor, budget: float, seed: int | None) -> Tensor:
    if seed is None:
        return images
    generator = torch.Generator().manual_seed(keyed_seed("attack", seed))
    return images + budget * (2 * torch.rand(images.shape[1:], generator=generator) - 1).to(images)


def _gradient(detector: Detector, images: Tensor) -> tuple[Tensor, Tensor]:
    """The surrogate (B,) and its gradient (B, C, H, W), each row's own; a few images at a time, for memory."""
    parts = [_gradient_of_few(detector, few) for few in _few(images)]
    return torch.cat([value for value, _ in parts]), torch.cat([gradient for _, gradient in parts])


def _value(detector: Detector, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([detector.surrogate(few) for few in _few(images)])


def _few(images: Tensor) -> Iterator[Tensor]:
    for start in range(0, len(images), _IMAGES_AT_ONCE):
        yield images[start : start + _IMAGES_AT_ONCE]


def _gradient_of_few(detector: Detector, images: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        point = images.detach().clone().requires_grad_()
        values = detector.surrogate(point)
        (gradient,) = torch.autograd.grad(values.sum(), point)
    if not (bool(values.isfinite().all()) and bool(gradient.isfinite().all())):
        raise ScoreError(f"the gradient of {detector.name} is not finite; the model may have diverged")
    return values.detach(), gradient


def _further(best: Tensor, furthest: Tensor, point: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Row by row the point with the larger value, the earlier of equals."""
    value = value.detach().to(furthest)
    better = value > furthest
    return torch.where(better[:, None, None, None], point, best), torch.where(better, value, furthest)
