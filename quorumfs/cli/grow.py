"""``quorumfs grow``."""

from pathlib import Path

import click

from quorumfs.cli.acting import act, options_of_action
from quorumfs.cli.command import OF_A_MOUNT, Verb
from quorumfs.cli.completion import MountPoint
from quorumfs.errors import UsageError
from quorumfs.options.values import RefusedError, parse_size


@click.command(
    cls=Verb,
    examples=[
        ("quorumfs grow /mnt/vdisk 40G", "To 40 GiB; a smaller disk is refused."),
        ("quorumfs grow /mnt/vdisk +20G", "By 20 GiB."),
    ],
    exits=OF_A_MOUNT,
    see=["status"],
)
@options_of_action
@click.argument("mountpoint", type=MountPoint())
@click.argument("size")
def grow(as_json: bool, runtime_dir: Path | None, mountpoint: str, size: str) -> None:
    """Make the disk at MOUNTPOINT larger, while it stays in use: SIZE like 40G, or +10G for more.

    All images become longer first; one that cannot is ejected, or the disk keeps its size where too
    few would be left. The bytes added are zeros, and take no space. If that was interrupted, the
    same command does the rest; not so with +. Then tell who uses the disk: QEMU by block_resize, a
    loop device by losetup -c.
    """
    more = size.startswith("+")
    try:
        count = parse_size(size.removeprefix("+"))
    except RefusedError as refused:
        raise UsageError(f"SIZE: got {size!r}, allowed: {refused}; after a + for more") from None
    act(mountpoint, "grow", as_json=as_json, runtime_dir=runtime_dir, size=count, more=more)
