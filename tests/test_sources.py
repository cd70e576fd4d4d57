"""Which data the words of a command line mean."""

import pytest

from raydiff.config import DataConfig, ExperimentConfig
from raydiff.errors import ConfigError
from raydiff.sources import config_of, data_of, download, evaluation_data


def test_no_config_is_the_defaults_with_overrides():
    assert config_of(None, ["seed=3"]) == ExperimentConfig(seed=3)


def test_a_name_is_a_data_set_with_its_source_and_the_overrides_last(tmp_path):
    data = data_of("folder", str(tmp_path), None, ["data.image_size=[16, 16]"])
    assert (data.dataset.name, data.dataset.source, data.image_size) == ("folder", str(tmp_path), (16, 16))


def test_a_file_named_like_a_data_set_is_a_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").write_text("data: {split_seed: 7}", encoding="utf-8")
    assert data_of("digits", None, None, []).split_seed == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("digitz", None, None), "digitz: is neither a config file nor a data set's name; did you mean 'digits'"),
        (("digits", "here", "there"), "--source and --download both say where the files are"),
        ((None, None, "there"), "--download needs a data set's name"),
        (("digits", None, "there"), "--download: digits is not a data set that is published"),
    ],
)
def test_words_that_mean_nothing(arguments, message):
    with pytest.raises(ConfigError, match=message):
        data_of(*arguments, [])


def test_what_nothing_here_can_fetch_says_where_it_is_published(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing here can fetch mvtec_ad; .*; fetch it by hand"):
        download("mvtec_ad", tmp_path)


def test_data_to_test_on(digit_shards, tmp_path):
    config = ExperimentConfig().override({"data.dataset.normal": ["3"], "data.shards": "elsewhere"})
    again = evaluation_data("digits", config)
    assert isinstance(again, DataConfig)
    assert (again.dataset.normal, again.shards) == (("3",), None)  # the same data set keeps its options
    folder = evaluation_data(str(tmp_path), config)
    assert (folder.dataset.name, folder.dataset.source) == ("folder", str(tmp_path))
    assert evaluation_data(digit_shards.uri, config).digest == digit_shards.digest
    with pytest.raises(ConfigError, match="nothing: is neither a folder nor a data set's name; there are: cifar10"):
        evaluation_data("nothing", config)
