"""``quorumfs resync``."""

from pathlib import Path

import click

from quorumfs.cli.acting import act, one_of, options_of_action
from quorumfs.cli.command import OF_A_MOUNT, Verb
from quorumfs.cli.completion import MountPoint
from quorumfs.cli.waiting import wait_for
from quorumfs.control.goals import RESYNCED
from quorumfs.errors import ExitCode


@click.command(
    cls=Verb,
    examples=[
        ("quorumfs resync --pause /mnt/vdisk", "While the guest needs the disks."),
        ("quorumfs resync --resume --wait /mnt/vdisk", "Until all that can be is up to date."),
    ],
    exits={**OF_A_MOUNT, ExitCode.NEEDS_OPERATOR: "With --wait: resyncs are paused."},
    see=["status", "wait"],
)
@options_of_action
@click.option("--pause", is_flag=True, help="Break it off, and begin none.")
@click.option("--resume", is_flag=True, help="Go on.")
@click.option("--limit", metavar="RATE", help="Bytes a second that are copied, like 50M, or none.")
@click.option("--wait", is_flag=True, help="Wait until all that can be brought up to date is.")
@click.argument("mountpoint", type=MountPoint())
def resync(
    as_json: bool,
    runtime_dir: Path | None,
    pause: bool,
    resume: bool,
    limit: str | None,
    wait: bool,
    mountpoint: str,
) -> None:
    """Steer how replicas of the disk at MOUNTPOINT that missed something are brought up to date.

    Without options, says how far that is. A pause and a limit hold until they are changed, or the
    disk is unmounted. What was copied before a pause is not copied again. With --wait, Ctrl-C
    ends the waiting alone.
    """
    act(
        mountpoint,
        "resync",
        as_json=as_json,
        runtime_dir=runtime_dir,
        order=one_of(pause=pause, resume=resume) or "show",
        limit=[] if limit is None else [limit],
    )
    if wait:
        wait_for(mountpoint, RESYNCED, None, runtime_dir)
