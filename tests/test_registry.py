"""Components are found by listing folders, and named by their files."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import raydiff
from raydiff import registry
from raydiff.config import Options
from raydiff.errors import ConfigError

ALL = [(kind, name) for kind in registry.KINDS for name in registry.names(kind)]


@pytest.mark.parametrize("kind", registry.KINDS)
def test_names_are_the_files_in_the_folder(kind):
    files = (Path(raydiff.__file__).parent / kind).glob("*.py")
    assert registry.names(kind) == tuple(sorted(f.stem for f in files if not f.stem.startswith("_")))


def test_the_components_of_the_foundation_are_there():
    assert {"isolation_forest", "ocsvm", "copod", "knn"} <= set(registry.names("baselines"))
    assert {"digits", "folder", "cifar10"} <= set(registry.names("datasets"))
    assert {"reconstruction", "denoising_error"} <= set(registry.names("scorers"))
    assert "unet" in registry.names("denoisers")
    assert "pixel" in registry.names("spaces")


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_a_component_defines_options_with_its_own_name_and_build(kind, name):
    module = registry.component(kind, name)
    assert issubclass(module.Options, Options)
    assert module.Options.model_fields["name"].default == name
    assert callable(module.build)
    assert {"Options", "build"} <= set(module.__all__)
    assert module.__doc__.startswith(f"``{name}``")


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_options_are_frozen_and_refuse_unknown_keys(kind, name):
    options = registry.component(kind, name).Options
    assert options.model_config["frozen"]
    assert options.model_config["extra"] == "forbid"


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_every_option_is_read_by_its_component(kind, name):
    """A setting that is parsed and never read would promise what it does not do."""
    module = registry.component(kind, name)
    for field in set(module.Options.model_fields) - {"name"}:
        homes = [c for c in module.Options.__mro__ if field in inspect.get_annotations(c)]  # it may set another default
        sources = {module.__file__, *(sys.modules[home.__module__].__file__ for home in homes)}
        uses = sum(Path(source).read_text().count(f".{field}") for source in sources)
        assert uses, f"{kind}/{name}: nothing reads .{field}"


def test_an_unknown_component_names_the_nearest():
    with pytest.raises(ConfigError, match=r"^no scorer is called 'reconstructoin'; did you mean 'reconstruction'\?$"):
        registry.component("scorers", "reconstructoin")
    with pytest.raises(
        ConfigError, match=r"no baseline is called 'zzz'; there are: copod, isolation_forest, knn, ocsvm"
    ):
        registry.component("baselines", "zzz")


def test_names_import_no_component():
    script = (
        "import sys; from raydiff import registry; [registry.names(k) for k in registry.KINDS];"
        "assert not {'torch', 'raydiff.denoisers.unet', 'raydiff.scorers.reconstruction'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_nearest():
    assert registry.nearest("num_step", ("num_steps", "seed")) == "did you mean 'num_steps'?"
    assert registry.nearest("qqq", ["a", "b"]) == "there are: a, b"
