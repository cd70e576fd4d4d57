"""What a run writes down as it goes: ``metrics.jsonl`` for programs, TensorBoard event files for people.

On a disk a line is appended. An object store has no such thing: there the whole file is written again, not more often
than so that it costs a twentieth of the time, and the event files after each validation.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raydiff.errors import StorageError
from raydiff.storage import Place, Storage

__all__ = ["METRICS", "MetricsLog", "progress_line", "read_metrics"]

METRICS = "metrics.jsonl"
"""The run folder's file of metrics, one JSON object a line, in order of ``step``."""

_SHARE = 0.05


class MetricsLog:
    """Appends lines to ``run_dir/metrics.jsonl`` and scalars to ``run_dir/tensorboard``.

    A run begins with ``{"step": s, "resumed": True}``. When that is a restart, the lines after step s are taken out,
    so that the file reads as if nothing had happened, and the line stays to say how many images are repeated: those up
    to the last step that was logged, and at most one log interval more.
    """

    def __init__(self, run_dir: Place, *, batch_size: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here: importing it takes a second

        self._batch_size = batch_size
        self._lines = _LinesOnDisk(run_dir) if isinstance(run_dir, Path) else _LinesInStore(run_dir)
        self._board = SummaryWriter(str(self._lines.board))

    def __call__(self, metrics: Mapping[str, Any]) -> dict[str, Any] | None:
        """Record one line and give it back; None for the beginning of a run that is new.

        Raises:
            StorageError: it cannot be written.
        """
        line = dict(metrics)
        if line.get("resumed"):
            if not self._lines.exist():
                return None
            line["images_repeated"] = self._rewind(line["step"]) * self._batch_size
        self._lines.append(line)
        for name, value in line.items():
            if name not in ("step", "resumed"):
                self._board.add_scalar(name, value, line["step"])
        self._board.flush()
        if "held_out_loss" in line:
            self.flush()
        return line

    def flush(self) -> None:
        """Write what is kept back: before a checkpoint that a restart would go on from.

        Raises:
            StorageError: it cannot be written.
        """
        self._lines.flush()

    def _rewind(self, step: int) -> int:
        """Drop the lines after ``step``; how many steps were logged beyond it."""
        lines = self._lines.all()
        kept = [line for line in lines if line["step"] <= step]
        self._lines.replace(kept)
        return max([line["step"] for line in lines], default=step) - step if len(kept) < len(lines) else 0


class _LinesOnDisk:
    """``metrics.jsonl`` in a folder, and the folder for event files."""

    def __init__(self, run_dir: Path) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path, self.board = run_dir / METRICS, run_dir / "tensorboard"

    def exist(self) -> bool:
        return self._path.exists()

    def all(self) -> list[dict[str, Any]]:
        return list(read_metrics(self._path.parent))

    def append(self, line: Mapping[str, Any]) -> None:
        with self._named(), self._path.open("a", encoding="utf-8") as file:
            file.write(_encoded([line]))

    def replace(self, lines: Sequence[Mapping[str, Any]]) -> None:
        temporary = self._path.with_suffix(".tmp")
        with self._named():
            temporary.write_text(_encoded(lines), encoding="utf-8")
            temporary.replace(self._path)

    def flush(self) -> None:
        """Nothing is kept back."""

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"{self._path}: cannot be written ({error.strerror}); free space") from error


class _LinesInStore:
    """``metrics.jsonl`` in a store, written anew with all its lines; event files go there from a folder here."""

    def __init__(self, storage: Storage) -> None:
        self._storage, self._known = storage, list(read_metrics(storage))
        self.board = Path(tempfile.mkdtemp(prefix="raydiff-tensorboard-"))
        weakref.finalize(self, shutil.rmtree, self.board, ignore_errors=True)
        self._took, self._ended, self._kept_back = 0.0, 0.0, False

    def exist(self) -> bool:
        return bool(self._known)

    def all(self) -> list[dict[str, Any]]:
        return self._known

    def append(self, line: Mapping[str, Any]) -> None:
        self._known.append(dict(line))
        self._kept_back = True
        if (time.monotonic() - self._ended) * _SHARE >= self._took:
            self._put()

    def replace(self, lines: Sequence[Mapping[str, Any]]) -> None:
        self._known, self._kept_back = [dict(line) for line in lines], True

    def flush(self) -> None:
        if self._kept_back:
            self._put()
        self._storage.child("tensorboard").put_tree(self.board)

    def _put(self) -> None:
        begun = time.monotonic()
        self._storage.write(METRICS, _encoded(self._known).encode())
        self._ended = time.monotonic()
        self._took, self._kept_back = self._ended - begun, False


def _encoded(lines: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def read_metrics(run_dir: Place) -> Iterator[dict[str, Any]]:
    """The finished lines so far; a last line that is still being written is left out.

    Raises:
        DataError, StorageError: the store that holds the run cannot be read.
    """
    if isinstance(run_dir, Path):
        path = run_dir / METRICS
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    else:
        text = run_dir.read(METRICS).decode() if run_dir.exists(METRICS) else ""
    for line in text.splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def progress_line(metrics: Mapping[str, Any], num_steps: int, batch_size: int) -> str:
    """One line for a person: step, loss, speed and the time left, or what a restart repeats; a space's, a head's."""
    if "fold" in metrics:
        own = {name: value for name, value in metrics.items() if name != "fold"}
        return f"fold {metrics['fold']}: {progress_line(own, num_steps, batch_size)}"
    for part in ("space", "head"):
        if f"{part}_step" in metrics:
            return _progress_beside(part, metrics)
    if "space_found" in metrics:
        return f"space: found in {metrics['space_found']}; fitting it took {clock(metrics['space_seconds'])}"
    if "space_awaited" in metrics:
        return f"space: another process is fitting it, for {metrics['space_awaited']}; waiting"
    step = metrics["step"]
    if "grids_made" in metrics:
        made, missing = metrics["grids_made"], metrics["grids_missing"]
        left = f"  {clock(metrics['grids_seconds'] / made * (missing - made))} left" if made < missing else ""
        return f"grids: {made} of {missing} files made{left}"
    if metrics.get("resumed"):
        repeated = metrics.get("images_repeated", 0)
        return f"resumed at step {step}/{num_steps}; {repeated} images or little more are seen again"
    if "left_out_shards" in metrics:
        again = f"; up to {metrics['repeated_at_most']} images are seen again" if "repeated_at_most" in metrics else ""
        lost = f"{metrics['left_out_shards']} bad shard(s) with {metrics['left_out_images']} training images"
        return f"step {step}/{num_steps}  {lost} left out{again}"
    parts = [f"step {step}/{num_steps}", f"{100 * step // num_steps:3d} %", f"loss {_loss(metrics['loss'])}"]
    if "held_out_loss" in metrics:
        parts.append(f"held-out {_loss(metrics['held_out_loss'])}")
    parts.append(f"{metrics['images_per_second']:.0f} images/s")
    if "workers" in metrics:
        parts.append(f"on {metrics['workers']} worker(s) only")
    if step < num_steps:
        parts.append(f"{clock((num_steps - step) * batch_size / metrics['images_per_second'])} left")
    return "  ".join(parts)


def _loss(value: float) -> str:
    """Four digits behind the point, or two that say something: a student's loss is small."""
    return f"{value:.4f}" if abs(value) >= 1e-3 or not value else f"{value:.1e}"


def _progress_beside(part: str, metrics: Mapping[str, Any]) -> str:
    """Of what is trained before or after the denoiser."""
    step, num_steps, seconds = (metrics[f"{part}_{name}"] for name in ("step", "steps", "seconds"))
    left = f"  {clock(seconds / step * (num_steps - step))} left" if step < num_steps else ""
    done = f"{part}: step {step}/{num_steps}  {100 * step // num_steps:3d} %"
    return f"{done}  loss {_loss(metrics[f'{part}_loss'])}{left}"


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
