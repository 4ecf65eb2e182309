"""``quorumfs scrub``."""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import click

from quorumfs.cli.acting import act, one_of, options_of_action
from quorumfs.cli.command import OF_A_MOUNT, Verb
from quorumfs.cli.completion import MountPoint
from quorumfs.cli.output import complain, printable
from quorumfs.cli.statustext import last_scrub_line, scrub_line
from quorumfs.control import schema
from quorumfs.control.human import human_bytes
from quorumfs.control.status import LastScrub, ScrubPlace, ScrubStatus
from quorumfs.errors import ExitCode, UsageError, UserError

if TYPE_CHECKING:
    from rich.console import RenderableType

LOOK_S = 0.5
"""Between two looks at a scrub that is waited for."""


@click.command(
    cls=Verb,
    examples=[
        ("quorumfs scrub --wait /mnt/vdisk", "Read and compare everything, and tell."),
        ("quorumfs scrub --repair --limit 50M /mnt/vdisk", "Slowly, and repair what is wrong."),
    ],
    exits={
        **OF_A_MOUNT,
        ExitCode.FAILED: "It failed or was refused; with --wait: something is left to repair.",
    },
    see=["resolve", "status"],
)
@options_of_action
@click.option("--repair", is_flag=True, help="Rewrite replicas that a strict majority outvotes.")
@click.option("--pause", is_flag=True, help="Have it wait, also at later mounts.")
@click.option("--resume", is_flag=True, help="Have it go on.")
@click.option("--stop", is_flag=True, help="End it.")
@click.option("--limit", metavar="RATE", help="Bytes a second of each replica, like 50M, or none.")
@click.option("--wait", is_flag=True, help="Wait for its end.")
@click.argument("mountpoint", type=MountPoint())
def scrub(
    as_json: bool,
    runtime_dir: Path | None,
    repair: bool,
    pause: bool,
    resume: bool,
    stop: bool,
    limit: str | None,
    wait: bool,
    mountpoint: str,
) -> ExitCode:
    """Read all replicas of the set at MOUNTPOINT and compare them, while the disk stays in use.

    Begins a scrub, unless one is under way; it yields to the guest, and goes on at the next mount.
    What a replica cannot be read at is rewritten; what differs is told, and repaired with --repair
    where a majority decides.
    """
    order = one_of(pause=pause, resume=resume, stop=stop)
    if order is not None and (repair or wait):
        raise UsageError(f"--{order}: got --repair or --wait too, allowed: none of them")
    order, rate = order or "start", None if limit is None else _rate(limit)
    if not wait:
        act(
            mountpoint,
            "scrub",
            as_json=as_json,
            runtime_dir=runtime_dir,
            order=order,
            repair=repair,
            limit=rate,
        )
        return ExitCode.OK
    from quorumfs.control import client  # noqa: PLC0415 (not needed for --help)

    try:
        begun = client.act(
            mountpoint, "scrub", runtime_dir=runtime_dir, order=order, repair=repair, limit=rate
        )
        if not as_json:
            complain(printable(str(begun.get("message", ""))))
        number = begun.get("number")
        if type(number) is not int:
            raise UserError(f"{mountpoint}: its daemon does not say which scrub this is")
        last = _await(mountpoint, runtime_dir, number, quiet=as_json)
    except KeyboardInterrupt:
        complain(f"quorumfs: the scrub goes on in the daemon; see: quorumfs status {mountpoint}")
        raise
    if as_json:
        print(json.dumps(schema.dump(last)))
    else:
        print("\n".join([last_scrub_line(last), *map(_place_line, last.places)]))
    return ExitCode.FAILED if last.unrepaired or last.stopped else ExitCode.OK


def _rate(text: str) -> int:
    """Bytes a second; 0: no limit. Raises `UsageError`."""
    from quorumfs.options import values  # noqa: PLC0415

    if text == "none":
        return 0
    try:
        return values.parse_size(text)
    except values.RefusedError as refused:
        raise UsageError(f"--limit: got {text!r}, allowed: none, or {refused}") from None


def _await(mountpoint: str, runtime_dir: Path | None, number: int, *, quiet: bool) -> LastScrub:
    """The scrub with this *number* once it has ended. Raises `ControlError`."""
    from quorumfs.control import client  # noqa: PLC0415

    with _Bar(shown=not quiet and sys.stdout.isatty()) as bar:
        while True:
            status = client.status(mountpoint, runtime_dir=runtime_dir)
            if status.last_scrub is not None and status.last_scrub.number >= number:
                return status.last_scrub
            if status.scrub is not None:
                bar.show(status.scrub)
            time.sleep(LOOK_S)


class _Bar:
    """How far it is, on a terminal."""

    def __init__(self, *, shown: bool) -> None:
        self._live: Any = None
        if shown:
            from rich.live import Live  # noqa: PLC0415 (a tenth of a second, needed only here)

            self._live = Live(auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, scrub: ScrubStatus) -> None:
        """Show that it is this far."""
        if self._live is not None:
            self._live.update(_picture(scrub), refresh=True)


def _picture(scrub: ScrubStatus) -> "RenderableType":
    from rich.console import Group  # noqa: PLC0415
    from rich.progress_bar import ProgressBar  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    bar = ProgressBar(total=scrub.total_bytes or 1, completed=scrub.done_bytes, width=40)
    return Group(Text(scrub_line(scrub)), bar)


def _place_line(place: ScrubPlace) -> str:
    """What is wrong at one place."""
    where = f"{human_bytes(place.length)} at {place.offset}"
    repaired = ", repaired" if place.repaired else ""
    if place.replica is None:
        return f"  {where}: the replicas differ, and nothing tells which one is right"
    who = printable(place.replica)
    if place.blame == "unreadable":
        return f"  {where}: {who} could not be read{repaired}"
    return f"  {where}: {who} differs from the majority{repaired}"
