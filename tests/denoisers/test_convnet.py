"""The convolutional denoiser: any grid, labels and positions that matter, and what cannot be asked of it."""

import re

import pytest
import torch

from raydiff.config import component_options
from raydiff.core.diffusion import Diffusion
from raydiff.core.schedule import make_schedule
from raydiff.denoisers import convnet
from raydiff.errors import ShapeError

SMALL = {"width": 16, "num_blocks": 2, "kernel_size": 3}


def build(*, channels=1, size=(8, 8), num_classes=None, moved=False, **fields):
    """A small network; ``moved`` shakes its weights, as training would."""
    torch.manual_seed(0)
    options = convnet.Options(**(SMALL | fields))
    network = convnet.build(options, channels=channels, image_size=size, num_classes=num_classes)
    if moved:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return network


@pytest.mark.parametrize(("channels", "size"), [(1, (1, 1)), (96, (16, 16)), (3, (7, 5)), (2, (1, 9))])
def test_any_grid(channels, size):
    x = torch.randn(2, channels, *size)
    assert build(channels=channels, size=size, moved=True)(x, torch.tensor([0, 999])).shape == x.shape


def test_it_begins_with_zero_and_every_block_as_the_identity():
    network = build()
    assert not network(torch.randn(2, 1, 8, 8), torch.tensor([0, 9])).any()
    hidden = torch.randn(2, 16, 8, 8)
    assert all(torch.equal(block(hidden, torch.randn(2, 16)), hidden) for block in network.blocks)


def test_a_cell_sees_as_far_as_the_kernels_reach():
    network = build(size=(1, 15), num_blocks=2, kernel_size=5, moved=True).eval()
    x, t = torch.zeros(1, 1, 1, 15), torch.tensor([5])
    touched = x.clone()
    touched[..., 7] = 1
    moved = (network(x, t) != network(touched, t)).flatten().nonzero().flatten()
    assert moved.tolist() == list(range(3, 12))


@pytest.mark.parametrize("positions", [True, False])
def test_positions_tell_rows_and_columns_apart(positions):
    network = build(channels=4, size=(5, 6), positions=positions, num_blocks=1, kernel_size=1, moved=True).eval()
    cells = network(torch.ones(1, 4, 5, 6), torch.tensor([3])).detach().flatten(2)[0].T  # (30, 4)
    gaps = torch.cdist(cells, cells) + torch.eye(30)
    assert bool(gaps.min() > 1e-2) if positions else bool((cells - cells[0]).abs().max() < 1e-5)
    assert not any("positions" in key for key in network.state_dict())


def test_a_conditional_network_learns_every_label_and_none():
    network = build(num_classes=4, moved=True)
    x, t = torch.randn(1, 1, 8, 8).expand(5, -1, -1, -1), torch.full((5,), 10)
    output = network(x, t, torch.arange(5))
    assert len({tuple(row.flatten().tolist()) for row in output.detach()}) == 5
    torch.testing.assert_close(network(x[:1], t[:1], None), output[4:])
    output.square().sum().backward()
    assert bool(network.conditioning.label.weight.grad.any(dim=1).all())


def test_labels_for_a_network_without_are_refused():
    with pytest.raises(ShapeError, match=re.escape("labels were given to a denoiser without")):
        build()(torch.zeros(1, 1, 8, 8), torch.tensor([0]), torch.tensor([1]))


def test_two_threads_give_the_same_bits_as_one():
    network = build(channels=96, size=(16, 16), width=192, kernel_size=7, moved=True).eval()
    model = Diffusion(network, make_schedule("squaredcos_cap_v2", 100), "sample")
    x, t = torch.randn(5, 96, 16, 16), torch.arange(5)
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


def test_dropout_is_off_when_evaluating():
    network = build(dropout=0.5, moved=True)
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([3])
    assert not torch.equal(network(x, t), network(x, t))
    network.eval()
    assert torch.equal(network(x, t), network(x, t))


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"kernel_size": 4}, "kernel_size is 4; it must be odd"), ({"width": 30}, "multiple of 4")],
)
def test_what_cannot_be_built_says_why(fields, message):
    with pytest.raises(ValueError, match=message):
        component_options("denoisers", {"name": "convnet", **fields})
