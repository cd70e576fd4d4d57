"""A config round-trips, refuses what it does not know, and its digest moves with what can move a score alone."""

import json
import subprocess
import sys
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from raydiff import registry
from raydiff.config import NO_EFFECT, WHERE_SET, DistillationConfig, ExperimentConfig, load_config, parse_override
from raydiff.errors import ConfigError

COMPONENTS = {"data.dataset": "datasets", "space": "spaces", "denoiser": "denoisers", "scoring": "scorers"}


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def error_of(tmp_path, text, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path / "config.yaml", text), overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"{tmp_path}/")


def component_config(path: str, kind: registry.Kind, name: str) -> ExperimentConfig:
    """The defaults with another component; text that an option needs is given as 'somewhere'."""
    needed = {
        key: "somewhere"
        for key, field in registry.component(kind, name).Options.model_fields.items()
        if field.is_required() and field.annotation is str
    }
    # v_prediction: the one prediction type that every noise schedule allows with it
    return ExperimentConfig().override({path: {"name": name, **needed}, "objective.prediction_type": "v_prediction"})


def all_configs():
    for path, kind in COMPONENTS.items():
        for name in registry.names(kind):
            yield pytest.param(component_config(path, kind, name), id=f"{path}={name}")


CONFIGS = list(all_configs())


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_survives_yaml_and_json(config, tmp_path):
    written = yaml.safe_dump(config.to_dict())
    assert load_config(write(tmp_path / "config.yaml", written)) == config
    assert load_config(write(tmp_path / "config.json", json.dumps(config.to_dict()))) == config
    again = load_config(tmp_path / "config.json")
    assert again.digest() == config.digest()
    assert json.dumps(again.to_dict()) == json.dumps(config.to_dict())  # byte for byte, for the artefact's hash


def test_every_default_is_written_out():
    written = ExperimentConfig().to_dict()
    for path, value in leaves(ExperimentConfig()):
        node: Any = written
        for part in path.split("."):
            node = node[part]
        assert node == value or list(value) == node


def test_an_empty_file_is_the_defaults(tmp_path):
    assert load_config(write(tmp_path / "config.yaml", "")) == ExperimentConfig()
    assert load_config(write(tmp_path / "config.yaml", "seed: 3\n")).seed == 3


def test_numbers_as_yaml_writes_them(tmp_path):
    """YAML 1.1 reads 1e-4 as text; a config must not."""
    assert (
        load_config(write(tmp_path / "config.yaml", "training: {learning_rate: 1e-4}")).training.learning_rate == 1e-4
    )


def test_a_config_cannot_be_changed():
    config = ExperimentConfig()
    for section, field in ((config, "seed"), (config.training, "num_steps"), (config.scoring, "name")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, field, 7)


def test_a_component_file_can_be_the_first_import():
    """A worker unpickles a data set before anything else imports the config, whose defaults name components."""
    script = (
        "import os, sys, numpy, pydantic, torch\n"  # what takes long and is not ours
        "for name in sys.argv[1:]:\n"
        "    if not os.fork():\n"
        "        assert not any(module.startswith('raydiff') for module in sys.modules)\n"
        "        __import__(f'raydiff.datasets.{name}')\n"
        "        sys.exit()\n"
        "    _, status = os.wait()\n"
        "    assert not status, name\n"
    )
    subprocess.run([sys.executable, "-c", script, *registry.names("datasets")], check=True, timeout=120)


# --- unknown keys and wrong values ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeed: 1", "config.yaml: seeed is not a known key; did you mean 'seed'?"),
        ("trainin: {}", "config.yaml: trainin is not a known key; did you mean 'training'?"),
        ("training: {num_step: 3}", "config.yaml: training.num_step is not a known key; did you mean 'num_steps'?"),
        ("data: {imagesize: [3, 3]}", "config.yaml: data.imagesize is not a known key; did you mean 'image_size'?"),
        (
            "scoring: {name: reconstruction, num_inference_step: 2}",
            "config.yaml: scoring.num_inference_step is not a known key; did you mean 'num_inference_steps'?",
        ),
        (
            "data: {dataset: {name: digits, normale: ['1']}}",
            "config.yaml: data.dataset.normale is not a known key; did you mean 'normal'?",
        ),
        (
            "denoiser: {name: unett}",
            "config.yaml: denoiser: no denoiser is called 'unett'; did you mean 'unet'?",
        ),
    ],
)
def test_an_unknown_key_names_the_nearest(tmp_path, text, message):
    assert error_of(tmp_path, text) == message


def test_an_unknown_key_with_no_near_one_lists_what_there_is(tmp_path):
    message = error_of(tmp_path, "zzz: 1")
    assert message.startswith("config.yaml: zzz is not a known key; there are: augmentation, calibration")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {num_steps: many}", "config.yaml: training.num_steps is 'many'; input should be a valid integer"),
        (
            "training: {num_steps: 0}",
            "config.yaml: training.num_steps is 0; input should be greater than or equal to 1",
        ),
        ("training: {num_steps: 1.5}", "config.yaml: training.num_steps is 1.5; input should be a valid integer"),
        ("training: 3", "config.yaml: training is 3; input should be a valid dictionary"),
        (
            "training: {learning_rate: .inf}",
            "config.yaml: training.learning_rate is inf; input should be a finite number",
        ),
        ("data: {image_size: 8}", "config.yaml: data.image_size is 8; input should be a valid tuple"),
        ("data: {image_size: [0, 8]}", "config.yaml: data: image_size is (0, 8); both sides must be at least 1"),
        ("data: {channels: 2}", "config.yaml: data.channels is 2; input should be 1 or 3"),
        ("data: {dataset: folder}", "config.yaml: data.dataset.source is missing; set it"),
        ("scoring: 3", "config.yaml: scoring: needs a name, one of: conditioned, "),
        ("scoring: {num_repeats: 3}", "config.yaml: scoring: needs a name, one of: conditioned, "),
        (
            "schedule: {beta_schedule: cosine}",
            "config.yaml: schedule.beta_schedule is 'cosine'; input should be 'linear'",
        ),
        ("{1: 2}", "config.yaml: 1 is 1; keys should be strings"),
        ("- seed", "config.yaml: holds a list; a config is a mapping of section to fields"),
        ("seed: [", "config.yaml: is not YAML ("),
        (
            "execution: {num_workers: 33}\ntraining: {accumulation_steps: 2}",
            "config.yaml: training.batch_size is 64; it must be at least execution.num_workers x "
            "training.accumulation_steps (66)",
        ),
        (
            "execution: {num_workers: 2, min_workers: 3}",
            "config.yaml: execution: min_workers is 3, more than num_workers (2); lower it",
        ),
        (
            "schedule: {rescale_to_zero_terminal_snr: true}",
            "config.yaml: schedule.rescale_to_zero_terminal_snr leaves nothing of the image at the last step",
        ),
    ],
)
def test_a_wrong_value_is_named_with_its_field(tmp_path, text, message):
    assert error_of(tmp_path, text).startswith(message)


def test_a_section_that_may_be_missing_is_checked_like_the_others(tmp_path):
    digest = "0" * 64
    config = load_config(write(tmp_path / "c.yaml", f"distillation: {{teacher: '{digest}', num_evaluations: 10}}"))
    assert config.distillation == DistillationConfig(teacher=digest, num_evaluations=10)
    message = error_of(tmp_path, "distillation: {teacher: x, num_evaluation: 10}")
    assert message.startswith("config.yaml: distillation.teacher is 'x'; string should match pattern")
    message = error_of(tmp_path, f"distillation: {{teacher: '{digest}', num_evaluations: 10, steps: 2}}")
    assert message.startswith("config.yaml: distillation.steps is not a known key; there are: num_evaluations, teacher")


def test_several_problems_are_counted(tmp_path):
    assert error_of(tmp_path, "seed: x\ntraining: {num_steps: 0, batch_size: 0}").endswith("(and 2 more)")


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing.yaml: cannot be read \(No such file or directory\); give the path"):
        load_config(tmp_path / "nothing.yaml")
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"config.yaml: is not YAML \('utf-8' codec"):
        load_config(tmp_path / "config.yaml")


# --- overrides --------------------------------------------------------------------------------------------------------


def test_overrides_by_dotted_path(tmp_path):
    path = write(tmp_path / "config.yaml", "seed: 1\ntraining: {num_steps: 5}\n")
    config = load_config(
        path, ["seed=2", "data.image_size=[16, 8]", "data.dataset.normal=['3']", "training.compile=true"]
    )
    assert (config.seed, config.training.num_steps, config.training.compile) == (2, 5, True)
    assert config.data.image_size == (16, 8)
    assert config.to_dict()["data"]["dataset"] == {"name": "digits", "normal": ["3"]}
    assert config == load_config(path).override(
        {"seed": 2, "data.image_size": (16, 8), "data.dataset.normal": ["3"], "training.compile": True}
    )


def test_switching_a_component_drops_the_old_ones_options():
    config = ExperimentConfig().override(["scoring.num_inference_steps=3", "scoring.stop=0.9"])
    switched = config.override(["scoring.name=reconstruction"])
    fresh = registry.component("scorers", "reconstruction").Options()
    assert switched.scoring == fresh
    assert config.override(["scoring=reconstruction"]).scoring == fresh
    assert config.override(["scoring.name=reconstruction", "scoring.start_step=0.7"]).scoring.start_step == 0.7
    assert config.override(["scoring.name=denoising_error"]).scoring == config.scoring  # the same name changes nothing


def test_an_override_leaves_its_values_alone():
    scoring = {"name": "reconstruction"}
    ExperimentConfig().override({"scoring": scoring, "scoring.start_step": 0.7})
    assert scoring == {"name": "reconstruction"}


def test_an_override_leaves_the_original_alone():
    config = ExperimentConfig()
    before = config.to_dict()
    config.override(["seed=5", "scoring.name=reconstruction", "data.dataset.normal=['4']"])
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("seed", "--set seed: write it as path=value, for example training.num_steps=200"),
        ("=3", "--set =3: write it as path=value, for example training.num_steps=200"),
        ("seed=[", "--set seed=[: the value is not YAML (while parsing a flow node"),
        ("seeed=1", "--set seeed: 'seeed' is not a known key; did you mean 'seed'?"),
        ("training.num_step=2", "--set training.num_step: 'num_step' is not a known key; did you mean 'num_steps'?"),
        ("trainig.num_steps=2", "--set trainig.num_steps: 'trainig' is not a known key; did you mean 'training'?"),
        ("training.num_steps.x=2", "--set training.num_steps.x: training.num_steps has no fields"),
        ("scoring.num_repeat=2", "--set: scoring.num_repeat is not a known key; did you mean 'num_repeats'?"),
        ("scoring.name=nope", "--set: scoring: no scorer is called 'nope'; there are: conditioned, "),
        ("seed=", "--set: seed is None; input should be a valid integer"),
        ("training.num_steps=0", "--set: training.num_steps is 0; input should be greater than or equal to 1"),
    ],
)
def test_a_wrong_override_says_what_is_wrong(tmp_path, assignment, message):
    assert error_of(tmp_path, "", assignment).startswith(message)


def test_parse_override_reads_yaml_values():
    assert parse_override("a.b=1") == ("a.b", 1)
    assert parse_override("a=[1, 2]") == ("a", [1, 2])
    assert parse_override("a=x=y") == ("a", "x=y")


# --- the digest -------------------------------------------------------------------------------------------------------


def leaves(section: BaseModel, prefix: str = ""):
    """(dotted path, value) of every field, components' options included."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def field_at(config: ExperimentConfig, path: str):
    node: Any = config
    *parents, last = path.split(".")
    for part in parents:
        node = getattr(node, part)
    return type(node).model_fields[last]


def candidates(value: Any, annotation: Any) -> list[Any]:
    """Other values that the field may take; the config decides which are valid."""
    if DistillationConfig in get_args(annotation):
        return [{"teacher": "0" * 64, "num_evaluations": 10}]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value + 2, value * 2, value - 1, *get_args(annotation)]
    if isinstance(value, float):
        return [value / 2, value * 1.01, value + 0.01]
    if isinstance(value, tuple):
        names = [*([str(v)] for v in range(1, 3)), ["cat"], ["screw"]]
        return [tuple(v * 2 for v in value), *names, [0.0, 0.5], value[:1], []]
    literals = [choice for arg in (annotation, *get_args(annotation)) for choice in get_args(arg)]
    return [*(choice for choice in literals if choice != value), "elsewhere", 3, 384, 2, 1, 0.3, [4, 4]]


NEEDED: dict[str, dict[str, Any]] = {
    "data.grids_dtype": {"data.grids": "run"},
    "data.aligned_width": {"data.align": "principal_axis", "data.resize": "stretch"},
    "data.align": {"data.resize": "stretch"},
    "space.shrinkage": {"space.statistics": "per_cell"},
}
"""What a field demands of others."""


def perturbed(config: ExperimentConfig, path: str, value: Any) -> tuple[ExperimentConfig, ExperimentConfig]:
    """A config in which the field may be another, and one in which it is."""
    base = config.override(NEEDED.get(path, {}))
    for candidate in candidates(value, field_at(config, path).annotation):
        try:
            other = base.override({path: candidate})
        except ConfigError:
            continue
        if other != base:
            return base, other
    raise AssertionError(f"no other valid value found for {path} = {value!r}; teach candidates() one")


@pytest.mark.parametrize("config", CONFIGS)
def test_the_digest_changes_with_every_field_that_can_move_a_score_and_no_other(config):
    for path, value in leaves(config):
        if path.endswith("name") and path.removesuffix(".name") in COMPONENTS:
            continue  # below
        extra = field_at(config, path).json_schema_extra or {}
        base, other = perturbed(config, path, value)
        moved = other.digest() != base.digest()
        assert moved == extra.get("affects_scores", True), path


def test_fields_without_effect_are_the_ones_that_cannot_move_a_score():
    """Frozen here, so that adding one to the list is a decision: each is left out of the digest."""
    extras = {path: field_at(ExperimentConfig(), path).json_schema_extra for path, _ in leaves(ExperimentConfig())}
    assert {path for path, extra in extras.items() if extra == WHERE_SET} == {
        *(f"augmentation.{name}" for name in type(ExperimentConfig().augmentation).model_fields),
        "calibration.max_images",
        "contamination.cutoff",
        "contamination.max_share",
        "contamination.weight",
        "cross_fitting.folds",
        "cross_fitting.num_steps",
        "cross_fitting.views",
        "data.align",
        "data.aligned_width",
        "data.grids_dtype",
        "data.on_bad_shard",
        "data.test_balance",
        "distillation",
        "objective.corrupted",
        "objective.patch_sizes",
        "objective.shuffled",
        "tiles.cell",
        "tiles.crops",
        "tiles.overlap",
        "tiles.size",
        "training.balance_classes",
    }
    assert {path for path, extra in extras.items() if extra == NO_EFFECT} == {
        "data.cache_mb", "data.grids", "data.shard_format", "data.shard_mb", "data.shards", "data.spaces",
        "execution.cpus_per_worker", "execution.max_failures", "execution.min_workers", "execution.num_workers",
        "execution.scoring_batch_size", "execution.use_gpu", "tiles.per_call",
        "training.checkpoint_every", "training.keep_checkpoints", "training.log_every", "training.validate_every",
        "training.validation_images",
    }  # fmt: skip


def test_components_digest_apart():
    for path, kind in COMPONENTS.items():
        digests = {component_config(path, kind, name).digest() for name in registry.names(kind)}
        assert len(digests) == len(registry.names(kind))


def test_the_digest_is_sha256_in_hex_and_the_same_in_another_order_of_keys(tmp_path):
    digest = ExperimentConfig().digest()
    assert len(digest) == 64
    assert int(digest, 16) >= 0
    backwards = json.dumps(dict(reversed(ExperimentConfig(seed=0).to_dict().items())))
    assert load_config(write(tmp_path / "c.json", backwards)).digest() == digest


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("seed: true", "seed"),
        ("training: {learning_rate: no}", "training.learning_rate"),
        ("data: {image_size: [8, true]}", "data.image_size"),
        ("data: {channels: true}", "data.channels"),
        ("data: {max_test_images: yes}", "data.max_test_images"),
    ],
)
def test_true_and_false_are_no_numbers(tmp_path, text, path):
    message = error_of(tmp_path, text)
    assert message.startswith(f"config.yaml: {path} is ")
    assert message.endswith("; input should be a number, not true or false")


def test_what_may_be_set_when_a_run_goes_on():
    config = ExperimentConfig()
    changed = config.to_resume(["data.on_bad_shard=skip", "execution.num_workers=2"])
    assert (changed.data.on_bad_shard, changed.execution.num_workers) == ("skip", 2)
    assert config.to_resume([]) == config
    with pytest.raises(ConfigError, match=r"^--set data.on_bad_shard=skip seed=1: changes what the run .* --resume;"):
        config.to_resume(["data.on_bad_shard=skip", "seed=1"])
