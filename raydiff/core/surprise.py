"""How rare a score is among those of normals, as -log p, with a tail beyond the highest of them.

Empirical p-values end at 1 / (n + 1), so that all clear anomalies would tie. For the highest tenth of normals p follows
an exponential tail fitted to them instead (peaks over threshold: Pickands 1975, doi:10.1214/aos/1176343003).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["surprise"]

_TAIL = 0.1
"""Share of normals whose scores are an exponential tail."""


def surprise(values: Tensor, normals: Tensor) -> Tensor:
    """-log of the share of normals that score as high, float64 (B,), from the sorted scores of normals (n,).

    Interpolated between normals, and linear, which is exponential in p, above the highest tenth and below the lowest.
    """
    known = normals.numpy()
    count = len(known)
    cut = min(count - 2, max(0, round((1 - _TAIL) * count) - 1))
    knots = known[: cut + 1]
    heights = -np.log((count - np.arange(cut + 1) - 0.5) / count)
    excess = max(float((known[cut + 1 :] - known[cut]).mean()), 1e-12)
    given = values.numpy()
    inside = np.interp(given, knots, heights)
    above = heights[-1] + (given - knots[-1]) / excess
    spread = max(float(known.std()), 1e-12)
    below = heights[0] + (given - knots[0]) / (spread * count)  # rises slowly: what is very normal still has an order
    return torch.from_numpy(np.where(given > knots[-1], above, np.where(given < knots[0], below, inside)))
