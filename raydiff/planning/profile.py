"""``Profile``: what a config costs on the machine where it was measured; a JSON file that plans elsewhere start from.

Seconds are medians, bytes are counted, not guessed. All are of one worker; a *row* is an image in its batch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from raydiff.config import ExperimentConfig
from raydiff.errors import ArtifactError, ConfigError, StorageError

__all__ = ["FORMAT_VERSION", "Images", "Line", "Pair", "Profile", "read_profile", "workload", "write_profile"]

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Line:
    """``fixed + per_row * rows``, neither below 0."""

    fixed: float
    per_row: float

    @classmethod
    def through(cls, points: Mapping[int, float]) -> Line:
        """The line through the points of the fewest and the most rows; through the origin where there is one point."""
        low, high = min(points), max(points)
        if low == high:
            return cls(0.0, points[low] / low)
        slope = (points[high] - points[low]) / (high - low)
        if slope <= 0:  # noise: the same for any number of rows
            return cls(points[high], 0.0)
        fixed = points[high] - slope * high
        return cls(fixed, slope) if fixed >= 0 else cls(0.0, points[high] / high)

    def at(self, rows: float) -> float:
        """The value for so many rows."""
        return self.fixed + self.per_row * rows


@dataclass(frozen=True)
class Images:
    """One stored image, the mean of a sample.

    ``source`` says whose they are; ``num_train`` and ``num_all`` how many the data set has, None where it is not at
    hand. ``file_bytes`` are of the file, ``decode_seconds`` until its pixels have the config's size.
    """

    source: str
    num_sampled: int
    file_bytes: float
    decode_seconds: float
    num_train: int | None = None
    num_calibration: int | None = None
    num_all: int | None = None


@dataclass(frozen=True)
class Pair:
    """Two processes of one machine at the same time, each with the profile's threads.

    ``slowdown``: a step's time in both over that in one of them while the other waits, at least 1.
    ``all_reduce_seconds``: by bytes, gloo over loopback, where 2 (W - 1) / W is 1.
    """

    slowdown: float
    all_reduce_seconds: dict[int, float]


@dataclass(frozen=True)
class Profile:
    """See the module.

    Attributes:
        workload: the config's fields that the figures depend on (:func:`workload`).
        machine, device, cores, threads, versions, commit: where it was measured, and with what.
        num_parameters: of the network; ``space_bytes`` of what a space has learnt or brought along.
        latent_values: numbers in what is diffused of one image.
        step_seconds: by rows, of a whole optimiser step as ``raydiff fit`` does it: noise, forward, backward, clipping,
            AdamW, average. What a costly space makes of an image is taken as remembered.
        saved_bytes: by rows, what autograd keeps for the backward pass.
        flops: per row, forward and backward, of convolutions (``convolution``) and products (``matmul``);
            ``forward_flops`` both of the forward pass.
        operations: by rows, started in forward and backward; ``forward_operations`` in a forward pass.
        encode_seconds, encode_flops: of a costly space, per image; 0 for another.
        space_seconds: of the whole fit of a space that is trained, from some of its steps; 0 for another.
        space_fixed_seconds: of the fit of another, beside encoding its images; ``space_fit_bytes`` what it takes beside
            them, for as many as it asks for.
        head_seconds: of the whole training of a scorer's own network, from some of its steps and examples; 0 without.
        evaluations: network evaluations per score; ``score_seconds`` per image, in batches of ``score_rows``.
        evidence_values: numbers that calibration holds of an image, those of its maps; 0 where that was not measured.
        checkpoint_bytes, checkpoint_seconds: written to a local temporary folder, with hashes and fsync.
        artifact_bytes: of the saved detector, calibration scores aside.
        process_bytes: resident memory of a process that has imported everything and holds no network.
        device_peak_bytes: by rows, the most a GPU's allocator held; empty on a CPU. ``device_memory_bytes``: the GPU's.
        pair: two processes at once; None where that was not measured.
    """

    workload: dict[str, Any]
    machine: str
    device: str
    cores: int
    threads: int
    num_parameters: int
    space_bytes: int
    latent_values: int
    step_seconds: dict[int, float]
    saved_bytes: dict[int, int]
    flops: dict[str, float]
    forward_flops: float
    operations: dict[int, int]
    forward_operations: int
    encode_seconds: float
    encode_flops: float
    costly_space: bool
    evaluations: int
    score_seconds: float
    score_rows: int
    checkpoint_bytes: int
    checkpoint_seconds: float
    artifact_bytes: int
    process_bytes: int
    images: Images
    pair: Pair | None = None
    device_peak_bytes: dict[int, int] = field(default_factory=dict)
    device_memory_bytes: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    seconds: float = 0.0
    space_seconds: float = 0.0
    space_fixed_seconds: float = 0.0
    space_fit_bytes: int = 0
    head_seconds: float = 0.0
    evidence_values: int = 0

    @property
    def forward_share(self) -> float:
        """Of a step's FLOPs, those of the forward pass."""
        return self.forward_flops / max(1.0, sum(self.flops.values()))

    @property
    def on_gpu(self) -> bool:
        """Whether it was measured on a GPU."""
        return self.device.startswith("cuda")

    def check(self, config: ExperimentConfig, where: str) -> None:
        """Refuse a profile of another network, image size or scorer.

        Raises:
            ConfigError: names the first field that differs.
        """
        wanted, have = _flat(workload(config)), _flat(self.workload)
        for name in sorted(wanted.keys() | have.keys()):
            if wanted.get(name) != have.get(name):
                raise ConfigError(
                    f"{where}: was measured with {name} = {have.get(name)}, the config says {wanted.get(name)};"
                    f" measure again with raydiff plan CONFIG --measure {where}"
                )


def workload(config: ExperimentConfig) -> dict[str, Any]:
    """The fields that a step, a score and a stored image depend on; the batch, the budget and the workers do not."""
    dumped = config.to_dict()
    kept = {name: dumped[name] for name in ("space", "denoiser", "scoring", "objective")}
    kept["data"] = {name: dumped["data"][name] for name in ("image_size", "channels", "resize")}
    if config.tiles.size is not None:
        kept["tiles"] = dumped["tiles"]
    if config.data.align != "none":
        kept["data"] |= {"align": config.data.align, "aligned_width": config.data.aligned_width}
    kept["training"] = {name: dumped["training"][name] for name in ("precision", "compile", "channels_last")}
    kept["schedule"] = {"num_train_timesteps": dumped["schedule"]["num_train_timesteps"]}
    for component in ("space", "scoring"):  # where their weights lie on this machine
        kept[component] = {k: v for k, v in kept[component].items() if k not in ("weights", "feature_weights")}
    return kept


def write_profile(profile: Profile, path: Path) -> None:
    """Write it as JSON.

    Raises:
        StorageError: the file cannot be written.
    """
    text = json.dumps({"format_version": FORMAT_VERSION, **asdict(profile)}, indent=1, sort_keys=True) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror}); choose another --measure") from error


def read_profile(path: Path) -> Profile:
    """What :func:`write_profile` wrote.

    Raises:
        ConfigError: there is no such file.
        ArtifactError: it is no profile, or one of a newer format.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data.pop("format_version")
        if version != FORMAT_VERSION:
            raise ArtifactError(f"{path}: has format version {version}; this raydiff reads {FORMAT_VERSION}")
        unknown = data.keys() - {known.name for known in fields(Profile)}
        if unknown:
            raise ValueError(f"{min(unknown)} is not a field of a profile")
        for name in ("step_seconds", "saved_bytes", "operations", "device_peak_bytes"):
            data[name] = _by_number(data[name])
        pair = data.pop("pair")
        reduced = None if pair is None else Pair(pair["slowdown"], _by_number(pair["all_reduce_seconds"]))
        return Profile(**{**data, "images": Images(**data["images"]), "pair": reduced})
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); write one with raydiff plan CONFIG --measure {path}"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{path}: is no profile ({' '.join(str(error).split())}); write one with raydiff plan CONFIG --measure"
            f" {path}"
        ) from error


def _by_number(mapping: Mapping[str, Any]) -> dict[int, Any]:
    """JSON's keys are text."""
    return {int(key): value for key, value in mapping.items()}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
