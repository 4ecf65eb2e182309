"""``quorumfs wait``, and what commands that wait have in common."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from quorumfs.cli.acting import options_of_action
from quorumfs.cli.command import Verb
from quorumfs.cli.completion import MountPoint, State
from quorumfs.cli.membership import named
from quorumfs.cli.output import complain, printable
from quorumfs.cli.statustext import resync_line
from quorumfs.control.goals import CURRENT, GOALS, Goal, goal
from quorumfs.control.status import Status
from quorumfs.errors import ExitCode, UserError

LOOK_S = (0.05, 0.5)
"""The first and the longest wait (seconds) between two looks."""


@click.command(
    cls=Verb,
    examples=[
        (
            "quorumfs wait --for clean --timeout 3600 /mnt/vdisk && poweroff",
            "Switch off when all replicas are equal.",
        ),
        ("quorumfs wait --for current:b.img /mnt/vdisk", "Until b.img holds everything."),
    ],
    exits={
        ExitCode.OK: "It is so.",
        ExitCode.FAILED: "It is not so in time.",
        ExitCode.UNUSABLE: "The disk cannot be used any more: no waiting helps.",
        ExitCode.NEEDS_OPERATOR: "A person must decide something first: no waiting helps.",
        ExitCode.USAGE: "The disk was unmounted, or STATE is none.",
    },
    see=["events", "status"],
)
@options_of_action
@click.option(
    "--for", "wanted", required=True, type=State(), metavar="STATE", help=f"One of: {GOALS}."
)
@click.option(
    "--timeout", type=click.FloatRange(0), metavar="SECONDS", help="Wait no longer than this."
)
@click.argument("mountpoint", type=MountPoint())
def wait(
    as_json: bool, runtime_dir: Path | None, wanted: str, timeout: float | None, mountpoint: str
) -> None:
    """Wait until the disk at MOUNTPOINT, or a replica of it, is as wanted.

    STATE is what quorumfs status shows; clean: healthy, nothing out of sync, and no repair at work;
    current:REPLICA: that replica holds everything. Gives up at once where no waiting helps.
    """
    if wanted.startswith(CURRENT):
        wanted = CURRENT + named(wanted.removeprefix(CURRENT))
    status = wait_for(mountpoint, goal(wanted), timeout, runtime_dir)
    if as_json:
        print(json.dumps(status.to_json()))
    else:
        print(f"{printable(status.mountpoint)}: {status.state.value}")


def wait_for(
    mountpoint: str, goal: Goal, timeout_s: float | None, runtime_dir: Path | None
) -> Status:
    """The status of the mount once *goal* is reached, with a progress bar on a terminal.

    Raises `UserError` if it is not in time, or cannot be.
    """
    from quorumfs.control import client, mounts  # noqa: PLC0415 (not needed for --help)

    mount = client.find(mountpoint)
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    pause_s, silent = LOOK_S[0], False
    with _shown() as show:
        while True:
            try:
                left_s = math.inf if deadline is None else max(0.1, deadline - time.monotonic())
                status = client.status(
                    mountpoint,
                    timeout_s=min(client.TIMEOUT_S, left_s),
                    runtime_dir=runtime_dir,
                )
            except client.NoAnswerError as error:
                if deadline is not None and time.monotonic() >= deadline:
                    raise
                if not silent:
                    complain(f"quorumfs: {error}; waiting for it")
                silent = True
                continue
            except client.ControlError:
                if mounts.is_ours(mount.mountpoint):
                    raise
                raise client.NotMountedError(
                    f"{mount.mountpoint} was unmounted meanwhile"
                ) from None
            silent = False
            if goal.is_reached(status):
                return status
            goal.require_hope(status)
            if deadline is not None and time.monotonic() >= deadline:
                raise UserError(goal.missed(status))
            show(status)
            left_s = pause_s if deadline is None else max(0.0, deadline - time.monotonic())
            time.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, LOOK_S[1])


@contextmanager
def _shown() -> Iterator[Callable[[Status], None]]:
    """Shows the progress of a mount on the terminal of stderr, if that is one, until the end."""
    if sys.stderr is None or not os.isatty(2):
        yield lambda _: None
        return
    from rich.console import Console, Group  # noqa: PLC0415 (a tenth of a second, needed only here)
    from rich.live import Live  # noqa: PLC0415
    from rich.progress_bar import ProgressBar  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    console = Console(stderr=True, highlight=False)
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def show(status: Status) -> None:
            if (resync := status.resync) is None:
                live.update(Text(f"{printable(status.mountpoint)}: {status.state.value}"))
            else:
                bar = ProgressBar(total=resync.total_bytes or 1, completed=resync.done_bytes)
                live.update(Group(Text(resync_line(resync)), bar))
            live.refresh()

        yield show
