from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from raydiff.config import ExperimentConfig, load_config
from raydiff.datasets.digits import DigitsDataset, Options, build
from raydiff.errors import ConfigError
from raydiff.images import ImageSpec, decode

SPEC = ImageSpec((8, 8), 1, "strict")


@pytest.fixture(scope="module")
def digits() -> DigitsDataset:
    return build(Options(normal=("0", "3")))


def test_one_class_protocol(digits: DigitsDataset) -> None:
    entries = digits.entries()
    trained = Counter(entry.class_name for entry in entries if entry.split == "train")
    tested = Counter(entry.class_name for entry in entries if entry.split == "test")
    assert trained == {"0": 2 * 178 // 3, "3": 2 * 183 // 3}
    assert set(tested) == set("0123456789")
    assert tested["0"] == 178 - trained["0"]
    assert sum(tested.values()) == 602
    assert {entry.is_anomaly for entry in entries if entry.split == "train"} == {False}
    for entry in entries:
        assert entry.is_anomaly == (entry.class_name not in ("0", "3"))
        assert entry.defect == (entry.class_name if entry.is_anomaly else "good")


def test_who_is_normal_does_not_change_what_is_tested(digits: DigitsDataset) -> None:
    other = build(Options(normal=("7",)))
    tested = [[e.image_id for e in data.entries() if e.split == "test"] for data in (digits, other)]
    assert tested[0] == tested[1]
    assert len({entry.image_id for entry in digits.entries()}) == len(digits.entries())


def test_the_split_is_pinned(digits: DigitsDataset) -> None:
    assert [entry.image_id for entry in digits.entries()[:8]] == [
        "0000", "0003", "0010", "0013", "0020", "0030", "0036", "0048",
    ]  # fmt: skip


def test_pixels_are_scikit_learns(digits: DigitsDataset) -> None:
    from sklearn.datasets import load_digits

    images, _ = load_digits(return_X_y=True)
    for entry in digits.entries()[::50]:
        content, mask = digits.read(entry)
        expected = np.rint(images[int(entry.image_id)].reshape(8, 8) * 255 / 16)
        assert np.array_equal(decode(content, SPEC, entry.image_id)[:, :, 0], expected)
        assert mask is None
        assert abs(len(content) - entry.size) < 60


def test_options_from_a_config() -> None:
    config = ExperimentConfig().override(["data.dataset.normal=['4', '5']"])
    assert config.data.dataset.model_dump() == {"name": "digits", "normal": ("4", "5")}


@pytest.mark.parametrize(("written", "meant"), [("[3]", ["3"]), ("[3, '5']", ["3", "5"]), ("8", ["8"]), ("'8'", ["8"])])
def test_digits_may_be_written_as_numbers(written: str, meant: list[str]) -> None:
    config = ExperimentConfig().override([f"data.dataset.normal={written}"])
    strings = ExperimentConfig().override({"data.dataset.normal": meant})
    assert config.to_dict() == strings.to_dict()
    assert config.digest() == strings.digest()
    assert ExperimentConfig().override(config.to_dict()) == config


@pytest.mark.parametrize(
    ("normal", "message"),
    [
        ("['x']", "'x' is no digit"),
        ("['1', '1']", "names a digit twice"),
        ("[]", "at least 1 item"),
        ("[true]", "valid string"),
        ("true", "valid tuple"),
        ("8.0", "valid tuple"),
        ("[1, '1']", "names a digit twice"),
        ("10", "'10' is no digit"),
        ("null", "valid tuple"),
    ],
)
def test_bad_digits_are_refused(normal: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExperimentConfig().override([f"data.dataset.normal={normal}"])


def test_the_default_config_names_this_data_set(tmp_path) -> None:
    (tmp_path / "config.yaml").write_text("")
    assert load_config(tmp_path / "config.yaml").data.dataset == Options()
