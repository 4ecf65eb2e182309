"""What ``--if-needed``, ``--check`` and ``--sidecars`` mean to the commands that have them."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from quorumfs.cli.output import printable
from quorumfs.control import client
from quorumfs.errors import ExitCode, UserError
from quorumfs.options.table import MountOptions
from quorumfs.options.texts import option_differences, option_texts

F = TypeVar("F", bound=Callable[..., Any])


def options_of_change(command: F) -> F:
    """Give *command* the options ``--if-needed`` and ``--check``."""
    if_needed = click.option(
        "--if-needed",
        is_flag=True,
        help="Do nothing, and exit with 0, if it is so already; refuse if it is otherwise.",
    )
    check = click.option(
        "--check",
        is_flag=True,
        help="Say what would be done, or why it would be refused, and change nothing.",
    )
    return if_needed(check(command))


def option_of_devices(command: F) -> F:
    """Give *command* the option ``--sidecars``."""
    return click.option(
        "--sidecars",
        metavar="DIR",
        callback=_directory,
        help="Where the sidecars of those REPLICAs lie that are block devices, as with mount -o "
        "sidecars=DIR.",
    )(command)


def _directory(context: click.Context, option: click.Parameter, text: str | None) -> str | None:
    return None if text is None else os.path.abspath(text)


def would(action: str, lines: Sequence[str] = ()) -> ExitCode:
    """Tell the user of ``--check`` what is not done; what to exit with."""
    for line in (f"would {action}", *lines):
        print(printable(line))
    return ExitCode.WOULD_CHANGE


def already_mounted(
    mountpoint: str, replicas: Sequence[str], options: MountOptions, runtime_dir: Path | None
) -> bool:
    """Whether *replicas* (absolute paths) are mounted at *mountpoint* with *options*.

    Raises `UserError` if another disk is mounted there, or the same in another way, or if nobody
    can tell. A mount whose daemon is gone is none.
    """
    try:
        status = client.status(mountpoint, runtime_dir=runtime_dir)
    except (client.NotMountedError, client.DaemonGoneError):
        return False
    for path in replicas:
        if replicas.count(path) > 1:
            raise UserError(f"{path} and {path} are the same file")
    present = [replica.path for replica in status.replicas]
    if set(present) != set(replicas):  # or they are the same by other names
        present = [os.path.realpath(path) for path in present]
        replicas = [os.path.realpath(path) for path in replicas]
    differences = [f"{path} is a replica there" for path in present if path not in replicas]
    differences += [f"{path} is no replica there" for path in replicas if path not in present]
    if not differences and options.read_pattern == "fifo" and present != list(replicas):
        differences.append(f"it reads the replicas in the order {', '.join(present)}")
    differences += option_differences(
        status.options,
        option_texts(options),
        ignored=[] if options.vote_threshold_given else ["vote-threshold"],
    )
    if differences:
        raise UserError(
            f"{mountpoint} is mounted already, but in another way: {'; '.join(differences)}; "
            "change it while it is in use (add, remove, set), or unmount it first"
        )
    return True
