from __future__ import annotations

import gzip
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raydiff.config import ExperimentConfig
from raydiff.datasets.mnist import Options, build, download
from raydiff.errors import ConfigError, DataError
from raydiff.images import ImageSpec, decode


def write_idx(path: Path, values: Any) -> None:
    content = struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)


def write_mnist(folder: Path, *, suffix: str = ".gz", train: int = 40, test: int = 20) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("t10k", test)):
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", (np.arange(count) % 10).astype(np.uint8))
    return folder


def options(source: Path, **fields: Any) -> Options:
    return Options(**{"source": str(source), "check_counts": False} | fields)


def test_one_class_protocol(tmp_path: Path) -> None:
    entries = build(options(write_mnist(tmp_path), normal=[3, 5])).entries()
    assert [entry.image_id for entry in entries[:4]] == ["train/00003", "train/00005", "train/00013", "train/00015"]
    kinds = Counter((entry.split, entry.is_anomaly) for entry in entries)
    assert kinds == {("train", False): 8, ("test", False): 4, ("test", True): 16}
    assert [(e.class_name, e.defect) for e in entries if e.split == "test"][3:5] == [("3", "good"), ("4", "4")]


def test_all_digits_may_be_normal(tmp_path: Path) -> None:
    entries = build(options(write_mnist(tmp_path), normal=[*range(10)])).entries()
    assert len(entries) == 60
    assert not any(entry.is_anomaly for entry in entries)


@pytest.mark.parametrize("suffix", [".gz", ""])
@pytest.mark.parametrize("below", ["", "raw", "MNIST/raw"])
def test_pixels_and_where_they_may_lie(tmp_path: Path, suffix: str, below: str) -> None:
    write_mnist(tmp_path / below, suffix=suffix)
    data = build(options(tmp_path, normal="4"))
    stored = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    content, mask = data.read(next(e for e in data.entries() if e.image_id == "train/00014"))
    assert mask is None
    assert np.array_equal(decode(content, ImageSpec((28, 28), 1, "strict"), "a")[..., 0], stored[14])


def test_counts_are_checked(tmp_path: Path) -> None:
    write_mnist(tmp_path, suffix="")
    with pytest.raises(DataError, match=r"holds 40 train images, expected 60000; .*check_counts=false"):
        build(options(tmp_path, check_counts=True))
    write_mnist(tmp_path, suffix="", train=60_000, test=11)
    with pytest.raises(DataError, match=r"holds 11 test images, expected 10000"):
        build(options(tmp_path, check_counts=True))


def test_missing_files_are_named(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"lacks t10k-labels-idx1-ubyte.gz \(packed or not\); set data.dataset.source"):
        build(options(tmp_path))
    with pytest.raises(DataError, match=r"nowhere: lacks train-images-idx3-ubyte.gz, train-labels"):
        build(options(tmp_path / "nowhere"))


@pytest.mark.parametrize("suffix", [".gz", ""])
def test_a_truncated_file_is_named(tmp_path: Path, suffix: str) -> None:
    write_mnist(tmp_path, suffix=suffix)
    path = tmp_path / f"t10k-images-idx3-ubyte{suffix}"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte(.gz: is truncated|: holds 13680 values, its header)"):
        build(options(tmp_path))


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("t10k-images-idx3-ubyte", np.zeros((20, 28), np.uint8), "is not an IDX file of uint8 with 3 axes"),
        ("t10k-images-idx3-ubyte", np.zeros((20, 32, 32), np.uint8), "holds images of 32 x 32; expected 28 x 28"),
        ("t10k-labels-idx1-ubyte", np.zeros(19, np.uint8), "has 19 labels for 20 images"),
        ("t10k-labels-idx1-ubyte", np.full(20, 26, np.uint8), "has the label 26"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, file: str, values: Any, message: str) -> None:
    write_mnist(tmp_path, suffix="")
    write_idx(tmp_path / file, values)
    with pytest.raises(DataError, match=f"{file}: {message}"):
        build(options(tmp_path))


def test_a_rewritten_file_has_another_fingerprint(tmp_path: Path) -> None:
    data = build(options(write_mnist(tmp_path)))
    before = data.entries()
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", np.zeros((40, 28, 28), np.uint8))
    after = data.entries()
    changed = {old.split for old, new in zip(before, after, strict=True) if old.fingerprint != new.fingerprint}
    assert changed == {"train"}
    assert not decode(data.read(after[0])[0], ImageSpec((28, 28), 1), "a").any()


def test_an_unknown_digit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'12' is no digit"):
        ExperimentConfig().override({"data.dataset": {"name": "mnist", "source": "x", "normal": [12]}})


def test_a_failing_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(DataError, match=r"MNIST could not be fetched \(.+\); check the network, or copy") as caught:
        download(tmp_path / "data")
    assert "\n" not in str(caught.value)


def test_what_was_fetched_before_is_not_fetched_again(tmp_path: Path) -> None:
    write_mnist(tmp_path / "MNIST" / "raw", suffix="")
    assert len(build(options(download(tmp_path))).entries()) == 24


@pytest.mark.shared
def test_the_whole_of_mnist(shared_data: Path) -> None:
    if not (shared_data / "mnist").is_dir():
        pytest.skip("RAYDIFF_DATA has no mnist")
    entries = build(Options(source=str(shared_data / "mnist"), normal=("3",))).entries()
    assert (len(entries), sum(entry.is_anomaly for entry in entries)) == (6131 + 10_000, 8990)
