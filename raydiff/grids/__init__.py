"""What a costly space makes of the training images, kept as Parquet files and streamed in the training order.

With ``data.grids`` set, every view of every training image that there can be is encoded once, before training begins,
by whatever trains: this process, or each of the Ray workers a share. From then on training reads rows of these files,
and neither decodes an image nor asks the space's network. In float32 a run ends with the very weights it would have
without: a row is what :meth:`raydiff.contracts.Space.encode` gives for that view, bit for bit.

A place holds any number of sets, each in a folder named by a digest of all that it depends on (``origin.json`` says
what): the space, what it learnt, the views, the image size, the machine. In it a file per few images, named by the
digest of the shard that they come from. So runs, a sweep's trials and a benchmark's cells may share a place; what one
of them has made the next finds, and several may make the same at the same time. A file is there whole or not at all,
so that work which was interrupted goes on where it stopped.

``layout`` is what there must be, ``writing`` makes what is missing, ``reading`` streams it, ``store`` is all of it for
one run.
"""

from __future__ import annotations

from raydiff.grids.layout import GridSet, Part
from raydiff.grids.reading import GridFiles, grid_stream
from raydiff.grids.store import GRIDS, Grids
from raydiff.grids.writing import write_missing

__all__ = ["GRIDS", "GridFiles", "GridSet", "Grids", "Part", "grid_stream", "write_missing"]
