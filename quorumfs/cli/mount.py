"""``quorumfs mount``."""

import os
from contextlib import suppress
from pathlib import Path

import click

from quorumfs.assembly import State
from quorumfs.cli.output import complain
from quorumfs.control import client
from quorumfs.control.status import describe
from quorumfs.daemon import occupy_streams, run_detached
from quorumfs.errors import UserError
from quorumfs.options import options_help, parse_options


class _MountCommand(click.Command):
    """Shows the mount options below the help, from the table that parses them."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Mount options (-o NAME[=VALUE][,...])"):
            formatter.write("".join(f"  {line}\n" for line in options_help().splitlines()))


@click.command(cls=_MountCommand)
@click.option(
    "-o",
    "texts",
    multiple=True,
    metavar="OPT[,OPT...]",
    help="Mount options, see below; may be given more than once.",
)
@click.option("-f", "foreground", is_flag=True, help="Stay in the foreground.")
@click.option(
    "--log-file",
    type=click.Path(path_type=Path),
    help="Log to this file; else to syslog, or to stderr with -f.",
)
@click.option("--log-json", is_flag=True, help="Log one JSON object a line.")
@click.option(
    "--runtime-dir",
    type=click.Path(path_type=Path, resolve_path=True),
    help="Keep there what status and umount need to find this mount; tell them the same.",
)
@click.argument("replicas", nargs=-1, required=True, metavar="REPLICA...")
@click.argument("mountpoint")
def mount(
    texts: tuple[str, ...],
    foreground: bool,
    log_file: Path | None,
    log_json: bool,
    runtime_dir: Path | None,
    replicas: tuple[str, ...],
    mountpoint: str,
) -> None:
    """Show the disk kept on the REPLICA image files as MOUNTPOINT/disk.img.

    Returns when the file can be opened, with the daemon in the background.
    """
    occupy_streams()
    options = parse_options(texts, len(replicas))
    # Only now: a refusal needs no FUSE, and what it imports takes most of the start-up time.
    from quorumfs.mounting import MountPlan, serve  # noqa: PLC0415

    plan = MountPlan(
        [os.path.abspath(path) for path in replicas],
        os.path.realpath(mountpoint),
        options,
        log_file and log_file.absolute(),
        log_json,
        runtime_dir,
    )
    if foreground:
        serve(plan, lambda: None, detached=False)
        return
    run_detached(lambda ready: serve(plan, ready, detached=True))
    try:
        os.stat(os.path.join(plan.mountpoint, "disk.img"))
    except OSError as error:
        raise UserError(f"mounted, but disk.img cannot be used: {error.strerror}") from None
    _warn(plan.mountpoint, runtime_dir)


def _warn(mountpoint: str, runtime_dir: Path | None) -> None:
    """Say on stderr which replicas are not in full use; the mount itself has succeeded."""
    with suppress(client.ControlError):
        status = client.status(mountpoint, runtime_dir=runtime_dir)
        if any(replica.state != State.CURRENT.value for replica in status.replicas):
            for line in describe(status):
                complain(f"quorumfs: warning: {line}")
