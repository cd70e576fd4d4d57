"""CSV and LaTeX of every table."""

import re

import pytest

from raydiff.report import tables as cells
from raydiff.report.export import Heading, Table, escape_latex, to_csv, to_latex


@pytest.fixture(scope="module")
def evaluations(benchmark_cells):
    return benchmark_cells


@pytest.fixture(scope="module")
def report(benchmark_report):
    return benchmark_report


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


def test_a_row_name_is_never_taken_for_the_option_of_the_line_before():
    rows = [cells.Row(name, [cells.Cell("1")]) for name in ("[1, 2]", "*", "x [1]")]
    lines = to_latex(Table("t", "t", "Class", [Heading("A")], rows)).splitlines()
    assert [line for line in lines if line.endswith(r"1 \\")] == [r"{}[1, 2] & 1 \\", r"{}* & 1 \\", r"x [1] & 1 \\"]


def test_what_is_missing_has_its_column():
    rows = [cells.Row("a", [cells.Cell("0.5", "1 of 2 cells", 0.5, missing="1 of 2 cells")])]
    rows.append(cells.Row("b", [cells.Cell("0.4", "± 0.1", 0.4, spread=0.1)]))
    table = Table("t", "t", "Method", [Heading("A")], rows)
    assert to_csv(table) == "Method,A,A sd,A measured\na,0.5,,1 of 2 cells\nb,0.4,0.1,\n"


def test_csv_keeps_full_numbers_and_quotes():
    rows = [cells.Row('say "x", y', [cells.Cell("0.123", "", 0.1234567), cells.Cell()])]
    table = Table("t", "t", "Method", [Heading("A"), Heading("F1\u2011max")], rows)
    assert to_csv(table) == 'Method,A,F1-max\n"say ""x"", y",0.123457,\n'


def test_tables_of_one_name_get_a_number():
    table = Table("x", "t", "m", [Heading("A")], [])
    assert table.unlike([]).name == "x"
    assert table.unlike([table, table.unlike([table])]).name == "x-3"
