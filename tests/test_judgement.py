"""The surrogate is the score, with gradients; two-sided z-scores; numbers without maps."""

import itertools

import pytest
import torch

from raydiff.errors import NotCalibratedError
from raydiff.judgement import Judge, JudgeOptions


def judge(**fields):
    return Judge(JudgeOptions(name="judge", **fields))


def evidence(n, size=(12, 9), seed=0, steps=3):
    return torch.rand(n, steps, *size, generator=torch.Generator().manual_seed(seed)) + 0.1


SETTINGS = [
    {"normalise": normalise, "blur": blur, "pooling": pooling, "sided": sided}
    for normalise, blur, pooling, sided in itertools.product(
        ["none", "pixel"], [0.0, 1.3], ["mean", "max", "top_k", "percentile"], ["high", "both"]
    )
] + [
    {"density": density, "density_on": on}
    for density in ("mahalanobis", "gaussian_mixture", "kde")
    for on in ("mean", "mean_and_top")
]


@pytest.mark.parametrize("fields", SETTINGS)
@pytest.mark.parametrize("size", [(12, 9), (1, 1)])
def test_the_surrogate_is_the_score(fields, size):
    scorer, x = judge(pooling_share=0.1, **fields), evidence(6, size, seed=1).requires_grad_()
    statistics = scorer.fit(evidence(40, size))
    surrogate = scorer.surrogate(x, statistics)
    torch.testing.assert_close(surrogate.detach(), scorer.judge(x, statistics, size).image, rtol=1e-4, atol=1e-6)
    surrogate.sum().backward()
    assert bool(x.grad.isfinite().all())
    assert bool(x.grad.flatten(1).any(1).all())


def test_two_sides_of_the_same_deviation_count_alike():
    normals = evidence(200)
    scorer = judge(sided="both", blur=0)
    statistics = scorer.fit(normals)
    up, down = (statistics["mean"] + sign * 5 * statistics["deviation"] for sign in (1, -1))
    high, low = scorer.judge(torch.stack([up, down]), statistics, (12, 9)).image
    assert float(high) == pytest.approx(5, rel=1e-4)
    assert float(low) == pytest.approx(5, rel=1e-4)
    assert float(judge(blur=0).judge(down[None], statistics, (12, 9)).image) == pytest.approx(-5, rel=1e-4)


def test_numbers_have_no_map_and_one_statistic_each():
    numbers = evidence(50, (1, 1))
    scorer = judge(density="mahalanobis")
    statistics = scorer.fit(numbers)
    assert statistics["density.center"].shape == (3,)
    assert scorer.judge(numbers, statistics, (8, 8)).map is None


def test_signed_evidence_goes_to_the_density_as_it_is():
    class Signed(Judge):
        positive = False

    scorer = Signed(JudgeOptions(name="signed", density="mahalanobis", density_on="mean"))
    values = evidence(50) - 0.6
    statistics = scorer.fit(values)
    torch.testing.assert_close(statistics["density.center"], values.double().mean((0, 2, 3)))
    assert bool(scorer.judge(values, statistics, (12, 9)).image.isfinite().all())


@pytest.mark.parametrize("fields", [{}, {"normalise": "none", "density": "kde"}])
def test_no_score_before_statistics(fields):
    for method in (judge(**fields).surrogate, lambda e, s: judge(**fields).judge(e, s, (12, 9))):
        with pytest.raises(NotCalibratedError, match="no statistics of normal images"):
            method(evidence(1), {})


CHANGES = [
    {"sided": "both"}, {"blur": 0}, {"pooling": "max"}, {"pooling_share": 0.3}, {"normalise": "step"},
    {"normalise": "none"}, {"shrinkage": 1.0}, {"density": "mahalanobis"}, {"density": "gaussian_mixture"},
    {"density_on": "mean"}, {"density_components": 1},
]  # fmt: skip


@pytest.mark.parametrize("fields", [{}, {"normalise": "step"}, *({"density": d} for d in ("kde", "gaussian_mixture"))])
def test_the_same_key_means_the_same_statistics(fields):
    evidence = torch.rand(40, 2, 6, 6, generator=torch.Generator().manual_seed(3)) + 0.1
    plain = Judge(JudgeOptions(name="x", **fields))
    same = set()
    for change in CHANGES:
        other = Judge(JudgeOptions(name="x", **{**fields, **change}))
        mine, others = plain.fit(evidence), other.fit(evidence)
        equal = mine.keys() == others.keys() and all(torch.equal(mine[k], others[k]) for k in mine)
        assert equal or other.fit_key() != plain.fit_key(), change
        if other.fit_key() == plain.fit_key():
            same |= set(change)
    assert same >= {"sided", "blur", "pooling"}
