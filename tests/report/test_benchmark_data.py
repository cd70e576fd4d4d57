"""Cells arranged: differences are paired by image, to the best classic of each cell; intervals are over images."""

import re

import numpy as np
import pytest

from raydiff.report import benchmark_tables as tables
from raydiff.report import benchmark_words, words
from raydiff.report.benchmark_data import Benchmark
from raydiff.results import Evaluation, Predictions


@pytest.fixture(scope="module")
def evaluations(benchmark_cells):
    return benchmark_cells


@pytest.fixture(scope="module")
def report(benchmark_report):
    return benchmark_report


@pytest.fixture(scope="module")
def page(report, parse):
    return parse(report.read_text())


def test_differences_are_to_the_best_classic_of_each_cell_and_corrected_together(evaluations, page, auroc):
    benchmark = Benchmark(evaluations)
    assert benchmark.classics == ["copod", "isolation_forest", "ocsvm"]
    found = {v.against.method: v for v in tables.verdicts(benchmark, "tiles")}
    assert set(found) == {"unet/strong", "unet/backwards", "knn"}
    ours, classics = auroc(evaluations, "unet/strong"), [auroc(evaluations, name) for name in benchmark.classics]
    expected = np.mean([ours[key] - max(classic[key] for classic in classics) for key in ours])
    strong = found["unet/strong"]
    assert strong.against.difference.estimate.value == pytest.approx(expected)
    assert (strong.outcome, strong.against.difference.num_cells) == (1, 6)
    assert (found["unet/backwards"].outcome, found["knn"].against.difference.num_cells) == (-1, 1)
    raw = sorted(v.against.difference.p_value for v in found.values())
    assert sorted(v.adjusted for v in found.values())[0] == pytest.approx(min(1, 3 * raw[0]))
    assert "Above the best classic method of each category and seed:" in page.text
    assert "Below it: unet/backwards (−0." in page.text


def test_what_cannot_be_told_apart_is_said_so(cell):
    same = [cell("unet/x", shift=1.0, noise=1), cell("ocsvm", shift=1.0, noise=2)]
    benchmark = Benchmark(same)
    found = tables.verdicts(benchmark, "tiles")
    assert [v.outcome for v in found] == [0]
    said = benchmark_words.verdict(benchmark, found)
    assert said[0].startswith("Not told apart from the best classic method of each category and seed: unet/x (")
    alone = Benchmark(same[:1])
    assert benchmark_words.verdict(alone, []) == [
        "No comparison with a classic method: no classic method is among them."
    ]


def test_classics_below_one_half_are_no_measure(cell):
    runs = [cell("unet/x", noise=1), cell("ocsvm", noise=2, shift=-1.0), cell("copod", noise=3, shift=-2.0)]
    said = benchmark_words.summary(Benchmark(runs), "tiles", tables.verdicts(Benchmark(runs), "tiles"))
    assert re.search(r"No classic method reaches an AUROC of one half here \(the highest mean is 0\.\d{3}\)", said)
    runs = [*runs[:2], cell("copod", noise=3)]
    said = benchmark_words.summary(Benchmark(runs), "tiles", tables.verdicts(Benchmark(runs), "tiles"))
    assert "No classic method" not in said


def test_names_with_commas_are_told_apart():
    assert benchmark_words.listed(["a", "b", "c"]) == "a, b and c"
    assert benchmark_words.listed(["features, kNN", "kNN"]) == "features, kNN; kNN"
    assert words.joined(["a", "b"]) == "a, b"


def test_a_classic_of_one_seed_stands_in_for_the_others_and_other_images_are_never_compared(cell):
    runs = [cell("unet/x", seed=seed, noise=1) for seed in range(3)] + [cell("ocsvm", noise=2, shift=0.5)]
    assert Benchmark(runs).differences("tiles")[0].difference.num_cells == 3
    fewer = cell("ocsvm", noise=2)
    ids = [f"other/{i}" for i in range(80)]
    moved = Evaluation(fewer.rows, Predictions(ids, *list(vars(fewer.predictions).values())[1:]), [])
    assert Benchmark([*runs[:3], moved]).differences("tiles") == []


def test_the_classics_can_be_named(evaluations):
    benchmark = Benchmark(evaluations, ["copod"])
    assert {a.references for a in benchmark.differences("tiles")} == {("copod",)}
    assert "ocsvm" in {a.method for a in benchmark.differences("tiles")}
    assert benchmark.methods[-1] == "copod"


def test_methods_that_read_images_in_another_order_are_paired_by_id(cell):
    ours, theirs = cell("unet/x", noise=1, shift=1.5), cell("ocsvm", noise=2)
    order = np.random.default_rng(0).permutation(80)
    p = theirs.predictions
    turned = Predictions(
        [p.ids[i] for i in order], [p.defects[i] for i in order], p.labels[order], p.scores[order], p.p_values[order],
        p.verdicts[order],
    )  # fmt: skip
    found = [Benchmark([ours, other]).differences("tiles") for other in (theirs, Evaluation(theirs.rows, turned, []))]
    assert found[0] == found[1]


def test_intervals_over_images_are_apart_from_the_spread_over_seeds(report, evaluations, read):
    row = read(report, "tiles-metrics")["ocsvm"]
    low, high = (float(row[f"95 % interval over images {end}"]) for end in ("low", "high"))
    assert low < float(row["AUROC"]) < high
    one = Benchmark(evaluations).interval("nuts@32", "ocsvm")
    two = Benchmark(evaluations).interval("tiles", "ocsvm")
    assert two[1] - two[0] < one[1] - one[0]  # twice the images
    bare = [Evaluation(e.rows, None, []) for e in evaluations]
    assert Benchmark(bare).interval("tiles", "ocsvm") is None
    own = bare[-1].rows[0].metrics["auroc"]
    assert Benchmark(bare).interval("tiles", "knn") == (own.low, own.high)
