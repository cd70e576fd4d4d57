"""What every baseline must do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raydiff.contracts import Baseline
from raydiff.detector.sharing import BaselineOnBackbone
from raydiff.testing._rows import build, check_rows, equal, require, tensors, untouched_generators
from raydiff.testing.images import planted_defect, small_images

__all__ = ["check_baseline"]


def check_baseline(name: str, **fields: Any) -> None:
    """Scores of the right shape, rows that stand alone, a state that restores every bit, planted defects found."""
    what = f"baseline {name!r}"
    for channels, size in ((1, (8, 8)), (3, (48, 24))):
        train, images = small_images(60, size, channels, seed=1), small_images(16, size, channels, seed=2)
        with untouched_generators(what):
            baseline: Baseline = build("baselines", name, fields, seed=5)
            baseline.check()
            baseline.fit(train)
            scores = baseline.score(images)
        require(tuple(scores.image.shape) == (16,), f"{what}: 16 images gave scores {tuple(scores.image.shape)}")
        require(scores.image.is_floating_point() and bool(scores.image.isfinite().all()), f"{what}: a score not finite")
        require(bool((scores.image != scores.image[0]).any()), f"{what}: all images score the same")
        if scores.map is not None:
            require(tuple(scores.map.shape) == (16, 1, *size), f"{what}: maps are {tuple(scores.map.shape)}")
        check_rows(what, lambda x, b=baseline: tensors(b.score(x)), images)  # type: ignore[misc]
        if isinstance(baseline, BaselineOnBackbone):
            seen = baseline.scored(baseline.backbone(images, baseline.head(images)))
            require(equal(tensors(seen), tensors(scores)), f"{what}: scores otherwise than what its head sees")
        _check_baseline_state(what, name, fields, baseline, train, images)
        defective, _ = planted_defect(images)
        gain = baseline.score(defective).image - baseline.score(images).image
        require(float(gain.mean()) > 0, f"{what}: planted defects score lower than their clean twins on average")


def _check_baseline_state(
    what: str, name: str, fields: dict[str, Any], baseline: Baseline, train: Tensor, images: Tensor
) -> None:
    from safetensors.torch import load, save

    expected = tensors(baseline.score(images))
    state = load(save({key: value.contiguous() for key, value in baseline.state().items()}))
    restored, again = (build("baselines", name, fields, seed=5) for _ in range(2))
    restored.load_state(state)
    again.fit(train)
    require(equal(tensors(restored.score(images)), expected), f"{what}: scores differ after state and load_state")
    require(equal(tensors(again.score(images)), expected), f"{what}: the same seed and images fit to other scores")
    second = restored.state()
    require(
        second.keys() == state.keys() and all(torch.equal(second[key], state[key]) for key in state),
        f"{what}: the state of a restored one is another state",
    )
