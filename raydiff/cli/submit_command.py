"""A command line on its way to a cluster: what it names is sent, or must lie where the cluster reaches it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from raydiff.cli.submit_files import Upload
from raydiff.errors import ConfigError

if TYPE_CHECKING:
    from raydiff.config import DataConfig

__all__ = ["moved", "shown"]

_USER = re.compile(r"://\S*@")
"""Of a URI; with its host where a secret holds an unescaped ``/``."""
_PASSWORD = re.compile(r"://[^\s@]*:\S*@")


@dataclass(frozen=True)
class _Kind:
    """The parameters of a command that are places, by what they are for."""

    sent: tuple[str, ...] = ()
    """Files that it reads: sent."""
    results: tuple[str, ...] = ()
    """Where it writes: never below the job's own folder."""
    places: tuple[str, ...] = ()
    """What it reads besides: on the cluster, or sent because of ``--include``."""
    must_say: bool = True
    """Whether one of ``results`` must be given: the default is below the job's own folder."""


_KINDS = {
    "fit": _Kind(sent=("config",), results=("out", "resume")),
    "evaluate": _Kind(results=("out",), places=("artefact", "dataset"), must_say=False),
    "score": _Kind(results=("out", "maps_dir"), places=("paths", "api_key_file")),
    "sweep": _Kind(sent=("space", "config"), results=("out",)),
    "benchmark": _Kind(sent=("suite",), results=("out",), places=("data",)),
    "serve": _Kind(
        places=("artefact", "api_key_file", "artifact_root", "shadow"), results=("write_config",), must_say=False
    ),
    "prepare": _Kind(sent=("what",), results=("out", "download"), places=("source",), must_say=False),
}


def moved(
    group: click.Group, command: Sequence[str], upload: Upload, *, notice: Callable[[str], None]
) -> list[str]:  # fmt: skip
    """The command line as its job runs it; the files that it names are added to the upload.

    Args:
        group: raydiff's commands.
        command: as typed, without ``raydiff``.
        upload: with what ``--include`` named.
        notice: told what the cluster must have.

    Raises:
        ConfigError: it cannot run in a job, or names what would not be there; click's own where it cannot be parsed.
    """
    name, *arguments = command
    if any(_PASSWORD.search(word) for word in command):
        notice(
            "Warning: a URI in this command seems to hold a key or password; who can read the dashboard can read it:"
            " give it with --env"
        )
    kind = _KINDS.get(name)
    if kind is None:
        raise ConfigError(f"{name}: is no command that runs as a job; there are: {', '.join(_KINDS)}")
    params = group.commands[name].make_context(f"raydiff {name}", list(arguments)).params
    for value in _paths(params, kind.sent):
        if name != "prepare" or Path(value).suffix or Path(value).exists():  # else it is a data set's name
            upload.add(value)
    _check_results(name, kind, params)
    _check_study(params.get("storage"))
    data = _data_of(name, params)
    if data is not None:
        _check_data(data, upload, name, params, notice)
    for value in _paths(params, kind.places):
        _check_place(value, upload)
    wanted = _paths(params, kind.sent + kind.places)
    return [name, *(_rewritten(argument, wanted, upload) for argument in arguments)]


def shown(command: str) -> str:
    """A command line without what may be a key or password in its URIs: ``s3://...@bucket/run``."""
    return _USER.sub("://...@", command)


def _paths(params: dict[str, Any], names: Sequence[str]) -> list[str]:
    """The values of parameters that are paths and no URIs, flat."""
    values = [value for name in names for value in _many(params.get(name))]
    return [str(value) for value in values if value is not None and "://" not in str(value)]


def _many(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else (value,)


def _check_results(name: str, kind: _Kind, params: dict[str, Any]) -> None:
    given = [option for option in kind.results if params.get(option) is not None]
    if kind.must_say and not given:
        raise ConfigError(
            f"{name} needs --out in a job, where the default would lie in a folder that is deleted: give s3://... or an"
            " absolute path that all nodes have"
        )
    for option in given:
        value = str(params[option])
        if "://" not in value and not Path(value).expanduser().is_absolute():
            raise ConfigError(
                f"--{option.removesuffix('_dir').replace('_', '-')} {value}: is relative, and a job's folder is on one"
                " node and is deleted; give s3://... or an absolute path that all nodes have"
            )


def _check_study(storage: str | None) -> None:
    if storage is not None and storage.startswith("sqlite:///") and not storage.startswith("sqlite:////"):
        raise ConfigError(
            f"--storage {storage}: is relative, and a job's folder is on one node and is deleted; give sqlite:////PATH"
            " on a path that all nodes have, or a database server"
        )


def _check_place(value: str, upload: Upload) -> None:
    if upload.name_of(value) is None and not Path(value).expanduser().is_absolute() and _looks_like_a_place(value):
        raise ConfigError(
            f"{value}: is relative and not sent; give s3://... or an absolute path that all nodes have, or send it with"
            f" --include {value}"
        )


def _looks_like_a_place(value: str) -> bool:
    """Not a data set's name."""
    from raydiff import registry

    return Path(value).exists() or value not in registry.names("datasets")


def _data_of(name: str, params: dict[str, Any]) -> DataConfig | None:
    """The data that the command learns from; its config is checked by the way.

    Raises:
        ConfigError: the config cannot be used.
    """
    from raydiff.sources import config_of, data_of

    if name == "prepare":
        return None if params["download"] else data_of(params["what"], params["source"], None, params["overrides"])
    if name == "sweep" or (name == "fit" and params["resume"] is None):
        return config_of(params["config"], params["overrides"]).data
    return None


def _check_data(
    data: DataConfig, upload: Upload, name: str, params: dict[str, Any], notice: Callable[[str], None]
) -> None:  # fmt: skip
    shards = params["out"] if name == "prepare" and params["out"] else data.shards
    if shards is not None and _is_relative(shards):
        raise ConfigError(
            f"data.shards {shards}: is relative, and a job's folder is on one node and is deleted; give s3://... or an"
            " absolute path that all nodes have"
        )
    if name != "prepare" and (grids := data.grids) not in (None, "run") and _is_relative(str(grids)):
        raise ConfigError(
            f"data.grids {grids}: is relative, and a job's folder is on one node and is deleted; give s3://..., an"
            " absolute path that all nodes have, or run"
        )
    if name != "prepare" and data.spaces is not None and _is_relative(data.spaces):
        raise ConfigError(
            f"data.spaces {data.spaces}: is relative, and a job's folder is on one node and is deleted; give s3://..."
            " or an absolute path that all nodes have"
        )
    if shards is None and name == "prepare":
        raise ConfigError("prepare needs --out in a job: give s3://... or an absolute path that all nodes have")
    source = getattr(data.dataset, "source", None)
    if source is None or "://" in source or upload.name_of(source) == Path(source).as_posix():
        return
    if not Path(source).expanduser().is_absolute():
        raise ConfigError(
            f"data.dataset.source {source}: is relative and not sent; write it as shards to s3:// (raydiff prepare) and"
            f" set data.shards, give an absolute path that all nodes have, or send it with --include {source}"
        )
    if shards is None or name == "prepare":
        notice(f"data.dataset.source {source}: is not sent; every node must have it there")


def _is_relative(place: str) -> bool:
    return "://" not in place and not Path(place).expanduser().is_absolute()


def _rewritten(argument: str, wanted: Sequence[str], upload: Upload) -> str:
    """An argument, or an option's value behind =, under its name in the job's folder where it is sent."""
    option, mark, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    if not value or str(Path(value)) not in {str(Path(each)) for each in wanted}:
        return argument
    there = upload.name_of(value)
    return argument if there is None else f"{option}{mark}{there}"
