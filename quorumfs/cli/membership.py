"""``quorumfs offline``, ``online``, ``add``, ``remove`` and ``replace``."""

import os
from pathlib import Path

import click

from quorumfs.cli.acting import act, options_of_action
from quorumfs.cli.command import OF_A_MOUNT, Verb
from quorumfs.cli.completion import FilePath, MountPoint, Replica
from quorumfs.errors import ExitCode


@click.command(
    cls=Verb,
    examples=[
        ("quorumfs offline /mnt/vdisk b.img", "Before b.img is copied: a backup."),
    ],
    exits={
        **OF_A_MOUNT,
        ExitCode.FAILED: "It was refused; or it was not current: it is out, and no backup.",
    },
    see=["online", "remove"],
)
@options_of_action
@click.argument("mountpoint", type=MountPoint())
@click.argument("replica", type=Replica())
def offline(as_json: bool, runtime_dir: Path | None, mountpoint: str, replica: str) -> ExitCode:
    """Take REPLICA of the set at MOUNTPOINT out, while the disk stays in use.

    Its image then holds the disk as it was at that moment, as after a power cut; its files are
    closed, and any program may read them: a backup. It stays out, also at later mounts, until
    quorumfs online. Refused where too few replicas would be left.
    """
    answer = act(
        mountpoint, "offline", as_json=as_json, runtime_dir=runtime_dir, replica=named(replica)
    )
    return ExitCode.OK if answer.get("is_copy", True) else ExitCode.FAILED


@click.command(
    cls=Verb,
    examples=[("quorumfs online /mnt/vdisk b.img", "After b.img was copied.")],
    exits=OF_A_MOUNT,
    see=["offline"],
)
@options_of_action
@click.argument("mountpoint", type=MountPoint())
@click.argument("replica", type=Replica())
def online(as_json: bool, runtime_dir: Path | None, mountpoint: str, replica: str) -> None:
    """Take REPLICA of the set at MOUNTPOINT in again: it gets what was written meanwhile."""
    act(mountpoint, "online", as_json=as_json, runtime_dir=runtime_dir, replica=named(replica))


@click.command(
    cls=Verb,
    examples=[
        ("quorumfs add --at 1 --wait /mnt/vdisk /srv/c.img", "One more, read first with fifo."),
    ],
    exits=OF_A_MOUNT,
    see=["remove", "replace"],
)
@options_of_action
@click.option("--at", type=click.IntRange(1), help="Its place in the order of reads, from 1 on.")
@click.option("--overwrite", is_flag=True, help="Give up what IMAGE holds.")
@click.option("--wait", is_flag=True, help="Wait until it holds everything.")
@click.argument("mountpoint", type=MountPoint())
@click.argument("image", type=FilePath())
def add(
    as_json: bool,
    runtime_dir: Path | None,
    at: int | None,
    overwrite: bool,
    wait: bool,
    mountpoint: str,
    image: str,
) -> None:
    """Make IMAGE a replica of the set at MOUNTPOINT, while the disk stays in use.

    IMAGE is made if it is absent. It counts once it holds everything, by a resync.

    A block device needs --overwrite, and a directory for its sidecar: the mount option sidecars,
    which set gives.
    """
    act(
        mountpoint,
        "add",
        as_json=as_json,
        runtime_dir=runtime_dir,
        image=os.path.abspath(image),
        at=at,
        overwrite=overwrite,
        wait=wait,
    )


@click.command(
    cls=Verb,
    examples=[("quorumfs remove /mnt/vdisk a.img", "The set goes on without a.img.")],
    exits=OF_A_MOUNT,
    see=["add", "offline", "replace"],
)
@options_of_action
@click.argument("mountpoint", type=MountPoint())
@click.argument("replica", type=Replica())
def remove(as_json: bool, runtime_dir: Path | None, mountpoint: str, replica: str) -> None:
    """Remove REPLICA from the set at MOUNTPOINT for good, while the disk stays in use.

    Its image keeps the disk as it was. Refused where too few replicas would be left.
    """
    act(mountpoint, "remove", as_json=as_json, runtime_dir=runtime_dir, replica=named(replica))


@click.command(
    cls=Verb,
    examples=[
        (
            "quorumfs replace /mnt/vdisk b.img /srv/new/b.img",
            "The medium of b.img died, or is to be taken away.",
        ),
    ],
    exits=OF_A_MOUNT,
    see=["add", "remove"],
)
@options_of_action
@click.option("--overwrite", is_flag=True, help="Give up what NEW holds.")
@click.argument("mountpoint", type=MountPoint())
@click.argument("old", type=Replica())
@click.argument("new", type=FilePath())
def replace(
    as_json: bool, runtime_dir: Path | None, overwrite: bool, mountpoint: str, old: str, new: str
) -> None:
    """Have NEW take the place of OLD in the set at MOUNTPOINT, while the disk stays in use.

    NEW is made if it is absent, or is a block device, as with add, and gets everything by a resync.
    OLD serves until then, if it can, and is then removed. If this is interrupted, the same command
    goes on.
    """
    act(
        mountpoint,
        "replace",
        as_json=as_json,
        runtime_dir=runtime_dir,
        replica=named(old),
        image=os.path.abspath(new),
        overwrite=overwrite,
    )


def named(replica: str) -> str:
    """What to call *replica* before a daemon, which has another working directory."""
    is_path = os.path.dirname(replica) or os.path.lexists(replica)
    return os.path.abspath(replica) if is_path else replica
