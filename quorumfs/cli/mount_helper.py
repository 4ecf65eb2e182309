"""``mount.quorumfs`` and ``umount.quorumfs``: what mount(8) and umount(8) run for our mounts.

Command line and exit codes are theirs. ``quorumfs install-units`` puts the programs of these names
where they are looked for.
"""

import getopt
import os
from collections.abc import Callable, Sequence

import click

from quorumfs.cli.mount import items, mount_replicas, remount
from quorumfs.cli.output import complain
from quorumfs.cli.umount import unmount
from quorumfs.errors import UsageError, UserError
from quorumfs.mount.configuration import configured, is_name, replicas_of
from quorumfs.options.parsing import is_option, parse_options

DONE, USAGE, INTERRUPTED, FAILED = 0, 1, 8, 32
"""Exit codes, see mount(8)."""

EXIT_STATUS = {
    DONE: "It is mounted, or unmounted.",
    USAGE: "The command line, an option or a file cannot be meant like this.",
    INTERRUPTED: "It was interrupted.",
    FAILED: "It failed or was refused, and standard error says why.",
}
"""What each of them means."""

FSTAB_ONLY = {
    *("auto", "noauto", "defaults", "nofail", "_netdev"),
    *("user", "nouser", "users", "nousers", "owner", "noowner", "group", "nogroup"),
    # What a file system with directories, devices or write times of its own would do otherwise
    *("async", "dirsync", "diratime", "nodiratime", "relatime", "norelatime"),
    *("strictatime", "nostrictatime", "lazytime", "nolazytime", "iversion", "noiversion"),
    *("mand", "nomand", "loud", "silent"),
    "nosymfollow",
}
"""Options that mean something to mount(8) or systemd alone, or nothing for one image file."""

FSTAB_ONLY_BEGIN = (
    *("x-", "X-", "comment=", "user="),
    # What the kernel shows of any FUSE mount, and mount(8) gives back when it is to be remounted
    *("user_id=", "group_id=", "rootmode=", "fd=", "max_read=", "blksize="),
)
"""The beginnings of further options that are for mount(8), systemd or the kernel alone."""


@click.command("mount-helper", hidden=True, context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def mount_helper(arguments: tuple[str, ...]) -> int:
    """SOURCE DIRECTORY [-sfnv] [-o OPTIONS] [-t TYPE], as mount(8) calls it."""

    def work() -> None:
        flags, (source, directory) = _parsed(arguments, "sfnvo:t:", 2)
        texts = [text for flag, text in flags if flag == "-o"]
        given = [item for item in items(texts) if not is_for_fstab(item)]
        if ("-s", "") in flags:
            given = [item for item in given if item == "remount" or is_option(item)]
        if "remount" in given:
            remount(directory, given)
            return
        if is_name(source):
            disk = configured(source)
            replicas: Sequence[str] = disk.replicas
            # The source that is shown is the one in fstab: so mount -a knows that it is mounted.
            given = [f"fsname={source}", *items([disk.options]), *given]
        else:
            replicas = replicas_of(source)
        if ("-f", "") in flags:
            parse_options(given, len(replicas))
            return
        mount_replicas(replicas, directory, given)

    return _exit_code("mount.quorumfs", work)


@click.command("umount-helper", hidden=True, context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def umount_helper(arguments: tuple[str, ...]) -> int:
    """DIRECTORY [-flnrv] [-t TYPE], as umount(8) calls it.

    Unlike the kernel it comes back only when the replicas are synced, and free. At a shutdown their
    own file systems are the next to be unmounted.
    """

    def work() -> None:
        flags, (directory,) = _parsed(arguments, "flnrvt:", 1)
        if {flag for flag, _ in flags} & {"-f", "-l", "-r"}:
            # Somebody does not want to wait, or wants what has nothing to do with the daemon.
            same = [flag for flag, _ in flags if flag in ("-f", "-l", "-r")]
            os.execvp("umount", ["umount", "-i", *same, directory])  # noqa: S606 (no shell)
        unmount(directory, wait=_is_job_of_init())

    return _exit_code("umount.quorumfs", work)


def is_for_fstab(item: str) -> bool:
    """Whether the option *item* is for others: dropped here, and unknown to our own command."""
    return item in FSTAB_ONLY or item.startswith(FSTAB_ONLY_BEGIN)


def _parsed(
    arguments: Sequence[str], short: str, positional: int
) -> tuple[list[tuple[str, str]], list[str]]:
    """Flags and what else there is, of which there must be as much. Raises `UsageError`."""
    try:
        flags, others = getopt.gnu_getopt(list(arguments), short)
    except getopt.GetoptError as error:
        raise UsageError(str(error)) from None
    if len(others) != positional:
        what = "a source and a directory" if positional == 2 else "a directory"
        raise UsageError(f"got {' '.join(others) or 'nothing'}, allowed: {what}")
    return flags, others


def _exit_code(program: str, work: Callable[[], None]) -> int:
    """What mount(8) makes of how *work* ends, which *program* has told."""
    try:
        work()
    except UsageError as error:
        complain(f"{program}: {error}")
        return USAGE
    except UserError as error:
        complain(f"{program}: {error}")
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    return DONE


def _is_job_of_init() -> bool:
    """Whether the umount(8) that runs this was started by systemd: for a unit, or at a shutdown.

    A person is told at once that the disk is in use. systemd would go on, and take away what the
    disk needs; it waits as long as the unit's TimeoutSec allows.
    """
    try:
        with open(f"/proc/{os.getppid()}/stat", encoding="ascii", errors="replace") as file:
            return int(file.read().rpartition(")")[2].split()[1]) == 1
    except (OSError, IndexError, ValueError):
        return False
