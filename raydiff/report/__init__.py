"""From result rows to one self-contained HTML file: no script, no outside host, readable on paper and on a telephone.

``tables`` turns evaluations into cells, ``words`` into sentences, ``figures`` into inline SVG; ``page`` lays them out
with ``page.html`` and ``page.css``. The modules ``benchmark_*`` do the same for a benchmark with ``benchmark.html``,
``sweep_*`` for a sweep with ``sweep.html``, and ``export`` gives each of its tables as CSV and LaTeX.
"""

from __future__ import annotations

from raydiff.report.benchmark_page import write_benchmark_report
from raydiff.report.page import write_report
from raydiff.report.sweep_data import Importance
from raydiff.report.sweep_page import write_sweep_report

__all__ = ["Importance", "write_benchmark_report", "write_report", "write_sweep_report"]
