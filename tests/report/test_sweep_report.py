"""The report of a sweep says what its rows say: what matters, what does not, what survives; and stands alone."""

import csv
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from raydiff.errors import ConfigError
from raydiff.report import Importance, write_sweep_report
from raydiff.report.sweep_data import read_sweep
from raydiff.report.sweep_figures import loss_figure
from raydiff.report.sweep_rates import rates
from raydiff.report.sweep_statistics import curves, front, grids, loss_rank, paired, spreads
from raydiff.report.sweep_words import matters
from raydiff.search_space import SearchSpace
from raydiff.sweep_records import (
    Final,
    Refit,
    Setting,
    StepLoss,
    TrainingRow,
    append_settings,
    append_trainings,
    write_final,
)

SCHEDULES = {"linear": 0.0, "scaled_linear": 0.02, "sigmoid": 0.06, "squaredcos_cap_v2": 0.10}
SPACE = {
    "title": "Noise schedules on a formula",
    "parameters": {
        "schedule.beta_schedule": {"choices": list(SCHEDULES)},
        "schedule.num_train_timesteps": {"int": [50, 1000], "log": True},
        "schedule.beta_end": {
            "float": [1e-3, 1e-1],
            "log": True,
            "when": {"schedule.beta_schedule": ["linear", "scaled_linear"]},
        },
        "training.weight_decay": {"float": [0.0, 0.1]},
        "scoring.start": {"float": [0.05, 0.5]},
        "scoring.num_inference_steps": {"int": [1, 16], "log": True},
        "scoring.pooling": {"choices": ["mean", "max", "top_k"]},
        "calibration.target_fpr": {"choices": [0.01, 0.05, 0.1]},
    },
    "trials": 40,
    "seeds": [0, 1],
    "refit_seeds": [100, 101, 102],
}
NO_EFFECT = "training.weight_decay"


def noise_of(seed, *more):
    return float(np.random.default_rng([seed, *more]).normal())


def auroc(params, seed, run):
    """The schedule's family matters most, then where scoring starts; weight decay not at all."""
    value = 0.80 + SCHEDULES[params["schedule.beta_schedule"]]
    value += 0.01 * math.log10(params["schedule.num_train_timesteps"] / 50)
    value -= 0.25 * (params["scoring.start"] - 0.2) ** 2 / 0.3**2 * 0.15
    value += {"mean": 0.0, "max": 0.004, "top_k": 0.008}[params["scoring.pooling"]]
    value += 0.002 * math.log2(params["scoring.num_inference_steps"])
    return value + 0.004 * noise_of(seed, run)


def drawn(rng, paths):
    every = {
        "schedule.beta_schedule": str(rng.choice(list(SCHEDULES))),
        "schedule.num_train_timesteps": round(50 * 20 ** rng.random()),
        "schedule.beta_end": 1e-3 * 100 ** rng.random(),
        "training.weight_decay": 0.1 * rng.random(),
        "scoring.start": 0.05 + 0.45 * rng.random(),
        "scoring.num_inference_steps": round(16 ** rng.random()),
        "scoring.pooling": str(rng.choice(["mean", "max", "top_k"])),
        "calibration.target_fpr": float(rng.choice([0.01, 0.05, 0.1])),
    }
    params = {path: every[path] for path in paths}
    if params.get("schedule.beta_schedule") not in ("linear", "scaled_linear", None):
        params.pop("schedule.beta_end", None)
    return params


def measured(params, seed, run):
    target = params["calibration.target_fpr"]
    return {
        "selection_auroc": auroc(params, seed, run),
        "nfe": float(params["scoring.num_inference_steps"]),
        "realised_fpr": round(200 * target * (1 + 0.2 * noise_of(seed, run, 1))) / 200,
        "detection_rate": min(1.0, 0.3 + 2 * target),
    }


def setting(params, run, seeds, **more):
    by_seed = {seed: measured(params, seed, run) for seed in seeds}
    means = {name: float(np.mean([v[name] for v in by_seed.values()])) for name in by_seed[seeds[0]]}
    more = {"phase": "search", "trial": run, "training": f"key{run:03d}"} | more
    return Setting(params=params, values=means, by_seed=by_seed, num_normal=200,
                   target_fpr=params["calibration.target_fpr"], **more)  # fmt: skip


def training(params, run, seed, state="complete", **more):
    quality = SCHEDULES[params["schedule.beta_schedule"]]
    steps = tuple(
        StepLoss(
            t,
            6 - 14 * t,
            0.05 + 0.4 * (1 - t),
            (0.01 + 0.5 * t) * (1.5 - 4 * quality) * math.exp(0.1 * noise_of(seed, run, 3)),
        )
        for t in np.linspace(0.02, 0.98, 13).tolist()
    )
    row = {"key": f"key{run:03d}", "phase": "search", "trial": run, "params": params, "seed": seed, "state": state,
           "seconds": 20.0 + run % 5, "steps": 300, "loss": 0.3 - quality + 0.02 * noise_of(seed, run, 2),
           "trial_seconds": 23.0, "by_step": steps if state == "complete" else ()} | more  # fmt: skip
    return TrainingRow(**row)


def make_sweep(out, space, *, trials=40, each=20, final=True, around=True):
    """Rows of a whole sweep: some trainings pruned, one failed and one failed and then repeated."""
    rng = np.random.default_rng(0)
    weights, rest = space.paths(("training",)), space.paths(("evidence", "judgement"))
    trainings, settings = [], []
    for run in range(trials):
        params = drawn(rng, weights)
        state = "failed" if run == 7 else "pruned" if run % 9 == 5 else "complete"
        failure = "Traceback ...\nTrainingError: the loss is nan at step 12" if state == "failed" else ""
        if run == 3:
            trainings.append(training(params, run, 0, "failed", failure="Traceback ...\nOSError: gone", loss=None))
        trainings += [training(params, run, seed, state, failure=failure) for seed in space.seeds]
        if state == "complete":
            settings += [setting(params | drawn(rng, rest), run, list(space.seeds)) for _ in range(each)]
    best = max(settings, key=lambda row: row.values["selection_auroc"])
    if around:
        settings += make_around(space, best.params)
    append_trainings(out, trainings)
    append_settings(out, settings)
    if final:
        write_final(out, make_final(best, len(settings)))


def make_around(space, best):
    more = {"phase": "around", "trial": None, "training": "around"}
    rows = [setting(best, 900, [0, 1, 2], **more)]
    for path in best:
        parameter = space.parameters[path]
        values = parameter.choices or tuple(np.geomspace(*parameter.range, 5) if parameter.log
                                            else np.linspace(*parameter.range, 5))  # fmt: skip
        values = [round(v) if parameter.int else v if parameter.choices else float(v) for v in values]
        rows += [setting({**best, path: value}, 901 if parameter.choices else 902 + i, [0, 1, 2], varied=path, **more)
                 for i, value in enumerate(values) if value != best[path]]  # fmt: skip
    return rows


def make_final(best, num_settings):
    def refit(seed, shift):
        targets = (0.01, 0.05, 0.1)
        rates = tuple({"target_fpr": t, "realised_fpr": 1.6 * t, "realised_tpr": 0.25 + 2 * t} for t in targets)
        value = 0.88 + shift + 0.005 * noise_of(seed)
        test = {"auroc": value - 0.05, "average_precision": value, "realised_fpr": 0.08, "realised_tpr": 0.5,
                "target_fpr": 0.05, "num_test_normal": 150.0, "num_test_anomalous": 90.0}  # fmt: skip
        return Refit(seed, {"selection_auroc": value}, test, rates)

    return Final(best.params, best.values, tuple(refit(seed, 0.015) for seed in (100, 101, 102)),
                 tuple(refit(seed, 0.0) for seed in (100, 101, 102)), 40, num_settings, {"trial": 12})  # fmt: skip


@pytest.fixture(scope="module")
def space():
    return SearchSpace(**SPACE)


@pytest.fixture(scope="module")
def out(tmp_path_factory, space):
    folder = tmp_path_factory.mktemp("sweep")
    make_sweep(folder, space)
    return folder


@pytest.fixture(scope="module")
def sweep(space, out):
    return read_sweep(space, out)


def importance(path, value, low, high, *, is_clear, evaluator="fanova"):
    return Importance(path, evaluator, value, low, high, 0.02, is_clear, 700, 35)


IMPORTANCES = [
    importance("schedule.beta_schedule", 0.9, 0.8, 0.95, is_clear=True),
    importance("scoring.start", 0.06, 0.04, 0.08, is_clear=True),
    importance("scoring.pooling", 0.002, 0.001, 0.003, is_clear=True),
    importance("schedule.beta_end", 0.001, 0.0, 0.01, is_clear=False),
    importance(NO_EFFECT, 0.001, 0.0, 0.01, is_clear=False),
]


class Page(HTMLParser):
    """The page's words, and that tags close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "img", "br", "wbr"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self):
        return re.sub(r"\s+", " ", "".join(self.text))


@pytest.fixture(scope="module")
def report(space, out, tmp_path_factory):
    return write_sweep_report(space, out, tmp_path_factory.mktemp("page") / "report.html", IMPORTANCES)


@pytest.fixture(scope="module")
def page(report):
    return Page(report.read_text(encoding="utf-8"))


def rows_of(report, name):
    with (report.parent / "tables" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_stands_alone_and_its_parts_are_named_once(page, report):
    text = report.read_text(encoding="utf-8")
    assert "http" not in text
    assert "<script" not in text
    assert "mathdefault" not in text
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = {attrs["href"][1:] for tag, attrs in page.tags if tag == "a"}
    assert links <= set(ids)


def test_the_sections_come_in_the_order_of_the_questions(page):
    anchors = ["survival", "importance", "curves", "interactions", "schedule", "thresholds", "course", "tables"]
    ids = [attrs["id"] for tag, attrs in page.tags if tag == "h2" and "id" in attrs]
    assert [each for each in ids if each in anchors] == anchors


def test_the_words_name_what_matters_and_what_does_not(page):
    assert "schedule.beta_schedule matters most: fANOVA gives it 0.90 of the variance" in page.words
    assert "its interval is clear of all others" in page.words
    assert f"{NO_EFFECT} does not matter here" in page.words
    assert "scoring.start (0.06) matters too" in page.words
    assert "scoring.pooling is told from chance, but gives less than 1 %" in page.words


def test_a_rival_within_the_interval_is_named(sweep):
    close = [importance("schedule.beta_schedule", 0.5, 0.3, 0.7, is_clear=True),
             importance("scoring.start", 0.4, 0.2, 0.6, is_clear=True)]  # fmt: skip
    assert "its interval overlaps that of scoring.start" in " ".join(matters(sweep, close, [], []))


def test_the_words_count_what_was_spared_and_stopped(page):
    assert "700 settings of 35 trainings" in page.words
    assert "the second level spared 665 (20 settings per training)" in page.words
    assert "Of 40 trainings, 4 were pruned and 1 was marked failed." in page.words
    assert "TrainingError: the loss is nan at step 12" in page.words
    assert "OSError: gone" not in page.words  # it was trained again


def test_the_words_say_what_is_left_of_the_gain(page, sweep):
    promised, start = sweep.final.promised["selection_auroc"], 0.88
    assert f"The search promised {promised:.3f} of its winner" in page.words
    share = 1.5 / (100 * (promised - start))
    said = int(re.search(r"1\.5 survive \((\d+) %; paired 95 % interval 1\.5 to 1\.5\)", page.words).group(1))
    assert said == pytest.approx(100 * share, abs=8)
    assert "so the winner is better" in page.words


def test_every_table_has_its_file_and_settings_have_every_row(report, sweep, page):
    named = set(re.findall(r"tables/([a-z0-9-]+)\.csv", report.read_text(encoding="utf-8")))
    written = {path.stem for path in (report.parent / "tables").glob("*.csv")}
    assert named <= written
    assert len(rows_of(report, "settings")) == len(sweep.settings)
    assert len(rows_of(report, "trainings")) == 80


def test_the_same_records_give_the_same_page(space, tmp_path):
    make_sweep(tmp_path, space, trials=8, each=2, final=False, around=False)
    pages = [write_sweep_report(space, tmp_path, tmp_path / name, IMPORTANCES).read_bytes() for name in "ab"]
    assert pages[0] == pages[1]


def test_names_and_values_are_text_not_markup(tmp_path):
    space = SearchSpace(
        title="<b>$x$ & co</b>",
        parameters={"schedule.beta_schedule": {"choices": ["<i>a$b$</i>", "b"]}, "scoring.start": {"float": [0, 1]}},
        around=None,
    )
    rng = np.random.default_rng(0)
    append_settings(tmp_path, [
        Setting("search", i, f"k{i}", {"schedule.beta_schedule": "<i>a$b$</i>" if i % 2 else "b",
                                       "scoring.start": float(rng.random())},
                {"selection_auroc": float(rng.random())}, {0: {}}, 10, 0.05)
        for i in range(8)
    ])  # fmt: skip
    text = write_sweep_report(space, tmp_path, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<i>" not in text
    assert "<b>$" not in text
    assert "a$b$" in text


def test_a_report_of_nothing_is_refused(space, tmp_path):
    with pytest.raises(ConfigError, match="run raydiff sweep first"):
        write_sweep_report(space, tmp_path, tmp_path / "report.html")


def test_sections_without_data_say_so(space, tmp_path):
    make_sweep(tmp_path, space, trials=3, each=2, final=False, around=False)
    words = Page(write_sweep_report(space, tmp_path, tmp_path / "report.html").read_text()).words
    assert "No curves around the best point were measured." in words
    assert "The winner was not refitted with fresh seeds" in words
    assert "too few for importances" in words


def test_a_sweep_whose_trainings_all_failed_still_has_a_page(space, tmp_path):
    params = {"schedule.beta_schedule": "linear"}
    append_trainings(tmp_path, [training(params, run, 0, "failed", failure="nan") for run in range(3)])
    words = Page(write_sweep_report(space, tmp_path, tmp_path / "report.html").read_text()).words
    assert "No training has a value yet." in words
    assert "Of 3 trainings, 3 were marked failed." in words


def test_a_space_without_training_parameters_is_one_training(tmp_path):
    parameters = {path: SPACE["parameters"][path] for path in ("scoring.start", "scoring.pooling")}
    space = SearchSpace(parameters=parameters)
    rng = np.random.default_rng(0)
    rows = [Setting("search", 0, "only", {"scoring.start": float(x), "scoring.pooling": "max"},
                    {"selection_auroc": 0.5 + 0.4 * float(x)}, {0: {"selection_auroc": 0.5}}, 50, 0.05)
            for x in 0.05 + 0.4 * rng.random(60)]  # fmt: skip
    append_settings(tmp_path, rows)
    words = Page(write_sweep_report(space, tmp_path, tmp_path / "report.html").read_text()).words
    assert "Setting, in the order measured" in words
    assert "none of which changes the weights; 60 settings of 1 training" in words
    assert "spared 59" in words


def test_with_thousands_of_settings_the_page_stays_small(space, tmp_path):
    make_sweep(tmp_path, SearchSpace(**SPACE | {"objectives": ["selection_auroc", "nfe"]}), trials=60, each=100)
    many = SearchSpace(**SPACE | {"objectives": ["selection_auroc", "nfe"]})
    path = write_sweep_report(many, tmp_path, tmp_path / "report.html", IMPORTANCES)
    assert len(read_sweep(many, tmp_path).settings) > 5000
    assert path.stat().st_size < 3_000_000


def test_a_curve_within_much_noise_is_not_called_flat(sweep):
    """Two seeds that differ a lot: no effect is seen, and none is denied."""
    rng = np.random.default_rng(0)
    rows = [
        Setting("around", None, "a", {"scoring.start": start}, {"selection_auroc": 0.5},
                {seed: {"selection_auroc": 0.5 + 0.2 * float(rng.random())} for seed in (0, 1)}, 10, 0.05,
                varied="scoring.start")
        for start in (0.1, 0.2, 0.3)
    ]  # fmt: skip
    noisy = type(sweep)(sweep.space, tuple(rows), (), None)
    said = " ".join(matters(noisy, [], curves(noisy), []))
    assert "Of scoring.start nothing can be said" in said
    assert "not matter" not in said


def test_a_conditional_parameter_leads_only_where_no_other_is_clear(sweep):
    """Its share is one of the variance among the settings that have it, so the two cannot be compared."""
    both = [importance("schedule.beta_end", 0.9, 0.8, 0.95, is_clear=True),
            importance("schedule.beta_schedule", 0.5, 0.4, 0.6, is_clear=True)]  # fmt: skip
    said = " ".join(matters(sweep, both, [], []))
    assert "schedule.beta_schedule matters most" in said
    assert "schedule.beta_end (0.90, where it applies) matters too" in said
    assert "among the settings that have it" in " ".join(matters(sweep, both[:1], [], []))


def test_importances_of_scoring_alone_are_not_taken_for_all(sweep):
    only = [importance("scoring.start", 0.9, 0.8, 0.95, is_clear=True)]
    assert "too few trainings to say what weights do" in " ".join(matters(sweep, only, [], []))


# --- what the numbers support -----------------------------------------------------------------------------------------


def test_the_spread_finds_the_effect_and_no_other(sweep):
    found = spreads(sweep)
    assert found[0].path == "schedule.beta_schedule"
    assert found[0].is_clear
    assert found[0].value == pytest.approx(0.1, abs=0.01)
    assert not next(spread for spread in found if spread.path == NO_EFFECT).is_clear


def test_curves_beyond_seed_noise_are_told_from_flat_ones(sweep):
    by_path = {curve.axis.path: curve for curve in curves(sweep)}
    assert by_path["schedule.beta_schedule"].is_clear
    assert not by_path[NO_EFFECT].is_clear
    centre = [point.value for point in by_path["scoring.start"].points if point.is_best_point]
    assert centre == [sweep.best.params["scoring.start"]]
    assert set(by_path) == set(sweep.best.params)


def test_noise_that_all_values_share_is_no_noise(sweep):
    """A seed that is worse everywhere says nothing of a parameter."""
    rows = [
        Setting("around", None, "a", {"scoring.start": start}, {"selection_auroc": 0.0},
                {seed: {"selection_auroc": 0.5 + 0.1 * seed + 0.02 * start} for seed in range(3)}, 10, 0.05,
                varied="scoring.start")
        for start in (0.1, 0.2, 0.3)
    ]  # fmt: skip
    one = type(sweep)(sweep.space, tuple(rows), (), None)
    (curve,) = curves(one)
    assert curve.noise == pytest.approx(0.0, abs=1e-9)
    assert curve.is_clear


def test_one_seed_gives_no_verdict_on_a_curve(sweep):
    rows = [Setting("around", None, "a", {"scoring.start": start}, {"selection_auroc": start},
                    {0: {"selection_auroc": start}}, 10, 0.05, varied="scoring.start")
            for start in (0.1, 0.3)]  # fmt: skip
    (curve,) = curves(type(sweep)(sweep.space, tuple(rows), (), None))
    assert curve.noise is None
    assert not curve.is_clear


def test_cells_of_a_grid_hold_their_mean_and_count(sweep):
    (grid,) = grids(sweep, ["schedule.beta_schedule", "scoring.pooling"])
    rows = [row for row in sweep.search if row.params["schedule.beta_schedule"] == "sigmoid"
            and row.params["scoring.pooling"] == "max"]  # fmt: skip
    at = grid.down.bins.index("max"), grid.across.bins.index("sigmoid")
    assert grid.counts[at] == len(rows)
    assert grid.counts.sum() == len(sweep.search)
    assert grid.means[at] == pytest.approx(np.mean([row.values["selection_auroc"] for row in rows]))


def test_the_loss_is_called_a_proxy_only_where_it_is_one(sweep):
    estimate, number = loss_rank(sweep)
    assert number == 35
    assert estimate.value < -0.7
    assert estimate.high < 0


def test_losses_over_a_wide_range_have_plain_numbers_on_their_axis(sweep):
    wide = tuple(replace(row, loss=0.01 * 1.1**i) for i, row in enumerate(sweep.trainings))
    drawn = loss_figure(replace(sweep, trainings=wide), "loss")
    assert "mathdefault" not in drawn
    assert ">0.05<" in drawn


def test_the_front_is_what_no_other_setting_beats(sweep):
    space = SearchSpace(**SPACE | {"objectives": ["selection_auroc", "nfe"]})
    found = front(type(sweep)(space, sweep.settings, sweep.trainings, None))
    every = [(row.values["selection_auroc"], -row.values["nfe"]) for row in sweep.search]
    best = {a for a in every if not any(b[0] >= a[0] and b[1] >= a[1] and b != a for b in every)}
    assert {(row.values["selection_auroc"], -row.values["nfe"]) for row in found.members} == best
    assert len(found.members) + len(found.others) == len(every)


def test_stopped_trainings_are_neither_best_nor_on_the_front(sweep):
    stopped = next(row for row in sweep.trainings if row.state == "pruned")
    perfect = Setting("search", stopped.trial, stopped.key, dict(sweep.best.params),
                      {"selection_auroc": 1.0, "nfe": 0.0}, {0: {}}, 10, 0.05)  # fmt: skip
    space = SearchSpace(**SPACE | {"objectives": ["selection_auroc", "nfe"]})
    with_it = type(sweep)(space, (*sweep.settings, perfect), sweep.trainings, None)
    assert with_it.best.params == sweep.best.params
    assert perfect not in front(with_it).members


def test_rates_have_binomial_intervals_of_one_split(sweep):
    found = rates(sweep)
    assert [rate.target for rate in found if rate.split == "test"] == [0.01, 0.05, 0.1]
    tenth = next(rate for rate in found if rate.split == "test" and rate.target == 0.1)
    assert (tenth.fpr.value, tenth.num_normal, tenth.num_seeds) == (pytest.approx(0.16), 150, 3)
    assert not tenth.holds
    assert tenth.fpr.low == pytest.approx(0.1053, abs=1e-3)
    assert {rate.target for rate in found if rate.split == "selection"} == {0.01, 0.05, 0.1}


def test_differences_are_paired_by_seed():
    winner = [Refit(seed, {"a": 0.1 * seed + 0.05}, {}) for seed in (1, 2, 3)]
    start = [Refit(seed, {"a": 0.1 * seed}, {}) for seed in (3, 2, 1)]
    found = paired(winner, start, "selection", "a")
    assert (found.mean, found.low, found.high) == (pytest.approx(0.05),) * 3
    assert paired(winner[:1], start[:1], "selection", "a") is None


def test_minimised_objectives_are_read_the_other_way_round(sweep):
    space = SearchSpace(**SPACE | {"objectives": ["nfe"]})
    other = type(sweep)(space, sweep.settings, sweep.trainings, None)
    assert other.best.values["nfe"] == min(row.values["nfe"] for row in sweep.search)
