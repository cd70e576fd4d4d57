"""What one run said about every test image, with pictures of the telling ones: a Parquet file beside its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raydiff.errors import DataError, StorageError

__all__ = ["Picture", "Predictions", "read_predictions", "write_predictions"]


@dataclass(frozen=True, eq=False)
class Predictions:
    """Every test image in reading order: ``scores`` and ``p_values`` float64 (n,), ``labels`` and ``verdicts`` bool."""

    ids: list[str]
    defects: list[str]
    labels: NDArray[np.bool_]
    scores: NDArray[np.float64]
    p_values: NDArray[np.float64]
    verdicts: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class Picture:
    """A test image worth looking at, as PNG files: ``index`` is its row in the predictions."""

    kind: Literal["miss", "false_alarm", "hit"]
    index: int
    image: bytes
    reconstruction: bytes | None
    heat_map: bytes | None
    mask: bytes | None


_PNG_COLUMNS = [field.name for field in fields(Picture) if field.name not in ("kind", "index")]


def write_predictions(path: Path, predictions: Predictions, pictures: Sequence[Picture]) -> None:
    """Write one run's file.

    Raises:
        StorageError: it cannot be written.
    """
    shown = {picture.index: picture for picture in pictures}
    columns: dict[str, Any] = {
        "id": pa.array(predictions.ids, pa.string()),
        "defect": pa.array(predictions.defects, pa.string()),
        "is_anomaly": predictions.labels,
        "score": predictions.scores,
        "p_value": predictions.p_values,
        "verdict": predictions.verdicts,
    }
    for name, kind in (("kind", pa.string()), *((name, pa.binary()) for name in _PNG_COLUMNS)):
        columns[name] = pa.array([getattr(shown.get(i), name, None) for i in range(len(predictions))], kind)
    order = pa.array([list(shown).index(i) if i in shown else None for i in range(len(predictions))], pa.int64())
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({**columns, "picture_order": order}), partial)
        partial.replace(path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from error


def read_predictions(path: Path) -> tuple[Predictions, list[Picture]]:
    """What :func:`write_predictions` wrote, pictures in their order.

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        table = pq.read_table(path).to_pydict()
        predictions = Predictions(
            table["id"], table["defect"], np.array(table["is_anomaly"], bool), np.array(table["score"], np.float64),
            np.array(table["p_value"], np.float64), np.array(table["verdict"], bool),
        )  # fmt: skip
        shown = [(order, i) for i, order in enumerate(table["picture_order"]) if order is not None]
        columns = ("kind", *_PNG_COLUMNS)
        pictures = [Picture(index=i, **{name: table[name][i] for name in columns}) for _, i in sorted(shown)]
    except (OSError, pa.ArrowException, KeyError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: is no file of predictions ({reason}); evaluate the run again") from error
    return predictions, pictures
