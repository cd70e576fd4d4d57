"""A local folder kept beside a place in a store, so that what needs a disk works where nobody shares one.

Rows that are appended, a database, checkpoints that are renamed into place: these want a disk, and an object store has
none. So whoever works does so in a folder of its own machine. :class:`Mirror` fetches what is in the store and puts
what has changed, in an order in which a record never says more than what is there.

* The command that leads keeps its records in such a folder: :func:`mirrored`, one command at a time for a place.
* A task on any node works in another, which is removed afterwards: :func:`on_node`.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

from raydiff.artifact import read_folder
from raydiff.errors import ConfigError, RaydiffError, StorageError
from raydiff.journal import alone_in
from raydiff.lock import LOCK, StoreLock
from raydiff.runtime import CHECKPOINTS
from raydiff.storage import MANIFEST, PARTIAL, Storage

__all__ = ["Mirror", "mirrored", "on_node", "scratch"]

_SHARE = 0.05
_THREADS = 16
_FIRST = "metrics.jsonl"
_RECORDS = frozenset({".json", ".jsonl", ".yaml", ".db", ".parquet"})
_LARGE = frozenset({"shards", CHECKPOINTS, "space", "spaces"})
_LOGS = "tensorboard"
_DETECTOR = f"/artifact/{MANIFEST}"
_NEVER = (0, 0, 0)

Stamp = tuple[int, int, int]
"""When a file was changed, its size, and its number on the disk."""


class Mirror:
    """A folder on this machine and the place in a store that it stands for; one thread at a time."""

    def __init__(
        self, storage: Storage, folder: Path, *, guard: Callable[[], None] = lambda: None,
        leave: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """Nothing is fetched yet.

        Args:
            storage: the place.
            folder: exists.
            guard: called before anything is put; raises where this must not write any more.
            leave: lets the place go, for who ends without leaving its ``with`` block.
        """
        self.storage, self.folder = storage, folder
        self._guard, self.leave = guard, leave
        self._known: dict[str, Stamp] = {}
        self._took, self._ended = 0.0, -1e9

    @property
    def uri(self) -> str:
        """The place, as another process opens it; may hold a secret."""
        return self.storage.uri

    @property
    def label(self) -> str:
        """The place, for messages."""
        return self.storage.label

    def fetch(self, below: str = "", *, records: bool = False) -> None:
        """Copy what lies there into the folder, or what lies below a name; what has that name here is written over.

        Checkpoints that are not there to their end are passed over, and removed by the next put. What was fetched
        before and is gone there goes here too.

        Args:
            below: a folder in the place.
            records: only what says what there is: rows, manifests, the study; no weights, checkpoints, images. Without,
                detectors are links to the copies that this machine keeps (:func:`raydiff.artifact.read_folder`).

        Raises:
            StorageError: the store cannot be reached, or the folder not be written.
            ArtifactError: a detector there is damaged.
        """
        for last in (False, False, True):
            try:
                self._fetch(below, records)
                return
            except FileNotFoundError as error:  # pruned meanwhile, by who does not know yet that its node is lost
                if last:
                    raise StorageError(
                        f"{self.label}/{below}: changes while it is read ({error}); try again"
                    ) from error

    def _fetch(self, below: str, records: bool) -> None:
        source, prefix = (self.storage.child(below), f"{below}/") if below else (self.storage, "")
        names = [f"{prefix}{name}" for name in source.files()]
        for name in {name for name in self._known if name.startswith(prefix)}.difference(names):
            (self.folder / name).unlink(missing_ok=True)
            del self._known[name]
        whole = {_parent(name) for name in names if name.endswith(f"/{MANIFEST}")}
        names = [name for name in names if _is_wanted(name) and (not records or _is_record(name))]
        half = {name for name in names if _is_checkpoint(name) and _parent(name) not in whole}
        names = [name for name in names if name not in half]
        self._known |= dict.fromkeys(half, _NEVER)  # they go with the next put
        detectors = set() if records else {_parent(name) for name in names if name.endswith(_DETECTOR)}
        names = [name for name in names if _parent(name) not in detectors]
        try:
            for parent in {(self.folder / name).parent for name in [*names, *detectors]}:
                parent.mkdir(parents=True, exist_ok=True)
            for name in detectors:
                _link(self.folder / name, read_folder(self.storage / name).path)
        except OSError as error:
            raise StorageError(f"{self.folder}: cannot be written ({error.strerror}); make room there") from error
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(self._get, names))

    def put(self, *, logs: bool = False) -> None:
        """Bring the place up to date with the folder: what is new or changed, and what was here and has gone.

        A training's metrics go first, then folders with a manifest, whole, then records, those of the top at the very
        end. Names that begin with a dot and files that are half written stay behind, and TensorBoard's, which are
        written to all the time, unless ``logs`` are asked for.

        Raises:
            StorageError: the store cannot be written; whatever else was put is there.
            ConfigError: another command has taken the place over.
        """
        self._guard()
        begun = time.monotonic()
        present = _present(self.folder, logs=logs)
        changed = {name for name, stamp in present.items() if self._known.get(name) != stamp}
        whole = {_parent(name) for name in present if name.rpartition("/")[2] == MANIFEST}
        self._put({name for name in changed if name.rpartition("/")[2] == _FIRST}, present)
        for folder in sorted({_parent(name) for name in changed} & whole):
            self._put({name for name in changed if _parent(name) == folder}, present, folder)
        rest = {name for name in changed if _parent(name) not in whole and name.rpartition("/")[2] != _FIRST}
        for depth in sorted({name.count("/") for name in rest}, reverse=True):
            self._put({name for name in rest if name.count("/") == depth}, present)
        self._forget([name for name in self._known if name not in present])
        self._ended = time.monotonic()
        self._took = self._ended - begun

    def put_now_and_then(self) -> None:
        """:meth:`put`, unless more than a twentieth of the time would go into it."""
        if (time.monotonic() - self._ended) * _SHARE >= self._took:
            self.put()

    def _put(self, names: set[str], present: dict[str, Stamp], folder: str = "") -> None:
        if not names:
            return
        place, start = (self.storage.child(folder), len(folder) + 1) if folder else (self.storage, 0)
        place.write_all({name[start:]: _content(self.folder / name) for name in sorted(names)})
        self._known |= {name: present[name] for name in names}

    def _forget(self, gone: list[str]) -> None:
        """Take out of the store what was pruned here, a folder's manifest first."""
        for name in sorted(gone, key=lambda name: name.rpartition("/")[2] != MANIFEST):
            if self.storage.exists(name):
                self.storage.delete(name)
            del self._known[name]

    def _get(self, name: str) -> None:
        path = self.folder / name
        try:
            with self.storage.open(name) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StorageError(f"{self.label}/{name}: cannot be copied to {path} ({error}); make room there") from error
        self._known[name] = _stamp(path)


@contextmanager
def mirrored(place: str | Storage, *, field: str = "--out", alone: bool = True) -> Iterator[Mirror]:
    """The records of a place in a store, in a folder of this machine, for the one command that leads there.

    What lies there is fetched; what is written here is put by :meth:`Mirror.put`, and what was not is lost.

    Args:
        place: a URI, or what it names.
        field: the option that names it, for messages.
        alone: False to look only: the place need not be writable, and may be another command's.

    Raises:
        StorageError: the store cannot be reached or written; before anything else.
        ConfigError: another command leads there.
    """
    storage = place if isinstance(place, Storage) else Storage.of(place, field=field)
    lock = StoreLock(storage)
    if alone:
        storage.prepare()
        lock.take()
    try:
        with scratch() as folder, _named(folder, storage.label):
            mirror = Mirror(storage, folder, guard=lock.check if alone else lambda: None, leave=lock.release)
            mirror.fetch(records=True)
            yield mirror
    finally:
        lock.release()


@contextmanager
def on_node(uri: str, *names: str) -> Iterator[Mirror]:
    """A scratch folder with what lies in a store under these names, for a task; what it leaves there is put back.

    Also what an error leaves, as the reason for it.

    Raises:
        StorageError: the store cannot be reached, or there is no room here.
    """
    storage = Storage.of(uri, field="--out")
    with scratch() as folder, _named(folder, storage.label):
        mirror = Mirror(storage, folder)
        for name in names:
            mirror.fetch(name)
        try:
            yield mirror
        except BaseException:
            with suppress(RaydiffError):  # the first error is the one to tell
                mirror.put(logs=True)
            raise
        mirror.put(logs=True)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder on this machine's disk for a while; what killed processes left of theirs is removed first.

    They lie under ``TMPDIR``.

    Raises:
        StorageError: the disk cannot be written.
    """
    root = Path(tempfile.gettempdir()) / f"raydiff-{os.getuid()}"
    with ExitStack() as stack:
        try:
            root.mkdir(mode=0o700, exist_ok=True)
            if root.stat().st_uid != os.getuid():
                raise StorageError(f"{root}: belongs to somebody else; set TMPDIR to a folder of your own")
            with alone_in(root, wait=True):
                for left in root.glob("work-*"):
                    _remove_if_left(left)
                outer = Path(tempfile.mkdtemp(prefix="work-", dir=root))
                stack.callback(shutil.rmtree, outer, ignore_errors=True)
                stack.enter_context(alone_in(outer))
            folder = outer / "place"  # whoever works there may hold a lock of its own
            folder.mkdir()
        except OSError as error:
            raise StorageError(
                f"{root}: cannot be written ({error.strerror}); set TMPDIR to a place with room"
            ) from error
        yield folder


def _remove_if_left(folder: Path) -> None:
    """Remove a folder whose process has ended, with its lock."""
    with suppress(ConfigError, StorageError), alone_in(folder) as certain:
        if certain:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _named(folder: Path, label: str) -> Iterator[None]:
    """Errors within name the place in the store, not the folder that stands for it; a full disk is this machine's."""
    try:
        yield
    except StorageError:
        raise
    except RaydiffError as error:
        error.args = tuple(arg.replace(str(folder), label) if isinstance(arg, str) else arg for arg in error.args)
        raise


def _present(folder: Path, *, logs: bool) -> dict[str, Stamp]:
    """Every file that is not hidden or half written."""
    found: dict[str, Stamp] = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        parts = name.split("/")
        hidden = any(part.startswith(".") for part in parts) or (_LOGS in parts and not logs)
        if hidden or path.suffix in (".partial", ".tmp") or name.endswith("-journal"):
            continue
        with suppress(FileNotFoundError):  # pruned meanwhile
            if path.is_file():
                found[name] = _stamp(path)
    return found


def _link(path: Path, target: Path) -> None:
    """In the place of what is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def _stamp(path: Path) -> Stamp:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _content(path: Path) -> bytes | Path:
    """A file; of a database what a reader would see of it now."""
    if path.suffix != ".db" or not path.stat().st_size:
        return path
    with closing(sqlite3.connect(path)) as database:
        return database.serialize()


def _is_wanted(name: str) -> bool:
    return PARTIAL not in name and name != LOCK and not {"..", _LOGS}.intersection(name.split("/"))


def _is_record(name: str) -> bool:
    """Whether a file says what there is; of a detector's folder only its manifest does."""
    parts = name.split("/")
    if any(part in _LARGE or part.startswith("shards-") for part in parts[:-1]):
        return False
    if "artifact" in parts[:-1]:
        return parts[-1] == MANIFEST
    return Path(name).suffix in _RECORDS


def _is_checkpoint(name: str) -> bool:
    return CHECKPOINTS in name.split("/")[:-2]


def _parent(name: str) -> str:
    return name.rpartition("/")[0]
