"""``quorumfs umount``."""

import os
import select
from contextlib import suppress
from time import monotonic

import click

from quorumfs.cli.status import printable
from quorumfs.control import client, mounts, runtime
from quorumfs.control.status import HANGS, Status, awaited, describe
from quorumfs.errors import UserError

PATIENCE_S = 10.0
"""How long to wait for the daemon in silence."""

HANGS_S = 2
"""A replica that has not answered for this long (seconds) is named."""

ANSWER_S = 2.0
"""How long to wait for the daemon to say what it waits for."""

GIVE_UP_S = 60.0
"""How long to wait for a daemon that does not go on: it gives up no request then."""


@click.command()
@click.argument("mountpoint")
def umount(mountpoint: str) -> None:
    """Unmount MOUNTPOINT, and wait until the replicas are synced and the daemon is gone."""
    mounted = client.find(mountpoint)  # without looking at it, for that asks the daemon
    mountpoint = mounted.mountpoint
    if os.geteuid() not in (0, mounted.owner):
        raise UserError(
            f"{mountpoint} is a mount of {client.user_name(mounted.owner)}: only that user and "
            "root may unmount it"
        )
    pid = runtime.daemon_pid(mountpoint, mounted.owner)
    # Before unmounting, so that the number cannot be that of another process by then.
    daemon = os.pidfd_open(pid) if pid else None
    watch = _Watch(mounted)
    watch.note_who_hangs()
    try:
        mounts.unmount(mountpoint, meanwhile=watch.look)
    except _GivenUpError as error:
        raise UserError(f"gave up unmounting {mountpoint}: {error}") from None
    except UserError as error:
        ours = (os.getpid(), pid)  # may stand in what the mount covers, or in it for a moment
        users = [user for user in mounts.users_of(mountpoint) if user[0] not in ours]
        named = ", ".join(f"pid {pid} ({name})" for pid, name in users)
        hint = f"; in use by {named}" if named else ""
        waits = "".join(f"; {line}" for line in watch.awaited().values())
        raise UserError(f"{error}{hint}{waits}") from None
    if daemon is not None:
        try:
            _wait_for(daemon, pid, watch)
        except _GivenUpError as error:
            raise UserError(
                f"unmounted {mountpoint}, but pid {pid} has not synced the replicas yet, and goes "
                f"on when it can: {error}"
            ) from None
        if word := runtime.take_word(mountpoint, mounted.owner):
            raise UserError(f"unmounted {mountpoint}, but {word}")


class _GivenUpError(Exception):
    """The daemon does not go on; the message says why."""


class _Watch:
    """Says what the end of a mount waits for."""

    def __init__(self, mount: mounts.Mount) -> None:
        self.mount = mount
        self.told: set[str] = set()
        """Of which replicas it was said."""
        self.hung: list[str] = []
        """Replicas that had been left behind because they do not answer, the last time heard."""
        self._heard_at = monotonic()

    def note_who_hangs(self) -> None:
        """Ask while the daemon can still be asked."""
        self._ask()

    def look(self) -> None:
        """Say who does not answer, once of each; raises `_GivenUpError` if the daemon stands still
        for too long.
        """
        status = self._ask()
        if status is not None and status.standstill_s is None:
            self._heard_at = monotonic()
        waits = self._awaited(status)
        for key, line in waits.items():
            if key not in self.told:
                self.told.add(key)
                click.echo(f"waiting for {printable(line)}", err=True)
        if monotonic() - self._heard_at > GIVE_UP_S:
            raise _GivenUpError(
                "; ".join(map(printable, waits.values()))
                or "it does not answer; see "
                + runtime.log_of(self.mount.mountpoint, self.mount.owner)
            )

    def awaited(self) -> dict[str, str]:
        """Who does not answer: by path, or by nothing if it is the daemon itself, in words."""
        return self._awaited(self._ask())

    def _awaited(self, status: Status | None) -> dict[str, str]:
        if status is None:
            return {}
        found = awaited(status, HANGS_S)
        if not found and status.standstill_s is not None:
            found[""] = f"pid {status.pid}: {describe(status)[0]}"
        return found

    def _ask(self) -> Status | None:
        with suppress(client.ControlError):  # it is at its end, or stopped
            status = client.status(self.mount.mountpoint, timeout_s=ANSWER_S, mount=self.mount)
            self.hung = [replica.path for replica in status.replicas if replica.reason == HANGS]
            return status
        return None


def _wait_for(daemon: int, pid: int | None, watch: _Watch) -> None:
    """Wait until the daemon has ended, or has done all that it can do for that.

    Raises `_GivenUpError`.
    """
    mountpoint, owner = watch.mount.mountpoint, watch.mount.owner
    waiting = select.poll()
    waiting.register(daemon, select.POLLIN)
    began = monotonic()
    told = False
    while not waiting.poll(mounts.LOOK_S * 1000):
        if runtime.daemon_pid(mountpoint, owner) != pid:  # it let go of the mount point: at its end
            if not waiting.poll(PATIENCE_S * 1000):
                hung = ", ".join(map(printable, watch.hung)) or "a replica"
                click.echo(
                    f"pid {pid} has finished, but cannot end before the file system of {hung} "
                    "answers: look at its disk, or the network to it; it stays locked until then",
                    err=True,
                )
            return
        watch.look()
        if not told and not watch.told and monotonic() - began > PATIENCE_S:
            click.echo(f"waiting for pid {pid} to sync the replicas of {mountpoint}", err=True)
            told = True
