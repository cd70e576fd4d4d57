"""No loop makes the host wait for the device: what a GPU computes is not asked for between log steps.

Here ``cpu:0`` stands for the device and ``cpu`` for the host. A value that comes from the network or from what is
diffused is the device's; asking for its number (``.item()``, ``float()``, ``if``: all ``aten::_local_scalar_dense``) or
copying it to the host would make the host wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raydiff.config import ExperimentConfig
from raydiff.detector import DiffusionDetector, load_detector
from raydiff.experiment import cached, held_out_images
from raydiff.latents import Latents
from raydiff.runtime import LocalRuntime
from raydiff.shards import ShardSet
from raydiff.testing import small_images
from raydiff.training import train

DEVICE = "cpu:0"


class Scalars(TorchDispatchMode):
    """Counts numbers that are asked of the device. What follows from a value of the device's is the device's too."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._storages: dict[int, Any] = {}  # kept, so that none is taken for one that was there before

    def own(self, tensors: Any) -> None:
        """Declare all tensors in a structure the device's."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = storage

    def owns(self, tensors: Any) -> bool:
        """Whether one of them is the device's."""
        leaves = (leaf for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor))
        return any(leaf.untyped_storage()._cdata in self._storages for leaf in leaves)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if self.owns((args, kwargs)):
            self.count += func is torch.ops.aten._local_scalar_dense.default
            self.own(found)
            for value, argument in zip(args, func._schema.arguments, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self.own(value)
        return found


class Copies(TorchFunctionMode):
    """Counts copies of the device's values to the host: by ``cpu()``, and by ``to`` a device that is called so."""

    def __init__(self, scalars: Scalars) -> None:
        super().__init__()
        self.calls = self.moves = 0
        self._scalars = scalars

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        moved = func is Tensor.to and args[1:2] == (torch.device("cpu"),)
        if (func is Tensor.cpu or moved) and self._scalars.owns(args[0]):
            self.calls += func is Tensor.cpu
            self.moves += moved
        return func(*args, **(kwargs or {}))


@contextmanager
def watching() -> Iterator[tuple[Scalars, Copies]]:
    scalars = Scalars()
    copies = Copies(scalars)
    with scalars, copies:
        yield scalars, copies


def trained(config: ExperimentConfig, shards: ShardSet, path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Numbers asked of the device, and copies made, by a run that logs, validates and saves at its end alone."""
    of = Latents.of
    with watching() as (scalars, copies):

        class Runtime(LocalRuntime):
            def wrap(self, network: nn.Module) -> nn.Module:
                scalars.own(list(network.state_dict().values()))
                return network

        def owned(self: Latents, *args: Any, **kwargs: Any) -> Tensor:
            latents = of(self, *args, **kwargs)
            scalars.own(latents)
            return latents

        with monkeypatch.context() as patched:
            patched.setattr(Latents, "of", owned)
            train(config, cached(config, shards), held_out_images(config, shards), Runtime(path, DEVICE), num_classes=1)
    return scalars.count, copies.calls  # the average's weights are moved ``to`` where they are


@pytest.mark.parametrize(
    "extra",
    [
        {"training.accumulation_steps": 2},
        {"objective.condition": "rotation", "objective.loss_weighting": "min_snr", "training.precision": "bfloat16"},
        {"objective.prediction_type": "deviation", "scoring": {"name": "deviation_correction"}},
    ],
    ids=["plain", "conditional", "deviation"],
)
def test_training_between_log_steps(
    tiny_config: ExperimentConfig,
    digit_shards: ShardSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    extra: dict[str, Any],
) -> None:
    once = {f"training.{name}_every": 100 for name in ("log", "validate", "checkpoint")}
    found = []
    for steps in (2, 6):
        config = tiny_config.override({**once, **extra, "training.num_steps": steps, "training.validation_images": 8})
        found.append(trained(config, digit_shards, tmp_path / str(steps), monkeypatch))
    assert found[0] == found[1], "more steps ask for no more"
    assert found[0][0] > 0, "the log line at the end does ask"


SCORERS: list[dict[str, Any]] = [
    {"name": "denoising_error"},
    {"name": "reconstruction"},
    {"name": "inversion"},
    {"name": "score_norms"},
    {"name": "curvature"},
    {"name": "likelihood"},
]


@pytest.mark.parametrize("scoring", SCORERS, ids=lambda scoring: str(scoring["name"]))
def test_scoring_more_images(run_dir: Path, tiny_config: ExperimentConfig, scoring: dict[str, Any]) -> None:
    """Images go to the device and evidence comes back, as often for many calls of the network as for one."""
    found = []
    detector = load_detector(run_dir / "artifact", device=DEVICE)
    assert isinstance(detector, DiffusionDetector)
    detector = detector.with_scoring(tiny_config.override({"scoring": scoring}).scoring)
    for count in (4, 40):
        with watching() as (scalars, copies):
            scalars.own(list(detector.network.state_dict().values()))
            detector.measure(small_images(count, (8, 8)))
        found.append((scalars.count, copies.calls + copies.moves))
    assert found[0] == found[1]
    assert found[0][0] == 0
    assert found[0][1] > 0, "the evidence is asked for"
