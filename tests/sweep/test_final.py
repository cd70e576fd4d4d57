"""The points of the curves around the best one."""

from __future__ import annotations

from pathlib import Path

from raydiff.config import ExperimentConfig
from raydiff.search_space import Parameter, SearchSpace
from raydiff.sweep.final import curves, grid
from raydiff.sweep.jobs import Job
from raydiff.sweep_records import Setting

SPACE = {
    "parameters": {
        "schedule.beta_schedule": {"choices": ["linear", "squaredcos_cap_v2"]},
        "schedule.beta_end": {"float": [0.01, 0.1], "log": True, "when": {"schedule.beta_schedule": ["linear"]}},
        "scoring.pooling": {"choices": ["mean", "max"]},
    },
    "around": {"values": 3, "seeds": [1, 2]},
}
BEST = {"schedule.beta_schedule": "linear", "schedule.beta_end": 0.02, "scoring.pooling": "mean"}


def test_a_grid_spans_the_range_and_has_the_best_value() -> None:
    values = grid(Parameter.model_validate({"float": [0.01, 1.0], "log": True}), 0.02, 3)
    assert values[0] == 0.01
    assert values[-1] == 1.0
    assert 0.02 in values
    assert len(values) == 4
    assert grid(Parameter.model_validate({"int": [1, 5]}), 3, 3) == [1, 3, 5]
    assert grid(Parameter.model_validate({"choices": [[1], [2]]}), [2], 9) == [[1], [2]]


def test_points_differ_in_one_parameter_and_share_their_networks(tmp_path: Path) -> None:
    job = Job(tmp_path, "shards", SearchSpace.model_validate(SPACE), ExperimentConfig(), {}, (0,))
    best = Setting("search", 0, "key", BEST, {}, {}, 10, 0.05)
    found = curves(job, best)
    assert {curve.job.seeds for curve in found} == {(1, 2)}
    points = [point for curve in found for point in curve.points]
    assert (BEST, None) in points
    assert (
        {"schedule.beta_schedule": "squaredcos_cap_v2", "scoring.pooling": "mean"},
        "schedule.beta_schedule",
    ) in points
    assert (BEST | {"scoring.pooling": "max"}, "scoring.pooling") in points
    [own] = [curve for curve in found if (BEST, None) in curve.points]
    assert (BEST | {"scoring.pooling": "max"}, "scoring.pooling") in own.points  # no training of its own
    assert len({curve.job.key for curve in found}) == len(found) == 5
