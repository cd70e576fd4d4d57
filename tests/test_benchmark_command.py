"""The table at the end of a benchmark: the report's own figures, and what is missing of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from raydiff.benchmark_command import table, write_report
from raydiff.experiment import ARTIFACT
from raydiff.plan import Cell, Plan, plan
from raydiff.report.benchmark_data import Benchmark
from raydiff.results import Evaluation, save_evaluations
from tests.report.conftest import make_cell, read_table
from tests.test_suite import TINY, write


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Two digits, two seeds; OCSVM has one of them."""
    methods = {name: dict(method) for name, method in TINY["methods"].items()}
    methods["OCSVM"]["seeds"] = [0]
    written = TINY | {"seeds": [0, 1], "methods": methods}
    return plan(write(tmp_path_factory.mktemp("suite") / "suite.yaml", written))


def measured(suite: Plan, wanted: Callable[[Cell], bool]) -> list[Evaluation]:
    """Digit 1 is easy and digit 0 hard, so a mean over one of them is another mean."""
    return [
        make_cell(c.method, c.dataset, c.category, c.seed, shift=3.0 if c.category == "1" else 0.5, cell=c.cell_id,
                  noise=1, artifact_digest=None)
        for c in suite.cells if wanted(c)
    ]  # fmt: skip


def line_of(text: str, method: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(method + "  "))


def test_the_figures_are_the_reports_and_say_what_is_missing(suite: Plan) -> None:
    found = measured(suite, lambda c: not (c.method == "near" and c.category == "0" and c.seed == 1))
    text, arranged = table(suite, found), Benchmark(found)
    name = suite.cells[0].dataset
    near, ocsvm = (arranged.score(name, method) for method in ("near", "OCSVM"))
    assert near is not None
    assert ocsvm is not None
    assert f"{near.mean:.3f} (3 of 4 cells)" in line_of(text, "near")
    assert line_of(text, "OCSVM").split()[1:] == [f"{ocsvm.mean:.3f}"]  # one seed is all it has
    assert f"{len(found)} of {len(suite.cells)} cells" in text


def test_a_part_of_the_suite_is_held_against_the_whole(suite: Plan) -> None:
    part = suite.only("OCSVM/*/1/*")
    text = table(part, measured(part, lambda _: True))
    assert "(1 of 2 cells)" in line_of(text, "OCSVM")
    assert line_of(text, "near").split()[1:] == ["-"]


def test_nothing_measured_is_no_table_of_errors(suite: Plan) -> None:
    assert line_of(table(suite, []), "OCSVM").split()[1:] == ["-"]


def test_the_report_knows_the_plan_and_guesses_no_classic(suite: Plan, tmp_path: Path) -> None:
    found = measured(suite, lambda c: c.method == "near" and c.category == "1")
    save_evaluations(tmp_path / "results.jsonl", found)
    for evaluation in found:
        folder = tmp_path / "cells" / str(evaluation.rows[0].cell) / ARTIFACT
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()  # the report asks no more of an artefact than that it is there
    written = write_report(suite, tmp_path)
    assert written is not None
    html = written[1].read_text()
    assert f"{len(found)} of {len(suite.cells)} planned cells are measured" in html
    assert "there is no classic method to hold them against" in html
    (row,) = read_table(written[1], "overview-auroc").values()
    assert row["digits measured"] == "2 of 4 cells"
