"""``quorumfs umount``."""

import os
import select
import signal
from contextlib import suppress
from pathlib import Path

import click

from quorumfs.cli.output import printable
from quorumfs.control import client, mounts, runtime
from quorumfs.errors import UserError

PATIENCE_S = 10.0
"""How long to wait for the daemon in silence; and for another user's, at all."""


@click.command()
@click.option(
    "--runtime-dir",
    type=click.Path(path_type=Path, resolve_path=True),
    help="Where mount was told to keep what commands need to find its daemon.",
)
@click.argument("mountpoint")
def umount(runtime_dir: Path | None, mountpoint: str) -> None:
    """Unmount MOUNTPOINT, and wait until the replicas are synced and the daemon is gone."""
    mounted = client.find(mountpoint)
    mountpoint = mounted.mountpoint
    if os.geteuid() not in (0, mounted.owner):
        raise UserError(
            f"{mountpoint} is a mount of {client.user_name(mounted.owner)}: only that user and "
            "root may unmount it"
        )
    is_ours = mounted.owner == os.geteuid()
    pid = runtime.daemon_pid(mountpoint, mounted.owner, runtime_dir)
    # Before unmounting, so that the number cannot be that of another process by then.
    daemon = _watch(pid, mounted.owner) if pid else None
    hidden = pid is None and is_ours and not mounts.is_dead(mountpoint)
    try:
        mounts.unmount(mountpoint, patience_s=None if is_ours else PATIENCE_S)
    except UserError as error:
        ours = (os.getpid(), pid)  # may stand in what the mount covers, or in it for a moment
        users = [user for user in mounts.users_of(mountpoint) if user[0] not in ours]
        named = ", ".join(f"pid {pid} ({name})" for pid, name in users)
        hint = f"; in use by {named}" if named else ""
        raise UserError(f"{error}{hint}") from None
    if daemon is not None:
        _wait_for(daemon, pid, mounted, runtime_dir)
        with runtime.Finder(runtime_dir) as finder:
            word = finder.take_word(mountpoint, mounted.owner)
        if word:
            raise UserError(f"unmounted {mountpoint}, but {word}")
    elif hidden:
        raise UserError(
            f"unmounted {mountpoint}, but did not find its daemon, which may still be syncing the "
            "replicas: what mount was told with --runtime-dir, umount is to be told too"
        )


def _watch(pid: int, owner: int) -> int | None:
    """A descriptor of the process *pid*, if it lives and is *owner*'s."""
    with suppress(OSError):
        daemon = os.pidfd_open(pid)
        if os.stat(f"/proc/{pid}").st_uid == owner:
            signal.pidfd_send_signal(daemon, 0)  # so that was this process, and no later one
            return daemon
        os.close(daemon)
    return None


def _wait_for(
    daemon: int, pid: int | None, mounted: mounts.Mount, runtime_dir: Path | None
) -> None:
    """Wait until the daemon has ended, or has done all that it can do for that."""
    waiting = select.poll()
    waiting.register(daemon, select.POLLIN)
    mountpoint, owner = mounted.mountpoint, mounted.owner
    told = False
    while not waiting.poll(PATIENCE_S * 1000):
        # It let go of the mount point: at its end
        if runtime.daemon_pid(mountpoint, owner, runtime_dir) != pid:
            if not waiting.poll(PATIENCE_S * 1000):
                click.echo(
                    f"pid {pid} has finished, but cannot end before a file system that does not "
                    "answer does: the replica there stays locked until then",
                    err=True,
                )
            return
        if owner != os.geteuid():  # who may keep it from ending for ever
            raise UserError(
                f"unmounted {mountpoint}, but pid {pid} of {client.user_name(owner)} has not "
                f"ended within {PATIENCE_S:g} s, and may not have synced the replicas: wait until "
                "it is gone before they are used"
            )
        if not told:
            place = printable(mountpoint)
            click.echo(f"waiting for pid {pid} to sync the replicas of {place}", err=True)
        told = True
