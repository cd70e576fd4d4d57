"""One combination of a sweep's training parameters, worked off: networks trained, settings measured on them.

Everything of a combination lies in one folder, so that whoever takes the work up again finds what was done::

    OUT/spaces/                       spaces that are trained, for all combinations (:mod:`raydiff.fitted_spaces`)
    OUT/trainings/KEY/job.json        the combination
    OUT/trainings/KEY/seed-S/         a run folder per seed, with its checkpoints
    OUT/trainings/KEY/trainings.jsonl one row per network
    OUT/trainings/KEY/settings.jsonl  one row per setting

``KEY`` is the same for the same weights, whatever the sampler calls them, so that nothing is trained twice.

Where OUT is in a store, the folder is worked on in a copy on the node, and what was done is put back (:func:`placed`).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from raydiff.config import ExperimentConfig
from raydiff.config.sections import CalibrationConfig
from raydiff.crossfit import remove_checkpoints
from raydiff.detector import DiffusionDetector, load_detector
from raydiff.errors import ConfigError
from raydiff.experiment import ARTIFACT, fit_locally, held_out_images
from raydiff.fitted_spaces import SPACES, seconds_elsewhere
from raydiff.journal import write_whole
from raydiff.mirror import Mirror, on_node
from raydiff.plan import training_scoring
from raydiff.search_space import Level, SearchSpace
from raydiff.shards import ShardSet
from raydiff.storage import Storage
from raydiff.sweep.evidence import EvidenceCache
from raydiff.sweep.objectives import measure_setting, step_losses
from raydiff.sweep_records import (
    Phase,
    Setting,
    TrainingRow,
    append_settings,
    append_trainings,
    read_settings,
    read_trainings,
)
from raydiff.tracking import read_metrics

__all__ = ["SCORING", "TRAINING", "Fit", "Job", "Networks", "local_fit", "placed", "stopped", "train_networks"]

TRAINING: tuple[Level, ...] = ("training",)
SCORING: tuple[Level, ...] = ("evidence", "judgement")

_SECONDS = "seconds.json"

Fit = Callable[[ExperimentConfig, Path, ShardSet, Callable[[Mapping[str, Any]], None]], object]
"""Trains a config in a run folder, from its last checkpoint if there is one, and leaves an artefact there."""


@dataclass(frozen=True)
class Job:
    """A combination of training parameters, the seeds to train it with, and where all of it lies.

    ``config`` is what the sweep began with, the space's ``base`` not yet laid over it; ``params`` are those of level
    ``training`` alone. With a ``store``, the URI of the sweep's place, ``out`` has a copy of that or of its records.
    """

    out: Path
    shards: str
    space: SearchSpace
    config: ExperimentConfig
    params: Mapping[str, Any]
    seeds: tuple[int, ...]
    phase: Phase = "search"
    trial: int | None = None
    device: str = "cpu"
    store: str | None = None

    @property
    def fitted(self) -> ExperimentConfig:
        """The config of the training: seed 0, one worker per trial's own, scoring and threshold of no account."""
        config = self.space.apply(self.config.override(self.space.workers), self.params)
        if self.space.pruning is not None:
            every = min(config.training.validate_every, self.space.pruning.grace_steps)
            config = config.override({"training.validate_every": every})
        return config.model_copy(
            update={"scoring": training_scoring(config), "calibration": CalibrationConfig(), "seed": 0}
        )

    @property
    def key(self) -> str:
        """12 hex characters over all that can change the weights, the seed aside."""
        return hashlib.sha256(self.fitted.digest().encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        """Where all of it lies, below ``out``."""
        return f"trainings/{self.key}"

    @property
    def folder(self) -> Path:
        """Where all of it lies."""
        return self.out / self.name

    @property
    def spaces(self) -> str:
        """Where spaces that were fitted are kept for all combinations."""
        return str(self.out / SPACES) if self.store is None else Storage.of(self.store).child(SPACES).uri

    def scored(self, params: Mapping[str, Any], seed: int) -> ExperimentConfig:
        """The whole config of a setting."""
        return self.space.apply(self.config.override(self.space.workers), params).override({"seed": seed})


@dataclass
class Networks:
    """The trained networks of a job, each with its evidence, ready to be measured under any setting."""

    job: Job
    caches: Mapping[int, EvidenceCache]
    rows: Mapping[int, TrainingRow]
    measured: list[Setting] = field(default_factory=list)
    """What was measured in this folder before and now, in order."""

    def __post_init__(self) -> None:
        self._known = {_identity(row.params, row.phase, row.varied, row.by_seed): row for row in self.measured}

    def measure(self, params: Mapping[str, Any], *, varied: str | None = None) -> Setting:
        """Measure a setting of all parameters, unless it was before, and keep its row.

        Raises:
            ConfigError: the combination cannot be scored, as with fewer steps than a scorer wants.
        """
        job = self.job
        asked = _identity(params, job.phase, varied, self.caches)
        if asked in self._known:
            return self._known[asked]
        names = [objective.name for objective in job.space.objectives]
        by_seed = {seed: self._of_seed(params, seed, names) for seed in self.caches}
        common = set.intersection(*(set(values) for values in by_seed.values()))
        values = {name: sum(each[name] for each in by_seed.values()) / len(by_seed) for name in sorted(common)}
        first = next(iter(self.caches))
        row = Setting(
            phase=job.phase, trial=job.trial, training=job.key, params=dict(params), values=values, by_seed=by_seed,
            num_normal=self.caches[first].num_normal,
            target_fpr=job.scored(params, first).calibration.target_fpr, varied=varied,
        )  # fmt: skip
        self.measured.append(row)
        self._known[asked] = row
        return row

    def keep(self, rows: Sequence[Setting]) -> None:
        """Write rows down."""
        if rows:
            append_settings(self.job.folder, rows)

    def _of_seed(self, params: Mapping[str, Any], seed: int, names: Sequence[str]) -> dict[str, float]:
        values = dict(measure_setting(self.caches[seed], self.job.scored(params, seed), names))
        values["training_seconds"] = self.rows[seed].seconds
        if self.rows[seed].loss is not None:
            values["loss"] = float(self.rows[seed].loss or 0.0)
        return values


@contextmanager
def placed(job: Job) -> Iterator[tuple[Job, Mirror | None]]:
    """The job where it can be worked on: as it is; or, with a store, on a copy of its folder, which is put back.

    Checkpoints of networks that are trained are not kept in a store.

    Raises:
        StorageError: see :func:`raydiff.mirror.on_node`.
    """
    if job.store is None:
        yield job, None
        return
    with on_node(job.store, job.name) as mirror:
        here = replace(job, out=mirror.folder)
        yield here, mirror
        for seed in job.seeds:
            if (here.folder / f"seed-{seed}" / ARTIFACT / "manifest.json").exists():
                remove_checkpoints(here.folder / f"seed-{seed}")


def train_networks(
    job: Job,
    fit: Fit | None = None,
    report: Callable[[int, float], None] = lambda *_: None,
    *,
    keep: Callable[[], None] = lambda: None,
) -> Networks:
    """Train what is not trained yet, each seed's network in its own run folder, and open them all.

    Args:
        job: the combination.
        fit: how to train; in this process by default.
        report: called with (optimiser steps so far, held-out loss) of the first seed that is trained, for pruning.
        keep: called now and then, when what is finished may be put elsewhere.

    Raises:
        ConfigError, DataError, TrainingError: see :func:`raydiff.experiment.fit_locally`.
    """
    shards = ShardSet.open(job.shards, on_bad_shard=job.config.data.on_bad_shard)
    if not (job.folder / "job.json").exists():
        write_whole(job.folder / "job.json", json.dumps({"params": dict(job.params)}, sort_keys=True))
    known = {row.seed: row for row in read_trainings(job.folder) if row.state == "complete"}
    rows, caches = {}, {}
    for number, seed in enumerate(job.seeds):
        place = job.folder / f"seed-{seed}"
        if seed not in known:
            known[seed] = _trained(
                job, place, seed, shards, fit or local_fit(job), report if not number else _no_report, keep
            )
            append_trainings(job.folder, [known[seed]])
            keep()
        rows[seed] = known[seed]
        detector = load_detector(place / ARTIFACT, device=job.device)
        if not isinstance(detector, DiffusionDetector):
            raise ConfigError(f"{place}: does not hold a diffusion model; remove the folder and run again")
        caches[seed] = EvidenceCache.of(detector, shards, seed=0, kinds=job.space.anomalies)
    return Networks(job, caches, rows, read_settings(job.folder))


def _trained(
    job: Job, place: Path, seed: int, shards: ShardSet, fit: Fit, report: Callable[[int, float], None],
    keep: Callable[[], None],
) -> TrainingRow:  # fmt: skip
    config = job.fitted.override({"seed": seed})
    before = _spent(place)
    begun = time.monotonic()

    def heed(line: Mapping[str, Any]) -> None:
        nonlocal before
        before += seconds_elsewhere(line)
        write_whole(place / _SECONDS, json.dumps({"seconds": before + time.monotonic() - begun}))
        keep()
        if "held_out_loss" in line and "fold" not in line:
            report(int(line["step"]), float(line["held_out_loss"]))

    fit(config, place, shards, heed)
    seconds = before + time.monotonic() - begun
    losses = [line["held_out_loss"] for line in read_metrics(place) if "held_out_loss" in line]
    detector = load_detector(place / ARTIFACT, device=job.device)
    assert isinstance(detector, DiffusionDetector)  # noqa: S101
    return TrainingRow(
        key=job.key, phase=job.phase, trial=job.trial, params=dict(job.params), seed=seed, state="complete",
        seconds=seconds, steps=config.training.num_steps, loss=losses[-1] if losses else None,
        by_step=step_losses(detector, held_out_images(config, shards)),
    )  # fmt: skip


def stopped(job: Job, state: str, failure: str = "") -> list[TrainingRow]:
    """Rows of networks that were not trained to the end: the seeds that had been begun."""
    done = {row.seed for row in read_trainings(job.folder)}
    rows = []
    for seed in job.seeds:
        place = job.folder / f"seed-{seed}"
        if seed in done or not place.exists():
            continue
        lines = list(read_metrics(place))
        losses = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
        rows.append(
            TrainingRow(
                key=job.key, phase=job.phase, trial=job.trial, params=dict(job.params), seed=seed,
                state="pruned" if state == "pruned" else "failed", seconds=_spent(place),
                steps=max((line["step"] for line in lines), default=0), loss=losses[-1] if losses else None,
                failure=failure,
            )
        )  # fmt: skip
    return rows


def _identity(params: Mapping[str, Any], phase: Phase, varied: str | None, seeds: Iterable[int]) -> str:
    return json.dumps([dict(params), phase, varied, sorted(seeds)], sort_keys=True)


def _spent(place: Path) -> float:
    """Seconds that an interrupted training had taken."""
    try:
        return float(json.loads((place / _SECONDS).read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def local_fit(job: Job) -> Fit:
    """Trains in this process, on the job's device; trained spaces are those of the whole sweep."""

    def fit(config: ExperimentConfig, place: Path, shards: ShardSet, heed: Callable[[Mapping[str, Any]], None]) -> None:
        fit_locally(config, place, shards, device=job.device, on_metrics=heed, spaces=job.spaces)

    return fit


def _no_report(step: int, loss: float) -> None:
    """Only the first seed's training can be stopped."""
