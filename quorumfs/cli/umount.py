"""``quorumfs umount``."""

import os
import select
import signal
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep

import click

from quorumfs.cli.command import IF_NEEDED, Verb
from quorumfs.cli.completion import MountPoint
from quorumfs.cli.needed import options_of_change, would
from quorumfs.cli.output import complain, printable
from quorumfs.control import client, mounts, runtime
from quorumfs.control.advice import awaited, describe
from quorumfs.control.journald import WARNING
from quorumfs.control.status import HANGS, Status
from quorumfs.errors import ExitCode, UsageError, UserError

PATIENCE_S = 10.0
"""How long to wait for the daemon in silence; and for another user's, at all."""

HANGS_S = 2
"""A replica that has not answered for this long (seconds) is named."""

ANSWER_S = 2.0
"""How long to wait for the daemon to say what it waits for."""

AGAIN_S = 0.5
"""How soon (seconds) to try again to unmount what is in use."""

GIVE_UP_S = 60.0
"""How long to wait for a daemon that does not go on: it gives up no request then."""

HELD_S = 2.0
"""After this long (seconds) it is asked whether another namespace of mounts has the disk."""

END_S = 1.0
"""How long its end may take after that."""


@click.command(
    cls=Verb,
    examples=[("quorumfs umount /mnt/vdisk", "Returns when the replicas may be copied or moved.")],
    exits=IF_NEEDED,
    see=["mount", "wait"],
)
@click.option(
    "--runtime-dir",
    type=click.Path(path_type=Path, resolve_path=True),
    help="Where mount was told to keep what commands need to find its daemon.",
)
@click.option(
    "--wait",
    is_flag=True,
    help="While the disk is in use, wait, and say who uses it.",
)
@click.option(
    "--pid",
    help="Unmount what the daemon with this process id serves. An empty id (as systemd may give) "
    "does nothing.",
)
@options_of_change
@click.argument("mountpoint", type=MountPoint(), required=False)
def umount(
    runtime_dir: Path | None,
    wait: bool,
    pid: str | None,
    if_needed: bool,
    check: bool,
    mountpoint: str | None,
) -> ExitCode:
    """Unmount MOUNTPOINT, and wait until the replicas are synced and the daemon is gone."""
    if pid is not None:
        if pid and not pid.isdecimal():
            raise UsageError(f"option --pid: got {pid!r}, allowed: the number of a process")
        if mountpoint is not None:
            raise UsageError("option --pid: got a mount point too, allowed: one of them")
        mountpoint = _served_by(pid, runtime_dir)
        if mountpoint is None:
            return ExitCode.OK
    elif mountpoint is None:
        raise click.UsageError("Missing argument 'MOUNTPOINT'.")
    try:
        mounted = client.find(mountpoint)  # without looking at it, for that asks the daemon
    except client.NotMountedError:
        if not if_needed:
            raise
        other = mounts.mount_at(os.path.realpath(mountpoint))
        if other is not None:
            raise UserError(
                f"{mountpoint} is a mount of {other.fs_type}, and not of quorumfs; umount(8) "
                "unmounts it"
            ) from None
        print(f"nothing to do: {printable(mountpoint)} is not mounted")
        return ExitCode.OK
    if check:
        pid_there = _daemon_pid(mounted, runtime_dir)
        if users := _users(mounted.mountpoint, pid_there):
            busy = f"cannot unmount {mounted.mountpoint}: it is busy; in use by {users}"
            raise UserError(busy)
        return would(f"unmount {mounted.mountpoint}")
    unmount(mountpoint, runtime_dir, wait=wait)
    return ExitCode.OK


def _served_by(pid: str, runtime_dir: Path | None) -> str | None:
    """The mount point of the daemon *pid*; None if it serves none, for it has ended, or will."""
    for mount in mounts.of_quorumfs():
        found = _daemon_pid(mount, runtime_dir)
        if found is not None and str(found) == pid:
            return mount.mountpoint
    return None


def _daemon_pid(mounted: mounts.Mount, runtime_dir: Path | None) -> int | None:
    """The process id of the daemon that serves *mounted*, if it lives and is found."""
    with runtime.Finder(runtime_dir) as finder:
        return finder.daemon_pid(finder.place_of(mounted), mounted.owner)


def unmount(mountpoint: str, runtime_dir: Path | None = None, *, wait: bool = False) -> None:
    """Unmount *mountpoint*, and wait until the replicas are synced and the daemon is gone.

    Raises `UserError`; but with *wait*, not because it is in use.
    """
    mounted = client.find(mountpoint)  # without looking at it, for that asks the daemon
    mountpoint = mounted.mountpoint
    if os.geteuid() not in (0, mounted.owner):
        raise UserError(
            f"{mountpoint} is a mount of {client.user_name(mounted.owner)}: only that user and "
            "root may unmount it"
        )
    is_ours = mounted.owner == os.geteuid()
    with runtime.Finder(runtime_dir) as finder:
        found_by = finder.place_of(mounted)
        pid = finder.daemon_pid(found_by, mounted.owner)
    # Before unmounting, so that the number cannot be that of another process by then.
    daemon = _process(pid, mounted.owner) if pid else None
    hidden = pid is None and is_ours and not mounts.is_dead(mountpoint)
    watch = _Watch(mounted, found_by, runtime_dir)
    watch.note_who_hangs()
    try:
        patience_s = None if is_ours else PATIENCE_S
        told = None
        while True:
            try:
                mounts.unmount(mountpoint, patience_s=patience_s, meanwhile=watch.look)
                break
            except mounts.BusyError:
                if not wait:
                    raise
            if (users := _users(mountpoint, pid)) != told:
                told = users
                who = users or "nobody who can be seen: a loop device (losetup -a), or swap"
                line = f"quorumfs: waiting until {mountpoint} is not in use any more by {who}"
                complain(line, WARNING)
            sleep(AGAIN_S)
    except _GivenUpError as error:
        raise UserError(f"gave up unmounting {mountpoint}: {error}") from None
    except UserError as error:
        named = _users(mountpoint, pid)
        hint = f"; in use by {named}" if named else ""
        waits = "".join(f"; {line}" for line in watch.awaited().values())
        raise UserError(f"{error}{hint}{waits}") from None
    shown_at, holders = mounts.shown_by(mounted)
    if os.getpid() in holders:
        if found_by == mountpoint:  # else a bind mount is gone, as was asked
            click.echo(f"{printable(shown_at)} shows the same disk still", err=True)
        return
    if daemon is not None:
        try:
            _wait_for(daemon, pid, watch)
        except _GivenUpError as error:
            raise UserError(
                f"unmounted {mountpoint}, but pid {pid} has not synced the replicas yet, and goes "
                f"on when it can: {error}"
            ) from None
        with runtime.Finder(runtime_dir) as finder:
            word = finder.take_word(found_by, mounted.owner)
        if word:
            raise UserError(f"unmounted {mountpoint}, but {word}")
    elif hidden:
        raise UserError(
            f"unmounted {mountpoint}, but did not find its daemon, which may still be syncing the "
            "replicas: what mount was told with --runtime-dir, umount is to be told too"
        )


def _users(mountpoint: str, pid: int | None) -> str:
    """Who uses *mountpoint*, in words, besides us and its daemon *pid*.

    These may stand in what the mount covers, or in it for a moment.
    """
    ours = (os.getpid(), pid)
    users = [user for user in mounts.users_of(mountpoint) if user[0] not in ours]
    return ", ".join(f"pid {pid} ({name})" for pid, name in users)


def _process(pid: int, owner: int) -> int | None:
    """A descriptor of the process *pid*, if it lives and is *owner*'s."""
    with suppress(OSError):
        daemon = os.pidfd_open(pid)
        if os.stat(f"/proc/{pid}").st_uid == owner:
            signal.pidfd_send_signal(daemon, 0)  # so that was this process, and no later one
            return daemon
        os.close(daemon)
    return None


class _GivenUpError(Exception):
    """The daemon does not go on; the message says why."""


class _Watch:
    """Says what the end of a mount waits for."""

    def __init__(self, mount: mounts.Mount, found_by: str, runtime_dir: Path | None) -> None:
        """*found_by*: `Finder.place_of` the mount."""
        self.mount = mount
        self.found_by = found_by
        self.runtime_dir = runtime_dir
        self.told: set[str] = set()
        """Of which replicas it was said."""
        self.hung: list[str] = []
        """Replicas that had been ejected because they do not answer, the last time heard."""
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
                or f"it does not answer; see {self._log()}"
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
            status = client.status(
                self.mount.mountpoint,
                timeout_s=ANSWER_S,
                runtime_dir=self.runtime_dir,
                mount=self.mount,
            )
            self.hung = [replica.path for replica in status.replicas if replica.reason == HANGS]
            return status
        return None

    def _log(self) -> str:
        with runtime.Finder(self.runtime_dir) as finder:
            return str(finder.log_of(self.found_by, self.mount.owner))


def _wait_for(daemon: int, pid: int | None, watch: _Watch) -> None:
    """Wait until the daemon has ended, or has done all that it can do for that.

    Raises `_GivenUpError`.
    """
    mountpoint, owner = watch.mount.mountpoint, watch.mount.owner
    waiting = select.poll()
    waiting.register(daemon, select.POLLIN)
    began = monotonic()
    told = False
    while not waiting.poll(mounts.PAUSE_S * 1000):
        # It let go of the mount point: at its end
        if runtime.daemon_pid(watch.found_by, owner, watch.runtime_dir) != pid:
            if not waiting.poll(END_S * 1000):
                hung = ", ".join(map(printable, watch.hung)) or "a replica"
                click.echo(
                    f"pid {pid} has finished, but cannot end before the file system of {hung} "
                    "answers: look at its disk, or the network to it; it stays locked until then",
                    err=True,
                )
            return
        patient = owner == os.geteuid()  # another user may keep it from ending for ever
        if not patient and monotonic() - began > PATIENCE_S:
            raise UserError(
                f"unmounted {mountpoint}, but pid {pid} of {client.user_name(owner)} has not "
                f"ended within {PATIENCE_S:g} s, and may not have synced the replicas: wait until "
                "it is gone before they are used"
            )
        watch.look()
        waited_s = monotonic() - began
        if not told and waited_s > HELD_S and (held := _held_elsewhere(watch.mount)):
            told = True
            click.echo(f"waiting for {held}", err=True)
        if not told and not watch.told and waited_s > PATIENCE_S:
            told = True
            place = printable(mountpoint)
            click.echo(f"waiting for pid {pid} to sync the replicas of {place}", err=True)
        if waited_s > GIVE_UP_S and (held := _held_elsewhere(watch.mount)):
            raise _GivenUpError(held)


def _held_elsewhere(mounted: mounts.Mount) -> str | None:
    """Who shows the file system of *mounted* still in another namespace, in words; None: nobody
    that can be seen."""
    place, holders = mounts.shown_by(mounted)
    if not holders:
        return None
    return (
        f"{', '.join(f'pid {holder}' for holder in holders)}, which has the disk still, at "
        f"{printable(place)} of another namespace of mounts (a container, or a unit with "
        "PrivateMounts)"
    )
