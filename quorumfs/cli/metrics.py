"""``quorumfs metrics``."""

import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from quorumfs.cli.answers import ask_all
from quorumfs.cli.command import Verb
from quorumfs.cli.completion import MountPoint
from quorumfs.cli.output import printable
from quorumfs.errors import ExitCode, UsageError, UserError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

FILE = "quorumfs.prom"
"""What node_exporter's textfile collector finds in its directory."""


@click.command(
    cls=Verb,
    examples=[
        (
            "quorumfs metrics --textfile /var/lib/prometheus/node-exporter",
            "For a timer: node_exporter reads the file.",
        ),
        ("quorumfs metrics --listen 9750", "For Prometheus on this host."),
    ],
    exits={
        ExitCode.OK: "Done; what is not mounted, or does not answer, has quorumfs_up 0.",
        ExitCode.USAGE: "The command line is wrong.",
    },
    see=["check", "status"],
)
@click.option(
    "--textfile",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help=f"Write DIR/{FILE} for node_exporter, in one piece, and print nothing.",
)
@click.option(
    "--listen", metavar="[HOST:]PORT", help="Answer scrapes there until Ctrl-C (HOST: 127.0.0.1)."
)
@click.option(
    "--runtime-dir",
    type=click.Path(path_type=Path, resolve_path=True),
    help="Look for daemons there too: the directory that was given to mount --runtime-dir.",
)
@click.argument("mountpoints", type=MountPoint(), nargs=-1, metavar="[MOUNTPOINT...]")
def metrics(
    textfile: Path | None,
    listen: str | None,
    runtime_dir: Path | None,
    mountpoints: tuple[str, ...],
) -> ExitCode:
    """Print the metrics of each MOUNTPOINT, or of all quorumfs mounts, for Prometheus.

    A mount whose daemon does not answer has quorumfs_up 0, and does not make it fail.
    """
    from prometheus_client import (  # noqa: PLC0415 (a tenth of a second, needed only here)
        CollectorRegistry,
        generate_latest,
        write_to_textfile,
    )

    if textfile is not None and listen is not None:
        raise UsageError("--listen: got --textfile too, allowed: one of them")
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Mounts(mountpoints, runtime_dir))
    if listen is not None:
        _serve(listen, registry)
    elif textfile is not None:
        path = textfile / FILE
        os.umask(0o022)  # node_exporter runs as somebody else
        try:
            write_to_textfile(str(path), registry)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None
    else:
        print(generate_latest(registry).decode(), end="")
    return ExitCode.OK


class _Mounts:
    """Asks the mounts at each scrape."""

    def __init__(self, mountpoints: tuple[str, ...], runtime_dir: Path | None) -> None:
        self._mountpoints = mountpoints
        self._runtime_dir = runtime_dir

    def describe(self) -> Iterable["Metric"]:
        """Nothing: the mounts need not be asked before the first scrape."""
        return []

    def collect(self) -> Iterable["Metric"]:
        from quorumfs.control.metrics import Disk, metrics  # noqa: PLC0415

        view = ask_all(self._mountpoints, self._runtime_dir)
        # One mount that was named twice is one.
        told = {printable(answer.mountpoint): answer.status for answer in view.answers}
        return metrics(Disk(mountpoint, status) for mountpoint, status in told.items())


def _serve(listen: str, registry: "CollectorRegistry") -> None:
    from prometheus_client import start_http_server  # noqa: PLC0415

    host, _, port = listen.rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    if not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UsageError(f"--listen: got {listen!r}, allowed: a port from 1, or HOST:PORT")
    stops = {signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    try:
        server, _ = start_http_server(int(port), host, registry)
    except OSError as error:
        raise UserError(f"cannot listen at {host}:{port}: {error.strerror}") from None
    try:
        place = f"[{host}]" if ":" in host else host
        print(f"listening at http://{place}:{port}/metrics", flush=True)
        signal.sigwait(stops)
        server.shutdown()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
