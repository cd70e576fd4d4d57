"""After the search: curves around the best point, and the winner beside the starting point over fresh seeds.

The search's best value is the best of many, so part of it is luck. What is left of it is measured with seeds that the
search has not seen, on the selection split, and then, once, on the test split.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from raydiff.config import ExperimentConfig
from raydiff.core.calibration import Calibration
from raydiff.detector import DiffusionDetector, load_detector
from raydiff.errors import ConfigError, ScoreError, ShapeError
from raydiff.evaluation import evaluate
from raydiff.experiment import ARTIFACT
from raydiff.fitted_spaces import seconds_elsewhere
from raydiff.journal import alone_in, write_whole
from raydiff.predictions import Predictions
from raydiff.search_space import LEVELS, Parameter, SearchSpace
from raydiff.shards import ShardSet
from raydiff.sweep.evidence import EvidenceCache
from raydiff.sweep.jobs import TRAINING, Fit, Job, local_fit, placed, train_networks
from raydiff.sweep.objectives import measure_setting
from raydiff.sweep_records import Refit, Setting
from raydiff.tracking import read_metrics

__all__ = ["Curve", "curves", "grid", "is_drawn", "refit", "run_curve"]

_DRAWN, _SECONDS = "around.json", "seconds.json"
_OTHER_ANOMALIES = 1
_TARGETS = (0.01, 0.02, 0.05, 0.1, 0.2)


@dataclass(frozen=True)
class Curve:
    """Points that share their training parameters, and so their networks: (all parameters, which one is varied)."""

    job: Job
    points: tuple[tuple[Mapping[str, Any], str | None], ...]


def curves(job: Job, best: Setting) -> list[Curve]:
    """The best point with one parameter at a time changed, gathered by the networks that they need.

    ``job`` has the sweep's config and space; phase, seeds and parameters are set here.
    """
    space, around = job.space, job.space.around
    if around is None:
        return []
    found: dict[str, tuple[Job, list[tuple[Mapping[str, Any], str | None]]]] = {}
    for params, varied in [(dict(best.params), None), *_varied(space, best.params, around.values)]:
        of_training = {path: value for path, value in params.items() if path in space.paths(TRAINING)}
        one = replace(job, params=of_training, seeds=space.around_seeds, phase="around", trial=None)
        try:
            key = one.key
        except ConfigError:  # invalid together, though each is in range
            continue
        found.setdefault(key, (one, []))[1].append((params, varied))
    return [Curve(one, tuple(points)) for one, points in found.values()]


def run_curve(curve: Curve, fit_of: Callable[[Job], Fit | None] = lambda _: None) -> int:
    """Train its networks and measure its points; what is there already is kept. How many points there are.

    ``fit_of`` says how to train a job where it is worked on; in this process by default.
    """
    with placed(curve.job) as (job, mirror), alone_in(job.folder, wait=True):
        networks = train_networks(job, fit_of(job), keep=mirror.put_now_and_then if mirror else lambda: None)
        known, rows = len(networks.measured), 0
        for params, varied in curve.points:
            try:
                networks.measure(params, varied=varied)
            except (ConfigError, ScoreError, ShapeError):  # more steps than this schedule has
                continue
            rows += 1
        networks.keep(networks.measured[known:])
        write_whole(job.folder / _DRAWN, json.dumps(_asked(curve)))
    return rows


def is_drawn(curve: Curve) -> bool:
    """Whether every point has been measured with every seed, or could not be."""
    path = curve.job.folder / _DRAWN
    return path.exists() and json.loads(path.read_text(encoding="utf-8")) == _asked(curve)


def _asked(curve: Curve) -> list[Any]:
    asked = [list(curve.job.seeds), [[dict(params), varied] for params, varied in curve.points]]
    return list(json.loads(json.dumps(asked)))


def grid(parameter: Parameter, best: Any, count: int) -> list[Any]:
    """Values of one parameter, the best one among them: all choices, or so many over its range."""
    if parameter.choices is not None:
        return list(parameter.choices)
    low, high = parameter.range or (0, 0)
    values = np.geomspace(low, high, count) if parameter.log else np.linspace(low, high, count)
    if parameter.step is not None:
        values = low + np.round((values - low) / parameter.step) * parameter.step
    exact = [round(value) for value in values] if parameter.int else [float(f"{value:.4g}") for value in values]
    return sorted({*(min(max(value, low), high) for value in exact), best})


def refit(
    job: Job,
    config: ExperimentConfig,
    place: Path,
    shards: ShardSet,
    names: Sequence[str],
    *,
    fit: Fit | None = None,
    test: bool,
    keep: Callable[[], None] = lambda: None,
) -> Refit:
    """Train and calibrate a whole config, measure it on the selection split and, where asked, once on test.

    A refit that is finished is read from its folder. ``names`` are the objectives to measure. The synthetic anomalies
    are others than the search's, of its kinds; the calibration normals are the same, there being no more. ``fit`` says
    how to train, in this process by default. ``keep`` is called with each line of metrics, when what is finished may be
    put elsewhere. ``training_seconds`` counts the fit of a space, whoever did it.
    """
    path = place / "refit.json"
    if path.exists():
        known = _read(path)
        if known.test or not test:
            return known
    if not (place / ARTIFACT / "manifest.json").exists():
        begun, elsewhere = time.monotonic(), 0.0

        def heed(line: Mapping[str, Any]) -> None:
            nonlocal elsewhere
            elsewhere += seconds_elsewhere(line)
            keep()

        (fit or local_fit(job))(config, place, shards, heed)
        write_whole(place / _SECONDS, json.dumps(time.monotonic() - begun + elsewhere))
    detector = load_detector(place / ARTIFACT, device=job.device)
    assert isinstance(detector, DiffusionDetector)  # noqa: S101
    cache = EvidenceCache.of(detector, shards, seed=_OTHER_ANOMALIES, kinds=job.space.anomalies)
    selection = measure_setting(cache, config, names)
    measured = _on_test(detector, shards) if test else ({}, ())
    result = Refit(config.seed, {**_of_training(place), **selection}, *measured)
    _write(path, result)
    return result


def _of_training(place: Path) -> dict[str, float]:
    """What the training took, as far as it was not interrupted, and its held-out loss."""
    losses = [line["held_out_loss"] for line in read_metrics(place) if "held_out_loss" in line]
    found = {"loss": float(losses[-1])} if losses else {}
    if (place / _SECONDS).exists():
        found["training_seconds"] = float(json.loads((place / _SECONDS).read_text(encoding="utf-8")))
    return found


def _on_test(detector: DiffusionDetector, shards: ShardSet) -> tuple[dict[str, float], tuple[dict[str, float], ...]]:
    """Metrics, and the rates at several targets."""
    evaluation = evaluate(detector, shards, num_pictures=0)
    row, predictions = evaluation.rows[0], evaluation.predictions
    assert detector.calibration is not None  # noqa: S101
    assert predictions is not None  # noqa: S101
    metrics = {name: estimate.value for name, estimate in row.metrics.items() if math.isfinite(estimate.value)}
    own = _rates(predictions, detector.calibration)
    counts = {
        "num_test_normal": float((~predictions.labels).sum()),
        "num_test_anomalous": float(predictions.labels.sum()),
    }
    rates = tuple(_rates(predictions, detector.calibration.at(target)) for target in _TARGETS)
    return {**metrics, **own, **counts}, rates


def _rates(predictions: Predictions, calibration: Calibration) -> dict[str, float]:
    flagged = predictions.scores > calibration.threshold.value
    return {
        "target_fpr": calibration.threshold.target_fpr,
        "realised_fpr": float(flagged[~predictions.labels].mean()),
        "realised_tpr": float(flagged[predictions.labels].mean()),
    }


def _varied(space: SearchSpace, best: Mapping[str, Any], count: int) -> Iterator[tuple[dict[str, Any], str]]:
    """Every parameter of the best point at its other values; those whose condition then fails are left out."""
    for path, parameter in space.parameters.items():
        if path not in best:
            continue
        for value in grid(parameter, best[path], count):
            if value == best[path]:
                continue
            yield _applying(space, {**best, path: value}), path


def _applying(space: SearchSpace, params: Mapping[str, Any]) -> dict[str, Any]:
    """Those parameters whose conditions hold among the ones that are left."""
    kept: dict[str, Any] = {}
    for path in space.paths(LEVELS):
        if path in params and space.applies(path, kept):
            kept[path] = params[path]
    return kept


def _write(path: Path, result: Refit) -> None:
    write_whole(path, json.dumps(dataclasses.asdict(result)))


def _read(path: Path) -> Refit:
    data = json.loads(path.read_text(encoding="utf-8"))
    return Refit(**{**data, "rates": tuple(data["rates"])})
