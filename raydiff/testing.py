"""For tests, yours and ours: a denoiser whose answers are known, small real images, checks for every component.

The checks take a component's name and, after it, option fields other than the defaults::

    from raydiff.testing import check_scorer
    check_scorer("denoising_error", num_inference_steps=2)

They build the component through the registry and raise ``AssertionError`` with one line that names the component and
what it breaks. raydiff's own tests run them over ``registry.names(kind)``: a new file is tested without being told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raydiff import registry
from raydiff.contracts import Baseline, Dataset, Entry, Perturbation, Perturbed, Scorer, Space
from raydiff.core.diffusion import Diffusion
from raydiff.core.schedule import NoiseSchedule, PredictionType, make_schedule, target
from raydiff.errors import ConfigError
from raydiff.images import ImageSpec, decode, decode_mask, to_uint8

__all__ = [
    "OracleDenoiser",
    "TurnedOracle",
    "check_baseline",
    "check_dataset",
    "check_denoiser",
    "check_perturbation",
    "check_scorer",
    "check_space",
    "planted_defect",
    "small_images",
]

BATCH_SIZES = (1, 2, 3, 7, 16)


class OracleDenoiser:
    """The best possible denoiser for Gaussian data: pixels independent, N(mean, std^2).

    The expected clean image is E[x_0 | x_t] = mean + sqrt(abar) std^2 (x_t - sqrt(abar) mean) / v with the variance
    v = abar std^2 + 1 - abar of x_t, and the expected noise eps* = sqrt(1 - abar) (x_t - sqrt(abar) mean) / v. It is
    called like any denoiser, ignores the condition (see :class:`TurnedOracle`), and computes in float64.

    Args:
        schedule: the noise schedule.
        mean: a number, or a tensor that broadcasts to (C, H, W).
        std: the data's standard deviation, above 0.
        prediction_type: what it returns.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        *,
        mean: float | Tensor = 0.0,
        std: float = 1.0,
        prediction_type: PredictionType = "epsilon",
    ) -> None:
        self.schedule = schedule
        self.mean = torch.as_tensor(mean, dtype=torch.float64)
        self.std = std
        self.prediction_type = prediction_type

    def __call__(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """The exact prediction for ``x_t`` (B, C, H, W) at steps ``t`` (B,), in the dtype of ``x_t``."""
        x, mean = x_t.double(), self.mean_under(condition).to(x_t.device)
        abar = self.schedule.alpha_bar(t, x)  # (B, 1, 1, 1)
        surprise = (x - abar.sqrt() * mean) / (abar * self.std**2 + 1 - abar)
        x0, epsilon = mean + abar.sqrt() * self.std**2 * surprise, (1 - abar).sqrt() * surprise
        return target(self.schedule, x0, t, epsilon, self.prediction_type).to(x_t)

    num_classes: int | None = None

    def mean_under(self, condition: Tensor | None) -> Tensor:  # noqa: ARG002
        """The mean that it believes in, broadcastable to (B, C, H, W)."""
        return self.mean

    def model(self, *, seed: int = 0, chunk_size: int = 16, differentiable: bool = False) -> Diffusion:
        """The oracle as a :class:`raydiff.core.diffusion.Diffusion`, ready for a scorer."""
        return Diffusion(
            self, self.schedule, self.prediction_type, seed=seed, num_classes=self.num_classes, chunk_size=chunk_size,
            differentiable=differentiable,
        )  # fmt: skip

    def sample(self, shape: tuple[int, ...], *, seed: int = 0) -> Tensor:
        """Images (B, C, H, W) from the Gaussian itself, float32."""
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return (self.mean + self.std * noise).float()


class TurnedOracle(OracleDenoiser):
    """The best denoiser for Gaussian data that were turned, when told by how many quarters.

    Label k turns its mean by k quarters; without a label (4, or None) its mean is the average of the four. ``mean`` is
    (C, H, H). Its samples are not turned.
    """

    num_classes = 4

    def mean_under(self, condition: Tensor | None) -> Tensor:
        """The turned mean of each row, (B, C, H, H)."""
        turned = torch.stack([torch.rot90(self.mean, k, (-2, -1)) for k in range(4)])
        means = torch.cat([turned, turned.mean(0, keepdim=True)])
        return means[4] if condition is None else means[condition.cpu()]


def small_images(n: int, size: tuple[int, int] = (8, 8), channels: int = 1, seed: int = 0) -> Tensor:
    """Real images, float32 (n, channels, *size) in [-1, 1]: handwritten digits of scikit-learn, drawn by ``seed``.

    With three channels each is another brightness of the same digit. There are 1797; beyond that they repeat.
    """
    from sklearn.datasets import load_digits

    digits = torch.from_numpy(load_digits().images / 8 - 1).float()[:, None]  # (1797, 1, 8, 8)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
    images = digits[order[torch.arange(n) % len(digits)]]
    if size != (8, 8):
        images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
    return torch.cat([(images + 1) * (1 - 0.25 * channel) - 1 for channel in range(channels)], dim=1).clamp(-1, 1)


def planted_defect(images: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Copies of the images with a patch of about a third of each side thrown to the other end of the grey scale.

    Returns:
        The images, (B, C, H, W): every number in the patch has moved by 1 or more. And the patches, bool (B, 1, H, W).
    """
    height, width = images.shape[-2:]
    sides = max(1, height // 3), max(1, width // 3)
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(len(images), 1, height, width, dtype=torch.bool)
    for mask in masks:
        top = int(torch.randint(height - sides[0] + 1, (), generator=generator))
        left = int(torch.randint(width - sides[1] + 1, (), generator=generator))
        mask[:, top : top + sides[0], left : left + sides[1]] = True
    return torch.where(masks, torch.where(images > 0, -1.0, 1.0), images), masks


def check_denoiser(name: str, **fields: Any) -> None:
    """Shapes, gradients, weights that save and load, steps and labels that matter, rows that stand alone."""
    what = f"denoiser {name!r}"
    for channels, size in ((1, (8, 8)), (3, (16, 16)), (1, (16, 8))):
        denoiser = _denoiser(name, fields, channels, size)
        if denoiser is None:
            _require(size[0] != size[1], f"{what}: refuses square images of {size}")
            continue
        _check_forward(what, denoiser, _noisy(3, channels, size))
    odd = _denoiser(name, fields, 1, (7, 5))
    if odd is not None:
        _check_forward(what, odd, _noisy(2, 1, (7, 5)))
    _check_weights(what, name, fields)
    _check_denoiser_rows(what, name, fields)


def check_scorer(name: str, **fields: Any) -> None:
    """Evidence and maps of the right shape, rows that stand alone, gradients, an honest NFE, and a defect found.

    A scorer whose ``check`` refuses an unconditional denoiser gets one that is told of quarter turns.
    """
    what = f"scorer {name!r}"
    scorer: Scorer = _build("scorers", name, fields)
    conditional = _needs_condition(scorer)
    for prediction_type in ("epsilon", "sample", "v_prediction"):
        oracle = _oracle((1, 8, 8), prediction_type, conditional=conditional)
        with _untouched_generators(what):
            _check_finds_defect(what, scorer, oracle)
    for shape in ((1, 8, 8), (3, 16, 16) if conditional else (3, 8, 16)):
        oracle = _oracle(shape, "epsilon", conditional=conditional)
        _check_evidence(what, scorer, oracle, shape)
        _check_scorer_rows(what, scorer, oracle, shape)
        _check_gradients(what, scorer, oracle, shape)


def check_baseline(name: str, **fields: Any) -> None:
    """Scores of the right shape, rows that stand alone, a state that restores every bit, planted defects found."""
    what = f"baseline {name!r}"
    for channels, size in ((1, (8, 8)), (3, (48, 24))):
        train, images = small_images(60, size, channels, seed=1), small_images(16, size, channels, seed=2)
        with _untouched_generators(what):
            baseline: Baseline = _build("baselines", name, fields, seed=5)
            baseline.fit(train)
            scores = baseline.score(images)
        _require(tuple(scores.image.shape) == (16,), f"{what}: 16 images gave scores {tuple(scores.image.shape)}")
        _require(
            scores.image.is_floating_point() and bool(scores.image.isfinite().all()), f"{what}: a score not finite"
        )
        _require(bool((scores.image != scores.image[0]).any()), f"{what}: all images score the same")
        if scores.map is not None:
            _require(tuple(scores.map.shape) == (16, 1, *size), f"{what}: maps are {tuple(scores.map.shape)}")
        _check_rows(what, lambda x, b=baseline: _tensors(b.score(x)), images)  # type: ignore[misc]
        _check_baseline_state(what, name, fields, baseline, train, images)
        defective, _ = planted_defect(images)
        gain = baseline.score(defective).image - baseline.score(images).image
        _require(float(gain.mean()) > 0, f"{what}: planted defects score lower than their clean twins on average")


def check_space(name: str, *, channels: int = 1, image_size: tuple[int, int] = (8, 8), **fields: Any) -> None:
    """Shapes both ways, images in [-1, 1] on the way back, rows that stand alone."""
    what = f"space {name!r}"
    images = small_images(16, image_size, channels)
    space: Space = _build("spaces", name, fields, channels=channels, image_size=image_size)
    with _untouched_generators(what):
        if space.num_fit_images:
            space.check()
            space.fit(small_images(32, image_size, channels, seed=1)[: space.num_fit_images])
        latents = space.encode(images)
    _require(
        tuple(latents.shape) == (16, *space.shape), f"{what}: encodes to {tuple(latents.shape)}, not {space.shape}"
    )
    _require(bool(latents.isfinite().all()), f"{what}: encodes to numbers that are not finite")
    _check_rows(what, lambda x: [space.encode(x)], images)
    decoded = space.decode(latents)
    if decoded is not None:
        _require(decoded.shape == images.shape, f"{what}: decodes to {tuple(decoded.shape)}")
        _require(bool((decoded.abs() <= 1).all()), f"{what}: decodes to images outside [-1, 1]")
        _check_rows(what, lambda x: [torch.as_tensor(space.decode(x))], latents)
    state = space.state()
    _require(all(isinstance(value, Tensor) for value in state.values()), f"{what}: its state is not tensors")
    restored: Space = _build("spaces", name, fields, channels=channels, image_size=image_size)
    restored.load_state(state)
    _require(torch.equal(restored.encode(images), latents), f"{what}: encodes otherwise after state and load_state")


def check_dataset(name: str, **fields: Any) -> None:
    """The same entries each time, unique ids, training images all normal, files that are there.

    Give the option that says where the files lie, for data sets that need one: ``check_dataset("folder", root=...)``.
    """
    what = f"dataset {name!r}"
    dataset, again = (_build("datasets", name, fields) for _ in range(2))
    entries = dataset.entries()
    _require(
        entries == dataset.entries() == again.entries(), f"{what}: lists other entries, or in another order, twice"
    )
    ids = [entry.image_id for entry in entries]
    _require(len(set(ids)) == len(ids), f"{what}: an image_id appears more than once")
    _require({entry.split for entry in entries} <= {"train", "test"}, f"{what}: has splits besides train and test")
    for split in ("train", "test"):
        _require(any(entry.split == split for entry in entries), f"{what}: has no {split} images")
    for entry in entries:
        _require(entry.split == "test" or not entry.is_anomaly, f"{what}: {entry.image_id} is anomalous and in train")
        _require(
            entry.is_anomaly == (entry.defect != "good"),
            f"{what}: {entry.image_id} has defect {entry.defect!r} and is_anomaly {entry.is_anomaly}",
        )
        _require(entry.size > 0, f"{what}: {entry.image_id} has size {entry.size}")
    _check_files(what, dataset, again, entries)


def check_perturbation(name: str, **fields: Any) -> None:
    """Images of the same shape that depend on image and id alone, and change more as it grows severe; honest masks."""
    what = f"perturbation {name!r}"
    for channels, size in ((1, (8, 8)), (3, (48, 24)), (1, (7, 33))):
        images = to_uint8(small_images(12, size, channels, seed=1))
        ids = [f"image-{i}" for i in range(len(images))]
        changes = []
        for severity in (1, 2, 3, 4, 5):
            changed = _check_perturbed(what, name, fields, images, ids, severity)
            changes.append(float(np.abs(changed.images.astype(float) - images).mean()))
        _require(
            changes[4] > changes[0] > 0,
            f"{what}: changes images of {size} by {changes[0]:.3g} at severity 1 and by {changes[4]:.3g} at 5",
        )
        for severity in (0, 6):
            try:
                _build("perturbations", name, fields).apply(images, severity=severity, ids=ids)
            except ConfigError:
                continue
            _require(False, f"{what}: takes severity {severity}")


def _check_perturbed(
    what: str, name: str, fields: dict[str, Any], images: Any, ids: Sequence[str], severity: int
) -> Perturbed:
    perturbation: Perturbation = _build("perturbations", name, fields)

    def apply(rows: Sequence[int], by: Perturbation = perturbation) -> Perturbed:
        return by.apply(images[list(rows)], severity=severity, ids=[ids[row] for row in rows])

    count, before = len(images), images.copy()
    with _untouched_generators(what):
        whole = perturbation.apply(images, severity=severity, ids=ids)
    _require(np.array_equal(images, before), f"{what}: writes into the images it is given")
    same = whole.images.shape == images.shape and whole.images.dtype == np.uint8
    _require(same, f"{what}: turns uint8 {images.shape} into {whole.images.dtype} {whole.images.shape}")
    again = _build("perturbations", name, fields)
    for order in (range(count), range(count - 1, -1, -1), [count // 2], range(0, count, 3)):
        part = apply(order, again)
        _require(np.array_equal(part.images, whole.images[list(order)]), f"{what}: depends on order or batch-mates")
        if whole.masks is not None and part.masks is not None:
            _require(np.array_equal(part.masks, whole.masks[list(order)]), f"{what}: its masks depend on batch-mates")
    others = perturbation.apply(images, severity=severity, ids=[f"other-{image_id}" for image_id in ids])
    if "seed" in registry.component("perturbations", name).Options.model_fields:
        _require(not np.array_equal(others.images, whole.images), f"{what}: draws the same for every id")
    else:
        _require(np.array_equal(others.images, whole.images), f"{what}: has no seed, and depends on the id")
    changed = (whole.images != images).any(-1)
    if perturbation.kind == "corruption":
        _require(whole.masks is None, f"{what}: is a corruption and gives masks")
        return whole
    masks = whole.masks
    if masks is None or masks.dtype != np.bool_ or masks.shape != images.shape[:3]:
        raise AssertionError(f"{what}: makes anomalies, and its masks are not bool (B, H, W)")
    _require(bool(masks.any((1, 2)).all()), f"{what}: marks no pixel of an image")
    _require(bool((changed & masks).any((1, 2)).all()), f"{what}: leaves an image as it is")
    _require(not (changed & ~masks).any(), f"{what}: changes pixels that it does not mark")
    return whole


def _check_forward(what: str, denoiser: nn.Module, x_t: Tensor) -> None:
    t = torch.arange(len(x_t)) * 7
    output = denoiser(x_t, t, None)
    _require(output.shape == x_t.shape, f"{what}: turns {tuple(x_t.shape)} into {tuple(output.shape)}")
    _require(bool(output.isfinite().all()), f"{what}: gives numbers that are not finite")
    (output - x_t).square().mean().backward()
    unreached = [key for key, p in denoiser.named_parameters() if p.requires_grad and p.grad is None]
    _require(not unreached, f"{what}: no gradient reaches {unreached[:1]}")
    _require(
        any(bool(p.grad.any()) for p in denoiser.parameters() if p.grad is not None), f"{what}: no gradient at all"
    )


def _check_weights(what: str, name: str, fields: dict[str, Any]) -> None:
    x_t, t = _noisy(3, 1, (8, 8)), torch.tensor([0, 40, 90])
    first, same, other = (_denoiser(name, fields, 1, (8, 8), seed=seed) for seed in (0, 0, 1))
    assert first is not None and same is not None and other is not None  # noqa: S101, PT018  square images were built before
    weights = first.state_dict()
    for key, value in same.state_dict().items():
        _require(torch.equal(weights[key], value), f"{what}: {key} differs between two builds from the same seed")
    _perturb(first)
    other.load_state_dict(first.state_dict())
    first.eval(), other.eval()
    with torch.inference_mode():
        output = first(x_t, t, None)
        _require(torch.equal(output, other(x_t, t, None)), f"{what}: weights loaded into another give another output")
        _require(not torch.equal(output, first(x_t, t.flip(0), None)), f"{what}: the step does not change the output")


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
            _require(torch.equal(torch.cat(parts), whole), f"{what}: another output in batches of {size}")
        if num_classes is not None:
            labelled = model.predict(x_t, t, torch.zeros_like(t))
            _require(not torch.equal(labelled, whole), f"{what}: the label does not change the output")


def _check_finds_defect(what: str, scorer: Scorer, oracle: OracleDenoiser) -> None:
    model, shape = oracle.model(), (1, 8, 8)
    statistics = scorer.fit(scorer.measure(model, oracle.sample((64, *shape), seed=1)))
    _require(all(isinstance(v, Tensor) for v in statistics.values()), f"{what}: its statistics are not tensors")
    clean = oracle.sample((16, *shape), seed=2)
    defective = planted_defect(clean)[0] if oracle.num_classes is None else _half_upside_down(clean)
    low, high = (scorer.judge(scorer.measure(model, x), statistics, (8, 8)).image for x in (clean, defective))
    lost = int((high <= low).sum())
    _require(
        lost == 0,
        f"{what}: {lost} of 16 planted defects score no higher than their clean twins ({oracle.prediction_type})",
    )


def _check_evidence(what: str, scorer: Scorer, oracle: OracleDenoiser, shape: tuple[int, int, int]) -> None:
    counter = _Counter(oracle)
    model = Diffusion(counter, oracle.schedule, oracle.prediction_type, num_classes=oracle.num_classes)
    x = oracle.sample((model.chunk_size, *shape), seed=3)
    evidence = scorer.measure(model, x)
    _require(
        evidence.ndim == 4 and len(evidence) == len(x), f"{what}: evidence is {tuple(evidence.shape)}, not (B, K, H, W)"
    )
    _require(evidence.dtype == torch.float32, f"{what}: evidence is {evidence.dtype}, not float32")
    _require(bool(evidence.isfinite().all()), f"{what}: evidence is not finite")
    spent, claimed = counter.rows / len(x), scorer.num_evaluations(model)
    _require(spent == claimed, f"{what}: says it costs {claimed} evaluations per image and spends {spent:g}")
    for size in (tuple(shape[1:]), (shape[1] * 2, shape[2] * 3)):
        scores = scorer.judge(evidence, scorer.fit(evidence), (size[0], size[1]))
        _require(tuple(scores.image.shape) == (len(x),), f"{what}: scores are {tuple(scores.image.shape)}")
        _require(bool(scores.image.isfinite().all()), f"{what}: a score is not finite")
        if scores.map is not None:
            _require(
                tuple(scores.map.shape) == (len(x), 1, *size), f"{what}: maps are {tuple(scores.map.shape)} for {size}"
            )
            _require(bool(scores.map.isfinite().all()), f"{what}: a map is not finite")
    reconstruction = scorer.reconstruct(model, x)
    if reconstruction is not None:
        _require(reconstruction.shape == x.shape, f"{what}: reconstructs {tuple(reconstruction.shape)}")
        _require(bool(reconstruction.isfinite().all()), f"{what}: reconstructs numbers that are not finite")


def _check_scorer_rows(what: str, scorer: Scorer, oracle: OracleDenoiser, shape: tuple[int, int, int]) -> None:
    model, size = oracle.model(), (shape[1] * 2, shape[2] * 2)
    x = oracle.sample((16, *shape), seed=4)
    statistics = scorer.fit(scorer.measure(model, oracle.sample((20, *shape), seed=5)))
    _check_rows(f"{what} (measure)", lambda rows: [scorer.measure(model, rows)], x)
    _check_rows(
        f"{what} (judge)", lambda rows: _tensors(scorer.judge(rows, statistics, size)), scorer.measure(model, x)
    )
    other_seed = scorer.fit(scorer.measure(oracle.model(seed=1), x))
    _require(other_seed.keys() == statistics.keys(), f"{what}: the names of its statistics depend on the data")


def _check_gradients(what: str, scorer: Scorer, oracle: OracleDenoiser, shape: tuple[int, int, int]) -> None:
    """Scores can be attacked: gradients reach the images, through a surrogate that is the score up to rounding."""
    statistics = scorer.fit(scorer.measure(oracle.model(), oracle.sample((40, *shape), seed=6)))
    x = oracle.sample((5, *shape), seed=7).clamp(-1, 1).requires_grad_()
    evidence = scorer.measure(oracle.model(differentiable=True), x)
    surrogate = scorer.surrogate(evidence, statistics)
    expected = scorer.judge(evidence, statistics, shape[1:]).image
    far = float(((surrogate.detach() - expected).abs() / (expected.abs() + 1e-3)).max())
    _require(far < 1e-4, f"{what}: its surrogate is {far:.1g} away from its score")
    surrogate.sum().backward()  # type: ignore[no-untyped-call]
    _require(x.grad is not None and bool(x.grad.isfinite().all()), f"{what}: no finite gradient reaches the image")
    reached = torch.as_tensor(x.grad).flatten(1).any(1)
    _require(bool(reached.all()), f"{what}: the gradient is zero for {int((~reached).sum())} of {len(x)} images")


def _needs_condition(scorer: Scorer) -> bool:
    try:
        scorer.check(None)
    except ConfigError:
        return True
    return False


def _half_upside_down(images: Tensor) -> Tensor:
    """The left half is that of the image turned by two quarters: right for no condition."""
    half = images.shape[-1] // 2
    return torch.cat([torch.rot90(images, 2, (-2, -1))[..., :half], images[..., half:]], -1)


def _check_baseline_state(
    what: str, name: str, fields: dict[str, Any], baseline: Baseline, train: Tensor, images: Tensor
) -> None:
    from safetensors.torch import load, save

    expected = _tensors(baseline.score(images))
    state = load(save({key: value.contiguous() for key, value in baseline.state().items()}))
    restored, again = (_build("baselines", name, fields, seed=5) for _ in range(2))
    restored.load_state(state)
    again.fit(train)
    _require(_equal(_tensors(restored.score(images)), expected), f"{what}: scores differ after state and load_state")
    _require(_equal(_tensors(again.score(images)), expected), f"{what}: the same seed and images fit to other scores")
    second = restored.state()
    _require(
        second.keys() == state.keys() and all(torch.equal(second[key], state[key]) for key in state),
        f"{what}: the state of a restored one is another state",
    )


def _check_files(what: str, dataset: Dataset, again: Dataset, entries: Sequence[Entry]) -> None:
    """A few files of each split and class: images that decode, and the same through another instance."""
    spec = ImageSpec((16, 16), channels=3)
    first = {(entry.split, entry.class_name, entry.defect): entry for entry in reversed(entries)}
    for entry in [*list(first.values())[:20], entries[-1]]:
        image, mask = dataset.read(entry)
        _require(len(image) > 0, f"{what}: {entry.image_id} is an empty file")
        _require((image, mask) == again.read(entry), f"{what}: {entry.image_id} reads differently twice")
        _require(mask is None or entry.is_anomaly, f"{what}: {entry.image_id} is normal and has a mask")
        pixels = decode(image, spec, entry.image_id)
        _require(pixels.shape == (16, 16, 3), f"{what}: {entry.image_id} decodes to {pixels.shape}")
        if mask is not None:
            marked = decode_mask(mask, spec, entry.image_id)
            _require(bool(marked.any()), f"{what}: the mask of {entry.image_id} is empty")


def _check_rows(what: str, score: Callable[[Tensor], list[Tensor]], rows: Tensor) -> None:
    """Contract 1: row i of the result is a function of row i, bit for bit, whatever is around it."""
    whole = score(rows)
    _require(_equal(score(rows), whole), f"{what}: a second call gives other numbers")
    for size in BATCH_SIZES:
        parts = [score(rows[i : i + size]) for i in range(0, len(rows), size)]
        joined = [torch.cat(pieces) for pieces in zip(*parts, strict=True)]
        _require(_equal(joined, whole), f"{what}: batches of {size} give other numbers than one batch of {len(rows)}")
    backwards = [result.flip(0) for result in score(rows.flip(0))]
    _require(_equal(backwards, whole), f"{what}: the order of the rows changes the numbers")
    neighbours = torch.cat([rows[:1], rows[1:].flip(0) * 0.5])
    _require(_equal([r[:1] for r in score(neighbours)], [r[:1] for r in whole]), f"{what}: depends on its neighbours")
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(score, [rows] * 4):
            _require(_equal(result, whole), f"{what}: four threads at once give other numbers")


class _Counter:
    """A denoiser that counts the rows it is asked for."""

    def __init__(self, denoiser: OracleDenoiser) -> None:
        self.denoiser = denoiser
        self.rows = 0

    def __call__(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        self.rows += len(x_t)
        return self.denoiser(x_t, t, condition)


@contextmanager
def _untouched_generators(what: str) -> Iterator[None]:
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    yield
    _require(torch.equal(torch.get_rng_state(), before), f"{what}: draws from torch's global generator")
    same = np.array_equal(np.random.get_state()[1], before_numpy)  # type: ignore[index]
    _require(same, f"{what}: draws from numpy's global generator")


def _build(kind: registry.Kind, name: str, fields: dict[str, Any], **arguments: Any) -> Any:
    return registry.build(kind, registry.component(kind, name).Options(**fields), **arguments)


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
            module: nn.Module = _build(
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


def _oracle(
    shape: tuple[int, int, int], prediction_type: PredictionType, *, conditional: bool = False
) -> OracleDenoiser:
    """For images like faint digits with pixel noise: a mean within [-0.5, 0.5] and a deviation of 0.2."""
    mean = small_images(1, (shape[1], shape[2]), shape[0])[0] * 0.5  # (C, H, W)
    kind = TurnedOracle if conditional else OracleDenoiser
    return kind(make_schedule("squaredcos_cap_v2", 50), mean=mean, std=0.2, prediction_type=prediction_type)


def _tensors(scores: Any) -> list[Tensor]:
    return [scores.image] if scores.map is None else [scores.image, scores.map]


def _equal(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
