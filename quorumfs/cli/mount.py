"""``quorumfs mount``."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

import click

from quorumfs.cli.acting import act
from quorumfs.cli.command import IF_NEEDED, Verb
from quorumfs.cli.completion import FilePathOrName, OptionList
from quorumfs.cli.needed import already_mounted, options_of_change, would
from quorumfs.cli.output import complain, printable
from quorumfs.control import client
from quorumfs.control.advice import describe
from quorumfs.control.journald import WARNING
from quorumfs.control.status import DiskState, Status
from quorumfs.decisions.growth import LONGER
from quorumfs.decisions.sectors import unreachable
from quorumfs.errors import ExitCode, UsageError, UserError
from quorumfs.mount.configuration import configured, is_name, path_of
from quorumfs.mount.daemon import in_child_process, run_detached
from quorumfs.options.parsing import parse_options
from quorumfs.options.table import option_rows

NO_REPLICA = "Missing argument 'REPLICA...'."


@click.command(
    cls=Verb,
    examples=[
        (
            "quorumfs mount -o read-pattern=fifo,vote-threshold=1 /nas1/a.img /nas2/b.img "
            "/mnt/vdisk",
            "Two replicas: reads come from the first, and one is enough.",
        ),
        (
            "quorumfs mount --if-needed /nas1/a.img /nas2/b.img /mnt/vdisk",
            "The same may be given again: nothing is done if it is mounted so already.",
        ),
        ("quorumfs mount -o remount,resync-rate=50M /mnt/vdisk", "Changes an option in use."),
    ],
    exits={
        **IF_NEEDED,
        ExitCode.UNUSABLE: "It is mounted, but too few replicas are current until a resync ends: "
        "do not use the disk yet. Or no sidecar can be read.",
        ExitCode.NEEDS_OPERATOR: "A person must decide: split brain. Nothing was mounted.",
    },
    tables={"Mount options": option_rows()},
    see=["create", "set", "status", "umount"],
)
@click.option(
    "-o",
    "texts",
    multiple=True,
    type=OptionList(),
    metavar="NAME[=VALUE][,...]",
    help="Mount options, see below; may be given more than once.",
)
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground.")
@click.option(
    "--log-file",
    type=click.Path(path_type=Path),
    help="Write the log to this file. Default: the journal, or syslog, or else a file in the "
    "runtime directory; with -f: stderr.",
)
@click.option("--log-json", is_flag=True, help="Log one JSON object a line.")
@click.option(
    "--runtime-dir",
    type=click.Path(path_type=Path, resolve_path=True),
    help="Keep there what status and umount need to find this mount; tell them the same.",
)
@options_of_change
@click.argument("replicas", type=FilePathOrName(), nargs=-1, metavar="REPLICA...")
@click.argument("mountpoint", type=FilePathOrName(), required=False, metavar="MOUNTPOINT")
def mount(
    texts: tuple[str, ...],
    foreground: bool,
    log_file: Path | None,
    log_json: bool,
    runtime_dir: Path | None,
    if_needed: bool,
    check: bool,
    replicas: tuple[str, ...],
    mountpoint: str | None,
) -> ExitCode:
    """Show the disk kept on the REPLICA image files or block devices as MOUNTPOINT/disk.img.

    Returns when the file can be opened, with the daemon in the background.

    With a NAME alone, mounts the disk that /etc/quorumfs/NAME.conf tells of; options given beside
    it count for more than those there.

    With -o remount and no REPLICA, changes the options of the disk at MOUNTPOINT, as set does; with
    a NAME, to what its file says.
    """
    if mountpoint is None:
        raise click.UsageError(NO_REPLICA)
    if "remount" in items(texts):
        if replicas:
            raise UsageError(
                "option remount: got replicas too, allowed: the mount point alone; add, remove and "
                "replace change which replicas there are"
            )
        if check:
            raise UsageError("option remount: got --check too, allowed: one of them")
    if not replicas and is_name(mountpoint) and os.path.exists(path_of(mountpoint)):
        disk = configured(mountpoint)
        replicas, mountpoint, texts = disk.replicas, disk.mountpoint, (disk.options, *texts)
    if "remount" in items(texts):
        remount(mountpoint, texts, runtime_dir)
        return ExitCode.OK
    if not replicas:
        no_file = f" There is no {path_of(mountpoint)}." if is_name(mountpoint) else ""
        raise click.UsageError(f"{NO_REPLICA}{no_file}")
    return mount_replicas(
        replicas,
        mountpoint,
        texts,
        foreground=foreground,
        log_file=log_file,
        log_json=log_json,
        runtime_dir=runtime_dir,
        if_needed=if_needed,
        check=check,
    )


def items(texts: Sequence[str]) -> list[str]:
    """The options in *texts*, each a list as after ``-o``."""
    return [item for text in texts for item in text.split(",") if item]


def remount(mountpoint: str, texts: Sequence[str], runtime_dir: Path | None = None) -> None:
    """Change the options of the disk at *mountpoint* to those in *texts*. Raises `UserError`."""
    changes = [item for item in items(texts) if item != "remount"]
    act(mountpoint, "set", as_json=False, runtime_dir=runtime_dir, options=changes)


def mount_replicas(
    replicas: Sequence[str],
    mountpoint: str,
    texts: Sequence[str],
    *,
    foreground: bool = False,
    log_file: Path | None = None,
    log_json: bool = False,
    runtime_dir: Path | None = None,
    if_needed: bool = False,
    check: bool = False,
) -> ExitCode:
    """Mount *replicas* with the options in *texts*; return when disk.img can be opened, or, in the
    *foreground*, when it is unmounted.

    *if_needed*: nothing is done where it is mounted so. *check*: nothing but to say what would be
    done. Raises `UserError`.
    """
    options = parse_options(texts, len(replicas))
    # Only now: a refusal needs no FUSE, and what it imports takes most of the start-up time.
    from quorumfs.mount.life import MountPlan, rehearse, serve  # noqa: PLC0415
    from quorumfs.replica.images import inside  # noqa: PLC0415

    plan = MountPlan(
        [os.path.abspath(path) for path in replicas],
        os.path.realpath(mountpoint),
        options,
        log_file and log_file.absolute(),
        log_json,
        runtime_dir,
    )
    if plan.log_file is not None and inside(str(plan.log_file), plan.mountpoint):
        raise UserError(f"the log file {plan.log_file} is inside the mount point {plan.mountpoint}")
    if if_needed and already_mounted(plan.mountpoint, plan.replicas, options, runtime_dir):
        print(f"nothing to do: {printable(plan.mountpoint)} is mounted already")
        _tell(plan.mountpoint, runtime_dir, options.replica_timeout_s)
        return ExitCode.OK
    if check:
        lines = in_child_process(lambda: rehearse(plan))
        return would(f"mount {', '.join(plan.replicas)} at {plan.mountpoint}", lines)
    if foreground:
        serve(plan, lambda: None, detached=False)
        return ExitCode.OK
    run_detached(lambda ready: serve(plan, ready, detached=True))
    try:
        os.stat(os.path.join(plan.mountpoint, "disk.img"))
    except OSError as error:
        raise UserError(f"mounted, but disk.img cannot be used: {error.strerror}") from None
    _tell(plan.mountpoint, runtime_dir, options.replica_timeout_s)
    return ExitCode.OK


def _tell(mountpoint: str, runtime_dir: Path | None, patience_s: float) -> None:
    """Say on stderr what is not as it should be with a mount that was made.

    Raises `UserError` if it cannot be used, because too few replicas are current and those that
    are brought up to date do not get there within *patience_s* seconds. Where nobody can tell, that
    is said.
    """
    deadline = time.monotonic() + patience_s
    try:
        status = client.status(mountpoint, runtime_dir=runtime_dir)
        while _comes_soon(status) and time.monotonic() < deadline:
            time.sleep(0.05)
            status = client.status(mountpoint, runtime_dir=runtime_dir)
    except client.NotMountedError:  # somebody has unmounted it meanwhile
        return
    except client.ControlError as error:
        _warn([f"mounted, but nothing tells whether it is in order: {error}"])
        return
    if why := unreachable(status.size):
        _warn([why])
    _warn([note for note in status.notes if LONGER in note])
    lines = []
    if not all(replica.current for replica in status.replicas):
        lines = describe(status)
    if status.state is not DiskState.NO_QUORUM:
        _warn(lines)
        return
    first, *others = lines or describe(status)
    _warn(others)
    raise UserError(f"mounted, and stays so, but {first}", exit_code=ExitCode.UNUSABLE)


def _comes_soon(status: Status) -> bool:
    """Whether too few replicas are current, and that may change by itself."""
    unusable = status.state is DiskState.NO_QUORUM
    return unusable and not status.read_only and status.metadata != "none"


def _warn(lines: Sequence[str]) -> None:
    for line in lines:
        complain(f"quorumfs: warning: {line}", WARNING)
