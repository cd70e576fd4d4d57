"""``search_spaces/*.yaml``: which config fields a sweep varies, over what, to what end, at what cost.

A parameter is a dotted config path with a distribution; it may depend on another one's value. The space is checked
against the config that the sweep begins with before anything runs. Three levels, found from the paths:

* ``training``: changes the network's weights; each new combination is a training.
* ``evidence``: changes what the scorer measures with a trained network; costs network evaluations.
* ``judgement``: changes what is made of measured evidence (pooling, blur, density, threshold); costs none.

``distributions`` is a parameter's values, ``paths`` says which fields may be varied, ``space`` is the file's content,
``reading`` reads it, ``structure`` and ``trying`` see that it fits a config. docs: docs/SWEEPS.md.
"""

from __future__ import annotations

from raydiff.search_space.distributions import Parameter, Suggester
from raydiff.search_space.paths import LEVELS, Level
from raydiff.search_space.reading import load_search_space
from raydiff.search_space.space import OBJECTIVES, Around, Direction, Objective, Pruning, SearchSpace

__all__ = [
    "LEVELS",
    "OBJECTIVES",
    "Around",
    "Direction",
    "Level",
    "Objective",
    "Parameter",
    "Pruning",
    "SearchSpace",
    "Suggester",
    "load_search_space",
]
