"""``raydiff serve``."""

from __future__ import annotations

import signal
import stat
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from raydiff.cli.options import Folder, Place

__all__ = ["serve"]


@click.command()
@click.argument("artefact", type=Place())
@click.option("--host", default="127.0.0.1", show_default=True, help="Another one lets other machines in.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(1, 65535))
@click.option("--target-fpr", type=float, help="The false-positive rate to start with; the artefact's own otherwise.")
@click.option("--min-replicas", default=1, show_default=True, help="0: none while nothing is asked.")
@click.option("--max-replicas", default=1, show_default=True, help="Replicas are added while requests wait.")
@click.option("--target-ongoing", default=8.0, show_default=True, help="Requests per replica to scale towards.")
@click.option("--upscale-delay-s", default=5.0, show_default=True, help="Wait so long before a replica is added.")
@click.option("--downscale-delay-s", default=60.0, show_default=True, help="And so long before one is taken away.")
@click.option("--max-queued", default=64, show_default=True, help="Images that may wait; then 503.")
@click.option("--max-batch-size", type=int, help="Images scored in one call [by the detector, 4 to 16].")
@click.option("--batch-wait-ms", default=0.0, show_default=True, help="Wait for more once the detector is free.")
@click.option("--num-cpus", default=1.0, show_default=True, help="CPUs of a replica; fractions too.")
@click.option("--num-gpus", default=0.0, show_default=True, help="GPUs of a replica; 0 scores on the CPU.")
@click.option("--compile", is_flag=True, help="Compile the networks first; quicker on a GPU, starts later.")
@click.option("--timeout-s", default=30.0, show_default=True, help="An answer takes no longer.")
@click.option("--roll-timeout-s", default=300.0, show_default=True, help="A roll that takes longer is given up.")
@click.option("--max-mb", default=32.0, show_default=True, help="Megabytes of an image.")
@click.option("--max-pixels", default=64_000_000, show_default=True, help="Pixels of an image.")
@click.option("--api-key-file", type=Folder(), metavar="FILE", help="Keys, one a line; without, nobody is asked.")
@click.option("--artifact-root", type=Folder(), metavar="DIR", help="Allow rolling to artefacts below it by HTTP.")
@click.option("--shadow", type=Place(), metavar="PLACE", help="An artefact that scores a share for the record only.")
@click.option("--shadow-share", default=0.1, show_default=True)
@click.option("--write-config", type=Folder(), metavar="FILE", help="Write it for `serve deploy`, and start nothing.")
def serve(artefact: Path | str, host: str, port: int, write_config: Path | None, **options: Any) -> None:
    """Serve an artefact over HTTP, with a page to try it, until interrupted.

    \b
    raydiff serve runs/screw
    curl --data-binary @part.png http://127.0.0.1:8000/v1/score
    """  # noqa: D301
    from raydiff.distributed import serve as endpoint
    from raydiff.distributed.serve_settings import ServeSettings

    settings = ServeSettings.of({"artifact": artefact, **options})
    if write_config is not None:
        endpoint.write_config(settings, host, port, write_config)
        click.echo(f"{write_config}: start it with `serve deploy {write_config}`")
        return
    if not endpoint.is_loopback(host):
        keys = "" if settings.api_key_file else " and no API key is asked for (--api-key-file)"
        click.echo(
            f"Warning: {host} lets other machines in; there is no TLS{keys}. Put a proxy with TLS in front.", err=True
        )
    if _is_open_to_all(settings.api_key_file):
        click.echo(
            f"Warning: {settings.api_key_file} can be read by every user of this machine; chmod 600 ends that", err=True
        )
    artifact_id = endpoint.check(settings, host, port)
    click.echo(f"starting with artefact {artifact_id[:12]} ...", err=True)
    stop = threading.Event()

    def ready(address: str) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):  # only now: Ray takes SIGTERM for itself when it starts
            signal.signal(number, lambda *_: stop.set())
        click.echo(f"{address} answers; Ctrl-C ends it")

    endpoint.run(settings, host, port, ready, stop)
    click.echo("ended", err=True)


def _is_open_to_all(file: str | None) -> bool:
    with suppress(OSError):  # that it cannot be read is said elsewhere
        return file is not None and bool(Path(file).stat().st_mode & stat.S_IROTH)
    return False
