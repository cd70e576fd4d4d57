"""Rows and predictions survive the way through files; what is broken is named."""

import json

import numpy as np
import pytest

from raydiff.core.metrics import Estimate, image_metrics, paired_differences
from raydiff.errors import DataError, StorageError
from raydiff.results import (
    Evaluation,
    Picture,
    Predictions,
    Result,
    append_results,
    compare,
    latest,
    load_evaluations,
    read_results,
    run_id,
    save_evaluations,
)


def make(
    detector="unet/denoising_error", *, seed=0, dataset="digits (3)", shift=1.0, ids=None, settings="first"
) -> Evaluation:
    """An evaluation of 30 images with scores drawn at random."""
    rng = np.random.default_rng([seed, len(detector)])
    labels = np.arange(30) % 3 == 0
    scores = rng.normal(size=30) + shift * labels
    predictions = Predictions(
        ids or [f"{i:03d}" for i in range(30)], ["crack" if label else "good" for label in labels], labels, scores,
        rng.random(30), scores > 0.5,
    )  # fmt: skip
    row = Result(
        run=run_id(detector, dataset, seed, settings), detector=detector, dataset=dataset, seed=seed, subset="all",
        subset_kind="all", num_normal=20, num_anomalous=10, metrics=image_metrics(scores, labels, num_draws=20),
        threshold=0.5, target_fpr=0.05, realised_fpr=Estimate(0.1, 0.0, 0.2), realised_tpr=Estimate(0.8, 0.7, 0.9),
        num_evaluations=8 if "/" in detector else None, ms_per_image_alone=2.5, ms_per_image=0.4, batch_size=64,
        device="cpu", hardware="a processor", versions={"python": "3.11"}, commit=None, command=None,
        created="2026-01-01T00:00:00+00:00", config_digest="c0ffee", artifact_digest=None, data_digest="da7a",
        config={"seed": seed},
    )  # fmt: skip
    pictures = [
        Picture("miss", 3, b"\x89PNG3", b"rebuilt", None, b"mask"), Picture("hit", 0, b"\x89PNG0", None, b"heat", None),
    ]  # fmt: skip
    crack = row.model_copy(update={"subset": "crack", "subset_kind": "defect", "config": None})
    return Evaluation([row, crack], predictions, pictures)


def test_evaluations_come_back_as_they_were(tmp_path):
    path = tmp_path / "out" / "results.jsonl"
    saved = [make(), make("ocsvm")]
    save_evaluations(path, saved)
    loaded = load_evaluations(path)
    assert [e.rows for e in loaded] == [e.rows for e in saved]
    for ours, theirs in zip(saved, loaded, strict=True):
        assert (ours.predictions.ids, ours.predictions.defects) == (theirs.predictions.ids, theirs.predictions.defects)
        for column in ("labels", "scores", "p_values", "verdicts"):
            before, after = getattr(ours.predictions, column), getattr(theirs.predictions, column)
            assert np.array_equal(before, after)
            assert before.dtype == after.dtype
        assert [vars(p) for p in theirs.pictures] == [vars(p) for p in ours.pictures]


def test_a_run_evaluated_again_replaces_itself(tmp_path):
    path = tmp_path / "results.jsonl"
    save_evaluations(path, [make(), make("ocsvm")])
    changed = make()
    changed.rows[0] = changed.rows[0].model_copy(update={"threshold": 9.0})
    save_evaluations(path, [changed])
    assert len(path.read_text().splitlines()) == 6
    assert {e.rows[0].detector: e.rows[0].threshold for e in load_evaluations(path)} == {
        "unet/denoising_error": 9.0, "ocsvm": 0.5,
    }  # fmt: skip
    assert {e.superseded for e in load_evaluations(path)} == {0}  # the same run, not another


def test_of_runs_with_one_seed_only_the_last_is_read(tmp_path):
    path = tmp_path / "results.jsonl"
    runs = [make(), make("ocsvm"), make(seed=1), make(settings="second"), make(settings="third")]
    save_evaluations(path, runs)
    (tmp_path / "predictions" / f"{runs[0].rows[0].run}.parquet").write_bytes(b"nobody reads it")
    found = {(e.rows[0].detector, e.rows[0].seed): (e.rows[0].run, e.superseded) for e in load_evaluations(path)}
    assert found == {
        ("ocsvm", 0): (runs[1].rows[0].run, 0),
        ("unet/denoising_error", 1): (runs[2].rows[0].run, 0),
        ("unet/denoising_error", 0): (runs[4].rows[0].run, 2),
    }
    assert read_results(path) == [row for i in (1, 2, 4) for row in runs[i].rows]
    assert [e.superseded for e in latest(load_evaluations(path))] == [0, 0, 2]
    save_evaluations(path, [runs[3]])  # an old run, evaluated again, is the last
    assert load_evaluations(path)[-1].rows[0].run == runs[3].rows[0].run


def test_rows_of_before_trained_on_was_kept_are_read(tmp_path):
    path = tmp_path / "results.jsonl"
    append_results(path, make().rows)
    path.write_text(path.read_text().replace('"trained_on":null,', ""))
    assert read_results(path)[0].trained_on is None


def test_a_run_without_its_row_of_all_was_cut_off(tmp_path):
    path = tmp_path / "results.jsonl"
    save_evaluations(path, [make()])
    append_results(path, make(settings="second").rows[1:])  # what a full disk let through
    assert read_results(path) == [make().rows[0], make().rows[1]]
    assert load_evaluations(path)[0].superseded == 0
    append_results(tmp_path / "cut.jsonl", make().rows[1:])
    with pytest.raises(DataError, match="holds no results"):
        read_results(tmp_path / "cut.jsonl")


def test_separators_of_unicode_end_no_line(tmp_path):
    odd = make(detector="a\u2028b\u2029c\x85d")
    save_evaluations(tmp_path / "results.jsonl", [odd])
    assert read_results(tmp_path / "results.jsonl") == odd.rows


def test_rows_alone_are_enough_to_load(tmp_path):
    append_results(tmp_path / "results.jsonl", make().rows)
    loaded = load_evaluations(tmp_path / "results.jsonl")
    assert loaded[0].predictions is None
    assert loaded[0].pictures == []
    assert repr(loaded[0]).startswith("Evaluation(unet/denoising_error on digits (3), seed 0: AUROC 0.")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda line: line[: len(line) // 2], r"line 2: is no result row \(Invalid JSON"),
        (lambda line: line.replace('"seed":0', '"seed":"zero"'), r"line 2: is no result row \(seed: .*integer"),
        (lambda line: line.replace('"seed":0', '"speed":0'), r"line 2: is no result row .*; remove the line or"),
        (lambda line: line.replace('"threshold":0.5', '"threshold":NaN'), "line 2: is no result row"),
    ],
)
def test_a_broken_line_is_named(tmp_path, damage, message):
    path = tmp_path / "results.jsonl"
    append_results(path, make().rows)
    lines = path.read_text().splitlines()
    path.write_text(lines[0] + "\n" + damage(lines[1]) + "\n")
    with pytest.raises(DataError, match=message) as caught:
        read_results(path)
    assert "\n" not in str(caught.value)


def test_missing_empty_and_binary_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read \(No such file"):
        read_results(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no results; run raydiff evaluate"):
        read_results(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        read_results(tmp_path / "binary.jsonl")


def test_damaged_predictions_are_named(tmp_path):
    path = tmp_path / "results.jsonl"
    save_evaluations(path, [make()])
    sidecar = next((tmp_path / "predictions").iterdir())
    sidecar.write_bytes(sidecar.read_bytes()[:50])
    with pytest.raises(DataError, match=rf"{sidecar.name}: is no file of predictions .*; evaluate the run again"):
        load_evaluations(path)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for call in (
        lambda: append_results(tmp_path / "file" / "results.jsonl", make().rows),
        lambda: save_evaluations(tmp_path / "file" / "results.jsonl", [make()]),
    ):
        with pytest.raises(StorageError, match="cannot be written"):
            call()


def test_every_line_is_plain_json(tmp_path):
    append_results(tmp_path / "results.jsonl", make().rows)
    line = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[0])
    assert line["metrics"]["auroc"].keys() == {"value", "low", "high"}


def test_compare_takes_the_best_classic_of_each_data_set_and_seed():
    evaluations = [
        make(seed=0), make("ocsvm", seed=0, shift=0.2), make("copod", seed=0, shift=3.0), make("knn", seed=0),
        make(seed=1), make("ocsvm", seed=1), make(dataset="alone"),
    ]  # fmt: skip
    found = [c for c in compare(evaluations, num_draws=30) if c.metric == "auroc"]
    assert [(c.detector, c.reference, c.seed) for c in found] == [
        ("unet/denoising_error", "copod", 0), ("knn", "copod", 0), ("unet/denoising_error", "ocsvm", 1),
    ]  # fmt: skip
    ours, theirs = evaluations[0].predictions, evaluations[2].predictions
    expected = paired_differences(ours.scores, theirs.scores, ours.labels, num_draws=30)
    assert found[0].difference == expected["auroc"]


def test_compare_takes_one_run_of_each_seed():
    later = make(settings="second", shift=3.0)
    assert compare([make(), make("ocsvm"), later], num_draws=10) == compare([make("ocsvm"), later], num_draws=10)


def test_compare_pairs_by_id_and_skips_other_images():
    ordered = make("ocsvm")
    p = ordered.predictions
    turned = Predictions(p.ids[::-1], p.defects[::-1], p.labels[::-1], p.scores[::-1], p.p_values, p.verdicts)
    direct = compare([make(), ordered], num_draws=10)
    assert compare([make(), Evaluation(ordered.rows, turned, [])], num_draws=10) == direct
    assert compare([make(), make("ocsvm", ids=[f"x{i}" for i in range(30)])]) == []
