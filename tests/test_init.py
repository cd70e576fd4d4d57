"""The public names, frozen: to add or remove one is a decision."""

import ast
import importlib
import tomllib
from pathlib import Path

import pytest

import raydiff

ROOT = Path(__file__).parent.parent


def test_all_is_the_public_names():
    assert raydiff.__all__ == [
        "Detector",
        "ExperimentConfig",
        "Prediction",
        "RaydiffError",
        "Scores",
        "load_config",
        "load_detector",
    ]


@pytest.mark.parametrize("name", raydiff.__all__)
def test_every_public_name_is_the_one_of_its_home(name):
    home = importlib.import_module(raydiff._HOME[name])
    assert getattr(raydiff, name) is getattr(home, name)
    assert name in home.__all__
    assert getattr(raydiff, name).__doc__


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(raydiff.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == raydiff._HOME
    assert sorted(seen) == sorted(raydiff.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'raydiff' has no attribute 'detect'"):
        raydiff.detect  # noqa: B018


def test_dir_lists_names_that_are_not_loaded_yet():
    assert dir(raydiff) == sorted([*raydiff.__all__, "__version__"])


def test_the_version_is_that_of_the_project():
    assert raydiff.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_the_package_says_that_it_is_typed():
    assert (Path(raydiff.__file__).parent / "py.typed").is_file()
