"""A detector whose networks are compiled: the same artefact, quicker on a GPU, equal to rounding.

``torch.compile`` fuses what lies between matrix products; on a GPU the whole of a call is replayed as one CUDA graph,
so that a batch of one no longer waits for hundreds of kernels to be launched one by one. Both need calls of one shape,
which a detector makes anyway (:mod:`raydiff.core.chunks`). It is done after loading and never saved: an artefact is
data. On a CPU it wins little and takes half a minute; there ``raydiff export`` to ONNX is quicker (docs/RESULTS.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raydiff.contracts import CompilableSpace
from raydiff.detector import Detector, DiffusionDetector, EnsembleDetector
from raydiff.errors import ConfigError, RaydiffError
from raydiff.exported import TOLERANCE
from raydiff.images import to_tensor

__all__ = ["compiled"]

_MOST_SHAPES = 256
"""Architectures and shapes that a process compiles a class of networks for; beyond that it is refused."""


class _Compiled(nn.Module):
    """A network that is called through its compiled twin, and is otherwise the network, its weights' names too."""

    def __init__(self, network: nn.Module, backend: str | Callable[..., Any]) -> None:
        super().__init__()
        self.network = network
        self._twin = torch.compile(network, dynamic=False, backend=backend)
        self._graphs: dict[tuple[Any, ...], _Graph] = {}
        self._lock = Lock()

    def forward(self, *arguments: Tensor | None) -> Any:
        """What the network gives: a tensor or a list of them."""
        if any(part is not None and part.requires_grad for part in arguments):
            return self._twin(*arguments)
        with torch.inference_mode(False), torch.no_grad():  # tensors of one kind, or it is compiled for each
            return self._plainly(*(part.clone() if part is not None and part.is_inference() else part
                                   for part in arguments))  # fmt: skip

    def _plainly(self, *arguments: Tensor | None) -> Any:
        tensors = [part for part in arguments if part is not None]
        if any(part.device.type != "cuda" for part in tensors):
            return self._twin(*arguments)
        key = tuple((part.shape, part.dtype, part.stride(), part.device) for part in tensors)
        with self._lock:  # a graph has one input and one output
            if key not in self._graphs:
                self._graphs[key] = _Graph(self._twin, tensors)
            return self._graphs[key](tensors)

    def state_dict(self, *arguments: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override]
        """The network's."""
        return self.network.state_dict(*arguments, **options)


class _Graph:
    """All kernels of a function's call on tensors of these shapes, recorded once and replayed as one CUDA graph.

    As in PyTorch's notes on CUDA semantics. ``torch.compile``'s own graphs belong to the thread that made them, and an
    endpoint loads in one thread and scores in another.
    """

    def __init__(self, function: Callable[..., Any], tensors: Sequence[Tensor]) -> None:
        self._inputs = [tensor.clone() for tensor in tensors]
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):  # compiles, and chooses kernels, which cannot be recorded
                function(*self._inputs)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._outputs = function(*self._inputs)

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        """The function's result, in memory of its own."""
        for inside, tensor in zip(self._inputs, tensors, strict=True):
            inside.copy_(tensor)
        self._graph.replay()
        found = self._outputs
        return found.clone() if isinstance(found, Tensor) else [part.clone() for part in found]


def compiled(detector: Detector, *, backend: str | Callable[..., Any] = "inductor") -> Detector:
    """The detector with its denoiser, and its space's network where there is one, compiled and tried.

    Args:
        detector: a diffusion model, calibrated, or an ensemble, whose diffusion models are compiled, a backbone that
            they share once; it is left as it is.
        backend: of ``torch.compile``.

    Raises:
        ConfigError: it is or holds no diffusion model, or there is no compiler here that torch can use.
        RaydiffError: compiled it scores otherwise, by more than :data:`raydiff.exported.TOLERANCE`.
    """

    def quick(network: nn.Module) -> nn.Module:
        return _Compiled(network, backend)

    twin: Detector
    if isinstance(detector, DiffusionDetector):
        twin = _twin(detector, quick)
    elif isinstance(detector, EnsembleDetector) and any(isinstance(one, DiffusionDetector) for one in detector.members):
        quicker = (_twin(one, quick) if isinstance(one, DiffusionDetector) else one for one in detector.members)
        twin = replace(detector, members=tuple(quicker))
    else:
        raise ConfigError(f"{detector.name}: only diffusion models are compiled; leave --compile out")
    try:  # PyTorch counts what one class of network was compiled for, over all artefacts that a process ever had
        with torch._dynamo.config.patch(recompile_limit=_MOST_SHAPES, fail_on_recompile_limit_hit=True):
            _check(detector, twin)
    except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(f"{detector.name} cannot be compiled here ({reason}); leave --compile out") from error
    return twin


def _twin(detector: DiffusionDetector, quick: Callable[[nn.Module], nn.Module]) -> DiffusionDetector:
    space = detector.space.compiled(quick) if isinstance(detector.space, CompilableSpace) else detector.space
    return replace(detector, network=quick(detector.network), space=space)


def _check(detector: Detector, twin: Detector) -> None:
    """Score grey, noise and a ramp both ways; the first call of the twin compiles."""
    shape = (*detector.config.data.image_size, detector.config.data.channels)
    noise = np.random.default_rng(0).integers(0, 256, shape)
    ramp = np.broadcast_to(np.linspace(0, 255, shape[1])[:, None], shape)
    images = to_tensor(np.stack([np.full(shape, 128), noise, ramp]).astype(np.uint8))
    expected, found = (one.score(images).image.double() for one in (detector, twin))
    unit = expected.abs()
    if detector.calibration is not None:
        unit = torch.maximum(unit, detector.calibration.scores.std())
    worst = float(((found - expected).abs() / unit).max())
    if not worst <= TOLERANCE:
        raise RaydiffError(
            f"{detector.name}: compiled it scores {worst:.2g} otherwise, more than {TOLERANCE:g}: its scorer magnifies"
            " rounding; leave --compile out"
        )
