"""The diffusion transformer: the published sizes, any grid of patches, labels, memory saving, what cannot be built."""

import re

import pytest
import torch
from torch.overrides import TorchFunctionMode

from raydiff.config import component_options
from raydiff.core.diffusion import Diffusion
from raydiff.core.schedule import make_schedule
from raydiff.denoisers import dit
from raydiff.errors import ConfigError, ShapeError

SMALL = {"depth": 2, "hidden_size": 16, "num_heads": 2}


def build(*, channels=1, size=(8, 8), num_classes=None, moved=False, **fields):
    """A small network; ``moved`` shakes its weights, as training would."""
    torch.manual_seed(0)
    options = dit.Options(**(SMALL | fields))
    network = dit.build(options, channels=channels, image_size=size, num_classes=num_classes)
    if moved:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return network


@pytest.mark.parametrize(
    ("size", "millions"),
    [("S", 33), ("B", 130), ("L", 458), ("XL", 675)],  # Peebles and Xie 2023, table 4 (patches of 2)
)
def test_the_published_sizes(size, millions):
    with torch.device("meta"):
        options = dit.Options(size=size, patch_size=2, learn_sigma=True)
        network = dit.build(options, channels=4, image_size=(32, 32), num_classes=1000)
    count = sum(p.numel() for p in network.parameters()) + network.positions.numel()  # the paper's code counts both
    assert count / 1e6 == pytest.approx(millions, rel=0.01)
    if size == "XL":
        assert count == 675_129_632


def test_a_size_whose_depth_is_changed():
    assert dit.Options(size="B", depth=3).shape == (3, 768, 12)
    assert len(build(depth=3).blocks) == 3


@pytest.mark.parametrize(
    ("channels", "size", "patch"),
    [(1, (8, 8), 2), (3, (16, 8), 4), (3, (9, 15), 3), (2, (7, 5), 1), (3, (512, 256), 16), (1, (28, 28), 28)],
)
def test_any_grid_of_patches(channels, size, patch):
    x = torch.randn(2, channels, *size)
    network = build(channels=channels, size=size, patch_size=patch, moved=True)
    assert network.positions.shape == (size[0] // patch * (size[1] // patch), 16)
    assert network(x, torch.tensor([0, 999])).shape == x.shape


def test_patches_come_back_where_they_were():
    network = build(channels=3, size=(4, 6), depth=1)
    pixels = torch.arange(2 * 3 * 4 * 6).float().reshape(2, 3, 4, 6)
    patches = pixels.unfold(2, 2, 2).unfold(3, 2, 2)  # (B, C, h, w, p, p)
    tokens = patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)  # (B, h w, p p C)
    assert torch.equal(network._unpatchify(tokens, channels=3), pixels)


def test_positions_tell_every_token_apart():
    positions = build(size=(16, 6)).positions
    distances = torch.cdist(positions, positions) + torch.eye(len(positions)) * 9
    assert len(positions) == 24
    assert float(distances.min()) > 0.1
    assert "positions" not in build().state_dict()


def test_it_begins_with_zero_and_every_block_as_the_identity():
    network = build()
    assert not network(torch.randn(2, 1, 8, 8), torch.tensor([0, 9])).any()
    tokens = torch.randn(2, 16, 16)
    assert all(torch.equal(block(tokens, torch.randn(2, 16)), tokens) for block in network.blocks)


def test_a_learnt_variance_is_left_unread():
    network = build(channels=3, learn_sigma=True, moved=True)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    assert network.output.out_features == 2 * 3 * 2 * 2
    before = network(x, t)
    assert before.shape == x.shape
    with torch.no_grad():
        network.output.bias.view(2, 2, 6)[..., 3:] += 1
    assert torch.equal(network(x, t), before)


def test_a_conditional_network_learns_every_label_and_none():
    network = build(num_classes=4, moved=True)
    x, t = torch.randn(1, 1, 8, 8).expand(5, -1, -1, -1), torch.full((5,), 10)
    output = network(x, t, torch.arange(5))
    assert len({tuple(row.flatten().tolist()) for row in output.detach()}) == 5
    torch.testing.assert_close(network(x[:1], t[:1], None), output[4:])
    output.square().sum().backward()
    assert bool(network.conditioning.label.weight.grad.any(dim=1).all())


def test_labels_for_a_network_without_are_refused():
    with pytest.raises(ShapeError, match="labels were given to a denoiser without"):
        build()(torch.zeros(1, 1, 8, 8), torch.tensor([0]), torch.tensor([1]))


class _Calls(TorchFunctionMode):
    """Counts calls of torch functions by name."""

    def __init__(self):
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def test_attention_is_one_fused_call_per_block():
    network, x, t = build(depth=3), torch.randn(1, 1, 8, 8), torch.tensor([5])
    with _Calls() as calls:
        network(x, t)
    assert calls.names.count("scaled_dot_product_attention") == 3
    assert "softmax" not in calls.names


def test_activation_checkpointing_computes_blocks_again_and_changes_no_gradient():
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([1, 50, 900])
    gradients, runs = [], []
    for checkpointing in (False, True):
        network = build(activation_checkpointing=checkpointing, dropout=0.3, moved=True)
        calls = []
        for block in network.blocks:
            block.mlp.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(1)
        network(x, t).square().sum().backward()
        gradients.append([p.grad for p in network.parameters()])
        runs.append(len(calls))
        with torch.no_grad():
            network.eval()(x, t)
        assert len(calls) == runs[-1] + 2
    assert runs == [2, 4]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_two_threads_give_the_same_bits_as_one():
    for fields in ({"hidden_size": 128, "num_heads": 4}, {"hidden_size": 384, "num_heads": 6}):
        network = build(channels=3, size=(32, 32), depth=1, moved=True, **fields).eval()
        model = Diffusion(network, make_schedule("squaredcos_cap_v2", 100), "epsilon")
        x, t = torch.randn(3, 3, 32, 32), torch.arange(3)
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            one = model.predict(x, t)
            torch.set_num_threads(2)
            assert torch.equal(model.predict(x, t), one)
        finally:
            torch.set_num_threads(before)


def test_training_in_bfloat16():
    network, x = build(num_classes=2, moved=True), torch.randn(2, 1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        loss = (network(x, torch.tensor([1, 2]), torch.tensor([0, 2])).float() - x).square().mean()
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in network.parameters())


def test_what_cannot_be_built_says_why():
    message = (
        "data.image_size makes what is diffused 8 x 7; both sides must be multiples of denoiser.patch_size, which is 2"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        build(size=(8, 7))
    with pytest.raises(ValueError, match="num_heads is 5; it must divide hidden_size, which is 384"):
        component_options("denoisers", {"name": "dit", "size": "S", "num_heads": 5})
    with pytest.raises(ValueError, match="'S', 'B', 'L', 'XL' or 'custom'"):
        component_options("denoisers", {"name": "dit", "size": "M"})
