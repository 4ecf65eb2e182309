"""``quorumfs status``."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from quorumfs.control.status import (
    SCHEMA,
    DiskState,
    ReplicaStatus,
    ResyncStatus,
    Status,
    describe,
    human_bytes,
    human_time,
    worst,
)
from quorumfs.errors import ExitCode

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

    from quorumfs.control.client import ControlError

WATCH_S = 1.0
"""Between two pictures of --watch."""

ASK_AT_ONCE = 16
"""Mounts asked side by side: one that hangs must not hold up the picture of the others."""

COLUMNS = (
    ("replica", "left", True),
    ("state", "left", True),
    ("reads", "right", True),
    ("writes", "right", True),
    ("flushes", "right", True),
    ("read", "right", False),
    ("written", "right", False),
    ("copied", "right", False),
    ("in flight", "right", False),
    ("errors", "right", True),
    ("out of sync", "right", True),
)
"""Of the replicas: heading, side, and whether a narrow terminal shows it too."""

WIDE = 120
"""Characters: a terminal from here on shows all columns."""

COLOURS = {
    DiskState.HEALTHY: "green",
    DiskState.DEGRADED: "yellow",
    DiskState.NO_QUORUM: "red",
    DiskState.NEEDS_OPERATOR: "magenta",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What one mount point said, or why it said nothing."""

    mountpoint: str
    """Absolute."""
    status: Status | None
    error: "ControlError | None" = None

    @property
    def exit_code(self) -> ExitCode:
        if self.status is not None:
            return self.status.state.exit_code
        assert self.error is not None
        return self.error.exit_code

    def to_json(self) -> dict[str, Any]:
        """The status, or an object with state null and the reason."""
        if self.status is not None:
            return self.status.to_json()
        assert self.error is not None
        return {
            "schema": SCHEMA,
            "mountpoint": self.mountpoint,
            "state": None,
            "problem": self.error.problem,
            "error": str(self.error),
        }


@dataclass(frozen=True, slots=True)
class View:
    """What there is to show at one moment."""

    answers: Sequence[Answer]
    unasked: int = 0
    """Mounts of other users, who alone may ask them."""
    nothing: str = "no quorumfs mounts"
    """What to say if there are no answers."""

    @property
    def exit_code(self) -> ExitCode:
        return worst(answer.exit_code for answer in self.answers)

    @property
    def remarks(self) -> list[str]:
        """What to say below the answers, or instead."""
        others = f"{self.unasked} of other users not shown"
        return [*([] if self.answers else [self.nothing]), *([others] if self.unasked else [])]

    def unhealthy(self) -> "View":
        """The same without what is healthy."""
        shown = [answer for answer in self.answers if answer.exit_code is not ExitCode.OK]
        return View(shown, self.unasked, "all mounts are healthy" if self.answers else self.nothing)


@click.command()
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print JSON: one object for one MOUNTPOINT, else (and with -x) a list of them.",
)
@click.option("-x", "only_unhealthy", is_flag=True, help="Show only mounts that are not healthy.")
@click.option("--watch", "watched", is_flag=True, help="Show it anew every second, until Ctrl-C.")
@click.argument("mountpoints", nargs=-1)
def status(
    as_json: bool, only_unhealthy: bool, watched: bool, mountpoints: tuple[str, ...]
) -> ExitCode:
    """Show the state of each MOUNTPOINT, or of all quorumfs mounts, and what to do next.

    Exits with the worst of those shown: 0 healthy, 1 degraded, 2 unusable, 3 needs the operator,
    4 not mounted, or not to be asked.
    """
    single = len(mountpoints) == 1 and not only_unhealthy
    in_colours = sys.stdout.isatty() and not as_json

    def look() -> View:
        view = ask_all(mountpoints)
        return view.unhealthy() if only_unhealthy else view

    def as_text(view: View) -> str:
        if not as_json:
            return "\n".join([*map(plain, view.answers), *view.remarks])
        content = [answer.to_json() for answer in view.answers]
        return json.dumps(content[0] if single else content)

    try:
        if watched:
            if not in_colours:
                return watch(look, lambda view: print(as_text(view), flush=True))
            console = _console()
            with _live(console) as live:
                return watch(
                    look, lambda view: live.update(picture(view, console.width), refresh=True)
                )
        view = look()
        if single and not as_json and view.answers[0].error is not None:
            raise view.answers[0].error
        if in_colours:
            console = _console()
            console.print(picture(view, console.width))
        else:
            print(as_text(view).rstrip("\n"), flush=True)
    except BrokenPipeError:
        forget_stdout()
        return ExitCode.OK
    return view.exit_code


def ask_all(mountpoints: Sequence[str]) -> View:
    """Ask these mounts, or all that this user may ask, side by side."""
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415 (not needed for --help)

    from quorumfs.control import client  # noqa: PLC0415 (the same)

    def ask(mountpoint: str) -> Answer:
        try:
            status = client.status(mountpoint)
        except client.ControlError as error:
            return Answer(os.path.abspath(mountpoint), None, error)
        return Answer(status.mountpoint, status)

    unasked = 0
    if not mountpoints:
        visible = client.visible_mounts()
        mountpoints = [m.mountpoint for m in visible if os.geteuid() in (0, m.owner)]
        unasked = len(visible) - len(mountpoints)
    with ThreadPoolExecutor(ASK_AT_ONCE) as pool:
        return View(list(pool.map(ask, mountpoints)), unasked)


def watch(look: Callable[[], View], show: Callable[[View], None]) -> ExitCode:
    """Show what *look* finds every second until Ctrl-C; the exit code is of what was shown last."""
    exit_code = ExitCode.OK
    try:
        while True:
            view = look()
            exit_code = view.exit_code
            show(view)
            time.sleep(WATCH_S)
    except KeyboardInterrupt:
        return exit_code


# Both forms are made of these


def headline(status: Status) -> str:
    """The facts of the set in one line."""
    facts = [
        human_bytes(status.size),
        f"{status.read_pattern}, vote-threshold {status.vote_threshold}",
        *(["read-only"] if status.read_only else []),
        f"pid {status.pid}",
    ]
    if status.set_id is not None:
        facts += [f"set {status.set_id}", f"generation {status.generation}"]
    else:
        facts.append(f"metadata={status.metadata}")
    return ", ".join(facts)


def state_word(status: Status) -> str:
    """The state of a disk, for a reader."""
    return f"{status.state.value} (fenced)" if status.fenced else status.state.value


def replica_row(replica: ReplicaStatus) -> tuple[str, ...]:
    """The cells of one replica, as `COLUMNS`."""
    return (
        printable(replica.path),
        replica.state,
        str(replica.reads),
        str(replica.writes),
        str(replica.flushes),
        human_bytes(replica.bytes_read),
        human_bytes(replica.bytes_written),
        human_bytes(replica.copied_bytes),
        str(replica.in_flight),
        str(replica.errors.total),
        human_bytes(replica.out_of_sync_bytes),
    )


def errors_line(replica: ReplicaStatus) -> str | None:
    """Which errors one replica had; None if it had none."""
    counts = {
        "read": replica.errors.read,
        "write": replica.errors.write,
        "flush": replica.errors.flush,
        "mismatch": replica.errors.mismatch,
        "timeout": replica.errors.timeout,
    }
    if not replica.errors.total:
        return None
    told = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    if (last := replica.last_error) is not None:
        told += f"; {last.what} {human_time(last.seconds_ago)} ago: {last.text}"
    return f"{printable(replica.path)}: {printable(told)}"


def resync_line(resync: ResyncStatus) -> str:
    """How far a resync is."""
    percent = 100 * resync.done_bytes // resync.total_bytes if resync.total_bytes else 100
    left = "unknown time" if resync.eta_s is None else human_time(resync.eta_s)
    which = f" of {printable(resync.replica)}" if resync.replica else ""
    return (
        f"{resync.kind.value}{which}: {percent} %, {human_bytes(resync.done_bytes)} of "
        f"{human_bytes(resync.total_bytes)}, {human_bytes(resync.rate_bytes_per_s)}/s, {left} left"
    )


def printable(text: str) -> str:
    """*text* on one line, in characters that every terminal and pipe takes."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def forget_stdout() -> None:
    """Whoever read the output has seen enough: what is still in its buffer goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# For pipes and files: stable, no colours, no wrapping


def plain(answer: Answer) -> str:
    """One mount as text of several lines."""
    status, place = answer.status, printable(answer.mountpoint)
    if status is None:
        assert answer.error is not None
        return f"{place}: {answer.error.problem}\n  {printable(str(answer.error))}\n"
    lines = [f"{place}: {state_word(status)}", f"  {headline(status)}"]
    lines += [f"  action: {printable(line)}" for line in describe(status)]
    lines += [f"  note: {printable(note)}" for note in status.notes]
    if status.resync is not None:
        lines.append(f"  {resync_line(status.resync)}")
    lines += [f"  {line}" for line in table(map(replica_row, status.replicas))]
    lines += [f"  errors of {line}" for line in map(errors_line, status.replicas) if line]
    return "\n".join(lines) + "\n"


def table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """The replicas' rows below their headings, in columns as wide as they must be."""
    cells = [tuple(name.upper() for name, *_ in COLUMNS), *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        padded = [
            cell.ljust(width) if side == "left" else cell.rjust(width)
            for cell, width, (_, side, _) in zip(row, widths, COLUMNS, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return lines


# For terminals


def _console() -> "Console":
    from rich.console import Console  # noqa: PLC0415 (a tenth of a second, needed only here)

    return Console(highlight=False)


def _live(console: "Console") -> "Live":
    from rich.live import Live  # noqa: PLC0415

    return Live(console=console, auto_refresh=False, vertical_overflow="crop")


def picture(view: View, width: int) -> "RenderableType":
    """All mounts in colours, with progress bars, for a terminal of *width* characters."""
    from rich.console import Group  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    parts = [part for answer in view.answers for part in _parts(answer, wide=width >= WIDE)]
    return Group(*parts, *map(Text, view.remarks))


def _parts(answer: Answer, *, wide: bool) -> "Iterable[RenderableType]":
    from rich.padding import Padding  # noqa: PLC0415
    from rich.progress_bar import ProgressBar  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    def indented(text: str, style: str = "") -> Padding:
        return Padding(Text(text, style), (0, 0, 0, 2))

    status, place = answer.status, printable(answer.mountpoint)
    if status is None:
        assert answer.error is not None
        yield Text.assemble((place, "bold"), ": ", (answer.error.problem, "bold red"))
        yield indented(printable(str(answer.error)))
        return
    colour = COLOURS[status.state]
    yield Text.assemble((place, "bold"), ": ", (state_word(status), f"bold {colour}"))
    yield indented(headline(status), "dim")
    for line in describe(status):
        yield indented(printable(line), colour)
    for note in status.notes:
        yield indented(f"note: {printable(note)}")
    if (resync := status.resync) is not None:
        yield indented(resync_line(resync))
        bar = ProgressBar(total=resync.total_bytes or 1, completed=resync.done_bytes, width=40)
        yield Padding(bar, (0, 0, 0, 2))
    replicas = Table(box=None, padding=(0, 1), header_style="dim")
    for name, side, always in COLUMNS:
        if wide or always:
            replicas.add_column(
                name,
                justify="left" if side == "left" else "right",
                no_wrap=name != "replica",  # where it is too narrow, paths fold, not numbers
                overflow="fold",
            )
    for replica in status.replicas:
        row = {
            name: Text(cell)
            for cell, (name, _, always) in zip(replica_row(replica), COLUMNS, strict=True)
            if wide or always
        }
        if replica.state != "current" or replica.trouble:
            row["state"].stylize(colour)
        if replica.errors.total:
            row["errors"].stylize("red")
        replicas.add_row(*row.values())
    yield Padding(replicas, (0, 0, 0, 1))
    for errors in filter(None, map(errors_line, status.replicas)):
        yield indented(f"errors of {errors}", "red")
