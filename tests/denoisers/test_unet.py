"""The U-Net in the sizes and forms users ask for, and the messages for those that cannot be."""

import pytest
import torch

from raydiff.denoisers import unet
from raydiff.errors import ConfigError

SMALL = {"block_out_channels": (8, 16), "norm_num_groups": 4}


def build(*, channels=1, size=(8, 8), num_classes=None, **fields):
    torch.manual_seed(0)
    return unet.build(unet.Options(**(SMALL | fields)), channels=channels, image_size=size, num_classes=num_classes)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("size", [(8, 8), (6, 10), (32, 16), (28, 28)])
def test_any_multiple_of_the_down_sampling(channels, size):
    x = torch.randn(2, channels, *size)
    assert build(channels=channels, size=size)(x, torch.tensor([0, 999])).shape == x.shape


def test_four_levels_on_a_larger_image():
    network = build(size=(64, 32), block_out_channels=(8, 8, 16, 16), attention_levels=(2, 3))
    x = torch.randn(1, 1, 64, 32)
    assert network(x, torch.tensor([5])).shape == x.shape


def test_attention_is_where_it_was_asked_for():
    def attentions(**fields):
        return sum("Attention" in type(module).__name__ for module in build(**fields).modules())

    assert attentions(attention_levels=()) < attentions(attention_levels=(1,)) < attentions(attention_levels=(0, 1))


def test_a_conditional_network_learns_every_label_and_none():
    network = build(num_classes=4)
    assert network.unet.class_embedding.num_embeddings == 5
    x, t = torch.randn(1, 1, 8, 8).expand(5, -1, -1, -1), torch.full((5,), 10)
    output = network(x, t, torch.arange(5))
    assert len({tuple(row.flatten().tolist()) for row in output.detach()}) == 5
    output.square().sum().backward()
    assert bool(network.unet.class_embedding.weight.grad.any(dim=1).all())


def test_an_unconditional_network_has_no_labels():
    network = build()
    assert network.unet.class_embedding is None
    assert network(torch.zeros(1, 1, 8, 8), torch.tensor([0])).shape == (1, 1, 8, 8)


def test_the_weights_follow_from_the_global_seed():
    first, second = build(), build()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_folding_pixels_keeps_the_image_size_and_saves_work():
    plain, folded = build(size=(16, 8)), build(size=(16, 8), patch_size=2)
    x, t = torch.randn(2, 1, 16, 8), torch.tensor([0, 999])
    assert folded(x, t).shape == x.shape
    assert folded.unet.conv_in.in_channels == 4
    assert folded.unet.config.sample_size == (8, 4)
    assert plain.unet.conv_in.in_channels == 1


def test_dropout_is_off_when_evaluating():
    network = build(dropout=0.5)
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([3])
    assert not torch.equal(network(x, t), network(x, t))
    network.eval()
    assert torch.equal(network(x, t), network(x, t))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"size": (8, 7)},
            r"data.image_size is \(8, 7\); with 2 levels \(denoiser.block_out_channels\) and denoiser.patch_size 1",
        ),
        ({"size": (8, 6), "patch_size": 2}, "denoiser.patch_size 2 both sides must be multiples of 4"),
        ({"size": (10, 8), "block_out_channels": (8, 8, 8)}, "both sides must be multiples of 4"),
        ({"norm_num_groups": 3}, "denoiser.norm_num_groups is 3; it must divide every width, and not 8"),
        ({"attention_levels": (0, 2)}, "denoiser.attention_levels names level 2; there are 2"),
        ({"attention_levels": (-1,)}, "denoiser.attention_levels names level -1; there are 2"),
    ],
)
def test_what_cannot_be_built_says_why(fields, message):
    with pytest.raises(ConfigError, match=message):
        build(**fields)
