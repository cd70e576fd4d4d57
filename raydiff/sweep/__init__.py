"""Settings of a trained network measured on the selection split: evidence once, objectives for next to nothing.

>>> cache = EvidenceCache.of(detector, ShardSet.open(uri))               # doctest: +SKIP
>>> measure_setting(cache, config.override({"scoring.blur": 2.0}))       # doctest: +SKIP
{'selection_auroc': 0.93, 'selection_average_precision': 0.94, 'nfe': 8.0, ...}

``evidence`` reads the calibration split and remembers what the network was asked, ``objectives`` says what a setting is
worth, ``jobs`` trains the networks. The test split is not opened.
"""

from __future__ import annotations

from raydiff.sweep.evidence import Evidence, EvidenceCache
from raydiff.sweep.objectives import measure_setting, step_losses

__all__ = ["Evidence", "EvidenceCache", "measure_setting", "step_losses"]
