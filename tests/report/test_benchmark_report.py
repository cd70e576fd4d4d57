"""A benchmark's report says what the cells say, whatever their order; every table is also CSV and LaTeX."""

import csv
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from raydiff.core.metrics import Estimate, image_metrics
from raydiff.core.statistics import Friedman
from raydiff.errors import ConfigError, StorageError
from raydiff.evaluation import evaluate
from raydiff.experiment import fit_baselines
from raydiff.images import encode_png
from raydiff.report import benchmark_costs as costs
from raydiff.report import benchmark_figures as figures
from raydiff.report import benchmark_tables as tables
from raydiff.report import benchmark_words, write_benchmark_report
from raydiff.report import tables as cells
from raydiff.report.benchmark_data import Benchmark
from raydiff.report.benchmark_ranks import Ranking, rank
from raydiff.report.export import Heading, Table, escape_latex, to_csv, to_latex
from raydiff.results import Evaluation, Picture, Predictions, Result, RobustnessRow, run_id

VOID = {"meta", "img", "br", "wbr", "link"}


def cell(method, dataset="tiles", category="", seed=0, *, shift=1.0, noise=0, pixels=False, **more) -> Evaluation:
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


@pytest.fixture(scope="module")
def evaluations():
    """Two data sets, one of two categories and three seeds; kNN has pretrained weights and lacks a category."""
    found = [
        cell(method, "tiles", category, seed, shift=shift, noise=i + 1, pixels=category == "a")
        for i, (method, shift) in enumerate(METHODS.items()) for category in ("a", "b") for seed in range(3)
    ]  # fmt: skip
    found += [cell(m, f"nuts@{side}", shift=s, noise=9, ms_per_image=side**2 / 1000) for m, s in METHODS.items()
              for side in (32, 64)]  # fmt: skip
    return [*found, cell("knn", "tiles", "a", shift=4.0, pretrained="lite0 in1k")]


@pytest.fixture(scope="module")
def robustness_rows():
    rows = [robust("unet/strong", "none", 0, 0.95), robust("ocsvm", "none", 0, 0.8)]
    rows += [robust(m, "blur", s, 0.9 - 0.1 * s) for m in ("unet/strong", "ocsvm") for s in (1, 3, 5)]
    return [*rows, robust("unet/strong", "pgd", 1, 0.3, budget=2 / 255)]


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


@pytest.fixture(scope="module")
def report(evaluations, robustness_rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    return write_benchmark_report(evaluations, robustness_rows, folder / "report.html", title="Tiles & more")


@pytest.fixture(scope="module")
def page(report):
    return Page(report.read_text())


def read(report, name):
    lines = csv.DictReader(io.StringIO((report.parent / "tables" / f"{name}.csv").read_text()))
    return {next(iter(line.values())): line for line in lines}


def auroc(evaluations, method, dataset="tiles"):
    """{(category, seed): AUROC}."""
    rows = [e.rows[0] for e in evaluations if (e.rows[0].detector, e.rows[0].dataset) == (method, dataset)]
    return {(row.category, row.seed): row.metrics["auroc"].value for row in rows}


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


def test_the_overview_is_the_mean_over_categories_and_the_spread_over_seeds_of_that_mean(report, page, evaluations):
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
    assert by_name["knn"].detail == "1 of 2 cat."
    assert [name for name, c in by_name.items() if c.best] == ["unet/strong"]
    assert "The highest mean AUROC is that of unet/strong" in page.text


def test_rows_with_pretrained_weights_are_marked_and_named(report, page):
    assert "† uses pretrained weights lite0 in1k: knn." in page.text
    assert read(report, "tiles-metrics")["knn"]["mark"] == "†"
    assert read(report, "tiles-metrics")["copod"]["mark"] == ""


def test_every_category_and_kind_has_its_row(report, evaluations):
    by_category = read(report, "tiles-categories")
    assert list(by_category) == ["a", "b", "mean"]
    values = auroc(evaluations, "ocsvm")
    assert float(by_category["b"]["ocsvm"]) == pytest.approx(np.mean([values["b", s] for s in range(3)]), abs=1e-5)
    assert by_category["b"]["knn†"] == ""
    assert list(read(report, "tiles-kinds")) == [f"{c}: defect {kind}" for c in "ab" for kind in ("crack", "hole")]
    assert list(read(report, "nuts-32-kinds")) == ["defect crack", "defect hole"]


def test_a_metric_that_some_category_lacks_has_no_mean(report):
    assert read(report, "tiles-metrics")["unet/strong"].get("AUPRO", "") == ""  # masks in category a alone
    assert float(read(report, "tiles-metrics")["unet/strong"]["AP"]) > 0.5


def test_differences_are_to_the_best_classic_of_each_cell_and_corrected_together(evaluations, page):
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


def test_what_cannot_be_told_apart_is_said_so():
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


def test_a_classic_of_one_seed_stands_in_for_the_others_and_other_images_are_never_compared():
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


def test_methods_that_read_images_in_another_order_are_paired_by_id():
    ours, theirs = cell("unet/x", noise=1, shift=1.5), cell("ocsvm", noise=2)
    order = np.random.default_rng(0).permutation(80)
    p = theirs.predictions
    turned = Predictions(
        [p.ids[i] for i in order], [p.defects[i] for i in order], p.labels[order], p.scores[order], p.p_values[order],
        p.verdicts[order],
    )  # fmt: skip
    found = [Benchmark([ours, other]).differences("tiles") for other in (theirs, Evaluation(theirs.rows, turned, []))]
    assert found[0] == found[1]


def test_intervals_over_images_are_apart_from_the_spread_over_seeds(report, evaluations):
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


def test_the_ranking_says_what_it_rests_on(evaluations, page):
    ranking = rank(Benchmark(evaluations))
    assert isinstance(ranking, Ranking)
    assert (ranking.methods[0], ranking.ranks[0], ranking.num_blocks) == ("unet/strong", 1.0, 4)
    assert (ranking.methods[-1], ranking.missing) == ("unet/backwards", ["knn"])
    assert ranking.critical == pytest.approx(2.728 * np.sqrt(5 * 6 / (6 * 4)), abs=0.002)
    assert "chi-square" in page.text
    assert "Categories of one data set are not independent" in page.text
    assert "Left out, for they did not run on every block: knn." in page.text


def test_the_ranking_refuses_itself(evaluations):
    one_block = [cell(method, shift=shift) for method, shift in METHODS.items()]
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


def test_scores_that_run_backwards_are_flagged(report, page):
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


def test_nothing_below_one_half_is_said_too(tmp_path):
    path = write_benchmark_report([cell("unet/x", shift=3)], [], tmp_path / "r.html", title="x")
    assert "No category and no kind of anomaly has an AUROC below one half" in Page(path.read_text()).text
    assert not (tmp_path / "tables" / "direction-cells.csv").exists()


def test_points_of_one_checkpoint_share_a_colour(evaluations):
    points = figures.points_of(Benchmark(evaluations), "tiles", "num_evaluations")
    assert [(p.method, p.checkpoint, p.cost) for p in points] == [("unet/backwards", 0, 8.0), ("unet/strong", 0, 8.0)]
    other = cell("unet/other", "tiles", "a", config={"seed": 0, "denoiser": {"name": "dit"}, "scoring": {}})
    points = figures.points_of(Benchmark([*evaluations, other]), "tiles", "ms_per_image")
    assert {p.method: p.checkpoint for p in points}["unet/other"] == 1


def test_names_in_a_figure_do_not_cross():
    points = [figures.Point(f"unet/scorer_{i}", 0, 8.0, 0.9 + 0.002 * i, 0.02, 0.02) for i in range(9)]
    svg = figures.scatter_figure(points, "NFE", "s")
    at = [tuple(map(float, m)) for m in re.findall(r"<text[^>]*translate\(([\d.]+) ([\d.]+)\)[^>]*>unet/scorer", svg)]
    at = at or [tuple(map(float, m)) for m in re.findall(r'<text[^>]* x="([\d.]+)" y="([\d.]+)"[^>]*>unet/scorer', svg)]
    assert len(at) == 9
    assert all(abs(a[1] - b[1]) > 8 or abs(a[0] - b[0]) > 55 for i, a in enumerate(at) for b in at[:i])


def test_cost_grows_by_the_power_it_was_made_with(evaluations, report):
    growth = {g.noun: g for g in costs.growths(Benchmark(evaluations))}
    assert growth["time per image"].power("ocsvm") == pytest.approx(2.0)
    assert growth["training time"].power("ocsvm") == pytest.approx(0.0, abs=1e-9)
    assert growth["time per image"].hardware == ""
    row = read(report, "nuts-growth-time-per-image")["ocsvm"]
    assert (float(row["32 px"]), float(row["64 px"]), float(row["power"])) == pytest.approx((1.024, 4.096, 2.0))
    mixed = [*evaluations, cell("ocsvm", "nuts@128", hardware="another")]
    table = costs.growth_tables(Benchmark(mixed), costs.growths(Benchmark(mixed)))[0]
    assert "Warning: measured on different hardware, a processor and another" in table.caption
    assert costs.growths(Benchmark([cell("ocsvm", "nuts@128")])) == []


def test_rows_of_several_machines_are_kept_apart():
    runs = [cell("ocsvm", seed=0, training_seconds=1.0), cell("ocsvm", seed=1, training_seconds=9.0, hardware="H200")]
    table = costs.cost_table(Benchmark(runs), "tiles")
    assert [(row.name, row.note, row.cells[0].value) for row in table.rows] == [
        ("ocsvm", "H200", 9.0), ("ocsvm", "a processor", 1.0),
    ]  # fmt: skip


def test_robustness_starts_at_the_unchanged_images(evaluations, robustness_rows, report):
    panels = costs.robustness(Benchmark(evaluations), robustness_rows)
    assert [(p.kind, p.perturbation) for p in panels] == [("corruption", "blur"), ("attack", "pgd")]
    blur = {m: [(at, c.value) for at, c in points] for m, points in panels[0].curves.items()}
    assert blur["unet/strong"] == [(0.0, 0.95), (1.0, pytest.approx(0.8)), (3.0, pytest.approx(0.6)), (5.0, 0.4)]
    assert [at for at, _ in panels[1].curves["unet/strong"]] == [0.0, 1.0]  # 2 / 255 is one grey level
    table = read(report, "tiles-robustness-corruption")
    assert float(table["blur 3"]["ocsvm"]) == pytest.approx(0.6)
    assert read(report, "tiles-robustness-attack").keys() == {"pgd 0", "pgd 1"}


def test_the_gallery_is_small_and_that_of_the_best_network(page):
    assert "tiles: a, unet/strong" in page.text
    assert "unet/backwards" not in re.findall(r"tiles: a, (\S+)", page.text)
    assert "(4 of" in page.text


def test_one_config_per_method_and_data_set_is_shown_in_full(page, evaluations):
    assert page.text.count('"scoring"') <= 6 * 3
    assert "Which rows are from which hardware" in page.text
    assert f"Runs ({len(evaluations)})" in page.text


def balanced(text):
    """Braces close, and no special character is bare."""
    depth = 0
    bare = re.sub(r"\\[\\{}$&%#_]", "", text)
    for character in bare:
        depth += (character == "{") - (character == "}")
        assert depth >= 0
    return depth == 0


def test_latex_is_balanced_escaped_and_has_as_many_cells_as_columns(report):
    for path in (report.parent / "tables").glob("*.tex"):
        text = path.read_text()
        assert balanced(text.split("\n", 1)[1]), path.name
        assert text.count(r"\begin{") == text.count(r"\end{")
        body = text[text.index(r"\begin{tabular}") :]
        columns = len(re.match(r"\\begin\{tabular\}\{(l r*)\}".replace(" ", ""), body).group(1))
        lines = [line for line in body.splitlines() if line.endswith(r" \\") and "multicolumn" not in line]
        assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {columns - 1}, path.name
        assert not re.search(r"(?<!\\)[%#_^~](?!\\)", body.replace("\\textsuperscript", "").replace("~", "").replace(
            "{!}{%", "")), path.name  # fmt: skip
        for command in (r"\toprule", r"\midrule", r"\bottomrule", r"\caption{", r"\label{"):
            assert text.count(command) == 1


def test_latex_escapes_what_a_name_may_hold():
    assert escape_latex("a_b & 50% {x} #1 $ ^ ~ \\") == (
        r"a\_b \& 50\% \{x\} \#1 \$ \textasciicircum{} \textasciitilde{} \textbackslash{}"
    )
    rows = [cells.Row("x_y", [cells.Cell("−0.1", "± 0.2", -0.1, best=True), cells.Cell("< 0.001")], mark="†")]
    table = Table("t", "50 %", "a|b", [Heading("A"), Heading("B", "", -1)], rows, "c")
    assert r"x\_y\textsuperscript{\dag{}} & \textbf{$-$0.1} {\scriptsize $\pm$ 0.2} & \textless{} 0.001 \\" in to_latex(
        table
    )
    assert r"B $\downarrow$" in to_latex(table)


def test_csv_keeps_full_numbers_and_quotes():
    rows = [cells.Row('say "x", y', [cells.Cell("0.123", "", 0.1234567), cells.Cell()])]
    table = Table("t", "t", "Method", [Heading("A"), Heading("F1\u2011max")], rows)
    assert to_csv(table) == 'Method,A,F1-max\n"say ""x"", y",0.123457,\n'


def test_tables_of_one_name_get_a_number():
    table = Table("x", "t", "m", [Heading("A")], [])
    assert table.unlike([]).name == "x"
    assert table.unlike([table, table.unlike([table])]).name == "x-3"


def test_names_from_the_data_are_escaped(tmp_path):
    evil = cell("<script>alert(1)</script>/x", "<b>tiles</b>", "<i>a</i>")
    path = write_benchmark_report([evil], [], tmp_path / "r.html", title="<u>")
    page = Page(path.read_text())
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


def test_a_report_of_detectors_trained_here(detector, digit_shards, tiny_config, tmp_path):
    baselines = list(fit_baselines(tiny_config, digit_shards, ["ocsvm", "copod"]))
    found = [evaluate(d, digit_shards, dataset="digits", category="0", num_draws=20) for d in (detector, *baselines)]
    page = Page(write_benchmark_report(found, [], tmp_path / "r.html", title="digits").read_text())
    for evaluation in found:
        row = evaluation.rows[0]
        assert f"{row.metrics['auroc'].value:.3f}" in page.text
        assert float(read(tmp_path / "r.html", "digits-metrics")[row.detector]["AUROC"]) == pytest.approx(
            row.metrics["auroc"].value, abs=1e-5
        )
    assert "No ranking: 3 methods ran on all of the 1 block" in page.text
