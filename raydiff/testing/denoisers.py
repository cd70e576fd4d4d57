"""What every denoiser must do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from raydiff.core.diffusion import Diffusion
from raydiff.core.schedule import make_schedule
from raydiff.errors import ConfigError
from raydiff.testing._rows import BATCH_SIZES, build, require

__all__ = ["check_denoiser"]


def check_denoiser(name: str, **fields: Any) -> None:
    """Shapes, gradients, weights that save and load, steps and labels that matter, rows that stand alone."""
    what = f"denoiser {name!r}"
    for channels, size in ((1, (8, 8)), (3, (16, 16)), (1, (16, 8))):
        denoiser = _denoiser(name, fields, channels, size)
        if denoiser is None:
            require(size[0] != size[1], f"{what}: refuses square images of {size}")
            continue
        _check_forward(what, denoiser, _noisy(3, channels, size))
    odd = _denoiser(name, fields, 1, (7, 5))
    if odd is not None:
        _check_forward(what, odd, _noisy(2, 1, (7, 5)))
    _check_weights(what, name, fields)
    _check_denoiser_rows(what, name, fields)


def _check_forward(what: str, denoiser: nn.Module, x_t: Tensor) -> None:
    t = torch.arange(len(x_t)) * 7
    output = denoiser(x_t, t, None)
    require(output.shape == x_t.shape, f"{what}: turns {tuple(x_t.shape)} into {tuple(output.shape)}")
    require(bool(output.isfinite().all()), f"{what}: gives numbers that are not finite")
    (output - x_t).square().mean().backward()
    unreached = [key for key, p in denoiser.named_parameters() if p.requires_grad and p.grad is None]
    require(not unreached, f"{what}: no gradient reaches {unreached[:1]}")
    require(any(bool(p.grad.any()) for p in denoiser.parameters() if p.grad is not None), f"{what}: no gradient at all")


def _check_weights(what: str, name: str, fields: dict[str, Any]) -> None:
    x_t, t = _noisy(3, 1, (8, 8)), torch.tensor([0, 40, 90])
    first, same, other = (_denoiser(name, fields, 1, (8, 8), seed=seed) for seed in (0, 0, 1))
    assert first is not None and same is not None and other is not None  # noqa: S101, PT018  square images were built before
    weights = first.state_dict()
    for key, value in same.state_dict().items():
        require(torch.equal(weights[key], value), f"{what}: {key} differs between two builds from the same seed")
    _perturb(first)
    other.load_state_dict(first.state_dict())
    first.eval(), other.eval()
    with torch.inference_mode():
        output = first(x_t, t, None)
        require(torch.equal(output, other(x_t, t, None)), f"{what}: weights loaded into another give another output")
        require(not torch.equal(output, first(x_t, t.flip(0), None)), f"{what}: the step does not change the output")


def _check_denoiser_rows(what: str, name: str, fields: dict[str, Any]) -> None:
    for num_classes in (None, 4):
        denoiser = _denoiser(name, fields, 1, (8, 8), num_classes=num_classes)
        assert denoiser is not None  # noqa: S101  square images were built before
        _perturb(denoiser)
        schedule = make_schedule("linear", 100)
        model = Diffusion(denoiser.eval(), schedule, "epsilon", num_classes=num_classes)
        x_t, t = _noisy(33, 1, (8, 8)), torch.arange(33) * 3
        whole = model.predict(x_t, t)
        for size in (*BATCH_SIZES, 33):
            parts = [model.predict(x_t[i : i + size], t[i : i + size]) for i in range(0, 33, size)]
            require(torch.equal(torch.cat(parts), whole), f"{what}: another output in batches of {size}")
        if num_classes is not None:
            labelled = model.predict(x_t, t, torch.zeros_like(t))
            require(not torch.equal(labelled, whole), f"{what}: the label does not change the output")


def _denoiser(
    name: str,
    fields: dict[str, Any],
    channels: int,
    size: tuple[int, int],
    *,
    num_classes: int | None = None,
    seed: int = 0,
) -> nn.Module | None:
    """A seeded one, or None where it refuses the image size."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            module: nn.Module = build(
                "denoisers", name, fields, channels=channels, image_size=size, num_classes=num_classes
            )
        except ConfigError:
            return None
    return module


def _perturb(denoiser: nn.Module) -> None:
    """Move every weight a little: layers that start at zero would hide what flows through them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def _noisy(n: int, channels: int, size: tuple[int, int]) -> Tensor:
    return torch.randn(n, channels, *size, generator=torch.Generator().manual_seed(n))
