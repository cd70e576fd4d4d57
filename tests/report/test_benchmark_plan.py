"""What was planned and is missing: it is said, and no mean over less than was planned is the best."""

import re

import pytest

from raydiff.report import benchmark_costs as costs
from raydiff.report import benchmark_direction, benchmark_words, write_benchmark_report
from raydiff.report import benchmark_figures as figures
from raydiff.report import benchmark_tables as tables
from raydiff.report.benchmark_data import Benchmark
from raydiff.report.benchmark_ranks import rank

SEEDS = {"unet/x": (0, 1), "unet/y": (0, 1), "ocsvm": (0,)}
PLANNED = {
    (method, dataset, category, seed) for method, seeds in SEEDS.items() for seed in seeds
    for dataset, category in (("tiles", "a"), ("tiles", "b"), ("tiles", "c"), ("nuts", ""))
}  # fmt: skip


def measured(cell, *left_out):
    """Tiles a and b; unet/x is the best by far."""
    shifts = {"unet/x": 3.0, "unet/y": 2.0, "ocsvm": 0.5}
    return [
        cell(method, "tiles", category, seed, shift=shifts[method], noise=i + 1)
        for i, (method, seeds) in enumerate(SEEDS.items()) for category in "ab" for seed in seeds
        if (method, category, seed) not in left_out
    ]  # fmt: skip


def test_the_lead_says_what_is_missing(cell):
    benchmark = Benchmark(measured(cell, ("unet/x", "b", 1)), planned=PLANNED)
    said = benchmark_words.lead(benchmark)
    assert (
        "9 of 20 planned cells are measured; missing: all of nuts (5), all of tiles: c (5), unet/x on tiles (1)."
        in said
    )
    assert benchmark_words.progress(Benchmark(measured(cell))) == []
    whole = Benchmark(measured(cell), planned={cell for cell in PLANNED if cell[2] in ("a", "b")})
    assert benchmark_words.progress(whole) == []
    methods = Benchmark([e for e in measured(cell) if e.rows[0].detector != "ocsvm"], planned=PLANNED)
    assert "all of ocsvm (3)" in benchmark_words.lead(methods)


def test_a_long_list_of_what_is_missing_is_cut(cell):
    planned = PLANNED | {("unet/x", f"d{i}", "", 0) for i in range(20)}
    said = benchmark_words.lead(Benchmark(measured(cell), planned=planned))
    assert said.count("all of") == 8
    assert "all of d6 (1), 18 more." in said


def test_without_a_category_no_mean_is_the_best_and_each_says_so(cell):
    benchmark = Benchmark(measured(cell), planned=PLANNED)
    (table,) = tables.overview_tables(benchmark, ["auroc"])
    assert {row.name: row.cells[0].detail for row in table.rows} == {
        "unet/x": "4 of 6 cells", "unet/y": "4 of 6 cells", "ocsvm": "2 of 3 cells",
    }  # fmt: skip
    assert not any(cell.best for row in table.rows for cell in row.cells)
    by_category = tables.categories_table(benchmark, "tiles")
    assert [(row.name, row.note) for row in by_category.rows][2] == ("c", "not measured yet")
    assert [row.name for row in by_category.rows if any(cell.best for cell in row.cells)] == ["a", "b"]
    summary = benchmark_words.summary(benchmark, "tiles", tables.verdicts(benchmark, "tiles"))
    assert summary.startswith("No method has all its cells yet. Above the best classic")
    assert ", 4 of 6 cells)" in summary


def test_a_method_that_lacks_a_seed_is_not_the_best(cell):
    planned = {cell for cell in PLANNED if cell[2] in ("a", "b")}
    benchmark = Benchmark(measured(cell, ("unet/x", "b", 1)), planned=planned)
    (table,) = tables.overview_tables(benchmark, ["auroc"])
    cells = {row.name: row.cells[0] for row in table.rows}
    assert cells["unet/x"].value > cells["unet/y"].value
    assert (cells["unet/x"].best, cells["unet/x"].missing) == (False, "3 of 4 cells")
    assert (cells["unet/y"].best, cells["ocsvm"].detail) == (True, "1 seed")
    assert re.fullmatch(r"± 0\.\d{3}", cells["unet/y"].detail)
    row = tables.categories_table(benchmark, "tiles").rows[1]
    assert [(c.best, c.missing) for c in row.cells] == [(False, "1 of 2 seeds"), (True, ""), (False, "")]
    kinds = {row.name: row.cells[0].missing for row in tables.defects_table(benchmark, "tiles").rows}
    assert (kinds["a: defect hole"], kinds["b: defect hole"]) == ("", "1 of 2 seeds")
    summary = benchmark_words.summary(benchmark, "tiles", [])
    assert summary.startswith("2 of 3 methods have all their cells. The highest mean AUROC is that of unet/y")
    differences = tables.differences_table(benchmark, "tiles", tables.verdicts(benchmark, "tiles"))
    found = {row.name: (row.cells[0].best, row.cells[3].text) for row in differences.rows}
    assert found == {"unet/x": (False, "3 of 4"), "unet/y": (True, "4")}
    names = [point.method for point in figures.points_of(benchmark, "tiles", "ms_per_image")]
    assert names == ["unet/x (3 of 4)", "unet/y"]
    direction = benchmark_direction.direction_tables(benchmark)[0]
    assert direction.rows[0].cells[0].detail.endswith("; 3 of 4 cells")


def test_a_seed_that_is_missing_in_one_category_needs_no_plan(cell):
    benchmark = Benchmark(measured(cell, ("unet/x", "b", 1)))
    assert benchmark.score("tiles", "unet/x").missing == "3 of 4 cells"
    assert benchmark.score("tiles", "ocsvm").missing == ""  # it has one seed everywhere


def test_ranks_of_part_of_the_plan_say_so(cell):
    said = rank(Benchmark(measured(cell, ("unet/x", "b", 1)), planned=PLANNED)).sentences
    assert "Only 2 of 4 planned blocks are measured, so these are not yet the suite's ranks." in said
    assert "Some seeds are still missing of unet/x." in said
    assert len(rank(Benchmark(measured(cell))).sentences) < len(said)


def test_robustness_over_fewer_cells_is_marked(cell, robustness_rows):
    rows = [row.model_copy(update={"detector": "unet/x"}) for row in robustness_rows if row.detector == "unet/strong"]
    (blur, _) = costs.robustness(Benchmark(measured(cell), planned=PLANNED), rows)
    assert {c.missing for _, c in blur.curves["unet/x"]} == {"1 of 6 cells"}
    assert not any(c.best for row in costs.robustness_tables([blur])[0].rows for c in row.cells)


def test_the_page_and_its_files_say_what_is_missing(cell, tmp_path, parse, read):
    path = write_benchmark_report(measured(cell), [], tmp_path / "r.html", title="x", planned=PLANNED)
    page = parse(path.read_text())
    assert "10 of 20 planned cells are measured" in page.text
    assert read(path, "overview-auroc")["unet/x"]["tiles measured"] == "4 of 6 cells"
    assert "4 of 6 cells" in (tmp_path / "tables" / "overview-auroc.tex").read_text()


def test_without_classics_the_differences_are_left_out_and_nothing_is_guessed(cell, tmp_path, parse):
    path = write_benchmark_report(measured(cell), [], tmp_path / "r.html", title="x", classics=[])
    page = parse(path.read_text())
    assert "there is no classic method to hold them against, so no differences are given" in page.text
    assert "No comparison with a classic method: no classic method is among them." in page.text
    assert "Differences to the best classic" not in page.text


def test_methods_fitted_on_different_numbers_of_images_are_named(cell):
    runs = measured(cell)
    assert tables.fitted_on(Benchmark(runs), "tiles") == ""
    for evaluation in runs:
        number = 100 if evaluation.rows[0].detector == "ocsvm" else 320
        object.__setattr__(evaluation.rows[0], "num_train_images", number)
    said = tables.fitted_on(Benchmark(runs), "tiles")
    assert said == " Methods were fitted on different numbers of training images: 320 (unet/x, unet/y); 100 (ocsvm)."


@pytest.mark.parametrize("name", ["unet/$x", "unet/$x$ ^2_", "unet/\\alpha$"])
def test_names_are_never_mathematics(cell, tmp_path, name):
    runs = [cell(n, "tiles", c, shift=i) for i, n in enumerate((name, "knn", "ocsvm")) for c in "ab"]
    path = write_benchmark_report(runs, [], tmp_path / "r.html", title="x")
    drawn = re.findall(r"<text[^>]*>([^<]*)", path.read_text())
    assert sum(name in text for text in drawn) == 3  # two figures of cost, one of ranks
