"""What a sweep leaves behind: a row per training, a row per setting, and what became of the winner.

::

    OUT/trainings.jsonl   one row per network that was trained (or stopped, or failed)
    OUT/settings.jsonl    one row per setting of all parameters that was measured, over its seeds
    OUT/final.json        the winner and the starting point, refitted over fresh seeds and tested once
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from raydiff.errors import DataError
from raydiff.journal import append_lines, read_lines, write_whole

__all__ = [
    "FINAL",
    "SETTINGS",
    "TRAININGS",
    "Final",
    "Phase",
    "Refit",
    "Setting",
    "StepLoss",
    "TrainingRow",
    "append_settings",
    "append_trainings",
    "read_final",
    "read_settings",
    "read_trainings",
    "write_final",
]

SETTINGS, TRAININGS, FINAL = "settings.jsonl", "trainings.jsonl", "final.json"

Phase = Literal["search", "around"]
"""``search``: proposed by the sampler. ``around``: the best point with one parameter changed, over several seeds."""


@dataclass(frozen=True)
class Setting:
    """One setting of all parameters, and what was measured of it on the selection split; never on test.

    ``params`` maps dotted config path to value; a parameter whose condition does not hold is absent. ``training`` is
    the key of the training it was scored with, without the seed; ``trial`` the number of the Optuna trial that opened
    that training, None in phase ``around``. ``by_seed`` has each objective per training seed, ``values`` their means.
    Beside the objectives asked for there are always ``selection_auroc``, ``nfe``, and, at the threshold of
    ``target_fpr``, the ``realised_fpr`` on normal images that it was not taken from and the ``detection_rate`` of the
    synthetic anomalies; ``num_normal`` images each.
    """

    phase: Phase
    trial: int | None
    training: str
    params: Mapping[str, Any]
    values: Mapping[str, float]
    by_seed: Mapping[int, Mapping[str, float]]
    num_normal: int
    target_fpr: float
    varied: str | None = None
    """In phase ``around``: the parameter that differs from the best point, None for that point itself."""


@dataclass(frozen=True)
class StepLoss:
    """How well a network denoises at one step, on held-out normals.

    ``t`` is the step as a share of T, ``log_snr`` the natural logarithm of its signal-to-noise ratio, ``loss`` the mean
    squared error of what the network predicts, ``x0_error`` that of the clean image which follows from it: the one that
    can be compared between schedules and prediction types, at equal ``log_snr``.
    """

    t: float
    log_snr: float
    loss: float
    x0_error: float


@dataclass(frozen=True)
class TrainingRow:
    """One network. ``params`` are the parameters that change weights; ``key`` leaves the seed out.

    ``seconds`` is the training alone, ``trial_seconds`` the whole Ray Tune trial in which it ran, divided by the
    trainings in it; ``loss`` the last held-out denoising loss, None where it failed before there was one.
    """

    key: str
    phase: Phase
    trial: int | None
    params: Mapping[str, Any]
    seed: int
    state: Literal["complete", "pruned", "failed"]
    seconds: float
    steps: int
    loss: float | None
    trial_seconds: float | None = None
    by_step: tuple[StepLoss, ...] = ()
    failure: str = ""


@dataclass(frozen=True)
class Refit:
    """One config trained anew with a seed that the search has not seen, measured on selection and, once, on test.

    ``test`` has the metrics of ``raydiff evaluate`` (``auroc``, ``average_precision``, ...), at the calibrated
    threshold also ``realised_fpr`` and ``realised_tpr`` with ``num_test_normal`` and ``num_test_anomalous`` images; it
    is empty where the test split was not read.
    """

    seed: int
    selection: Mapping[str, float]
    test: Mapping[str, float]
    rates: tuple[Mapping[str, float], ...] = ()
    """On test, one per target rate: ``target_fpr``, ``realised_fpr``, ``realised_tpr``."""


@dataclass(frozen=True)
class Final:
    """The winner beside the config that the sweep began with, both refitted over the same fresh seeds.

    ``promised`` is what the search measured of the winner, per objective: the best of many, so too good.
    """

    params: Mapping[str, Any]
    promised: Mapping[str, float]
    winner: tuple[Refit, ...] = ()
    start: tuple[Refit, ...] = ()
    num_trainings: int = 0
    num_settings: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)


def append_settings(out: Path, rows: Iterable[Setting]) -> None:
    """Add rows; each is whole or not there."""
    append_lines(out / SETTINGS, [json.dumps(dataclasses.asdict(row)) for row in rows])


def append_trainings(out: Path, rows: Iterable[TrainingRow]) -> None:
    """Add rows; each is whole or not there."""
    append_lines(out / TRAININGS, [json.dumps(dataclasses.asdict(row)) for row in rows])


def read_settings(out: Path) -> list[Setting]:
    """All rows, in the order they were measured; none where the file is missing."""
    return [
        Setting(**{**row, "by_seed": {int(seed): values for seed, values in row["by_seed"].items()}})
        for row in _rows(out / SETTINGS)
    ]


def read_trainings(out: Path) -> list[TrainingRow]:
    """All rows, in the order they ended; none where the file is missing."""
    return [
        TrainingRow(**{**row, "by_step": tuple(StepLoss(**step) for step in row["by_step"])})
        for row in _rows(out / TRAININGS)
    ]


def write_final(out: Path, final: Final) -> None:
    """Write ``final.json`` whole."""
    write_whole(out / FINAL, json.dumps(dataclasses.asdict(final), indent=1))


def read_final(out: Path) -> Final | None:
    """What became of the winner; None before the last phase."""
    path = out / FINAL
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        parts = {name: tuple(Refit(**{**row, "rates": tuple(row["rates"])}) for row in data[name]) for name in _REFITS}
        return Final(**{**data, **parts})
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: is no record of a winner ({error}); remove it and run the sweep again") from error


_REFITS = ("winner", "start")


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows = []
    for number, line in read_lines(path, "restore it, or choose another --out"):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"{path} line {number}: is no row ({error}); remove the line") from error
    return rows
