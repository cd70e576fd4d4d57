"""A benchmark's report says what the cells say, whatever their order; it stands alone and can be read by everyone."""

import csv
import io
import re

import numpy as np
import pytest

from raydiff.core.statistics import Friedman
from raydiff.errors import ConfigError, StorageError
from raydiff.evaluation import evaluate
from raydiff.experiment import fit_baselines
from raydiff.report import benchmark_figures as figures
from raydiff.report import benchmark_tables as tables
from raydiff.report import write_benchmark_report
from raydiff.report.benchmark_data import Benchmark
from raydiff.report.benchmark_ranks import Ranking, rank


@pytest.fixture(scope="module")
def evaluations(benchmark_cells):
    return benchmark_cells


@pytest.fixture(scope="module")
def report(benchmark_report):
    return benchmark_report


@pytest.fixture(scope="module")
def page(report, parse):
    return parse(report.read_text())


def test_the_file_stands_alone_and_everyone_can_read_it(report, page):
    html = report.read_text()
    assert "http" not in html
    assert "<script" not in html
    assert "@import" not in html
    assert all(image["src"].startswith("data:image/png;base64,") and image["alt"] for image in page.all("img"))
    assert all(header.get("scope") in ("col", "row", "colgroup") for header in page.all("th"))
    drawings = [tag for tag in page.all("div") if tag.get("role") == "img"]
    assert len(drawings) == len(page.all("svg")) > 8
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link["href"][1:] for link in page.all("a")} <= set(ids)


def test_the_order_in_which_cells_were_finished_changes_no_byte(evaluations, robustness_rows, report, tmp_path):
    shuffled = [evaluations[i] for i in np.random.default_rng(0).permutation(len(evaluations))]
    again = write_benchmark_report(shuffled, robustness_rows[::-1], tmp_path / "r.html", title="Tiles & more")
    assert again.read_text() == report.read_text()
    first, second = ({f.name: f.read_text() for f in (p.parent / "tables").iterdir()} for p in (report, again))
    assert first == second


def test_every_table_of_the_page_has_its_two_files(report, page):
    named = set(re.findall(r"tables/([a-z0-9-]+)\.csv, \.tex", page.text))
    written = {path.name for path in (report.parent / "tables").iterdir()}
    assert written == {f"{name}.{kind}" for name in named for kind in ("csv", "tex")}
    for name in ("overview-auroc", "tiles-metrics", "tiles-categories", "tiles-kinds", "tiles-differences",
                 "tiles-cost", "ranks", "nuts-growth-time-per-image", "tiles-robustness-corruption", "direction",
                 "tiles-robustness-attack", "direction-cells"):  # fmt: skip
        assert name in named


def test_the_overview_is_the_mean_over_categories_and_the_spread_over_seeds_of_that_mean(
    report, page, evaluations, read, auroc
):
    values = auroc(evaluations, "unet/strong")
    means = [np.mean([values[category, seed] for category in "ab"]) for seed in range(3)]
    row = read(report, "overview-auroc")["unet/strong"]
    assert float(row["tiles"]) == pytest.approx(np.mean(means), abs=1e-5)
    assert float(row["tiles sd"]) == pytest.approx(np.std(means, ddof=1), abs=1e-5)
    assert row["NFE"] == "8"
    assert "nuts@32 sd" not in row  # a single seed has no spread
    assert f"{np.mean(means):.3f}± {np.std(means, ddof=1):.3f}" in page.text


def test_a_mean_over_fewer_categories_says_so_and_is_never_the_best(evaluations, page):
    benchmark = Benchmark(evaluations)
    table = next(t for t in tables.overview_tables(benchmark, ["auroc"]))
    by_name = {row.name: row.cells[2] for row in table.rows}  # nuts@32, nuts@64, tiles
    assert by_name["knn"].value == max(c.value for c in by_name.values())
    assert by_name["knn"].detail == by_name["knn"].missing == "1 of 2 cells"
    assert [name for name, c in by_name.items() if c.best] == ["unet/strong"]
    assert "The highest mean AUROC is that of unet/strong" in page.text


def test_rows_with_pretrained_weights_are_marked_and_named(report, page, read):
    assert "† uses pretrained weights lite0 in1k: knn." in page.text
    assert read(report, "tiles-metrics")["knn"]["mark"] == "†"
    assert read(report, "tiles-metrics")["copod"]["mark"] == ""


def test_every_category_and_kind_has_its_row(report, evaluations, read, auroc):
    by_category = read(report, "tiles-categories")
    assert list(by_category) == ["a", "b", "mean"]
    values = auroc(evaluations, "ocsvm")
    assert float(by_category["b"]["ocsvm"]) == pytest.approx(np.mean([values["b", s] for s in range(3)]), abs=1e-5)
    assert by_category["b"]["knn†"] == ""
    assert list(read(report, "tiles-kinds")) == [f"{c}: defect {kind}" for c in "ab" for kind in ("crack", "hole")]
    assert list(read(report, "nuts-32-kinds")) == ["defect crack", "defect hole"]


def test_a_metric_that_some_category_lacks_has_no_mean(report, read):
    assert read(report, "tiles-metrics")["unet/strong"].get("AUPRO", "") == ""  # masks in category a alone
    assert float(read(report, "tiles-metrics")["unet/strong"]["AP"]) > 0.5


def test_the_ranking_says_what_it_rests_on(evaluations, page):
    ranking = rank(Benchmark(evaluations))
    assert isinstance(ranking, Ranking)
    assert (ranking.methods[0], ranking.ranks[0], ranking.num_blocks) == ("unet/strong", 1.0, 4)
    assert (ranking.methods[-1], ranking.missing) == ("unet/backwards", ["knn"])
    assert ranking.critical == pytest.approx(2.728 * np.sqrt(5 * 6 / (6 * 4)), abs=0.002)
    assert "chi-square" in page.text
    assert "Categories of one data set are not independent" in page.text
    assert "Left out, for they did not run on every block: knn." in page.text


def test_the_ranking_refuses_itself(evaluations, cell, methods):
    one_block = [cell(method, shift=shift) for method, shift in methods.items()]
    said = rank(Benchmark(one_block))
    assert said.startswith("No ranking: 5 methods ran on all of the 1 block")
    two_methods = rank(Benchmark([cell(m, c) for m in ("unet/x", "ocsvm") for c in ("a", "b")]))
    assert two_methods.endswith("ranks need at least 3 methods common to at least 2 blocks.")


def test_ranks_close_together_share_a_bar(evaluations):
    ranking = Ranking(["a", "b", "c"], [1.0, 1.5, 3.0], None, [("a", "b")], Friedman(4.0, 0.1), 0.8, 4, 4, [])
    svg = figures.rank_figure(ranking, "r")
    assert len(re.findall(r"stroke-width: 4\b", svg)) == 1
    for said in (">a  1.00<", ">3.00  c<", ">critical difference 0.80<"):
        assert said in svg
    assert "cannot be told apart, and neither can any two" in ranking.sentences[0]
    assert not any("independent" in sentence for sentence in ranking.sentences)


def test_scores_that_run_backwards_are_flagged(report, page, read):
    row = read(report, "direction")["unet/backwards"]
    assert float(row["tiles"]) < 0.5
    assert float(row["tiles high"]) < 0.5
    assert "▼ 0." in page.text
    assert "2 of 2 below" in page.text
    lows = list(csv.DictReader(io.StringIO((report.parent / "tables" / "direction-cells.csv").read_text())))
    backwards = {line["note"] for line in lows if line["Method"] == "unet/backwards"}
    assert {"tiles: a", "tiles: b", "tiles: a, defect crack", "nuts@32"} <= backwards
    assert {line["direction"] for line in lows if line["note"] == "tiles: a"} == {"reversed"}
    assert not any(line["Method"] in ("unet/strong", "ocsvm") for line in lows)
    values = [float(line["AUROC"]) for line in lows]
    assert values == sorted(values)


def test_nothing_below_one_half_is_said_too(tmp_path, cell, parse):
    path = write_benchmark_report([cell("unet/x", shift=3)], [], tmp_path / "r.html", title="x")
    assert "No category and no kind of anomaly has an AUROC below one half" in parse(path.read_text()).text
    assert not (tmp_path / "tables" / "direction-cells.csv").exists()


def test_points_of_one_checkpoint_share_a_colour(evaluations, cell):
    points = figures.points_of(Benchmark(evaluations), "tiles", "num_evaluations")
    assert [(p.method, p.checkpoint, p.cost) for p in points] == [("unet/backwards", 0, 8.0), ("unet/strong", 0, 8.0)]
    other = cell("unet/other", "tiles", "a", config={"seed": 0, "denoiser": {"name": "dit"}, "scoring": {}})
    points = figures.points_of(Benchmark([*evaluations, other]), "tiles", "ms_per_image")
    assert {p.method: p.checkpoint for p in points}["unet/other (1 of 2)"] == 1


def test_a_method_that_asks_its_network_nothing_has_no_place_on_a_log_scale(cell):
    benchmark = Benchmark([cell("unet/one", num_evaluations=1), cell("unet/none", num_evaluations=0)])
    shown = {cost: [p.method for p in figures.points_of(benchmark, "tiles", cost)]
             for cost in ("num_evaluations", "ms_per_image")}  # fmt: skip
    assert shown == {"num_evaluations": ["unet/one"], "ms_per_image": ["unet/none", "unet/one"]}


def test_names_in_a_figure_do_not_cross():
    points = [figures.Point(f"unet/scorer_{i}", 0, 8.0, 0.9 + 0.002 * i, 0.02, 0.02) for i in range(9)]
    svg = figures.scatter_figure(points, "NFE", "s")
    at = [tuple(map(float, m)) for m in re.findall(r"<text[^>]*translate\(([\d.]+) ([\d.]+)\)[^>]*>unet/scorer", svg)]
    at = at or [tuple(map(float, m)) for m in re.findall(r'<text[^>]* x="([\d.]+)" y="([\d.]+)"[^>]*>unet/scorer', svg)]
    assert len(at) == 9
    assert all(abs(a[1] - b[1]) > 8 or abs(a[0] - b[0]) > 55 for i, a in enumerate(at) for b in at[:i])


def test_the_gallery_is_small_and_that_of_the_best_network(page):
    assert "tiles: a, unet/strong" in page.text
    assert "unet/backwards" not in re.findall(r"tiles: a, (\S+)", page.text)
    assert "(4 of" in page.text


def test_one_config_per_method_and_data_set_is_shown_in_full(page, evaluations):
    assert page.text.count('"scoring"') <= 6 * 3
    assert "Which rows are from which hardware" in page.text
    assert f"Runs ({len(evaluations)})" in page.text


def test_names_from_the_data_are_escaped(tmp_path, cell, parse):
    evil = cell("<script>alert(1)</script>/x", "<b>tiles</b>", "<i>a</i>")
    path = write_benchmark_report([evil], [], tmp_path / "r.html", title="<u>")
    page = parse(path.read_text())
    assert page.all("script") == page.all("i") == page.all("u") == []
    assert "<script>alert(1)</script>/x" in page.text


def test_what_cannot_be_reported_is_said(evaluations, tmp_path):
    with pytest.raises(ConfigError, match="at least one evaluation"):
        write_benchmark_report([], [], tmp_path / "r.html", title="x")
    with pytest.raises(ConfigError, match="classics names 'vit'; the results hold unet/backwards, unet/strong, copod"):
        write_benchmark_report(evaluations, [], tmp_path / "r.html", title="x", classics=["vit"])
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        write_benchmark_report(evaluations[:1], [], tmp_path / "file" / "r.html", title="x")


def test_a_report_of_detectors_trained_here(detector, digit_shards, tiny_config, tmp_path, read, parse):
    baselines = list(fit_baselines(tiny_config, digit_shards, ["ocsvm", "copod"]))
    found = [evaluate(d, digit_shards, dataset="digits", category="0", num_draws=20) for d in (detector, *baselines)]
    page = parse(write_benchmark_report(found, [], tmp_path / "r.html", title="digits").read_text())
    for evaluation in found:
        row = evaluation.rows[0]
        assert f"{row.metrics['auroc'].value:.3f}" in page.text
        assert float(read(tmp_path / "r.html", "digits-metrics")[row.detector]["AUROC"]) == pytest.approx(
            row.metrics["auroc"].value, abs=1e-5
        )
    assert "No ranking: 3 methods ran on all of the 1 block" in page.text
