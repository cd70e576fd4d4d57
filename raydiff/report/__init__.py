"""From result rows to one self-contained HTML file: no script, no outside host, readable on paper and on a telephone.

``tables`` turns evaluations into cells, ``words`` into sentences, ``figures`` into inline SVG; ``page`` lays them out
with ``page.html`` and ``page.css``.
"""

from __future__ import annotations

from raydiff.report.page import write_report

__all__ = ["write_report"]
