"""Tables of cost, its growth with resolution, and robustness."""

import pytest

from raydiff.report import benchmark_costs as costs
from raydiff.report.benchmark_data import Benchmark


@pytest.fixture(scope="module")
def evaluations(benchmark_cells):
    return benchmark_cells


@pytest.fixture(scope="module")
def report(benchmark_report):
    return benchmark_report


def test_cost_grows_by_the_power_it_was_made_with(evaluations, report, cell, read):
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


def test_rows_of_several_machines_are_kept_apart(cell):
    runs = [cell("ocsvm", seed=0, training_seconds=1.0), cell("ocsvm", seed=1, training_seconds=9.0, hardware="H200")]
    table = costs.cost_table(Benchmark(runs), "tiles")
    assert [(row.name, row.note, row.cells[0].value) for row in table.rows] == [
        ("ocsvm", "H200", 9.0), ("ocsvm", "a processor", 1.0),
    ]  # fmt: skip
    assert "other tasks may have run on the machine at the same time" in table.caption


def test_robustness_starts_at_the_unchanged_images(evaluations, robustness_rows, report, read):
    panels = costs.robustness(Benchmark(evaluations), robustness_rows)
    assert [(p.kind, p.perturbation) for p in panels] == [("corruption", "blur"), ("attack", "pgd")]
    blur = {m: [(at, c.value) for at, c in points] for m, points in panels[0].curves.items()}
    assert blur["unet/strong"] == [(0.0, 0.95), (1.0, pytest.approx(0.8)), (3.0, pytest.approx(0.6)), (5.0, 0.4)]
    assert [at for at, _ in panels[1].curves["unet/strong"]] == [0.0, 1.0]  # 2 / 255 is one grey level
    table = read(report, "tiles-robustness-corruption")
    assert float(table["blur 3"]["ocsvm"]) == pytest.approx(0.6)
    assert read(report, "tiles-robustness-attack").keys() == {"pgd 0", "pgd 1"}
