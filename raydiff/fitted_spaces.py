"""Fitted spaces, kept for whoever needs the same one.

A space that learns is fitted before the diffusion is trained, and follows from its options and the training images
alone. Runs that differ in anything else, such as a sweep's trials and a benchmark's trainings, would each fit it anew.
With ``data.spaces`` the first leaves it in a place where the others find it.

There every space has a folder, named by a digest of all that its bits follow from, which ``origin.json`` in it lists:
the options with the seed, the very pixels it was fitted on (so which images, views, tiles, and what folds and suspects
leave out), pretrained weights, the code that fits, the libraries' versions, processor and threads. What is found is
what fitting would have given, bit for bit on a CPU. In that folder each fit has one of its own, which is there whole or
not at all and is verified when it is read; where none can be used, the space is fitted anew. What is damaged is removed
then, and what cannot be read is left. Where a fit cannot be written, as on a full disk, it is used and not kept.

On a disk whoever needs a space that another process is fitting waits for it, while that lives, so there is one fit. In
an object store, which has no locks, both fit, side by side, and from then on all read the same one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raydiff.artifact import encode_json, encode_tensors, read_folder, write_folder
from raydiff.config import ExperimentConfig
from raydiff.contracts import Space, TrainedSpace
from raydiff.detector import build_space, space_options
from raydiff.errors import ArtifactError, ConfigError, DataError, StorageError
from raydiff.journal import alone_in
from raydiff.provenance import processor, versions
from raydiff.shards import ShardSet
from raydiff.spaces._learning import LearntOptions
from raydiff.splits import training_images
from raydiff.storage import Place, Storage, as_place, uri_of

__all__ = ["SPACES", "FittedSpace", "fitted_space", "seconds_elsewhere", "takes_long"]

SPACES = "spaces"
"""The folder of a benchmark or a sweep for them."""

FORMAT_VERSION = 1

_logger = logging.getLogger(__name__)

Report = Callable[[Mapping[str, Any]], None]


class FittedSpace(NamedTuple):
    """What a fit came to: the space's state, what was said of its progress, and the seconds it took."""

    state: Mapping[str, Tensor]
    lines: Sequence[Mapping[str, Any]] = ()
    seconds: float = 0.0


def fitted_space(
    config: ExperimentConfig,
    shards: ShardSet,
    *,
    without: Collection[str] = (),
    device: str = "cpu",
    spaces: str | None = None,
    report: Report = lambda _: None,
) -> FittedSpace:
    """The config's space, fitted on training images; found in ``spaces`` where it was fitted before, else left there.

    Args:
        config: of a space that learns.
        shards: whose training images it learns from.
        without: ids of those that are left out.
        device: where it is fitted.
        spaces: a folder or a URI; None to keep nothing.
        report: gets what a space that is trained says of its progress; of one that is found ``space_found``, where,
            ``space_seconds``, what fitting it took, and ``space_waited``, the seconds until it was found; and
            ``space_awaited``, where, while another process is fitting it.

    Raises:
        ConfigError: it needs pretrained weights that are not there.
        TrainingError: its loss is not a number.
        StorageError: the place cannot be reached or made; found out before anything is fitted.
    """
    space = build_space(config)
    images = training_images(config, shards, space.num_fit_images, without=without)
    if spaces is None:
        return _fit(space, images.to(device), report)
    origin = _origin(config, space, images, device)
    digest = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()
    place = as_place(spaces, field="data.spaces") / f"{config.space.name}-{digest[:24]}"
    begun = time.monotonic()
    found = _kept(place, origin)
    if found is None:
        with _alone(place, report) as certain:
            found = _kept(place, origin)
            if found is None:
                if certain:
                    _tidy(place)
                return _keep(place, origin, _fit(space, images.to(device), report))
    waited = time.monotonic() - begun
    report({"space_found": str(place), "space_seconds": found.seconds, "space_waited": waited})
    return found


def takes_long(config: ExperimentConfig) -> bool:
    """Whether the config's space is trained, so that it pays to share it (:class:`raydiff.contracts.TrainedSpace`)."""
    return isinstance(config.space, LearntOptions)


def seconds_elsewhere(line: Mapping[str, Any]) -> float:
    """What a run that was told this line would have taken longer, had it fitted the space itself."""
    return float(line["space_seconds"] - line["space_waited"]) if "space_found" in line else 0.0


def _fit(space: Space, images: Tensor, report: Report) -> FittedSpace:
    lines, begun = list[Mapping[str, Any]](), time.monotonic()

    def heed(line: Mapping[str, Any]) -> None:
        lines.append(line)
        report(line)

    space.fit_with_progress(images, heed) if isinstance(space, TrainedSpace) else space.fit(images)
    return FittedSpace(space.state(), lines, time.monotonic() - begun)


def _origin(config: ExperimentConfig, space: Space, images: Tensor, device: str) -> dict[str, Any]:
    """All that the bits of a fitted space follow from, as plain JSON."""
    pretrained = None
    if space.pretrained is not None:
        space.check()
        pretrained = hashlib.sha256(encode_tensors(space.state())).hexdigest()
    return {
        "format_version": FORMAT_VERSION,
        "space": space_options(config).model_dump(mode="json"),
        "images": {
            "shape": list(images.shape),
            "dtype": str(images.dtype),
            "sha256": hashlib.sha256(images.flatten().numpy().data).hexdigest(),
        },
        "pretrained": pretrained,
        "code": _code(),
        "versions": versions(),
        "machine": _machine(torch.device(device)),
    }


@cache
def _code() -> str:
    """Digest of the source that a fit runs through: a space that other code fitted may be another."""
    package, sha256 = Path(__file__).parent, hashlib.sha256()
    for path in sorted([*package.glob("spaces/*.py"), *package.glob("core/*.py"), package / "backbone.py"]):
        sha256.update(f"{path.relative_to(package)}\n".encode())
        sha256.update(path.read_bytes())
    return sha256.hexdigest()


def _machine(device: torch.device) -> dict[str, Any]:
    """What the last bits of a fit depend on beside the code."""
    cpu = f"{processor()}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


@contextmanager
def _alone(place: Place, report: Report) -> Iterator[bool]:
    """Be the one process of all that share the disk that fits this space; false where that cannot be told.

    Says so where another one is at it.
    """
    if not isinstance(place, Path):
        yield False
        return
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{place}: cannot be made ({error.strerror}); change data.spaces") from error
    with ExitStack() as held:
        certain = False
        with suppress(StorageError):  # a folder that others wrote and this process may only read
            try:
                certain = held.enter_context(alone_in(place))
            except ConfigError:
                report({"space_awaited": str(place)})
                certain = held.enter_context(alone_in(place, wait=True))
        yield certain


def _tidy(place: Place) -> None:
    """Remove fits that are damaged or half written; nobody else is here. What cannot be read may be a good one."""
    assert isinstance(place, Path)  # noqa: S101
    with suppress(OSError):
        for left in place.iterdir():
            if left.is_dir() and (left.name.startswith(".") or _is_damaged(left)):
                shutil.rmtree(left, ignore_errors=True)


def _is_damaged(fit: Path) -> bool:
    """Whether its files are surely not those that were written; not where the system failed to read them."""
    try:
        read_folder(fit)
    except ArtifactError as error:
        cause = error.__cause__
        return isinstance(cause, FileNotFoundError) or not isinstance(cause, OSError)
    except OSError:
        return False
    return False


def _kept(place: Place, origin: Mapping[str, Any]) -> FittedSpace | None:
    """The first fit that lies there whole and of this origin."""
    for name in Storage.of(uri_of(place), field="data.spaces").folders():
        if name.startswith("."):
            continue
        try:
            folder = read_folder(place / name)
            if folder.json("origin.json") == origin:
                progress = folder.json("progress.json")
                return FittedSpace(folder.tensors("space.safetensors"), progress["lines"], float(progress["seconds"]))
        except (ArtifactError, DataError, StorageError, OSError) as error:
            _logger.warning("%s; it is passed over", error)
    return None


def _keep(place: Place, origin: Mapping[str, Any], fitted: FittedSpace) -> FittedSpace:
    """Write a fit, and give back the one that all will find: another process may have been faster.

    One that cannot be written is given back as it is.
    """
    files = {
        "origin.json": encode_json(origin), "space.safetensors": encode_tensors(fitted.state),
        "progress.json": encode_json({"seconds": fitted.seconds, "lines": fitted.lines}),
    }  # fmt: skip
    try:
        write_folder(place / uuid.uuid4().hex[:12], "space", files)
        return _kept(place, origin) or fitted
    except (StorageError, OSError) as error:
        _logger.warning(
            "%s; this run goes on with the space it fitted, and the next will fit it again: make room in data.spaces,"
            " or set it to a place that can be written", error,
        )  # fmt: skip
        return fitted
