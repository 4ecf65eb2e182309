"""``quorumfs set``."""

from pathlib import Path

import click

from quorumfs.cli.acting import act, options_of_action
from quorumfs.cli.command import OF_A_MOUNT, Verb
from quorumfs.cli.completion import MountPoint, Setting


@click.command(
    "set",
    cls=Verb,
    examples=[("quorumfs set /mnt/vdisk read-pattern=fifo replica-timeout=4s", "Both, or none.")],
    exits=OF_A_MOUNT,
    see=["mount", "status"],
)
@options_of_action
@click.argument("mountpoint", type=MountPoint())
@click.argument("options", type=Setting(), nargs=-1, required=True, metavar="OPTION=VALUE...")
def set_options(
    as_json: bool, runtime_dir: Path | None, mountpoint: str, options: tuple[str, ...]
) -> None:
    """Change mount options of the disk at MOUNTPOINT while it stays in use: all of them, or none.

    vote-threshold, read-pattern, write-mostly, rewrite-corrupted, blkverify, replica-timeout,
    write-ack, behind-max, resync-rate, scrub-every, on-event and sidecars, as mount takes them;
    until it is unmounted, but vote-threshold is that of the set from then on. Any other is refused,
    unless it has that value already.
    """
    act(mountpoint, "set", as_json=as_json, runtime_dir=runtime_dir, options=list(options))
