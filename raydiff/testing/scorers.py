"""What every scorer must do, asked with a denoiser that is always right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raydiff import registry
from raydiff.contracts import Scorer, StepScorer
from raydiff.core.diffusion import Diffusion
from raydiff.core.schedule import PredictionType, make_schedule
from raydiff.errors import ConfigError
from raydiff.judgement import Judge
from raydiff.planting import TrainedScorer
from raydiff.testing._rows import build, check_rows, equal, require, tensors, untouched_generators
from raydiff.testing.examples import LatentExamples
from raydiff.testing.images import planted_defect, small_images
from raydiff.testing.oracle import CorrectingOracle, OracleDenoiser, TurnedOracle

__all__ = ["check_scorer"]


def check_scorer(name: str, **fields: Any) -> None:
    """Evidence and maps of the right shape, rows that stand alone, gradients, an honest NFE, and a defect found.

    Of a :class:`raydiff.contracts.StepScorer` also that steps stand alone. A :class:`raydiff.planting.TrainedScorer`
    is trained first, twice: to the same weights.
    A scorer whose ``check`` refuses an unconditional denoiser gets one that is told of quarter turns.
    """
    what = f"scorer {name!r}"
    scorer: Scorer = build("scorers", name, fields)
    conditional = _needs_condition(scorer)
    for prediction_type in _prediction_types(scorer):
        oracle = _oracle((1, 8, 8), prediction_type, conditional=conditional)
        with untouched_generators(what):
            scorer = _trained(what, name, fields, oracle, (1, 8, 8))
            _check_finds_defect(what, scorer, oracle)
    for shape in ((1, 8, 8), (3, 16, 16) if conditional else (3, 8, 16)):
        oracle = _oracle(shape, _prediction_types(scorer)[0], conditional=conditional)
        scorer = _trained(what, name, fields, oracle, shape, steps=3)
        _check_training(what, name, fields, oracle, shape)
        _check_evidence(what, scorer, oracle, shape)
        _check_scorer_rows(what, scorer, oracle, shape)
        _check_gradients(what, scorer, oracle, shape)
        if isinstance(scorer, StepScorer):
            _check_steps(what, scorer, _at_other_steps(name, fields), oracle, shape)


def _trained(
    what: str, name: str, fields: dict[str, Any], oracle: OracleDenoiser, shape: tuple[int, int, int], steps: int = 80
) -> Scorer:
    """A new scorer, trained on the oracle's images and planted defects if it is one that is trained."""
    given = {"num_steps": steps} if "num_steps" in registry.component("scorers", name).Options.model_fields else {}
    scorer: Scorer = build("scorers", name, {**fields, **given})
    if not isinstance(scorer, TrainedScorer):
        return scorer
    require(not scorer.is_trained and not scorer.state(), f"{what}: has weights before it was trained")
    clean = oracle.sample((24, *shape), seed=9)
    defective, masks = planted_defect(clean, seed=1)
    examples = LatentExamples(torch.cat([clean, defective]), torch.cat([~masks & masks, masks]), len(clean))
    scorer.train(oracle.model(), examples, lambda _: None)
    require(scorer.is_trained and bool(scorer.state()), f"{what}: has no weights after it was trained")
    return scorer


def _check_training(
    what: str, name: str, fields: dict[str, Any], oracle: OracleDenoiser, shape: tuple[int, int, int]
) -> None:
    """The same examples give the same weights, and restored ones the same evidence."""
    first, second = (_trained(what, name, fields, oracle, shape, steps=2) for _ in range(2))
    if not isinstance(first, TrainedScorer):
        return
    one, other = first.state(), second.state()
    same = one.keys() == other.keys() and equal(list(one.values()), [other[key] for key in one])
    require(same, f"{what}: is trained to other weights by the same examples")
    restored: Scorer = build("scorers", name, fields)
    restored.load_state(one)
    model, x = oracle.model(), oracle.sample((3, *shape), seed=10)
    require(equal([restored.measure(model, x)], [first.measure(model, x)]), f"{what}: measures otherwise when restored")


def _prediction_types(scorer: Scorer) -> tuple[PredictionType, ...]:
    known: tuple[PredictionType, ...] = getattr(scorer, "prediction_types", Judge.prediction_types)
    return known


def _needs_condition(scorer: Scorer) -> bool:
    try:
        scorer.check(None, "pixel")
    except ConfigError:
        return True
    return False


def _at_other_steps(name: str, fields: dict[str, Any]) -> StepScorer:
    """The scorer with other values of the options that choose the steps, as far as it has them."""
    known = registry.component("scorers", name).Options.model_fields
    others = {"num_inference_steps": 1, "start": 0.3, "early_exit": None}
    scorer: StepScorer = build("scorers", name, {**fields, **{k: v for k, v in others.items() if k in known}})
    return scorer


def _oracle(
    shape: tuple[int, int, int], prediction_type: PredictionType, *, conditional: bool = False
) -> OracleDenoiser:
    """For images like faint digits with pixel noise: a mean within [-0.5, 0.5] and a deviation of 0.2."""
    mean = small_images(1, (shape[1], shape[2]), shape[0])[0] * 0.5  # (C, H, W)
    schedule = make_schedule("squaredcos_cap_v2", 50)
    if prediction_type == "deviation":
        return CorrectingOracle(schedule, mean=mean, std=0.2)
    kind = TurnedOracle if conditional else OracleDenoiser
    return kind(schedule, mean=mean, std=0.2, prediction_type=prediction_type)


def _check_finds_defect(what: str, scorer: Scorer, oracle: OracleDenoiser) -> None:
    model, shape = oracle.model(), (1, 8, 8)
    statistics = scorer.fit(scorer.measure(model, oracle.sample((64, *shape), seed=1)))
    require(all(isinstance(v, Tensor) for v in statistics.values()), f"{what}: its statistics are not tensors")
    clean = oracle.sample((16, *shape), seed=2)
    defective = planted_defect(clean)[0] if oracle.num_classes is None else _half_upside_down(clean)
    low, high = (scorer.judge(scorer.measure(model, x), statistics, (8, 8)).image for x in (clean, defective))
    lost = int((high <= low).sum())
    require(
        lost == 0,
        f"{what}: {lost} of 16 planted defects score no higher than their clean twins ({oracle.prediction_type})",
    )


def _half_upside_down(images: Tensor) -> Tensor:
    """The left half is that of the image turned by two quarters: right for no condition."""
    half = images.shape[-1] // 2
    return torch.cat([torch.rot90(images, 2, (-2, -1))[..., :half], images[..., half:]], -1)


def _check_evidence(what: str, scorer: Scorer, oracle: OracleDenoiser, shape: tuple[int, int, int]) -> None:
    counter = _Counter(oracle)
    model = Diffusion(counter, oracle.schedule, oracle.prediction_type, num_classes=oracle.num_classes)
    x = oracle.sample((16, *shape), seed=3)  # whole calls, so that no padding is counted
    evidence = scorer.measure(model, x)
    require(
        evidence.ndim == 4 and len(evidence) == len(x), f"{what}: evidence is {tuple(evidence.shape)}, not (B, K, H, W)"
    )
    require(evidence.dtype == torch.float32, f"{what}: evidence is {evidence.dtype}, not float32")
    require(bool(evidence.isfinite().all()), f"{what}: evidence is not finite")
    spent, claimed = counter.rows / len(x), scorer.num_evaluations(model)
    require(spent == claimed, f"{what}: says it costs {claimed} evaluations per image and spends {spent:g}")
    statistics = scorer.fit(evidence)
    plain = scorer.judge(evidence, statistics, shape[1:]).image
    for size in (tuple(shape[1:]), (shape[1] * 2, shape[2] * 3)):
        scores = scorer.judge(evidence, statistics, (size[0], size[1]))
        require(equal([scores.image], [plain]), f"{what}: image scores depend on the size of the maps")
        require(tuple(scores.image.shape) == (len(x),), f"{what}: scores are {tuple(scores.image.shape)}")
        require(bool(scores.image.isfinite().all()), f"{what}: a score is not finite")
        if scores.map is not None:
            require(
                tuple(scores.map.shape) == (len(x), 1, *size), f"{what}: maps are {tuple(scores.map.shape)} for {size}"
            )
            require(bool(scores.map.isfinite().all()), f"{what}: a map is not finite")
    reconstruction = scorer.reconstruct(model, x)
    if reconstruction is not None:
        require(reconstruction.shape == x.shape, f"{what}: reconstructs {tuple(reconstruction.shape)}")
        require(bool(reconstruction.isfinite().all()), f"{what}: reconstructs numbers that are not finite")


class _Counter:
    """A denoiser that counts the rows it is asked for."""

    def __init__(self, denoiser: OracleDenoiser) -> None:
        self.denoiser = denoiser
        self.rows = 0

    def __call__(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        self.rows += len(x_t)
        return self.denoiser(x_t, t, condition)


def _check_scorer_rows(what: str, scorer: Scorer, oracle: OracleDenoiser, shape: tuple[int, int, int]) -> None:
    model, size = oracle.model(), (shape[1] * 2, shape[2] * 2)
    x = oracle.sample((16, *shape), seed=4)
    statistics = scorer.fit(scorer.measure(model, oracle.sample((20, *shape), seed=5)))
    check_rows(f"{what} (measure)", lambda rows: [scorer.measure(model, rows)], x)
    check_rows(f"{what} (judge)", lambda rows: tensors(scorer.judge(rows, statistics, size)), scorer.measure(model, x))
    other_seed = scorer.fit(scorer.measure(oracle.model(seed=1), x))
    require(other_seed.keys() == statistics.keys(), f"{what}: the names of its statistics depend on the data")


def _check_steps(
    what: str, scorer: StepScorer, fewer: StepScorer, oracle: OracleDenoiser, shape: tuple[int, int, int]
) -> None:
    """Evidence of a step is the same alone and among others, whichever steps the options choose."""
    model = oracle.model()
    x = (oracle.sample((8, *shape), seed=8) - oracle.mean).float()  # none of its labels fits
    steps = scorer.timesteps(model.schedule)
    whole = scorer.measure(model, x)
    require(equal([scorer.measure_steps(model, x, steps)], [whole]), f"{what}: measure_steps is not measure")
    if not scorer.by_step(model):
        return
    require(whole.shape[1] == len(steps), f"{what}: is by step and gives {whole.shape[1]} maps for {len(steps)} steps")
    spent = scorer.num_evaluations(model)
    require(spent % len(steps) == 0, f"{what}: is by step and spends {spent} evaluations on {len(steps)} steps")
    alone = torch.cat([fewer.measure_steps(model, x, [step]) for step in steps], 1)
    require(equal([alone], [whole]), f"{what}: evidence of a step depends on the other steps, or on which are chosen")
    backwards = scorer.measure_steps(model, x, steps[::-1]).flip(1)
    require(equal([backwards], [whole]), f"{what}: evidence of a step depends on the order of the steps")


def _check_gradients(what: str, scorer: Scorer, oracle: OracleDenoiser, shape: tuple[int, int, int]) -> None:
    """Scores can be attacked: gradients reach the images, through a surrogate that is the score up to rounding."""
    statistics = scorer.fit(scorer.measure(oracle.model(), oracle.sample((40, *shape), seed=6)))
    x = oracle.sample((5, *shape), seed=7).clamp(-1, 1).requires_grad_()
    evidence = scorer.measure(oracle.model(differentiable=True), x)
    surrogate = scorer.surrogate(evidence, statistics)
    expected = scorer.judge(evidence, statistics, shape[1:]).image
    far = float(((surrogate.detach() - expected).abs() / (expected.abs() + 1e-3)).max())
    require(far < 1e-4, f"{what}: its surrogate is {far:.1g} away from its score")
    surrogate.sum().backward()  # type: ignore[no-untyped-call]
    require(x.grad is not None and bool(x.grad.isfinite().all()), f"{what}: no finite gradient reaches the image")
    reached = torch.as_tensor(x.grad).flatten(1).any(1)
    require(bool(reached.all()), f"{what}: the gradient is zero for {int((~reached).sum())} of {len(x)} images")
