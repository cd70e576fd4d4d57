"""A small benchmark's cells, made by hand, and the report of them."""

import csv
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from raydiff.core.metrics import Estimate, image_metrics
from raydiff.images import encode_png
from raydiff.report import write_benchmark_report
from raydiff.results import Evaluation, Picture, Predictions, Result, RobustnessRow, run_id

VOID = {"meta", "img", "br", "wbr", "link"}


def make_cell(method, dataset="tiles", category="", seed=0, *, shift=1.0, noise=0, pixels=False, **more) -> Evaluation:
    """40 normal and 40 anomalous images; those of a category are alike for all methods, ``noise`` is the method's."""
    rng = np.random.default_rng([len(category), *map(ord, category)])
    labels = np.arange(80) >= 40
    base = rng.normal(size=80)
    own = np.random.default_rng([seed, noise]).normal(size=80)
    scores = base + shift * labels + (0.3 if noise else 0.0) * own
    ids, defects = [f"{category}/{i:03d}.png" for i in range(80)], ["good"] * 40 + ["crack"] * 20 + ["hole"] * 20
    metrics = image_metrics(scores, labels, num_draws=20)
    if pixels:
        metrics |= {name: Estimate(0.9) for name in ("pixel_auroc", "pixel_average_precision", "aupro")}
    network = "/" in method
    row = Result(**{
        "run": run_id(method, dataset, seed, category), "detector": method, "dataset": dataset, "seed": seed,
        "subset": "all", "subset_kind": "all", "num_normal": 40, "num_anomalous": 40, "metrics": metrics,
        "threshold": 1.0, "target_fpr": 0.05, "realised_fpr": Estimate(0.1, 0.05, 0.2),
        "realised_tpr": Estimate(0.8, 0.7, 0.9), "num_evaluations": 8 if network else None, "ms_per_image_alone": 2.5,
        "ms_per_image": 4.0, "batch_size": 64, "device": "cpu", "hardware": "a processor", "versions": {"python": "3"},
        "commit": "abcdef012345", "command": "raydiff benchmark x", "created": "2026-01-02T00:00:00+00:00",
        "config_digest": "c0ffee" * 8, "artifact_digest": "a11" * 8, "data_digest": "da7a" * 8,
        "config": {"seed": seed, "scoring": {"name": method}}, "category": category, "training_seconds": 12.0,
    } | more)  # fmt: skip
    parts = [
        row.model_copy(update={
            "subset": kind, "subset_kind": "defect", "config": None, "num_anomalous": 20,
            "metrics": image_metrics(*_only(scores, labels, np.array(defects), kind), num_draws=20),
        }) for kind in ("crack", "hole")
    ]  # fmt: skip
    png = encode_png(rng.integers(0, 256, (8, 8, 1)).astype(np.uint8))
    pictures = [Picture("hit", i, png, None, None, None) for i in range(79, 72, -1)] if network else []
    predictions = Predictions(ids, defects, labels, scores, np.full(80, 0.5), scores > 1.0)
    return Evaluation([row, *parts], predictions, pictures)


def _only(scores, labels, defects, kind):
    chosen = ~labels | (defects == kind)
    return scores[chosen], labels[chosen]


def robust(method, perturbation, severity, auroc, *, budget=None, category="a"):
    return RobustnessRow(
        cell=f"{method}/{category}", detector=method, dataset="tiles", category=category, seed=0,
        kind="corruption" if budget is None else "attack", perturbation=perturbation, severity=severity, budget=budget,
        num_normal=40, num_anomalous=40, auroc=Estimate(auroc, auroc - 0.1, auroc + 0.05),
        realised_fpr=Estimate(0.1), realised_tpr=Estimate(0.8), score_shift_normal=0.0, score_shift_anomalous=0.0,
    )  # fmt: skip


METHODS = {"unet/strong": 2.5, "unet/backwards": -1.0, "copod": 0.3, "ocsvm": 1.2, "isolation_forest": 0.8}


class Page(HTMLParser):
    """Checks that tags close in order, and gathers what the tests ask about."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.words))


def read_table(report, name):
    lines = csv.DictReader(io.StringIO((report.parent / "tables" / f"{name}.csv").read_text()))
    return {next(iter(line.values())): line for line in lines}


def aurocs(evaluations, method, dataset="tiles"):
    """{(category, seed): AUROC}."""
    rows = [e.rows[0] for e in evaluations if (e.rows[0].detector, e.rows[0].dataset) == (method, dataset)]
    return {(row.category, row.seed): row.metrics["auroc"].value for row in rows}


@pytest.fixture(scope="session")
def benchmark_cells():
    """Two data sets, one of two categories and three seeds; kNN has pretrained weights and lacks a category."""
    found = [
        make_cell(method, "tiles", category, seed, shift=shift, noise=i + 1, pixels=category == "a")
        for i, (method, shift) in enumerate(METHODS.items()) for category in ("a", "b") for seed in range(3)
    ]  # fmt: skip
    found += [make_cell(m, f"nuts@{side}", shift=s, noise=9, ms_per_image=side**2 / 1000) for m, s in METHODS.items()
              for side in (32, 64)]  # fmt: skip
    return [*found, make_cell("knn", "tiles", "a", shift=4.0, pretrained="lite0 in1k")]


@pytest.fixture(scope="session")
def robustness_rows():
    rows = [robust("unet/strong", "none", 0, 0.95), robust("ocsvm", "none", 0, 0.8)]
    rows += [robust(m, "blur", s, 0.9 - 0.1 * s) for m in ("unet/strong", "ocsvm") for s in (1, 3, 5)]
    return [*rows, robust("unet/strong", "pgd", 1, 0.3, budget=2 / 255)]


@pytest.fixture(scope="session")
def benchmark_report(benchmark_cells, robustness_rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    return write_benchmark_report(benchmark_cells, robustness_rows, folder / "report.html", title="Tiles & more")


@pytest.fixture(scope="session")
def cell():
    return make_cell


@pytest.fixture(scope="session")
def methods():
    return METHODS


@pytest.fixture(scope="session")
def parse():
    return Page


@pytest.fixture(scope="session")
def read():
    return read_table


@pytest.fixture(scope="session")
def auroc():
    return aurocs
