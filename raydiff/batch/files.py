"""Score loose image files: one row each, in order, to CSV, JSON lines or Parquet, with heat maps on request.

Files stream through in batches; neither images nor rows pile up. The table is written under a temporary name and
renamed when it is whole. Other ways to score files (a service, a cluster) write the same rows and pictures with what is
public here.
"""

from __future__ import annotations

import csv
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raydiff.contracts import Prediction
from raydiff.detector import Detector
from raydiff.errors import ConfigError, DataError, NotCalibratedError, ScoreError, StorageError
from raydiff.evaluation import Progress, predict_named
from raydiff.heatmap import drawn, heat
from raydiff.images import ImageSpec, decode, decode_file, find_images, images_per_batch, to_tensor, to_uint8

__all__ = [
    "SCHEMA", "PictureFolder", "ScoreSummary", "ScoredFile", "Table", "name_of", "open_table", "read_bytes",
    "score_files",
]  # fmt: skip

SCHEMA = pa.schema(
    [
        ("path", pa.string()), ("score", pa.float64()), ("threshold", pa.float64()), ("p_value", pa.float64()),
        ("is_anomaly", pa.bool_()), ("error", pa.string()),
    ]
)  # fmt: skip
"""Of the table in Parquet: the fields of :class:`ScoredFile`."""


@dataclass(frozen=True)
class ScoredFile:
    """One row of the table. ``error`` says why a skipped image has no score; the other fields are then None."""

    path: str
    score: float | None
    threshold: float
    p_value: float | None
    is_anomaly: bool | None
    error: str | None


@dataclass(frozen=True)
class ScoreSummary:
    """How many rows were written, how many images were called anomalous, how many could not be read."""

    num_images: int
    num_anomalous: int
    num_bad: int


def score_files(
    detector: Detector,
    paths: Iterable[str | os.PathLike[str]],
    out: str | Path,
    *,
    maps_dir: str | Path | None = None,
    on_bad_image: Literal["error", "skip"] = "error",
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> ScoreSummary:
    """Score files, and all images in folders, and write one row each in the order of ``find_images``.

    A KeyboardInterrupt, an image or a score that cannot be used leave the rows so far in ``<out>.partial``, and say so.

    Args:
        detector: calibrated.
        paths: image files, and folders that are searched for some.
        out: where the rows go; ``.csv``, ``.jsonl`` or ``.parquet`` says how.
        maps_dir: where ``<file>.heatmap.png`` and, if the detector has one, ``<file>.reconstruction.png`` go, in the
            folders of the images below what they have in common.
        on_bad_image: ``skip`` writes a row with the error and goes on.
        batch_size: images per call; by default :func:`raydiff.images.images_per_batch`.
        progress: called after each batch.

    Raises:
        NotCalibratedError: the detector has no threshold.
        ConfigError: ``out`` has another suffix, or ``maps_dir`` is asked of a detector without anomaly maps.
        DataError: a path does not exist, or an image cannot be read; names it.
        ScoreError: a score is NaN or infinite; names the image.
        StorageError: a file cannot be written.
    """
    if detector.calibration is None:
        raise NotCalibratedError(f"{detector.name} has no threshold; calibrate it before it scores files")
    threshold = detector.calibration.threshold.value
    size = batch_size or images_per_batch(detector.config)
    files, num_anomalous, num_bad = find_images(paths), 0, 0
    pictures = None if maps_dir is None else PictureFolder(Path(maps_dir), files)
    with open_table(Path(out)) as table, table.kept_if_interrupted():
        for start in range(0, len(files), size):
            part = files[start : start + size]
            images, errors = _read(part, detector.image_spec, on_bad_image)
            good = [path for path, error in zip(part, errors, strict=True) if error is None]
            prediction = None
            if good:
                names = [name_of(path) for path in good]
                prediction = predict_named(detector, to_tensor(images), names, explain=pictures is not None)
            rows = _rows(part, errors, prediction, threshold)
            table.write(rows)
            if pictures is not None and prediction is not None:
                _draw(pictures, good, prediction, detector)
            num_anomalous += sum(bool(row.is_anomaly) for row in rows)
            num_bad += len(part) - len(good)
            if progress is not None:
                progress(start + len(part), len(files))
    return ScoreSummary(len(files), num_anomalous, num_bad)


def _read(
    paths: Sequence[Path], spec: ImageSpec, on_bad_image: Literal["error", "skip"]
) -> tuple[NDArray[np.uint8], list[str | None]]:
    """The readable images (B, H, W, C), and an error or None for each path."""
    images: list[NDArray[np.uint8]] = []
    errors: list[str | None] = []
    for path in paths:
        try:
            images.append(decode(read_bytes(path), spec, name_of(path)))
            errors.append(None)
        except DataError as error:
            if on_bad_image == "error":
                raise
            errors.append(str(error))
    return (np.stack(images) if images else np.empty((0, *spec.image_size, spec.channels), np.uint8)), errors


def read_bytes(path: Path) -> bytes:
    """A file's content.

    Raises:
        DataError: it cannot be read; names it.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{name_of(path)}: cannot be read ({error.strerror})") from error


def name_of(path: Path) -> str:
    """A path as text for the table: a file's name need not be text."""
    return os.fsencode(path).decode("utf-8", "replace")


def _rows(
    paths: Sequence[Path], errors: Sequence[str | None], prediction: Prediction | None, threshold: float
) -> list[ScoredFile]:
    verdicts: Iterator[tuple[float, float, bool]] = iter(())
    if prediction is not None:
        columns = (prediction.pred_score.double(), prediction.p_value, prediction.pred_label)
        verdicts = zip(*(column.tolist() for column in columns), strict=True)
    rows = []
    for path, error in zip(paths, errors, strict=True):
        score, p_value, is_anomaly = (None, None, None) if error is not None else next(verdicts)
        rows.append(ScoredFile(name_of(path), score, threshold, p_value, is_anomaly, error))
    return rows


def _draw(pictures: PictureFolder, paths: Sequence[Path], prediction: Prediction, detector: Detector) -> None:
    """A heat map and a reconstruction for each image, on what its file shows."""
    calibration, maps = detector.calibration, prediction.anomaly_map
    if maps is None or calibration is None:
        raise ConfigError(f"{detector.name} draws no anomaly maps; leave out the folder for maps")
    rebuilt = None if prediction.reconstruction is None else to_uint8(prediction.reconstruction)
    spec = detector.image_spec
    for i, path in enumerate(paths):
        data = read_bytes(path)
        level = heat(maps[i, 0].cpu().numpy(), calibration.mask_threshold)
        made = drawn(data, spec, decode_file(data, spec, name_of(path)), level, None if rebuilt is None else rebuilt[i])
        for what, png in (("heatmap", made.heat_map), ("reconstruction", made.reconstruction)):
            if png is not None:
                pictures.save(path, what, png)


class PictureFolder:
    """Writes pictures under the names of their images, in the images' folders below what these have in common."""

    def __init__(self, folder: Path, files: Sequence[Path]) -> None:
        self._folder = folder
        self._common = Path(os.path.commonpath([path.absolute().parent for path in files]))

    def save(self, path: Path, what: str, png: bytes) -> None:
        """Write ``<path>.<what>.png``.

        Raises:
            StorageError: it cannot be written.
        """
        relative = path.absolute().relative_to(self._common)
        target = self._folder / relative.parent / f"{relative.name}.{what}.png"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(png)
        except OSError as error:
            raise StorageError(
                f"{name_of(target)}: cannot be written ({error.strerror}); choose another folder"
            ) from error


class Table:
    """Where rows go; an error of the writing names the file."""

    def __init__(self, path: Path, file: _File) -> None:
        self._path, self._file = path, file
        self._count = 0
        self.kept = False

    def write(self, rows: Sequence[ScoredFile]) -> None:
        """Append rows.

        Raises:
            StorageError: they cannot be written.
        """
        with _named(self._path):
            self._file.write(rows)
        self._count += len(rows)

    @contextmanager
    def kept_if_interrupted(self) -> Iterator[None]:
        """What interrupts or fails within leaves the rows so far, if there are any, and says where."""
        try:
            yield
        except (DataError, ScoreError) as error:
            if self._count:
                error.args = (f"{error}; the {self._count} rows before are in {name_of(self.keep())}", *error.args[1:])
            raise
        except KeyboardInterrupt as error:
            if self._count:
                error.add_note(f"the {self._count} rows so far are in {name_of(self.keep())}")
            raise

    def keep(self) -> Path:
        """When the work fails, leave what was written, readable, at the place returned."""
        self.kept = True
        return _partial(self._path)


class _File(ABC):
    @abstractmethod
    def write(self, rows: Sequence[ScoredFile]) -> None:
        """Append rows."""

    @abstractmethod
    def close(self) -> None:
        """Finish the file."""


class _Csv(_File):
    def __init__(self, path: Path) -> None:
        self._file: IO[str] = path.open("w", encoding="utf-8", newline="")
        self._writer = csv.writer(self._file)
        self._writer.writerow([field.name for field in fields(ScoredFile)])

    def write(self, rows: Sequence[ScoredFile]) -> None:
        # None is an empty cell; repr keeps every bit of a float
        self._writer.writerows(["" if value is None else value for value in asdict(row).values()] for row in rows)

    def close(self) -> None:
        self._file.close()


class _JsonLines(_File):
    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")

    def write(self, rows: Sequence[ScoredFile]) -> None:
        self._file.writelines(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)

    def close(self) -> None:
        self._file.close()


class _Parquet(_File):
    def __init__(self, path: Path) -> None:
        self._writer: Any = pq.ParquetWriter(path, SCHEMA)

    def write(self, rows: Sequence[ScoredFile]) -> None:
        self._writer.write_table(pa.Table.from_pylist([asdict(row) for row in rows], SCHEMA))

    def close(self) -> None:
        self._writer.close()


_TABLES: dict[str, type[_Csv] | type[_JsonLines] | type[_Parquet]] = {
    ".csv": _Csv, ".jsonl": _JsonLines, ".parquet": _Parquet,
}  # fmt: skip


@contextmanager
def open_table(path: Path) -> Iterator[Table]:
    """A table that takes its name when it is whole; nothing is left behind when the work fails, unless it is kept.

    Args:
        path: ``.csv``, ``.jsonl`` or ``.parquet`` says how it is written.

    Raises:
        ConfigError: another suffix.
        StorageError: it cannot be written.
    """
    kind = _TABLES.get(path.suffix.lower())
    if kind is None:
        raise ConfigError(f"{path}: its ending says no format; use one of {', '.join(_TABLES)}")
    partial, kept = _partial(path), False
    try:
        with _named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = kind(partial)
        try:
            table = Table(path, file)
            yield table
        except BaseException:
            with suppress(OSError, pa.ArrowException):  # what went wrong first is what is said
                file.close()
                kept = table.kept
            raise
        with _named(path):
            file.close()
            partial.replace(path)
    finally:
        if not kept:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """An OSError of the writing within names the table; nothing else belongs within."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from error
