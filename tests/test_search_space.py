"""A search space: what it refuses and how, what it asks of a real Optuna trial, the config it makes of the answer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from raydiff.config import ExperimentConfig, load_config
from raydiff.errors import ConfigError
from raydiff.search_space import LEVELS, OBJECTIVES, Parameter, SearchSpace, load_search_space

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "search_spaces").glob("*.yaml"))
LEARNING_RATE = {"training.learning_rate": {"float": [1e-4, 1e-2], "log": True}}


@pytest.fixture(scope="module")
def digits() -> ExperimentConfig:
    return load_config(ROOT / "examples" / "configs" / "digits.yaml")


def read(tmp_path: Path, text: str) -> SearchSpace:
    path = tmp_path / "space.yaml"
    path.write_text(text, encoding="utf-8")
    return load_search_space(path)


def space_of(parameters: dict[str, Any], **others: Any) -> SearchSpace:
    return SearchSpace.model_validate({"parameters": parameters, **others})


def refusal(parameters: dict[str, Any], config: ExperimentConfig, **others: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        space_of(parameters, **others).check(config, "space.yaml")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("space.yaml: ")
    return message


def new_trial(seed: int = 0) -> optuna.Trial:
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed)).ask()


# --- the file ---------------------------------------------------------------------------------------------------------


def test_numbers_as_yaml_writes_them(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-4 as text; a search space must not, wherever it stands."""
    space = read(tmp_path, """
        base: {schedule.beta_start: 1e-5}
        parameters:
          training.learning_rate: {float: [1e-4, 1E-2], log: true}
          schedule.beta_end: {choices: [2e-2, 0.1]}
          training.weight_decay: {float: [1e-3, 1.5e-1], when: {schedule.beta_end: 2e-2}}
        points: [{training.learning_rate: 1e-3, schedule.beta_end: 2e-2}]
        """)  # fmt: skip
    assert space.parameters["training.learning_rate"].float == (1e-4, 1e-2)
    assert space.parameters["schedule.beta_end"].choices == (0.02, 0.1)
    assert space.parameters["training.weight_decay"].when == {"schedule.beta_end": (0.02,)}
    assert space.base == {"schedule.beta_start": 1e-5}
    assert space.points == ({"training.learning_rate": 1e-3, "schedule.beta_end": 0.02},)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("title: nothing", "parameters is missing"),
        ("paramters: {}", "paramters is not a known key; did you mean 'parameters'?"),
        ("parameters: {training.dropout: [1, 2]}", "parameters.training.dropout is [1, 2]; write a distribution"),
        ("parameters: {seed: {chioces: [1]}}", "parameters.seed: chioces is not a known key; did you mean 'choices'?"),
        (
            "pruning: {grace: 3}\nparameters: {a: {int: [1, 2]}}",
            "pruning: grace is not a known key; did you mean 'grace_st",
        ),
        (
            "objectives: [{nam: nfe}]\nparameters: {a: {int: [1, 2]}}",
            "objectives.0: nam is not a known key; did you mean",
        ),
        ("objectives: nfe\nparameters: {a: {int: [1, 2]}}", "objectives is 'nfe'; write a list"),
        ("parameters: {a: {int: 3}}", "parameters.a.int is 3; write a list"),
        ("parameters: {a: {int: [1, 2]}, a: {int: [1, 3]}}", "a is given twice"),
        ("parameters: {a: {int: [1, 2]}}\nseeds: []", "seeds is []"),
        ("parameters: {a: {int: [1, 2]}}\nseeds: [100]", "refit_seeds has 100, which seeds has too"),
        ("parameters: {a: {int: [1, 2]}}\nseeds: [1, 1]", "seeds has 1 twice"),
        ("parameters: {a: {int: [1, 2]}}\nrefit_seeds: [-1]", "refit_seeds has -1; a seed lies between"),
        ("parameters: {a: {int: [1, 2]}}\nnum_gpus: 1.5", "num_gpus is 1.5; above 1 it must be a whole number"),
    ],
)
def test_a_bad_file_is_named_with_its_key(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "space.yaml"))
    assert expected in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        load_search_space(tmp_path / "none.yaml")


# --- distributions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("distribution", "expected"),
    [
        ({}, "has no distribution"),
        ({"int": [1, 2], "float": [1, 2]}, "has int and float; give exactly one"),
        ({"choices": []}, "at least 1 item"),
        ({"choices": [1, 2, 1]}, "1 is given twice"),
        ({"choices": [[1, 2], [1, 2]]}, "[1, 2] is given twice"),
        ({"choices": [1, float("nan")]}, "nan cannot be stored"),
        ({"choices": [1, 2], "log": True}, "log is set for choices"),
        ({"int": [5, 5]}, "int is [5, 5], an empty range"),
        ({"float": [2, 1]}, "float is [2.0, 1.0], an empty range"),
        ({"float": [0, 1], "log": True}, "with log; the lowest must be above 0"),
        ({"float": [1, 2], "log": True, "step": 0.5}, "log and step are both set"),
        ({"float": [0.1, 1.0], "step": 0.2}, "does not reach the end; end at 0.9"),
        ({"int": [1, 8], "step": 2}, "does not reach the end; end at 7"),
        ({"int": [1, 8], "step": 0.5}, "step is 0.5 for whole numbers"),
        ({"int": [1, 8], "step": 0}, "greater than 0"),
        ({"int": [True, 8]}, "true or false"),
        ({"int": [1, 8], "when": {"training.batch_size": []}}, "empty list"),
    ],
)
def test_a_distribution_that_is_none(distribution: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)):
        Parameter.model_validate(distribution)


def test_a_value_is_admitted_where_the_distribution_has_it() -> None:
    stepped = Parameter.model_validate({"float": [0.1, 0.9], "step": 0.2})
    assert [stepped.admits(value) for value in (0.1, 0.3, 0.7000000000000001, 0.2, 1.1, True, "0.1")] == [
        True, True, True, False, False, False, False,
    ]  # fmt: skip
    choices = Parameter.model_validate({"choices": [0, [1, 2], None]})
    assert [choices.admits(value) for value in (0, [1, 2], (1, 2), None, False, 3)] == [True] * 4 + [False] * 2


# --- what a trial is asked --------------------------------------------------------------------------------------------

NESTED: dict[str, Any] = {
    "scoring.top": {"float": [0.3, 1.0], "when": {"scoring.name": "inversion"}},
    "scoring.blur": {"float": [0, 2], "step": 0.5},
    "objective.min_snr_gamma": {"float": [1, 20], "log": True, "when": {"objective.loss_weighting": "min_snr"}},
    "objective.loss_weighting": {"choices": ["uniform", "min_snr"]},
    "denoiser.attention_levels": {"choices": [[], [1]]},
    "calibration.max_images": {"choices": [None, 40]},
    "scoring.name": {"choices": ["inversion", "reconstruction"]},
}


def test_levels_follow_from_paths(digits: ExperimentConfig) -> None:
    space = space_of(NESTED)
    assert space.paths(["training"]) == (
        "objective.loss_weighting", "objective.min_snr_gamma", "denoiser.attention_levels",
    )  # fmt: skip
    assert space.paths(["evidence"]) == ("scoring.name", "scoring.top")
    assert space.paths(["judgement"]) == ("scoring.blur", "calibration.max_images")
    assert space_of({"scoring": {"choices": [{"name": "likelihood"}]}}).paths(["evidence"]) == ("scoring",)


def test_optuna_is_asked_in_order_and_only_what_applies() -> None:
    space = space_of(NESTED)
    seen = set()
    for seed in range(20):
        trial = new_trial(seed)
        values = space.suggest(trial)
        assert list(values) == list(trial.params) == [path for path in space.paths() if path in values]
        assert ("scoring.top" in values) == (values["scoring.name"] == "inversion")
        assert ("objective.min_snr_gamma" in values) == (values["objective.loss_weighting"] == "min_snr")
        assert values["denoiser.attention_levels"] in ([], [1])
        assert trial.params["denoiser.attention_levels"] in ("[]", "[1]")
        assert space.suggest(new_trial(seed)) == values
        seen.add((values["scoring.name"], values["calibration.max_images"]))
    assert len(seen) == 4


def test_levels_can_be_asked_one_after_the_other() -> None:
    space = space_of({
        "schedule.num_train_timesteps": {"choices": [50, 1000]},
        "scoring.num_inference_steps": {"int": [10, 20], "when": {"schedule.num_train_timesteps": 1000}},
    })  # fmt: skip
    assert set(space.suggest(new_trial(), ["training"])) == {"schedule.num_train_timesteps"}
    scoring = ("evidence", "judgement")
    assert space.suggest(new_trial(), scoring, {"schedule.num_train_timesteps": 50}) == {}
    (asked,) = space.suggest(new_trial(), scoring, {"schedule.num_train_timesteps": 1000}).items()
    assert asked[0] == "scoring.num_inference_steps"


# --- the config that comes out ----------------------------------------------------------------------------------------


def test_base_then_values_then_options_after_their_component(digits: ExperimentConfig) -> None:
    space = space_of(NESTED, base={"training.num_steps": 7, "scoring.sided": "both"})
    config = space.apply(digits, {"scoring.top": 0.5, "scoring.blur": 1.5, "scoring.name": "inversion"})
    assert config.training.num_steps == 7
    assert config.scoring.model_dump() | {"name": "inversion", "top": 0.5, "blur": 1.5} == config.scoring.model_dump()
    assert digits.training.num_steps == 400


def test_a_whole_component_can_be_a_choice(digits: ExperimentConfig) -> None:
    choices = [{"name": "inversion", "num_inference_steps": 3}, {"name": "denoising_error"}]
    space = space_of({"scoring": {"choices": choices}, "scoring.pooling": {"choices": ["mean", "max"]}})
    space.check(digits, "space.yaml")
    values = space.suggest(new_trial())
    assert values["scoring"] in choices
    config = space.apply(digits, {"scoring.pooling": "max", "scoring": choices[0]})
    assert (config.scoring.name, config.scoring.model_dump()["pooling"]) == ("inversion", "max")


def test_a_combination_that_is_no_config_is_blamed_on_its_values(digits: ExperimentConfig) -> None:
    space = space_of({
        "schedule.rescale_to_zero_terminal_snr": {"choices": [False, True]},
        "objective.prediction_type": {"choices": ["epsilon", "sample"]},
        **LEARNING_RATE,
    })  # fmt: skip
    params = {
        "training.learning_rate": 1e-3, "objective.prediction_type": "epsilon",
        "schedule.rescale_to_zero_terminal_snr": True,
    }  # fmt: skip
    expected = "^schedule.rescale_to_zero_terminal_snr=True, objective.prediction_type=epsilon: schedule.rescale"
    with pytest.raises(ConfigError, match=expected):
        space.apply(digits, params)


def test_the_digest_is_of_what_trials_depend_on() -> None:
    before = space_of(LEARNING_RATE).digest()
    assert space_of(LEARNING_RATE, trials=3, title="Other", sampler="random").digest() == before
    others = (
        space_of({"training.learning_rate": {"float": [1e-4, 1e-1], "log": True}}),
        space_of(LEARNING_RATE, base={"training.num_steps": 3}),
        space_of(LEARNING_RATE, seeds=[1]),
        space_of(LEARNING_RATE, objectives=["loss"]),
    )
    assert len({before, *(other.digest() for other in others)}) == 5


# --- whether it fits the config ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("schedule.beta_schedul", "did you mean 'schedule.beta_schedule'?"),
        ("training.beta_end", "did you mean 'schedule.beta_end'?"),
        ("shedule", "did you mean 'schedule'?"),
        ("schedule", "is a whole section; name one of its fields"),
        ("scoring.poling", "did you mean 'scoring.pooling'?"),
        ("scoring.start_step", "has no start_step; only conditioned, deviation_correction, reconstruction"),
        ("training.log_every", "changes no score"),
        ("data.image_size", "may not be varied: a sweep compares settings on the same images"),
        ("contamination.max_share", "may not be varied: a sweep counts every calibration image as normal"),
        ("cross_fitting.folds", "may not be varied: a sweep compares settings on calibration images"),
        ("augmentation.shft", "did you mean 'augmentation.shift'?"),
        ("seed", "list seeds under seeds"),
        ("execution.num_workers", "num_cpus, num_gpus and num_workers"),
    ],
)
def test_a_path_that_cannot_be_varied(digits: ExperimentConfig, path: str, expected: str) -> None:
    message = refusal({path: {"choices": [1, 2]}}, digits)
    assert message.startswith("space.yaml: parameters: ")
    assert expected in message


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"training.num_steps": {"int": [0, 10]}}, "parameters.training.num_steps: 0 cannot be used"),
        ({"training.num_steps": {"float": [10, 20]}}, "valid integer"),
        ({"training.learning_rate": {"choices": [1e-3, "fast"]}}, "training.learning_rate: 'fast' cannot be used"),
        ({"training.weight_decay": {"choices": [0, True]}}, "True cannot be used"),
        ({"scoring.name": {"choices": ["inversion", "inversoin"]}}, "did you mean 'inversion'?"),
        ({"scoring.name": {"int": [1, 2]}}, "scoring.name is a range; give it choices"),
        ({"scoring": {"choices": [{"top": 0.5}]}}, "needs a name"),
        ({"scoring": {"choices": ["inversion"]}, "scoring.name": {"choices": ["inversion"]}}, "say the same"),
        ({"denoiser.attention_levels": {"choices": [[1], [2]]}}, "'[2]' cannot be used: denoiser.attention_levels"),
    ],
)
def test_a_value_that_its_field_does_not_take(digits: ExperimentConfig, parameters: Any, expected: str) -> None:
    assert expected in refusal(parameters, digits)


def test_an_option_that_only_some_components_have_needs_a_condition(digits: ExperimentConfig) -> None:
    names = {"scoring.name": {"choices": ["inversion", "likelihood", "reconstruction"]}}
    top: dict[str, Any] = {"float": [0.3, 1.0]}
    assert (
        "scoring may be reconstruction, which has no top; add when: {scoring.name: [inversion, likelihood]}"
        in refusal({**names, "scoring.top": top}, digits)
    )
    bad = top | {"when": {"scoring.name": ["inversion", "reconstruction"]}}
    assert "scoring may be reconstruction" in refusal({**names, "scoring.top": bad}, digits)
    good = top | {"when": {"scoring.name": ["inversion", "likelihood"]}}
    space_of({**names, "scoring.top": good}).check(digits, "space.yaml")
    statistic = {"choices": ["path", "latent"], "when": {"scoring.name": "inversion"}}
    through = top | {"when": {"scoring.statistic": "path"}}  # only inversion has a statistic
    space_of({**names, "scoring.statistic": statistic, "scoring.top": through}).check(digits, "space.yaml")
    whole = {"scoring": {"choices": [{"name": "inversion"}, "reconstruction"]}, "scoring.top": top}
    assert "scoring may be reconstruction, which has no top" in refusal(whole, digits)


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        (
            {"schedule.beta_schedul": "linear"},
            "is not another parameter of this space; did you mean 'schedule.beta_sched",
        ),
        ({"schedule.beta_end": 0.2}, "is not another parameter"),
        ({"schedule.beta_schedule": "cosine"}, "schedule.beta_schedule never is 'cosine'; it has 'linear', 'sigmoid'"),
        ({"schedule.num_train_timesteps": 55}, "never is 55; it lies between 50 and 100 in steps of 10"),
        ({"training.learning_rate": 1e-3}, "hits no single value"),
        ({"scoring.pooling": "mean"}, "scoring.pooling only judgement, which is chosen after it"),
        ({"objective.step_range": [[0.0, 1.0]], "schedule.beta_schedule": "linear"}, "conditions contradict"),
    ],
)
def test_a_condition_that_never_holds(digits: ExperimentConfig, when: dict[str, Any], expected: str) -> None:
    parameters = {
        "schedule.beta_end": {"float": [0.02, 0.2], "when": when},
        "schedule.beta_schedule": {"choices": ["linear", "sigmoid"]},
        "schedule.num_train_timesteps": {"int": [50, 100], "step": 10},
        "scoring.pooling": {"choices": ["mean", "max"]},
        "objective.step_range": {"choices": [[0.0, 1.0], [0.0, 0.9]], "when": {"schedule.beta_schedule": "sigmoid"}},
        **LEARNING_RATE,
    }
    message = refusal(parameters, digits)
    assert message.startswith("space.yaml: parameters.schedule.beta_end")
    assert expected in message


def test_conditions_in_a_circle(digits: ExperimentConfig) -> None:
    parameters = {
        "denoiser.dropout": {"choices": [0, 0.1], "when": {"training.batch_size": 16}},
        "training.batch_size": {"choices": [16, 32], "when": {"denoiser.dropout": 0}},
    }
    assert "circle, denoiser.dropout -> training.batch_size -> denoiser.dropout" in refusal(parameters, digits)


def test_values_that_do_not_go_together_are_named(digits: ExperimentConfig) -> None:
    rescaled: dict[str, Any] = {"choices": [False, True]}
    parameters = {
        "objective.prediction_type": {"choices": ["epsilon", "sample", "v_prediction"]},
        "schedule.rescale_to_zero_terminal_snr": rescaled,
        "scoring.pooling": {"choices": ["mean", "max"]},
    }
    message = refusal(parameters, digits)
    assert "the combination objective.prediction_type=epsilon, schedule.rescale_to_zero_terminal_snr=True is" in message
    assert message.endswith("add a `when`, or narrow a range")
    rescaled["when"] = {"objective.prediction_type": ["sample", "v_prediction"]}
    space_of(parameters).check(digits, "space.yaml")


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        (
            {"scoring.start": {"float": [0.1, 0.5]}, "scoring.stop": {"float": [0.4, 0.9]}},
            r"combination scoring.start=0.\d+, scoring.stop=0.\d+ is not valid: .* must lie below stop",
        ),
        (
            {"schedule.num_train_timesteps": {"choices": [20, 100]}, "scoring.num_inference_steps": {"int": [1, 30]}},
            r"combination schedule.num_train_timesteps=20, scoring.num_inference_steps=\d+ is not valid: .* has only",
        ),
        (
            {"denoiser.block_out_channels": {"choices": [[16], [8, 16]]},
             "denoiser.attention_levels": {"choices": [[0], [1]]}},
            r"combination denoiser.block_out_channels=\[16\], denoiser.attention_levels=\[1\] is not valid",
        ),
        (
            {"training.batch_size": {"choices": [16, 64]}, "training.accumulation_steps": {"choices": [1, 32]}},
            r"combination training.batch_size=16, training.accumulation_steps=32 is not valid",
        ),
        (
            {"denoiser.name": {"choices": ["dit"]}, "denoiser.hidden_size": {"int": [32, 64]}},
            r"combination denoiser.hidden_size=\d+ is not valid: .*multiple of 4; narrow its range, or give it a step",
        ),
    ],
)  # fmt: skip
def test_what_only_building_shows(digits: ExperimentConfig, parameters: dict[str, Any], expected: str) -> None:
    assert re.search(expected, refusal(parameters, digits))


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ({"base": {"training.num_stpes": 3}}, "base: training.num_stpes: 'num_stpes' is not a known key; did you mean"),
        ({"base": {"training.num_steps": -3}}, "base: training.num_steps is -3"),
        ({"base": {"seed": 3}}, "base: seed is set by the sweep; list seeds under seeds"),
        ({"base": {"data.calibration_fraction": 0.5}}, "base: data.calibration_fraction says which images there are"),
        ({"base": {"execution.use_gpu": True}}, "set num_gpus"),
        ({"num_workers": 65}, "num_workers is 65: training.batch_size is 64; it must be at least"),
        ({"objectives": ["selection_aurok"]}, "did you mean 'selection_auroc'?"),
        ({"objectives": ["auroc"]}, "did you mean 'selection_auroc'?"),
        ({"objectives": ["loss", "loss"]}, "loss is given twice"),
        ({"objectives": ["selection_auroc", "nfe"]}, "nfe is the same whatever these parameters are"),
        ({"pruning": {"grace_steps": 400}}, "pruning.grace_steps is 400 and training.num_steps 400"),
        ({"points": [{"training.learning_rat": 1e-3}]}, "points[0]: training.learning_rat is not a parameter; did you"),
        (
            {"points": [{}, {"training.learning_rate": 1.0}]},
            "points[1]: training.learning_rate is 1.0; it lies between",
        ),
    ],
)
def test_what_else_does_not_fit(digits: ExperimentConfig, others: dict[str, Any], expected: str) -> None:
    assert expected in refusal(LEARNING_RATE, digits, **others)


def test_augmentation_can_be_varied(digits: ExperimentConfig) -> None:
    space = space_of({"augmentation.shift": {"choices": [0.0, 0.1]}})
    space.check(digits, "space.yaml")
    assert space.paths(["training"]) == ("augmentation.shift",)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"data.calibration_fraction": 0}, "data.calibration_fraction is 0, and a sweep compares"),
        ({"contamination.max_share": 0.1, "cross_fitting.folds": 2}, "contamination.max_share is 0.1, and a sweep"),
    ],
)
def test_calibration_images_must_be_there_and_normal(
    digits: ExperimentConfig, fields: dict[str, Any], expected: str
) -> None:
    assert expected in refusal(LEARNING_RATE, digits.override(fields))


def test_the_loss_is_no_measure_where_it_changes_its_meaning(digits: ExperimentConfig) -> None:
    weighting = {"objective.loss_weighting": {"choices": ["uniform", "min_snr"]}}
    assert "objective.loss_weighting changes what that measures; leave pruning out" in refusal(
        weighting | LEARNING_RATE, digits, pruning={}
    )
    assert "loss cannot be compared" in refusal(weighting | LEARNING_RATE, digits, objectives=["loss"])
    pooling = {"scoring.pooling": {"choices": ["mean", "max"]}}
    assert "num_workers is 2); leave pruning out" in refusal(LEARNING_RATE, digits, pruning={}, num_workers=2)
    assert "no parameter here opens one; leave pruning out" in refusal(pooling, digits, pruning={})
    assert "training_seconds is the same whatever" in refusal(pooling, digits, objectives=["training_seconds"])
    space_of(LEARNING_RATE, pruning={}, objectives=["loss"]).check(digits, "space.yaml")


def test_a_point_must_keep_to_conditions(digits: ExperimentConfig) -> None:
    parameters = {
        "objective.loss_weighting": {"choices": ["uniform", "min_snr"]},
        "objective.min_snr_gamma": {"float": [1, 20], "when": {"objective.loss_weighting": "min_snr"}},
    }
    for point in (
        {"objective.min_snr_gamma": 5},
        {"objective.min_snr_gamma": 5, "objective.loss_weighting": "uniform"},
    ):
        message = refusal(parameters, digits, points=[point])
        assert "points[0]: objective.min_snr_gamma applies only with objective.loss_weighting in ['min_snr']" in message
    good = {"objective.min_snr_gamma": 5, "objective.loss_weighting": "min_snr"}
    space_of(parameters, points=[good]).check(digits, "space.yaml")


def test_every_objective_has_its_direction() -> None:
    assert space_of(LEARNING_RATE, objectives=list(OBJECTIVES)).directions() == tuple(OBJECTIVES.values())
    assert space_of(LEARNING_RATE, objectives=[{"name": "nfe", "direction": "maximize"}]).directions() == ("maximize",)


# --- what is shipped --------------------------------------------------------------------------------------------------


def test_six_spaces_are_shipped() -> None:
    names = ["dit", "noise_schedule", "scoring", "thresholds", "timesteps", "unet"]
    assert [path.stem for path in SHIPPED] == names


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_space_fits_the_shipped_config(path: Path, digits: ExperimentConfig) -> None:
    space = load_search_space(path)
    space.check(digits, path.name)
    for seed in range(5):
        space.apply(digits, space.suggest(new_trial(seed), LEVELS))
    assert f"raydiff sweep search_spaces/{path.name} --config examples/configs/" in path.read_text()


def test_the_manuals_example_is_a_search_space(tmp_path: Path, digits: ExperimentConfig) -> None:
    text = (ROOT / "docs" / "SWEEPS.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(# my_space.*?)```", text, re.DOTALL)
    space = read(tmp_path, example)
    space.check(digits, "my_space.yaml")
    shown = set(yaml.safe_load(example))
    assert shown | {"num_workers", "sampler", "sampler_seed"} >= set(SearchSpace.model_fields) - {"num_gpus"}


def test_anomalies_are_named_and_belong_to_the_study(digits: ExperimentConfig) -> None:
    plain = space_of({"scoring.blur": {"float": [0, 2]}})
    some = space_of({"scoring.blur": {"float": [0, 2]}}, anomalies=["cut_paste"])
    some.check(digits, "space")
    assert some.digest() != plain.digest()
    wrong = space_of({"scoring.blur": {"float": [0, 2]}}, anomalies=["jpeg"])
    with pytest.raises(ConfigError, match="space: anomalies: jpeg makes no anomaly; name some of blur_patch"):
        wrong.check(digits, "space")


def test_curves_use_seeds_that_did_not_choose_the_best_point() -> None:
    assert space_of(LEARNING_RATE, seeds=[1], refit_seeds=[2]).around_seeds == (0, 3, 4)
    assert space_of(LEARNING_RATE, around={"seeds": [7]}).around_seeds == (7,)
    with pytest.raises(ValueError, match=r"around\.seeds has 1, which seeds has too; .* give others"):
        space_of(LEARNING_RATE, seeds=[1], around={"seeds": [1, 2]})
