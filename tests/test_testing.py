"""The shipped checks catch what they promise to catch, and the oracle is the best denoiser there is."""

import pickle
import struct
import sys
from types import ModuleType, SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import torch
from torch import nn

from raydiff import config, registry, testing
from raydiff.contracts import Scores
from raydiff.core.schedule import make_schedule, predict_epsilon, predict_x0
from raydiff.images import encode_png, to_uint8
from raydiff.judgement import Judge, JudgeOptions
from raydiff.scorers._steps import at_steps
from raydiff.spaces import feature
from raydiff.testing import CorrectingOracle, OracleDenoiser, check_dataset, planted_defect, small_images

# --- the oracle -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "deviation"])
def test_the_oracle_is_the_formula(prediction_type):
    schedule = make_schedule("linear", 100)
    oracle = OracleDenoiser(schedule, mean=0.3, std=0.5, prediction_type=prediction_type)
    x_t, t = torch.randn(4, 1, 3, 3, dtype=torch.float64), torch.tensor([0, 20, 60, 99])
    abar = schedule.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    epsilon = (1 - abar).sqrt() * (x_t - abar.sqrt() * 0.3) / (abar * 0.25 + 1 - abar)
    torch.testing.assert_close(predict_epsilon(schedule, oracle(x_t, t), x_t, t, prediction_type), epsilon)
    x0 = predict_x0(schedule, oracle(x_t, t), x_t, t, prediction_type)
    torch.testing.assert_close(abar.sqrt() * x0 + (1 - abar).sqrt() * epsilon, x_t)


def test_no_constant_change_improves_the_oracle():
    """Its mean squared error on Gaussian data is the posterior variance, and rises whichever way it is moved."""
    schedule = make_schedule("linear", 100)
    oracle = OracleDenoiser(schedule, mean=0.3, std=0.5, prediction_type="sample")
    x0 = oracle.sample((64, 1, 32, 32), seed=1)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2))
    for step in (5, 50, 95):
        t = torch.full((64,), step)
        guess = oracle(schedule.add_noise(x0, t, noise), t)
        abar = float(schedule.alphas_cumprod[step])
        best = float((guess - x0).square().mean())
        assert best == pytest.approx(0.25 * (1 - abar) / (abar * 0.25 + 1 - abar), rel=0.02)
        for worse in (guess + 0.05, guess - 0.05, guess * 1.1, guess * 0.9):
            assert float((worse - x0).square().mean()) > best


def test_no_constant_change_improves_the_correcting_oracle():
    """On images that are corrupted in single pixels, a third of them on the mean; none elsewhere."""
    schedule = make_schedule("linear", 100)
    oracle = CorrectingOracle(schedule, mean=0.3, std=0.2, corrupted=0.3)
    x0 = oracle.sample((64, 1, 32, 32), seed=1)
    generator = torch.Generator().manual_seed(2)
    noise, corrupted = torch.randn(x0.shape, generator=generator), torch.rand(x0.shape, generator=generator) < 0.3
    for step in (20, 50, 95):
        t = torch.full((64,), step)
        x_t = torch.where(corrupted, schedule.add_noise(x0, t, noise), x0)
        deviation = torch.where(corrupted, schedule.deviation(x0, t, noise), 0.0)
        guess = oracle(x_t, t)
        best = float((guess - deviation).square().mean())
        assert best < 0.8 * float(deviation.square().mean())
        for worse in (guess + 0.05, guess - 0.05, guess * 1.1, guess * 0.9):
            assert float((worse - deviation).square().mean()) > best


def test_the_oracle_samples_its_own_gaussian():
    mean = torch.tensor([-0.5, 0.5]).reshape(2, 1, 1)
    images = OracleDenoiser(make_schedule("linear", 10), mean=mean, std=0.2).sample((400, 2, 8, 8))
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.tensor([-0.5, 0.5]), rtol=0, atol=0.01)
    torch.testing.assert_close(images.std((0, 2, 3)), torch.tensor([0.2, 0.2]), rtol=0.02, atol=0)


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "channels"), [((8, 8), 1), ((16, 12), 3), ((5, 7), 1)])
def test_small_images(size, channels):
    images = small_images(6, size, channels, seed=3)
    assert images.shape == (6, channels, *size)
    assert images.dtype == torch.float32
    assert float(images.min()) >= -1
    assert float(images.max()) <= 1
    assert torch.equal(images, small_images(6, size, channels, seed=3))
    assert not torch.equal(images, small_images(6, size, channels, seed=4))
    assert len({tuple(image.flatten().tolist()) for image in images}) == 6


def test_there_are_as_many_small_images_as_asked_for():
    assert small_images(2000).shape == (2000, 1, 8, 8)


@pytest.mark.parametrize("shape", [(8, 8), (16, 9), (2, 2)])
def test_a_planted_defect_moves_the_patch_by_one_or_more_and_nothing_else(shape):
    images = small_images(20, shape, 3)
    defective, masks = planted_defect(images, seed=1)
    assert masks.shape == (20, 1, *shape)
    assert masks.dtype == torch.bool
    moved = (defective - images).abs()
    everywhere = masks.expand_as(images)
    assert float(moved[everywhere].min()) >= 1
    assert float(moved[~everywhere].max()) == 0
    assert float(defective.abs().max()) <= 1
    assert torch.equal(planted_defect(images, seed=1)[0], defective)


# --- data sets --------------------------------------------------------------------------------------------------------


def write_folder(path):
    images = to_uint8(small_images(8, (16, 16)))
    for i, where in enumerate(["train/good"] * 4 + ["test/good"] * 2 + ["test/scratch"] * 2):
        (path / where).mkdir(parents=True, exist_ok=True)
        (path / where / f"{i:03d}.png").write_bytes(encode_png(images[i]))
    (path / "ground_truth/scratch").mkdir(parents=True)
    for i in (6, 7):
        mask = np.zeros((16, 16), dtype=np.bool_)
        mask[4:9, i:12] = True
        (path / f"ground_truth/scratch/{i:03d}_mask.png").write_bytes(encode_png(mask))
    return {"source": str(path)}


def write_cifar10(path):
    from raydiff.datasets.cifar10 import CLASSES

    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        pixels = to_uint8(small_images(20, (32, 32), 3)).transpose(0, 3, 1, 2).reshape(20, 3072)
        content = {b"data": pixels.copy(), b"labels": [i % 10 for i in range(20)]}
        (path / name).write_bytes(pickle.dumps(content))
    meta = {b"label_names": [name.encode() for name in CLASSES], b"num_cases_per_batch": 20}
    (path / "batches.meta").write_bytes(pickle.dumps(meta))
    return {"source": str(path)}


def write_mnist(path):
    for part, count in (("train", 30), ("t10k", 20)):
        pixels = to_uint8(small_images(count, (28, 28)))[..., 0]
        (path / f"{part}-images-idx3-ubyte").write_bytes(
            struct.pack(">4I", 0x803, count, 28, 28) + np.ascontiguousarray(pixels).tobytes()
        )
        labels = struct.pack(">2I", 0x801, count) + bytes(i % 10 for i in range(count))
        (path / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    return {"source": str(path), "check_counts": False}


def write_mnist_c(path):
    pixels = to_uint8(small_images(20, (28, 28)))
    for i, name in enumerate(["identity", *registry.component("datasets", "mnist_c").CORRUPTIONS]):
        (path / "mnist_c" / name).mkdir(parents=True)
        for part in ("train", "test") if name == "identity" else ("test",):
            np.save(path / "mnist_c" / name / f"{part}_images.npy", np.roll(pixels, i, axis=1))
            np.save(path / "mnist_c" / name / f"{part}_labels.npy", np.arange(20) % 10)
    return {"source": str(path)}


def write_mvtec_ad(path):
    for category in ("screw", "tile"):
        write_folder(path / category)
    return {"source": str(path), "check_counts": False}


def write_class_folders(path):
    images = to_uint8(small_images(12, (24, 20), 3))
    for i, where in enumerate(f"{part}/n0{label}" for part in ("train", "val") for label in range(3) for _ in range(2)):
        (path / where).mkdir(parents=True, exist_ok=True)
        (path / where / f"{i}.png").write_bytes(encode_png(images[i]))
    return {"source": str(path), "normal": ["n00", "n02"]}


SOURCES = {
    "folder": write_folder, "cifar10": write_cifar10, "mnist": write_mnist, "mnist_c": write_mnist_c,
    "mvtec_ad": write_mvtec_ad, "mini_imagenet": write_class_folders, "imagenet_folder": write_class_folders,
}  # fmt: skip
"""How to make a small source for the data sets that need files; the others are tested as they are."""


@pytest.mark.parametrize("name", registry.names("datasets"))
def test_every_data_set_passes_the_shipped_check(name, tmp_path):
    fields = SOURCES[name](tmp_path) if name in SOURCES else {}
    check_dataset(name, **fields)
    dataset = registry.build("datasets", registry.component("datasets", name).Options(**fields))
    assert pickle.loads(pickle.dumps(dataset)).entries() == dataset.entries()  # it travels to a worker


# --- what the checks catch --------------------------------------------------------------------------------------------


@pytest.fixture
def plant(monkeypatch):
    """Put a component into the registry for one test: ``plant(kind, build)`` under the name "planted"."""

    def planter(kind, build):
        class Options(config.Options):
            name: Literal["planted"] = "planted"

        module = ModuleType(f"raydiff.{kind}.planted")
        module.Options, module.build = Options, build
        monkeypatch.setitem(sys.modules, module.__name__, module)
        known = registry.names
        monkeypatch.setattr(registry, "names", lambda k: (*known(k), "planted") if k == kind else known(k))

    return planter


class Honest:
    """A baseline that does everything right: distance to the training mean."""

    def check(self):
        pass

    def fit(self, images):
        self.mean = images.mean(0)

    def score(self, images):
        return Scores(torch.stack([(image - self.mean).square().double().mean() for image in images]))

    def state(self):
        return {"mean": self.mean}

    def load_state(self, state):
        self.mean = state["mean"]


class DividesByTheBatchMaximum(Honest):
    def score(self, images):
        raw = super().score(images).image
        return Scores(raw / raw.max())


class LowerIsAnomalous(Honest):
    def score(self, images):
        return Scores(-super().score(images).image)


class Forgets(Honest):
    def load_state(self, state):
        self.mean = state["mean"] * 0


class DrawsGlobally(Honest):
    def fit(self, images):
        super().fit(images + 0 * torch.randn(1))


class Constant(Honest):
    def score(self, images):
        return Scores(torch.ones(len(images)))


class NotFinite(Honest):
    def score(self, images):
        return Scores(super().score(images).image / 0)


def test_an_honest_baseline_passes(plant):
    plant("baselines", lambda options, seed: Honest())
    testing.check_baseline("planted")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (DividesByTheBatchMaximum, "batches of 1 give other numbers than one batch of 16"),
        (LowerIsAnomalous, "planted defects score lower than their clean twins"),
        (Forgets, "scores differ after state and load_state"),
        (DrawsGlobally, "draws from torch's global generator"),
        (Constant, "all images score the same"),
        (NotFinite, "a score not finite"),
    ],
)
def test_a_broken_baseline_is_caught(plant, broken, message):
    plant("baselines", lambda options, seed: broken())
    with pytest.raises(AssertionError, match=f"baseline 'planted': {message}"):
        testing.check_baseline("planted")


class NoisePerImage:
    """The old habit: another draw for every image of the batch, from a generator seeded by the call."""

    def check(self, num_conditions, space):
        pass

    def num_evaluations(self, model):
        return 1

    def measure(self, model, x):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        t = torch.full((len(x),), 10)
        return (model.predict_x0(model.schedule.add_noise(x, t, noise), t) - x).square().mean(1, keepdim=True)

    def fit(self, evidence):
        return {}

    def judge(self, evidence, statistics, image_size):
        return Scores(torch.stack([e.double().mean() for e in evidence]))

    def reconstruct(self, model, x):
        return None


class Understates(NoisePerImage):
    def measure(self, model, x):
        t = torch.full((len(x),), 10)
        x_t = model.schedule.add_noise(x, t, torch.zeros_like(x))
        return (model.predict_x0(x_t, t) - model.predict_x0(x_t, t) + model.predict_x0(x_t, t) - x).square()


class SizeMatters(Judge):
    """Right but for this."""

    def __init__(self):
        super().__init__(JudgeOptions(name="planted"))

    def num_evaluations(self, model):
        return 1

    def measure(self, model, x):
        return self.measure_steps(model, x, [10])

    def measure_steps(self, model, x, steps):
        x_t, t, repeated = at_steps(model, x, steps)
        errors = (model.predict_x0(x_t, t) - repeated).square().mean(1)
        return errors.reshape(len(x), len(steps), *x.shape[2:])

    def judge(self, evidence, statistics, image_size):
        scores = super().judge(evidence, statistics, image_size)
        return Scores(scores.map.amax((1, 2, 3)), scores.map)

    def reconstruct(self, model, x):
        return None


class StepsMatter(SizeMatters):
    """Says that steps stand alone, and compares each with their mean."""

    judge = Judge.judge

    def num_evaluations(self, model):
        return 3

    def timesteps(self, schedule):
        return [5, 10, 15]

    def by_step(self, model):
        return True

    def measure(self, model, x):
        return self.measure_steps(model, x, self.timesteps(model.schedule))

    def measure_steps(self, model, x, steps):
        errors = super().measure_steps(model, x, steps)
        return errors + errors.mean(1, keepdim=True)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (NoisePerImage, r"\(measure\): (a second call|batches of 1|the order|depends)"),
        (Understates, ": says it costs 1 evaluations per image and spends 3"),
        (SizeMatters, ": image scores depend on the size of the maps"),
        (StepsMatter, ": evidence of a step depends on the other steps"),
    ],
)
def test_a_broken_scorer_is_caught(plant, broken, message):
    plant("scorers", lambda options: broken())
    with pytest.raises(AssertionError, match=f"scorer 'planted'( )?{message}"):
        testing.check_scorer("planted")


class Deaf(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_t, t, condition=None):
        return self.convolution(x_t)


def test_a_denoiser_that_does_not_hear_the_step_is_caught(plant):
    plant("denoisers", lambda options, channels, image_size, num_classes: Deaf(channels))
    with pytest.raises(AssertionError, match="denoiser 'planted': the step does not change the output"):
        testing.check_denoiser("planted")


def test_a_space_whose_head_sees_something_else_is_caught(monkeypatch):
    fields = {"backbone": "tf_efficientnet_lite0", "levels": [1], "num_components": 4, "grid": 8}
    plain = feature.FeatureSpace.encode
    monkeypatch.setattr(feature.FeatureSpace, "encode", lambda space, images: 2 * plain(space, images))
    with pytest.raises(AssertionError, match="encodes otherwise than its head sees"):
        testing.check_space("feature", image_size=(32, 32), **fields)


def test_a_space_that_leaves_the_range_is_caught(plant):
    class Loud:
        num_fit_images = 0
        shape = (1, 8, 8)
        encode = staticmethod(lambda images: images)
        decode = staticmethod(lambda latents: latents * 2)
        state = staticmethod(dict)

    plant("spaces", lambda options, channels, image_size: Loud())
    with pytest.raises(AssertionError, match=r"space 'planted': decodes to images outside \[-1, 1\]"):
        testing.check_space("planted")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": "a"}, "an image_id appears more than once"),
        ({"split": "calibration"}, "has splits besides train and test"),
        ({"split": "train"}, "b is anomalous and in train"),
        ({"defect": "good"}, "b has defect 'good' and is_anomaly True"),
        ({"size": 0}, "b has size 0"),
    ],
)
def test_a_broken_data_set_is_caught(plant, change, message):
    from dataclasses import replace

    from raydiff.contracts import Entry

    good = Entry("a", "train", "x", "good", False, 10)
    bad = replace(Entry("b", "test", "x", "dent", True, 10), **change)
    entries = [good, bad, Entry("c", "test", "x", "good", False, 10)]
    png = encode_png(np.zeros((4, 4), dtype=np.uint8))
    plant("datasets", lambda options: SimpleNamespace(entries=lambda: entries, read=lambda entry: (png, None)))
    with pytest.raises(AssertionError, match=f"dataset 'planted': {message}"):
        check_dataset("planted")
