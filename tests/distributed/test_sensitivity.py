"""Importances rank what a formula makes important first, and call what has no effect so."""

import math

import numpy as np
import optuna
import pytest

from raydiff.distributed.sensitivity import EVALUATORS, importances, study_of
from raydiff.search_space import SearchSpace
from raydiff.sweep_records import Setting

SPACE = SearchSpace(
    parameters={
        "schedule.beta_schedule": {"choices": ["linear", "sigmoid", "squaredcos_cap_v2"]},
        "schedule.beta_end": {
            "float": [1e-3, 1e-1], "log": True, "when": {"schedule.beta_schedule": ["linear", "sigmoid"]}
        },
        "training.weight_decay": {"float": [0.0, 0.1]},
        "scoring.start": {"float": [0.05, 0.5]},
        "scoring.blur": {"choices": [0.0, [1, 2], True]},
    }
)  # fmt: skip


def rows(space=SPACE, *, trainings=24, each=6, seed=0, sign=1.0):
    """The family moves the value by up to 0.2, where scoring starts by 0.08, the last two by nothing.

    A training has its own noise, shared by its settings.
    """
    rng = np.random.default_rng(seed)
    found = []
    for run in range(trainings):
        weights = {"schedule.beta_schedule": ["linear", "sigmoid", "squaredcos_cap_v2"][int(rng.integers(3))],
                   "training.weight_decay": 0.1 * rng.random()}  # fmt: skip
        if weights["schedule.beta_schedule"] != "squaredcos_cap_v2":
            weights["schedule.beta_end"] = 1e-3 * 100 ** rng.random()
        noise = 0.015 * rng.normal()
        for _ in range(each):
            params = weights | {
                "scoring.start": 0.05 + 0.45 * rng.random(),
                "scoring.blur": [0.0, [1, 2], True][int(rng.integers(3))],
            }
            value = {"linear": 0.0, "sigmoid": 0.1, "squaredcos_cap_v2": 0.2}[params["schedule.beta_schedule"]]
            value += 0.18 * params["scoring.start"] + noise
            values = {"selection_auroc": 0.6 + sign * value, "loss": 0.4 - value}
            found.append(Setting("search", run, f"k{run}", params, values, {0: values}, 50, 0.05))
    return found


@pytest.fixture(scope="module")
def found():
    return importances(SPACE, rows(), "selection_auroc", num_draws=12)


def one(found, evaluator, path):
    return next(each for each in found if (each.evaluator, each.path) == (evaluator, path))


def test_the_most_important_comes_first_with_its_interval_clear(found):
    first, *others = [each for each in found if each.evaluator == "fanova"]
    assert first.path == "schedule.beta_schedule"
    assert first.is_clear
    assert all(other.high < first.low for other in others)
    assert one(found, "mean_decrease_impurity", first.path).is_clear


def test_what_has_no_effect_is_not_told_from_chance(found):
    for evaluator in EVALUATORS:
        assert not one(found, evaluator, "training.weight_decay").is_clear
        assert not one(found, evaluator, "scoring.blur").is_clear
        assert one(found, evaluator, "scoring.start").is_clear


def test_shares_lie_between_0_and_1_and_within_their_intervals(found):
    assert len(found) == len(EVALUATORS) * len(SPACE.parameters)
    for each in found:
        assert 0 <= each.low <= each.value <= each.high <= 1 + 1e-9
        assert 0 <= each.chance <= 1


def test_a_conditional_parameter_is_measured_where_it_exists(found):
    having = [row for row in rows() if "schedule.beta_end" in row.params]
    for evaluator in EVALUATORS:
        each = one(found, evaluator, "schedule.beta_end")
        assert (each.num_settings, each.num_trainings) == (len(having), len({row.training for row in having}))
        assert not each.is_clear


def test_the_same_seed_gives_the_same_figures():
    a, b = (importances(SPACE, rows(trainings=8), "selection_auroc", num_draws=2, seed=s) for s in (3, 3))
    assert a == b


def test_an_objective_that_should_be_small_is_turned():
    study = study_of(SPACE, rows(trainings=8), "loss")
    assert study.best_value == -min(row.values["loss"] for row in rows(trainings=8))


def test_on_few_trainings_settings_are_drawn_and_only_scoring_is_measured():
    """As of a sweep of scoring alone; what differs between the trainings is not laid at its door."""
    few = importances(SPACE, rows(trainings=3, each=30), "selection_auroc", num_draws=8)
    assert {each.path for each in few} == {"scoring.start", "scoring.blur"}
    assert one(few, "fanova", "scoring.start").value > 0.9
    assert one(few, "fanova", "scoring.start").is_clear
    assert not one(few, "fanova", "scoring.blur").is_clear
    assert few[0].num_trainings == 3


def test_too_few_settings_or_no_variance_give_no_interval():
    assert importances(SPACE, rows(trainings=5, each=3), "selection_auroc") == []
    assert importances(SPACE, rows(sign=0.0), "selection_auroc") == []
    assert importances(SPACE, rows(), "nfe") == []
    assert importances(SPACE, [], "selection_auroc") == []


def test_only_what_the_sampler_proposed_counts():
    search = rows(trainings=8)
    around = [Setting("around", None, "a", row.params, {"selection_auroc": 0.0}, {}, 50, 0.05) for row in search]
    assert len(study_of(SPACE, [*search, *around], "selection_auroc").trials) == len(search)


def test_settings_of_one_training_are_drawn_together():
    """With thousands of settings on few trainings, what only trainings tell stays uncertain."""
    few = importances(SPACE, rows(trainings=7, each=60), "selection_auroc", num_draws=4)
    family = one(few, "fanova", "schedule.beta_schedule")
    assert family.high - family.low > 0.01
    assert family.num_settings <= 300


def test_the_study_is_one_that_optuna_can_read(capfd):
    study = study_of(SPACE, rows(trainings=8), "selection_auroc")
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE
    assert study.best_value == max(row.values["selection_auroc"] for row in rows(trainings=8))
    kept = {trial.params["scoring.blur"] for trial in study.trials}
    assert kept == {0.0, "[1, 2]", True}
    ends = [trial.params["schedule.beta_end"] for trial in study.trials if "schedule.beta_end" in trial.params]
    assert all(math.log(1e-3) <= end <= math.log(1e-1) for end in ends)
    assert capfd.readouterr().err == ""


def test_a_value_from_an_older_space_is_left_out():
    moved = SearchSpace(
        parameters=SPACE.model_dump(exclude_none=True)["parameters"] | {"scoring.start": {"float": [0.2, 0.5]}}
    )
    study = study_of(moved, rows(trainings=8), "selection_auroc")
    starts = [trial.params.get("scoring.start", 1.0) for trial in study.trials]
    assert min(starts) >= 0.2
    assert 1.0 in starts
