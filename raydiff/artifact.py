"""The folder format of everything raydiff saves: data, never code.

A folder is written under a temporary name beside its place, its ``manifest.json`` last, then renamed: it is there whole
or not at all. In an object store, where nothing can be renamed, the manifest is removed first and written last: without
it a folder does not count. The manifest names the kind, the format version, and each file's size and SHA-256. Reading
checks all of them, so a truncated, altered or half-copied folder is an error that says which file. What lies in a store
is read from a copy, which each machine keeps in ``~/.cache/raydiff`` (or below ``$XDG_CACHE_HOME``) under the digest.

=====================  ===============================================================================
config.json            the kind of detector and its whole config, every default written out
weights.safetensors    the network (or the sample a baseline is refitted from), and the space's state
calibration.json       threshold and calibration scores; absent until calibrated
statistics.safetensors what the scorer learnt from calibration normals; absent until calibrated
training.*             in a checkpoint only: the state to resume from
member-<i>.*           in an ensemble only: the same files of its i-th member
manifest.json          last
=====================  ===============================================================================
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors
import safetensors.torch
from torch import Tensor

from raydiff.errors import ArtifactError, StorageError
from raydiff.journal import alone_in
from raydiff.storage import MANIFEST, Storage, as_place

__all__ = ["FORMAT_VERSION", "Folder", "Kind", "encode_json", "encode_tensors", "read_folder", "write_folder"]

FORMAT_VERSION = 1
"""Raised when a reader of the old format could not read the new one."""

Kind = Literal["artifact", "checkpoint", "space", "head"]

_UNFINISHED = "has no manifest.json, so it was never finished; go on with raydiff fit --resume RUN, or save it again"
_UNUSED_S = 30 * 86_400.0


@dataclass(frozen=True)
class Folder:
    """A verified folder. ``digest`` is the SHA-256 of its manifest, which holds those of its files."""

    path: Path
    kind: Kind
    digest: str
    files: frozenset[str]
    prefix: str = ""

    def part(self, prefix: str) -> Folder:
        """The files whose names begin with ``prefix``, by the rest of their names."""
        inside = frozenset(name.removeprefix(prefix) for name in self.files if name.startswith(prefix))
        return replace(self, files=inside, prefix=self.prefix + prefix)

    def json(self, name: str) -> Any:
        """A JSON file's content."""
        path = self.path / f"{self.prefix}{name}"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ArtifactError(f"{path}: is not JSON ({error}); save the artefact again") from error

    def tensors(self, name: str) -> dict[str, Tensor]:
        """A safetensors file's tensors, on the CPU."""
        path = self.path / f"{self.prefix}{name}"
        try:
            tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ArtifactError(f"{path}: is no safetensors file ({error})") from error
        return tensors


def encode_json(data: Any) -> bytes:
    """JSON with sorted keys: the same data gives the same bytes."""
    return (json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def encode_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Safetensors: the same tensors give the same bytes."""
    data: bytes = safetensors.torch.save({name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)})
    return data


def write_folder(
    place: str | Path | Storage, kind: Kind, files: Mapping[str, bytes], *, overwrite: bool = False
) -> str:
    """Write a folder whole or not at all, to a path or a URI; returns its digest.

    Raises:
        StorageError: the place cannot be written (permission, full disk), or exists and ``overwrite`` is not set. What
            was there before is still there; in an object store what was overwritten may count as not there.
    """
    path = as_place(place)
    manifest = encode_json(_manifest(kind, files))
    if (path.exists() if isinstance(path, Path) else path.exists(MANIFEST)) and not overwrite:
        raise StorageError(f"{path}: exists; choose another place, or remove it first")
    if isinstance(path, Path):
        _write_renamed(path, {**files, MANIFEST: manifest})
    else:
        path.write_all({**files, MANIFEST: manifest})
    return hashlib.sha256(manifest).hexdigest()


def _write_renamed(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder of these files, and put it in the place of what is there."""
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        temporary.chmod(0o755)
        for name, data in files.items():
            _write(temporary / name, data)
        _put_in_place(temporary, path)
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written ({error.strerror}); free space or choose another place"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def read_folder(place: str | Path | Storage) -> Folder:
    """Verify a folder, at a path or a URI, against its manifest; from a store it is fetched, unless it is here already.

    Raises:
        ArtifactError: it does not exist, has no manifest (was not finished), is of a newer format, or a file of it is
            missing, truncated or altered.
        StorageError: the store cannot be reached, or there is no room here for the copy.
    """
    place = as_place(place)
    return _fetched(place) if isinstance(place, Storage) else _verified(place)


def _verified(path: Path) -> Folder:
    if not path.is_dir():
        raise ArtifactError(f"{path}: there is no such folder; give the folder that holds manifest.json")
    try:
        raw = (path / MANIFEST).read_bytes()
        manifest = json.loads(raw)
        version = manifest["format_version"]
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise ArtifactError(
                f"{path}: has format version {version}; this raydiff reads up to {FORMAT_VERSION}, so upgrade raydiff"
            )
        kind, files = manifest["kind"], manifest["files"]
        if raw != encode_json({"format_version": version, "kind": kind, "files": files}) or not (
            version == FORMAT_VERSION and kind in get_args(Kind)
        ):
            raise ValueError("it is not as it was written")
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: {_UNFINISHED}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path / MANIFEST}: is damaged ({error}); save the artefact again") from error
    for name, (size, digest) in expected.items():
        _verify(path / name, size, digest)
    return Folder(path, kind, hashlib.sha256(raw).hexdigest(), frozenset(files))


def _fetched(storage: Storage) -> Folder:
    """The folder as this machine keeps it, under its manifest's digest."""
    if not storage.exists(MANIFEST):
        if storage.exists():
            raise ArtifactError(f"{storage}: {_UNFINISHED}")
        raise ArtifactError(f"{storage}: there is no such folder; give a run, or the folder that holds manifest.json")
    raw = storage.read(MANIFEST)
    kept = _cache() / hashlib.sha256(raw).hexdigest()
    if (folder := _kept(kept)) is not None:
        return folder
    with alone_in(kept.parent.with_name("fetching"), wait=True):  # a machine's processes begin together
        return _kept(kept) or _brought(storage, raw, kept)


def _brought(storage: Storage, raw: bytes, kept: Path) -> Folder:
    """A copy of a folder with this manifest, put where it is kept."""
    temporary = Path(tempfile.mkdtemp(prefix="new-", dir=kept.parent))
    try:
        _copy(storage, raw, temporary)
        _put_in_place(temporary, kept)
    except ArtifactError as error:
        raise ArtifactError(str(error).replace(str(temporary), str(storage))) from error
    except OSError as error:
        raise StorageError(f"{kept}: cannot be written ({error.strerror}); make room there") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _verified(kept)


def _kept(path: Path) -> Folder | None:
    """The copy that is there, marked as used; a damaged one is made again."""
    try:
        folder = _verified(path)
        os.utime(path)
    except (ArtifactError, OSError):
        return None
    return folder


def _copy(storage: Storage, raw: bytes, folder: Path) -> None:
    """Fetch a manifest's files into a folder, and verify them there."""
    (folder / MANIFEST).write_bytes(raw)
    with suppress(ValueError, KeyError, TypeError):  # a damaged manifest is said to be one below
        names = json.loads(raw)["files"].keys() & storage.files().keys()
        storage.fetch(folder, sorted(names))
    _verified(folder)


def _cache() -> Path:
    """Where this machine keeps copies; those that nobody used for a month are removed first.

    Raises:
        StorageError: it cannot be made.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))  # noqa: PTH111
    root = root / "raydiff" / "artifacts"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for kept in root.iterdir():
            with suppress(FileNotFoundError):  # removed by another process
                if time.time() - kept.stat().st_mtime > _UNUSED_S:
                    shutil.rmtree(kept, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"{root}: cannot be written ({error.strerror}); set XDG_CACHE_HOME to another") from error
    return root


def _manifest(kind: Kind, files: Mapping[str, bytes]) -> dict[str, Any]:
    entries = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    return {"format_version": FORMAT_VERSION, "kind": kind, "files": entries}


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _put_in_place(temporary: Path, path: Path) -> None:
    """Rename into place; an older folder there is set aside first and removed after."""
    if not path.exists():
        temporary.rename(path)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent)) / path.name
    path.rename(aside)
    try:
        temporary.rename(path)
    except OSError:
        with suppress(OSError):
            aside.rename(path)
        raise
    shutil.rmtree(aside.parent, ignore_errors=True)


def _verify(path: Path, expected_size: int, expected_digest: str) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ArtifactError(f"{path}: is missing ({error.strerror}); copy the whole folder again") from error
    if size != expected_size:
        raise ArtifactError(
            f"{path}: is truncated or was changed ({size} bytes, the manifest says {expected_size}); copy it again"
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != expected_digest:
        raise ArtifactError(f"{path}: was altered (its SHA-256 is not the manifest's); copy it again")
