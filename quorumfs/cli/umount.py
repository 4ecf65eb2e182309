"""``quorumfs umount``."""

import os
import select
from time import monotonic

import click

from quorumfs.control import client, mounts, runtime
from quorumfs.errors import UsageError, UserError

PATIENCE_S = 10.0
"""How long to wait for the daemon in silence."""

LOOK_S = 0.5
"""How often to look whether it has done what it can."""

END_S = 1.0
"""How long its end may take after that."""


@click.command()
@click.argument("mountpoint")
def umount(mountpoint: str) -> None:
    """Unmount MOUNTPOINT, and wait until the replicas are synced and the daemon is gone."""
    mountpoint = os.path.realpath(mountpoint)
    mounted = mounts.mount_at(mountpoint)
    if mounted is None or mounted.fs_type != mounts.FS_TYPE:
        raise UsageError(f"{mountpoint} is not a quorumfs mount")
    if os.geteuid() not in (0, mounted.owner):
        raise UserError(
            f"{mountpoint} is a mount of {client.user_name(mounted.owner)}: only that user and "
            "root may unmount it"
        )
    pid = runtime.daemon_pid(mountpoint, mounted.owner)
    # Before unmounting, so that the number cannot be that of another process by then.
    daemon = os.pidfd_open(pid) if pid else None
    try:
        mounts.unmount(mountpoint)
    except UserError as error:
        ours = (os.getpid(), pid)  # may stand in what the mount covers, or in it for a moment
        users = [user for user in mounts.users_of(mountpoint) if user[0] not in ours]
        named = ", ".join(f"pid {pid} ({name})" for pid, name in users)
        hint = f"; in use by {named}" if named else ""
        raise UserError(f"{error}{hint}") from None
    if daemon is not None:
        _wait_for(daemon, pid, mountpoint, mounted.owner)
        if word := runtime.take_word(mountpoint, mounted.owner):
            raise UserError(f"unmounted {mountpoint}, but {word}")


def _wait_for(daemon: int, pid: int | None, mountpoint: str, owner: int) -> None:
    """Wait until the daemon has ended, or has done all that it can do for that."""
    waiting = select.poll()
    waiting.register(daemon, select.POLLIN)
    silent_until = monotonic() + PATIENCE_S
    while not waiting.poll(LOOK_S * 1000):
        if runtime.daemon_pid(mountpoint, owner) != pid:  # it let go of the mount point: at its end
            if not waiting.poll(END_S * 1000):
                click.echo(
                    f"pid {pid} has finished, but cannot end before a file system that does not "
                    "answer does: the replica there stays locked until then",
                    err=True,
                )
            return
        if monotonic() > silent_until:
            click.echo(f"waiting for pid {pid} to sync the replicas of {mountpoint}", err=True)
            silent_until = float("inf")
