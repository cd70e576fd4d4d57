"""The report: one file that stands alone, says what the rows say, and can be read by everyone."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from raydiff.core.metrics import Estimate, image_metrics
from raydiff.errors import ConfigError, StorageError
from raydiff.images import encode_png
from raydiff.report import figures, tables, words, write_report
from raydiff.results import (
    Comparison,
    Evaluation,
    Picture,
    Predictions,
    Result,
    compare,
    load_evaluations,
    run_id,
    save_evaluations,
)

VOID = {"meta", "img", "br", "wbr", "link"}


def png(seed: int) -> bytes:
    return encode_png(np.random.default_rng(seed).integers(0, 256, (8, 8, 1)).astype(np.uint8))


def make(
    detector="unet/denoising_error", *, seed=0, dataset="digits (3)", shift=1.5, pixels=False, trained_on="da7a" * 16,
    **config,
) -> Evaluation:  # fmt: skip
    """30 normal and 30 anomalous images; a better detector has a larger shift."""
    rng = np.random.default_rng(seed)
    labels = np.arange(60) >= 30
    scores = rng.normal(size=60) + shift * labels
    verdicts = scores > 1.0
    ids, defects = [f"test/{i:03d}.png" for i in range(60)], ["good"] * 30 + ["crack"] * 15 + ["blow_hole"] * 15
    metrics = image_metrics(scores, labels, num_draws=50)
    if pixels:
        metrics |= {name: Estimate(0.9, 0.85, 0.95) for name in ("pixel_auroc", "pixel_average_precision", "aupro")}
    row = Result(
        run=run_id(detector, dataset, seed, config), detector=detector, dataset=dataset, seed=seed, subset="all",
        subset_kind="all", num_normal=30, num_anomalous=30, metrics=metrics, threshold=1.0, target_fpr=0.05,
        realised_fpr=Estimate(0.1, 0.05, 0.2), realised_tpr=Estimate(0.8, 0.7, 0.9),
        num_evaluations=8 if "/" in detector else None, ms_per_image_alone=2.5, ms_per_image=0.4 + shift,
        batch_size=64, device="cpu", hardware="a processor, 2 cores, 1 thread", versions={"python": "3.11"},
        commit="abcdef012345", command="raydiff evaluate here", created="2026-01-02T00:00:00+00:00",
        config_digest="c0ffee" * 8, artifact_digest="a11" * 8, data_digest="da7a" * 8, config={"seed": seed} | config,
        trained_on=trained_on,
    )  # fmt: skip
    rows = [row]
    for defect in ("crack", "blow_hole"):
        chosen = ~labels | (np.array(defects) == defect)
        part = image_metrics(scores[chosen], labels[chosen], num_draws=20)
        rows.append(row.model_copy(update={
            "subset": defect, "subset_kind": "defect", "config": None, "num_anomalous": 15, "metrics": part,
        }))  # fmt: skip
    misses = [i for i in range(30, 60) if not verdicts[i]][:2]
    hit = int(np.argmax(scores))
    pictures = [Picture("miss", i, png(i), png(i + 1), png(i + 2), png(i + 3)) for i in misses]
    pictures.append(Picture("hit", hit, png(hit), None, None, None))
    predictions = Predictions(ids, defects, labels, scores, rng.random(60), verdicts)
    return Evaluation(rows, predictions, pictures)


class Page(HTMLParser):
    """Checks that tags close in order, and gathers what the tests ask about."""

    def __init__(self, text: str) -> None:
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
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.words))


@pytest.fixture(scope="module")
def evaluations():
    return [make(pixels=True), make("ocsvm", shift=0.5), make("copod", shift=0.2)]


@pytest.fixture(scope="module")
def html(evaluations, tmp_path_factory):
    path = write_report(evaluations, tmp_path_factory.mktemp("report") / "report.html", title="Tiles & more")
    return path.read_text()


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_the_file_stands_alone(html, page):
    assert "http" not in html
    assert "<script" not in html
    assert "@import" not in html
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    assert page.all("link") == []


def test_everyone_can_read_it(page):
    assert page.all("html")[0]["lang"] == "en"
    assert "width=device-width" in str(page.all("meta"))
    assert all(image["alt"] for image in page.all("img"))
    assert all(header.get("scope") in ("col", "row", "colgroup") for header in page.all("th"))
    drawings = [tag for tag in page.all("div") if tag.get("role") == "img"]
    assert len(drawings) == len(page.all("svg")) == 2 + 3
    assert all(drawing["aria-label"] for drawing in drawings)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_it_says_what_the_rows_say(page, evaluations):
    for evaluation in evaluations:
        row = evaluation.rows[0]
        assert row.detector in page.text
        for estimate in (*row.metrics.values(), row.realised_fpr, row.realised_tpr):
            assert f"{estimate.value:.3f}{estimate.low:.3f}–{estimate.high:.3f}" in page.text
        for part in evaluation.rows[1:]:
            assert f"{part.metrics['auroc'].value:.3f}" in page.text
    for said in (
        "defect crack", "15 anomalous, 30 normal", "raydiff evaluate here", "abcdef012345", "a processor",
        "Tiles & more", '"seed": 0', "da7a" * 8, "Small figures: 95 % interval over 30 normal and 30",
    ):  # fmt: skip
        assert said in page.text


def test_the_gallery_shows_each_image_with_what_there_is_of_it(page, evaluations):
    alts = [image["alt"] for image in page.all("img")]
    first = evaluations[0].predictions.ids[evaluations[0].pictures[0].index]
    for view in ("input", "reconstruction", "heat map", "true mask"):
        assert f"{view} of {first}" in alts
    assert len(alts) == 4 * (len(evaluations[0].pictures) - 1) + 1
    assert "called normal: score" in page.text
    assert "Best hits (1 of" in page.text


def test_the_same_evaluations_give_the_same_bytes(evaluations, html, tmp_path):
    assert write_report(evaluations, tmp_path / "again.html", title="Tiles & more").read_text() == html


def test_names_from_the_data_are_escaped(tmp_path):
    evil = make("<script>alert(1)</script>/x", dataset="<b>tiles</b>")
    page = Page(write_report([evil], tmp_path / "r.html", title="<i>").read_text())
    assert page.all("script") == page.all("i") == []
    assert "<script>alert(1)</script>/x" in page.text


def test_seeds_become_mean_and_standard_deviation(tmp_path):
    runs = [make(seed=seed) for seed in (2, 0, 1)] + [make("ocsvm", seed=seed, shift=0.4) for seed in range(3)]
    page = Page(write_report(runs, tmp_path / "r.html").read_text())
    values = [run.rows[0].metrics["auroc"].value for run in runs[:3]]
    assert f"{np.mean(values):.3f}± {np.std(values, ddof=1):.3f}" in page.text
    assert "Mean over 3 training seeds" in page.text
    assert "of 3 seeds)" in page.text
    assert "minus ocsvm, seed 2" in page.text


def test_a_seed_trained_again_is_no_second_seed(tmp_path):
    first, again = make(shift=0.3), make(training={"num_steps": 900})
    save_evaluations(tmp_path / "results.jsonl", [first, make("ocsvm", shift=0.5), again])
    text = Page(write_report(load_evaluations(tmp_path / "results.jsonl"), tmp_path / "r.html").read_text()).text
    assert "training seeds ±" not in text
    assert "± " not in text
    assert f"{again.rows[0].metrics['auroc'].value:.3f}" in text
    assert text.count("1 earlier run is left out") == 1
    assert "left out" not in Page(write_report([first], tmp_path / "r.html").read_text()).text
    assert "1 earlier run is left out" in write_report([first, again], tmp_path / "r.html").read_text()


def test_seeds_of_different_configs_are_told_apart_from_seeds_alone(tmp_path):
    steps = {"num_steps": 400, "log_every": 10}
    alike = [make(seed=seed, training=steps | {"log_every": seed + 1}, execution={"use_gpu": seed > 0})
             for seed in range(2)]  # fmt: skip
    assert "different configs" not in write_report(alike, tmp_path / "r.html").read_text()
    longer = make(seed=2, training=steps | {"num_steps": 900})
    page = Page(write_report([*alike, longer], tmp_path / "r.html").read_text())
    assert (
        "The seeds of unet/denoising_error were trained with different configs (training.num_steps differs)"
        in page.text
    )


def test_rows_fitted_on_different_data_are_marked(tmp_path):
    other = "beef" * 16
    runs = [make(trained_on=other), make("ocsvm", shift=0.5), make("copod", shift=0.2), make("old", trained_on=None)]
    page = Page(write_report(runs, tmp_path / "r.html").read_text())
    marks = {row.name: row.mark for row in tables.main_table(tables.group(runs)["digits (3)"], "")[1]}
    assert marks == {"unet/denoising_error": "1", "ocsvm": "2", "copod": "2", "old": "3"}
    assert len(page.all("sup")) == 4
    assert "1 data beefbeefbeef; 2 data da7ada7ada7a; 3 data not recorded." in page.text
    same = Page(write_report(runs[1:3], tmp_path / "r.html").read_text())
    assert same.all("sup") == []
    assert "fitted on different data" not in same.text
    tiles = [make(dataset="tiles", trained_on=other), make("ocsvm", dataset="tiles", trained_on=other)]
    several = tables.group([*runs, *tiles])
    assert [row.mark for row in tables.overview_table(several)[1]] == ["*", "", ""]
    page = Page(write_report([*runs, *tiles], tmp_path / "r.html").read_text())
    assert "* its detectors were fitted on different data" in page.text


def test_an_interval_without_width_is_explained(tmp_path):
    said = "Where both ends of an interval read the same"
    perfect = Page(write_report([make(shift=50)], tmp_path / "r.html").read_text())
    assert "1.0001.000–1.000" in perfect.text
    assert perfect.text.count(said) == 1
    assert said not in Page(write_report([make(shift=1.0)], tmp_path / "r.html").read_text()).text
    seeds = [make(name, seed=seed, shift=50) for name in ("vit/x", "ocsvm") for seed in range(2)]
    assert said in Page(write_report(seeds, tmp_path / "r.html").read_text()).text  # that of their differences


def test_categories_of_a_benchmark_are_parts_of_their_data_set(tmp_path):
    runs = [make(), make("ocsvm", shift=0.4)]
    other = [Evaluation([row.model_copy(update={"category": "8", "run": f"{row.run}-8"}) for row in run.rows],
                        run.predictions, run.pictures) for run in runs]  # fmt: skip
    assert list(tables.group([*runs, *other])) == ["digits (3)", "digits (3): 8"]
    text = Page(write_report([*runs, *other], tmp_path / "r.html").read_text()).text
    assert text.count("minus ocsvm, seed 0") == 2
    assert "earlier run" not in text


def test_several_data_sets_have_a_row_each_and_a_mean_below(tmp_path):
    runs = [make(), make("ocsvm", shift=0.4), make(dataset="tiles", shift=0.8)]
    groups = tables.group(runs)
    detectors, rows = tables.overview_table(groups)
    assert detectors == ["unet/denoising_error", "ocsvm"]
    assert [row.name for row in rows] == ["digits (3)", "tiles", "mean of 2 data sets"]
    expected = np.mean([runs[0].rows[0].metrics["auroc"].value, runs[2].rows[0].metrics["auroc"].value])
    assert rows[-1].cells[0].value == pytest.approx(expected)
    assert rows[-1].cells[1].value is None  # ocsvm did not run on the tiles
    page = Page(write_report(runs, tmp_path / "r.html").read_text())
    assert "All data sets: AUROC" in page.text


def test_the_best_of_a_column_is_bold_by_what_better_means_there():
    groups = tables.group([make(shift=3), make("ocsvm", shift=0.2)])["digits (3)"]
    columns, rows = tables.main_table(groups, "unet/denoising_error")
    best = {column.name.replace("\u00a0", " ").replace("\u2011", "-"): [row.cells[i].best for row in rows]
            for i, column in enumerate(columns)}  # fmt: skip
    assert best["AUROC"] == best["FPR at 95 % TPR"] == [True, False]
    assert best["FPR"] == best["NFE"] == [False, False]
    assert best["ms, in batches"] == [False, True]
    assert "AUPRO" not in best  # nobody drew maps
    assert [row.main for row in rows] == [True, False]


def test_equal_at_the_shown_precision_is_equally_bold():
    marked = tables.mark_best([tables.Cell("0.99", "", 0.9901), tables.Cell("0.99", "", 0.9899), tables.Cell()], 1)
    assert [cell.best for cell in marked] == [True, True, False]
    assert not tables.mark_best([tables.Cell("1", "", 1.0)], 1)[0].best


def test_the_summary_is_fair_to_the_others():
    runs = [make(shift=1.0), make("ocsvm", shift=0.2), make("knn", shift=3.0)]
    groups = tables.group(runs)["digits (3)"]
    text = words.summary(groups, groups[0], compare(runs, num_draws=50))
    assert text.startswith("On digits (3), with 30 normal and 30 anomalous test images, unet/denoising_error scores")
    assert "false-positive rate of 5 %, it raised a false alarm on 10.0 %" in text
    assert "above that of the best classic detector, ocsvm (paired 95 % interval" in text
    assert f"The highest AUROC here is that of knn, {groups[2].auroc:.3f}." in text


@pytest.mark.parametrize(
    ("difference", "said"),
    [
        (Estimate(0.01, -0.02, 0.04), "0.010 above that of the best classic detector, copod (paired 95 % interval"
         " −0.020 to +0.040, so the two cannot be told apart on these images)."),
        (Estimate(-0.1, -0.2, -0.05), "0.100 below that of the best classic detector, copod (paired 95 % interval"
         " −0.200 to −0.050)."),
        (Estimate(0.0, 0.0, 0.0), "Its AUROC equals that of the best classic detector, copod."),
    ],
)  # fmt: skip
def test_the_summary_says_how_sure_a_difference_is(difference, said):
    groups = tables.group([make()])["digits (3)"]
    comparison = Comparison(
        detector="unet/denoising_error", reference="copod", dataset="digits (3)", seed=0, metric="auroc",
        difference=difference, num_images=60,
    )  # fmt: skip
    assert said in words.summary(groups, groups[0], [comparison])


def test_rows_without_predictions_make_a_report_without_curves(evaluations, tmp_path):
    bare = [Evaluation(evaluation.rows, None, []) for evaluation in evaluations]
    page = Page(write_report(bare, tmp_path / "r.html").read_text())
    assert "ROC curves" not in page.text
    assert "Best hits" not in page.text
    assert f"{evaluations[0].rows[0].metrics['auroc'].value:.3f}" in page.text


def test_a_report_from_files_is_the_report_from_memory(evaluations, html, tmp_path):
    save_evaluations(tmp_path / "results.jsonl", evaluations)
    loaded = load_evaluations(tmp_path / "results.jsonl")
    path = write_report(loaded, tmp_path / "out" / "report.html", title="Tiles & more")
    assert path.read_text() == html


def test_what_cannot_be_reported_is_said(evaluations, tmp_path):
    with pytest.raises(ConfigError, match="at least one evaluation"):
        write_report([], tmp_path / "r.html")
    with pytest.raises(ConfigError, match="main is 'vit'; the results hold unet/denoising_error, ocsvm, copod"):
        write_report(evaluations, tmp_path / "r.html", main="vit")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        write_report(evaluations, tmp_path / "file" / "r.html")


def test_figures_take_the_pages_ink_and_keep_apart_their_ids(evaluations):
    groups = tables.group(evaluations)["digits (3)"]
    looks = figures.styles([group.detector for group in groups], "unet/denoising_error")
    assert len({(look.colour, look.dashes) for look in looks.values()}) == 3
    svg = figures.roc_figure(groups, looks, "a")
    assert svg.startswith("<svg")
    assert "currentColor" in svg
    assert figures.INK not in svg
    assert all(name.startswith("a-") for name in re.findall(r'\bid="([^"]*)"', svg))
    assert all(name.startswith("a-") for name in re.findall(r"url\(#([^)]*)\)", svg))
    assert ">False-positive rate<" in svg


def test_a_histogram_survives_equal_scores_and_a_threshold_far_away():
    predictions = make().predictions
    same = Predictions(*(vars(predictions) | {"scores": np.zeros(60)}).values())
    assert "threshold 50" in figures.histogram_figure(predictions, 50.0, "h")
    assert figures.histogram_figure(same, 0.0, "h").startswith("<svg")
