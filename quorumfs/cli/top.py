"""``quorumfs top``: what a disk does, on one screen."""

import os
import select
import shutil
import sys
import termios
import time
import tty
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from quorumfs.cli.command import Verb
from quorumfs.cli.completion import MountPoint
from quorumfs.cli.output import printable
from quorumfs.cli.statuspicture import COLOURS, NARROW
from quorumfs.cli.statustext import headline, replica_row, resync_line, scrub_lines, state_word
from quorumfs.control.advice import describe
from quorumfs.control.diskmap import CELLS_MAX, DiskMap
from quorumfs.control.human import human_bytes
from quorumfs.control.status import ReplicaStatus, Status
from quorumfs.errors import ExitCode, UserError

if TYPE_CHECKING:
    from rich.console import JustifyMethod, RenderableType
    from rich.table import Table

    from quorumfs.control import mounts
    from quorumfs.control.recent import Recent

EVENTS_SHOWN = 8

COLUMNS = (
    ("state", True),
    ("reads/s", True),
    ("writes/s", True),
    ("read", False),
    ("written", False),
    ("p50", True),
    ("p99", False),
    ("queue", True),
)
"""Of the replicas: heading, and whether a narrow terminal shows it too."""

FIGURES = 84
"""Characters that all of these may need, with the space between them."""

MARGIN = 4
"""Columns beside the map."""

SHADES = str.maketrans(".+#", "·▒█")


@dataclass(slots=True)
class Picture:
    """What is known of the disk, and was a moment before."""

    status: Status
    disk_map: DiskMap
    at: float
    """When *status* was taken (monotonic, seconds)."""
    before: Status | None = None
    seconds: float = 1.0
    """Between both."""
    events: deque[str] = field(default_factory=lambda: deque(maxlen=EVENTS_SHOWN))

    def rates(self, replica: ReplicaStatus) -> tuple[str, ...]:
        """Reads and writes a second, and their bytes."""
        before = () if self.before is None else self.before.replicas
        old = next((one for one in before if one.path == replica.path), None)
        if old is None:
            return ("", "", "", "")
        pairs = (
            (replica.reads, old.reads),
            (replica.writes, old.writes),
            (replica.bytes_read, old.bytes_read),
            (replica.bytes_written, old.bytes_written),
        )
        reads, writes, read, written = (max(0, new - o) / self.seconds for new, o in pairs)
        return (
            f"{reads:.0f}",
            f"{writes:.0f}",
            f"{human_bytes(int(read))}/s",
            f"{human_bytes(int(written))}/s",
        )


@click.command(
    cls=Verb,
    examples=[
        ("quorumfs top /mnt/vdisk", "Until q, or Ctrl-C."),
        ("quorumfs top --interval 5 /mnt/vdisk", "A new picture every five seconds."),
    ],
    exits={ExitCode.OK: "The end was wanted: q, or Ctrl-C."},
    see=["status", "events"],
)
@click.option(
    "--interval",
    type=click.FloatRange(0.2, 60.0),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="How often to look.",
)
@click.option(
    "--runtime-dir",
    type=click.Path(path_type=Path, resolve_path=True),
    help="Where mount was told to keep what commands need to find its daemon.",
)
@click.argument("mountpoint", type=MountPoint())
def top(interval: float, runtime_dir: Path | None, mountpoint: str) -> ExitCode:
    """Show what the disk at MOUNTPOINT does: requests, latency and queue of each replica, where
    replicas are out of sync, what a resync or a scrub has passed, and what happened last.

    It needs a terminal; elsewhere use status --watch, or events.
    """
    from rich.console import Console  # noqa: PLC0415 (a tenth of a second, needed only here)
    from rich.live import Live  # noqa: PLC0415

    from quorumfs.control import client  # noqa: PLC0415

    if not sys.stdout.isatty() or not sys.stdin.isatty():
        raise UserError(
            "top needs a terminal; for a file or a pipe there is: quorumfs status --watch"
        )
    mount = client.find(mountpoint)
    last = client.events(mount, None, runtime_dir=runtime_dir).last
    shown: Picture | None = None
    live = Live(console=Console(highlight=False), screen=True, auto_refresh=False)
    try:
        with _keys(), live:
            while True:
                recent = client.events(mount, last, runtime_dir=runtime_dir)
                last = recent.last
                shown = look(mount, shown, recent, runtime_dir)
                size = shutil.get_terminal_size()
                live.update(drawn(shown, size.columns), refresh=True)
                if _asked_to_end(interval):
                    return ExitCode.OK
    except KeyboardInterrupt:
        return ExitCode.OK


def look(
    mount: "mounts.Mount", before: Picture | None, recent: "Recent", runtime_dir: Path | None
) -> Picture:
    """The next picture after *before*. Raises `UserError`."""
    from quorumfs.control import client  # noqa: PLC0415

    cells = max(10, min(CELLS_MAX, shutil.get_terminal_size().columns - MARGIN))
    disk_map = client.disk_map(mount, cells, runtime_dir=runtime_dir)
    status, now = client.status(mount.mountpoint, runtime_dir=runtime_dir), time.monotonic()
    picture = Picture(status, disk_map, now)
    if before is not None:
        picture.before, picture.seconds = before.status, max(0.001, now - before.at)
        picture.events = before.events
    picture.events.extend(told.text for told in recent.events)
    return picture


def drawn(picture: Picture, width: int) -> "RenderableType":
    """*picture*, for a terminal of *width* columns."""
    from rich.console import Group  # noqa: PLC0415

    return Group(*_parts(picture, width))


def _parts(picture: Picture, width: int) -> "Iterable[RenderableType]":
    from rich.text import Text  # noqa: PLC0415

    status = picture.status
    colour = COLOURS[status.state]
    place = printable(status.mountpoint)
    yield Text.assemble((place, "bold"), ": ", (state_word(status), f"bold {colour}"))
    yield Text(headline(status), "dim")
    for line in describe(status):
        yield Text(printable(line), colour)
    yield _replica_table(picture, width)
    for name, cells in _maps(picture):
        yield Text(name, "dim")
        yield Text(f"  {cells[: width - MARGIN].translate(SHADES)}")
    if status.resync is not None:
        yield Text(resync_line(status.resync))
    for line in scrub_lines(status):
        yield Text(line)
    if picture.events:
        yield Text("events", "bold")
    for event in picture.events:
        yield Text(printable(event), overflow="ellipsis", no_wrap=True)


def _replica_table(picture: Picture, width: int) -> "Table":
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold")
    table.add_column("replica", overflow="fold")
    shown = [narrow_too or width >= NARROW for _, narrow_too in COLUMNS]
    for heading, _ in compress(COLUMNS, shown):
        side: JustifyMethod = "left" if heading == "state" else "right"
        table.add_column(heading, justify=side, no_wrap=True)
    # Where there is no room for paths here, the maps name them.
    longest = max(len(printable(replica.path)) for replica in picture.status.replicas)
    in_full = longest + FIGURES <= width
    for replica in picture.status.replicas:
        path, state, *_ = replica_row(replica)
        name = path if in_full else os.path.basename(path)
        bad = not replica.current or replica.trouble
        cells: list[str | Text] = [
            Text(state, COLOURS[picture.status.state] if bad else ""),
            *picture.rates(replica),
            *_latency(replica),
            str(replica.in_flight),
        ]
        table.add_row(name, *compress(cells, shown))
    return table


def _maps(picture: Picture) -> Iterator[tuple[str, str]]:
    """What to draw of the disk from its begin to its end: a heading, and cells."""
    for one in picture.disk_map.replicas:
        yield f"out of sync: {printable(one.path)}", one.cells
    if picture.disk_map.scrubbed is not None:
        yield "scrubbed", picture.disk_map.scrubbed


def _latency(replica: ReplicaStatus) -> tuple[str, str]:
    """The median and the 99th percentile of the slower of reads and writes, lately."""
    known = [one for one in (replica.latency.read, replica.latency.write) if one is not None]
    if not known:
        return "", ""
    slowest = max(known, key=lambda one: one.p50_us)
    return f"{slowest.p50_us / 1000:.1f} ms", f"{slowest.p99_us / 1000:.1f} ms"


@contextmanager
def _keys() -> Iterator[None]:
    """Have single keys come at once, and not be shown."""
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _asked_to_end(seconds: float) -> bool:
    """Wait so long for a key; whether it says that it is enough."""
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    return bool(ready) and sys.stdin.read(1) in ("q", "Q", "\x1b", "")
