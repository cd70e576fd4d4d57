"""A detector beside the classic ones: every one measured on the same images, saved, and in the table."""

from raydiff.comparison import BASELINES, RESULTS, compare, table
from raydiff.detector import load_detector
from raydiff.results import load_evaluations


def test_compare_measures_saves_and_tabulates(detector, digit_shards, tmp_path):
    said = []

    def progress(what):
        return lambda done, total: said.append((what, done, total))

    evaluations = compare(
        detector, digit_shards, tmp_path, baselines_from=digit_shards, command="raydiff test", progress=progress
    )
    names = [detector.name, *BASELINES]
    assert [evaluation.rows[0].detector for evaluation in evaluations] == names
    assert [e.rows[0].detector for e in load_evaluations(tmp_path / RESULTS)] == names
    count = digit_shards.count("test")
    assert {what for what, done, total in said if done == total == count} == {f"scored {name}" for name in names}
    for name, evaluation in zip(BASELINES, evaluations[1:], strict=True):
        saved = load_detector(tmp_path / "baselines" / name)
        assert saved.artifact_digest == evaluation.rows[0].artifact_digest
        assert evaluation.rows[0].command == "raydiff test"

    _, title, head, *lines, _ = table(evaluations).split("\n")
    assert title.startswith("digits (0): 60 normal and 542 anomalous")
    assert [line.split()[0] for line in (head, *lines)] == ["detector", *names]
    auroc = evaluations[2].rows[0].metrics["auroc"]
    assert f"{auroc.value:.3f} [{auroc.low:.3f}, {auroc.high:.3f}]" in lines[2]


def test_without_baselines_there_are_none(detector, digit_shards, tmp_path):
    (only,) = compare(
        detector,
        digit_shards,
        tmp_path,
        baselines_from=None,
        command="",
        progress=lambda what: lambda done, total: None,
    )
    assert only.rows[0].detector == detector.name
    assert not (tmp_path / "baselines").exists()
