"""The head sees what its options say, and its answer and the denoising error are combined as z-scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from raydiff.config import component_options
from raydiff.core.diffusion import Diffusion
from raydiff.core.metrics import image_auroc
from raydiff.core.schedule import make_schedule
from raydiff.errors import ArtifactError, ConfigError, RaydiffError, TrainingError
from raydiff.planting import TrainedScorer
from raydiff.scorers import denoising_error, discriminative
from raydiff.scorers._head import Head, HeadSize, HeadTraining, train_head
from raydiff.scorers.discriminative import Discriminative, Options, build
from raydiff.testing import LatentExamples, OracleDenoiser, planted_defect

SHAPE = (1, 12, 12)
QUICK = {"num_steps": 120, "batch_size": 8, "width": 32, "learning_rate": 3e-3, "noise": 0, "blur": 0}


@pytest.fixture(scope="module")
def oracle() -> OracleDenoiser:
    return OracleDenoiser(make_schedule("squaredcos_cap_v2", 50), mean=torch.zeros(SHAPE), std=0.3)


def blotched(images: Tensor) -> tuple[Tensor, Tensor]:
    """A patch in which neighbours are alike: each pixel might be normal, so that the error says little."""
    changed, masks = planted_defect(images, seed=3)
    return torch.where(masks, images.mean((1, 2, 3), keepdim=True) + 0.2, changed), masks


def examples(oracle: OracleDenoiser, count: int = 32) -> LatentExamples:
    clean = oracle.sample((count, *SHAPE), seed=1)
    changed, masks = blotched(clean)
    return LatentExamples(torch.cat([clean, changed]), torch.cat([~masks & masks, masks]), count)


def trained(oracle: OracleDenoiser, **fields: Any) -> Discriminative:
    scorer = build(Options.model_validate(QUICK | fields))
    scorer.train(oracle.model(), examples(oracle), lambda _: None)
    return scorer


def aurocs(oracle: OracleDenoiser, scorer: Any) -> float:
    model, clean = oracle.model(), oracle.sample((48, *SHAPE), seed=5)
    statistics = scorer.fit(scorer.measure(model, oracle.sample((48, *SHAPE), seed=6)))
    x = torch.cat([clean, blotched(clean)[0]])
    scores = scorer.judge(scorer.measure(model, x), statistics, SHAPE[1:]).image.numpy()
    return image_auroc(scores, torch.arange(96).numpy() >= 48)


def test_it_finds_what_the_error_of_the_diffusion_does_not(oracle: OracleDenoiser) -> None:
    fields = {"num_inference_steps": 1, "start": 0.6, "stop": 0.8, "start_from": "clean", "blur": 0}
    alone = denoising_error.build(denoising_error.Options.model_validate(fields))
    head, error = aurocs(oracle, trained(oracle, combine="head")), aurocs(oracle, alone)
    assert head > 0.95 > 0.8 > error


def test_its_error_maps_are_the_denoising_errors(oracle: OracleDenoiser) -> None:
    model, x = oracle.model(), oracle.sample((5, *SHAPE), seed=7)
    for start_from in ("clean", "noised"):
        fields: dict[str, Any] = {"num_inference_steps": 3, "start": 0.2, "stop": 0.6, "start_from": start_from}
        alone = denoising_error.build(denoising_error.Options.model_validate(fields))
        scorer = trained(oracle, **fields, num_steps=1)
        evidence = scorer.measure(model, x)
        assert evidence.shape == (5, 4, 12, 12)
        assert torch.equal(evidence[:, 1:], alone.measure(model, x))
        assert scorer.num_evaluations(model) == 3


def test_the_combinations_are_of_z_scores(oracle: OracleDenoiser) -> None:
    model, x = oracle.model(), oracle.sample((4, *SHAPE), seed=8)
    scorer = trained(oracle, num_inference_steps=2, start=0.3, num_steps=5)
    normals = scorer.measure(model, oracle.sample((30, *SHAPE), seed=9))
    evidence = scorer.measure(model, x)
    z = (evidence - normals.mean((0, 2, 3))[:, None, None]) / normals.std((0, 2, 3), correction=0)[:, None, None]
    head, error = z[:, :1], z[:, 1:].mean(1, keepdim=True)
    for how, expected in (("mean", (head + error) / 2), ("max", torch.maximum(head, error))):
        other = build(Options.model_validate({**QUICK, "combine": how, "normalise": "step", "num_inference_steps": 2}))
        other.load_state(scorer.state())
        maps = other.judge(evidence, other.fit(normals), SHAPE[1:]).map
        torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-4)


def test_the_head_sees_what_the_options_say(oracle: OracleDenoiser) -> None:
    shapes = {}
    for sees in ("both", "image", "difference"):
        scorer = trained(oracle, sees=sees, num_inference_steps=2, start=0.3, num_steps=1)
        shapes[sees] = scorer.state()["head.enter.weight"].shape[1]
    assert shapes == {"both": 1 + 2 + 2, "image": 1, "difference": 2 + 2}
    alone = trained(oracle, sees="image", combine="head", num_steps=1)
    assert alone.num_evaluations(oracle.model()) == 0
    assert alone.measure(oracle.model(), oracle.sample((2, *SHAPE))).shape == (2, 1, 12, 12)


def test_combining_otherwise_needs_no_other_head() -> None:
    key = build(Options()).training_key()
    for field, value in {"combine": "max", "blur": 3, "density": "kde", "pooling": "max"}.items():
        assert build(Options.model_validate({field: value})).training_key() == key
    for field, value in {"sees": "image", "start": 0.5, "kinds": ["cut_paste"], "width": 8, "num_anomalies": 5}.items():
        assert build(Options.model_validate({field: value})).training_key() != key


def test_the_same_weights_where_what_it_sees_is_not_kept(
    oracle: OracleDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = trained(oracle, num_steps=5).state()
    monkeypatch.setattr(discriminative, "_CACHE_BYTES", 0)
    made_anew = trained(oracle, num_steps=5).state()
    assert all(torch.equal(value, made_anew[name]) for name, value in kept.items())


def test_noise_is_on_what_it_learns_from_alone(oracle: OracleDenoiser) -> None:
    plain, noisy, again = (trained(oracle, num_steps=5, noise=noise).state() for noise in (0, 0.5, 0.5))
    assert all(torch.equal(value, again[name]) for name, value in noisy.items())
    assert not torch.equal(noisy["head.enter.weight"], plain["head.enter.weight"])
    assert torch.equal(noisy["head.scale"], plain["head.scale"])


def test_it_says_how_far_it_is(oracle: OracleDenoiser) -> None:
    lines: list[Any] = []
    scorer = build(Options.model_validate({**QUICK, "num_steps": 40}))
    assert isinstance(scorer, TrainedScorer)
    scorer.train(oracle.model(), examples(oracle), lines.append)
    assert [line["head_step"] for line in lines] == list(range(4, 41, 4))
    assert lines[-1]["head_loss"] < lines[0]["head_loss"]


def test_what_cannot_be_is_refused(oracle: OracleDenoiser) -> None:
    for fields, message in (
        ({"kernel_size": 2}, "kernel_size is 2; it must be odd"),
        ({"severities": [0, 3]}, "severities holds 0"),
        ({"normalise": "none"}, "combine is mean and normalise none"),
    ):
        with pytest.raises(ValidationError, match=message):
            component_options("scorers", {"name": "discriminative", **fields})
    with pytest.raises(ConfigError, match=r"scoring\.kinds: blur makes no anomaly"):
        build(Options(kinds=("blur",))).check(None, "pixel")
    with pytest.raises(RaydiffError, match="not trained yet"):
        build(Options()).measure(oracle.model(), oracle.sample((1, *SHAPE)))
    with pytest.raises(ArtifactError, match="does not fit its options"):
        build(Options(width=8)).load_state(trained(oracle, num_steps=1).state())
    with pytest.raises(ArtifactError, match="does not fit its options"):
        build(Options()).load_state({})
    scorer, broken = build(Options.model_validate({**QUICK, "num_steps": 3})), examples(oracle)
    broken.x[:] = float("nan")
    with pytest.raises(TrainingError, match=r"head's loss is not a number at step 1; lower scoring\.learning_rate"):
        scorer.train(oracle.model(), broken, lambda _: None)


def test_a_cell_that_is_hardly_anomalous_teaches_nothing(oracle: OracleDenoiser) -> None:
    """Whether it is called so or not at all changes no weight."""

    class Faint(LatentExamples):
        def shares(self, rows: Any) -> Tensor:
            return torch.where(self.masks[list(rows)], 1.0, 0.05 * (self.x[list(rows)] > 10))

    def weights(corner: float) -> dict[str, Tensor]:
        own = examples(oracle)
        own.x[own.num_normal :, :, 0, 0] = corner
        own.masks[:, :, 0, 0] = False
        scorer = build(Options.model_validate({**QUICK, "num_steps": 3, "kernel_size": 1, "sees": "image"}))
        scorer.train(model, Faint(own.x, own.masks, own.num_normal), lambda _: None)
        return scorer.state()

    model: Diffusion = oracle.model()
    one, other = weights(11.0), weights(99.0)
    assert all(torch.allclose(value, other[name], atol=1e-6) for name, value in one.items())


def with_shares(oracle: OracleDenoiser, shares: Tensor) -> LatentExamples:
    """Normal images, and as many that are said to be anomalous by these shares of their cells."""
    clean = oracle.sample((len(shares), *SHAPE), seed=1)
    return LatentExamples(torch.cat([clean, clean + 1]), torch.cat([torch.zeros_like(shares), shares]), len(shares))


def test_anomalies_too_small_for_the_grid_are_refused(oracle: OracleDenoiser) -> None:
    shares = torch.zeros(8, *SHAPE)
    shares[:, :, 3, 3] = 0.05
    shares[:3, :, 3, 3] = 0.5
    scorer = build(Options.model_validate(QUICK | {"num_steps": 1}))
    message = "3 of 8 planted anomalies cover 10% of a cell of the 12 x 12 grid, .*set scoring.severities higher"
    with pytest.raises(ConfigError, match=message):
        scorer.train(oracle.model(), with_shares(oracle, shares), lambda _: None)
    assert not scorer.is_trained
    shares[3, :, 3, 3] = 0.5
    scorer.train(oracle.model(), with_shares(oracle, shares), lambda _: None)
    few = build(Options.model_validate(QUICK | {"num_steps": 1}))
    few.train(oracle.model(), with_shares(oracle, shares[:2]), lambda _: None)


def test_one_cell_is_anomalous_however_little_of_it_is() -> None:
    head = Head.of(1, HeadSize(8, 0, 1), 0)
    x = torch.cat([torch.zeros(8, 1, 1, 1), torch.ones(8, 1, 1, 1)])
    trained_head = train_head(
        head, HeadTraining(60, 8, 3e-2, 0.0), lambda rows: x[rows], 0.02 * x, 8, seed=0, report=lambda _: None
    )
    logits = trained_head(x).flatten()
    assert logits[8:].min() > 1
    assert logits[:8].max() < -1
