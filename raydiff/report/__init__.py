"""From result rows to one self-contained HTML file: no script, no outside host, readable on paper and on a telephone.

``tables`` turns evaluations into cells, ``words`` into sentences, ``figures`` into inline SVG; ``page`` lays them out
with ``page.html`` and ``page.css``. The modules ``benchmark_*`` do the same for a benchmark with ``benchmark.html``,
and ``export`` gives each of its tables as CSV and LaTeX.
"""

from __future__ import annotations

from raydiff.report.benchmark_page import write_benchmark_report
from raydiff.report.page import write_report

__all__ = ["write_benchmark_report", "write_report"]
