"""``quorumfs status``."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quorumfs.cli.command import Verb
from quorumfs.cli.completion import MountPoint
from quorumfs.cli.output import OutputError, forget_stdout, printable
from quorumfs.control import schema
from quorumfs.control.advice import describe
from quorumfs.control.human import human_bytes, human_time
from quorumfs.control.status import (
    SCHEMA,
    DiskState,
    LastScrub,
    ReplicaStatus,
    ResyncStatus,
    ScrubStatus,
    Status,
    worst,
)
from quorumfs.decisions.replicaio import Way
from quorumfs.errors import ExitCode

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.table import Table

    from quorumfs.control.client import ControlError

WATCH_S = 1.0
"""Between two pictures of --watch."""

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

NARROW = 80
"""Characters: a terminal with fewer has no room for a path beside the numbers of its replica."""

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
    """Absolute; as the kernel knows it, if it does."""
    status: Status | None
    error: "ControlError | None" = None
    owner: int | None = None
    """Whose mount it is, by the kernel's table; None: it has none there."""

    @property
    def exit_code(self) -> ExitCode:
        if self.status is not None:
            return self.status.state.exit_code
        assert self.error is not None
        return self.error.exit_code

    @property
    def claimed_by(self) -> str | None:
        """Whose daemon says so, if that is another user's."""
        from quorumfs.control import client  # noqa: PLC0415 (not needed for --help)

        if self.owner is None or self.owner == os.geteuid():
            return None
        return client.user_name(self.owner)

    def to_json(self) -> dict[str, Any]:
        """The status, or an object with state null and the reason."""
        if self.status is not None:
            return {**self.status.to_json(), "owner": self.owner}
        assert self.error is not None
        return {
            "schema": SCHEMA,
            "mountpoint": self.mountpoint,
            "state": None,
            "problem": self.error.problem,
            "error": str(self.error),
            "owner": self.owner,
        }


def json_schema() -> dict[str, Any]:
    """The JSON Schema of what `Answer.to_json` gives."""
    answered = schema.json_schema(Status)
    head = {"schema": {"const": SCHEMA}, "owner": schema.json_schema(int | None)}
    answered["properties"] |= head
    answered["required"] += head
    texts = {name: {"type": "string"} for name in ("mountpoint", "problem", "error")}
    unanswered = {**head, **texts, "state": {"type": "null"}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "One mount, as quorumfs status --json shows it",
        "anyOf": [
            answered,
            {"type": "object", "properties": unanswered, "required": list(unanswered)},
        ],
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


@click.command(
    cls=Verb,
    examples=[
        ("quorumfs status", "All disks that are mounted."),
        ("quorumfs status --watch /mnt/vdisk", "One disk, while it is resynced."),
        ("quorumfs status -x --json", "Whatever is not healthy, for a program."),
    ],
    exits={
        ExitCode.OK: "All that are shown are healthy. Of several the worst state counts.",
        ExitCode.FAILED: "Degraded: the disk can be used, and something is to be done or awaited.",
        ExitCode.UNUSABLE: "Unusable: too few replicas are current, or the daemon is gone, does "
        "not answer, or answers what is no status.",
        ExitCode.NEEDS_OPERATOR: "A person must decide something.",
        ExitCode.USAGE: "It is not mounted, or not to be asked by this user; or a wrong option.",
    },
    see=["check", "events", "examine", "metrics", "wait"],
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print JSON: one object for one MOUNTPOINT, else (and with -x) a list of them.",
)
@click.option("-x", "only_unhealthy", is_flag=True, help="Show only mounts that are not healthy.")
@click.option("--watch", "watched", is_flag=True, help="Show it anew every second, until Ctrl-C.")
@click.option(
    "--runtime-dir",
    type=click.Path(path_type=Path, resolve_path=True),
    help="Look there too for daemons whose mount was told so.",
)
@click.option(
    "--json-schema", "only_schema", is_flag=True, help="Print the JSON Schema of one object."
)
@click.argument("mountpoints", type=MountPoint(), nargs=-1, metavar="[MOUNTPOINT...]")
def status(
    as_json: bool,
    only_unhealthy: bool,
    watched: bool,
    runtime_dir: Path | None,
    only_schema: bool,
    mountpoints: tuple[str, ...],
) -> ExitCode:
    """Show the state of each MOUNTPOINT, or of all quorumfs mounts, and what to do next."""
    if only_schema:
        print(json.dumps(json_schema(), indent=2))
        return ExitCode.OK
    single = len(mountpoints) == 1 and not only_unhealthy
    in_colours = sys.stdout.isatty() and not as_json

    def look() -> View:
        view = ask_all(mountpoints, runtime_dir)
        return view.unhealthy() if only_unhealthy else view

    def as_text(view: View) -> str:
        if not as_json:
            return "\n".join([*map(plain, view.answers), *view.remarks])
        content = [answer.to_json() for answer in view.answers]
        return json.dumps(content[0] if single else content)

    view = View([])
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
    except OutputError as error:  # whoever looks at the exit code alone is told the worst
        error.exit_code = worst([view.exit_code, error.exit_code])
        raise
    return view.exit_code


def ask_all(mountpoints: Sequence[str], runtime_dir: Path | None = None) -> View:
    """Ask these mounts, or all that this user may ask, side by side."""
    from quorumfs.control import client, mounts  # noqa: PLC0415 (not needed for --help)

    unasked = 0
    places: list[mounts.Mount | Answer] = []
    if mountpoints:
        for mountpoint in mountpoints:
            try:
                places.append(client.find(mountpoint))
            except client.ControlError as error:
                places.append(Answer(os.path.abspath(mountpoint), None, error))
    else:
        visible = mounts.of_quorumfs()
        places += [mount for mount in visible if os.geteuid() in (0, mount.owner)]
        unasked = len(visible) - len(places)
    asked = [place for place in places if not isinstance(place, Answer)]
    told = iter(client.statuses(asked, runtime_dir=runtime_dir))

    def answer(mount: mounts.Mount) -> Answer:
        said = next(told)
        if isinstance(said, client.ControlError):
            return Answer(mount.mountpoint, None, said, mount.owner)
        return Answer(mount.mountpoint, said, owner=mount.owner)

    answers = [place if isinstance(place, Answer) else answer(place) for place in places]
    return View(answers, unasked)


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


def claim(user: str) -> str:
    """What to think of the rest, where it comes from another user's daemon."""
    return f"a mount of {printable(user)}, whose daemon says all of this, and could say anything:"


def headline(status: Status) -> str:
    """The facts of the set in one line."""
    facts = [
        human_bytes(status.size),
        f"{status.read_pattern}, vote-threshold {status.vote_threshold}",
        *(["read-only"] if status.read_only else []),
        *(["resync paused"] if status.resync_paused else []),
        *_past_the_cache(status),
        f"pid {status.pid}",
    ]
    if status.set_id is not None:
        facts += [f"set {status.set_id}", f"generation {status.generation}"]
    else:
        facts.append(f"metadata={status.metadata}")
    return ", ".join(facts)


def _past_the_cache(status: Status) -> list[str]:
    """Which replicas are read and written with O_DIRECT, if any."""
    known = [replica for replica in status.replicas if replica.io is not None]
    direct = [replica for replica in known if replica.io == Way.DIRECT.value]
    if len(direct) == len(known):
        return ["direct I/O"] if direct else []
    names = (printable(replica.path) for replica in direct)
    return [f"direct I/O of {' and '.join(names)}"] if direct else []


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


def counts_line(replica: ReplicaStatus) -> str:
    """What one replica did, where there is no room for a table."""
    return (
        f"{replica.reads} reads, {replica.writes} writes, {replica.flushes} flushes, "
        f"{replica.errors.total} errors, {human_bytes(replica.out_of_sync_bytes)} out of sync"
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


def scrub_line(scrub: ScrubStatus) -> str:
    """How far a scrub is, and what it has found."""
    percent = 100 * scrub.done_bytes // scrub.total_bytes if scrub.total_bytes else 100
    left = "unknown time" if scrub.eta_s is None else human_time(scrub.eta_s)
    pace = f"{human_bytes(scrub.rate_bytes_per_s)}/s, {left} left"
    if scrub.paused:
        pace = "paused"
    elif scrub.waits:
        pace = f"it waits: {printable(scrub.waits)}"
    return (
        f"scrub: {percent} %, {human_bytes(scrub.done_bytes)} of "
        f"{human_bytes(scrub.total_bytes)}, {pace}; {found_by(scrub)}"
    )


def last_scrub_line(last: LastScrub) -> str:
    """What the last scrub found."""
    end = "was stopped" if last.stopped else "ended"
    ended = f"{end} {printable(last.ended)} after {human_time(last.seconds)}"
    return f"last scrub {ended}: {found_by(last)}"


def found_by(scrub: ScrubStatus | LastScrub) -> str:
    """What a scrub found, in blocks."""
    counts = {
        "mismatches": scrub.mismatches,
        "unreadable": scrub.unreadable,
        "repaired": scrub.repaired,
        "undecided": scrub.undecided,
        "left as they were": scrub.unrepaired,
    }
    told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return told or "0 mismatches"


def scrub_lines(status: Status) -> list[str]:
    """All there is to say of scrubs."""
    lines = [] if status.scrub is None else [scrub_line(status.scrub)]
    if status.last_scrub is not None:
        lines.append(last_scrub_line(status.last_scrub))
    if status.next_scrub is not None:
        lines.append(f"next scrub: {printable(status.next_scrub)}")
    return lines


# For pipes and files: stable, no colours, no wrapping


def plain(answer: Answer) -> str:
    """One mount as text of several lines."""
    status, place = answer.status, printable(answer.mountpoint)
    if status is None:
        assert answer.error is not None
        return f"{place}: {answer.error.problem}\n  {printable(str(answer.error))}\n"
    lines = [f"{place}: {state_word(status)}"]
    if (user := answer.claimed_by) is not None:
        lines.append(f"  {claim(user)}")
    lines.append(f"  {headline(status)}")
    lines += [f"  action: {printable(line)}" for line in describe(status)]
    lines += [f"  note: {printable(note)}" for note in status.notes]
    if status.resync is not None:
        lines.append(f"  {resync_line(status.resync)}")
    lines += [f"  {line}" for line in scrub_lines(status)]
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

    parts = [part for answer in view.answers for part in _parts(answer, width)]
    return Group(*parts, *map(Text, view.remarks))


def _parts(answer: Answer, width: int) -> "Iterable[RenderableType]":
    from rich.padding import Padding  # noqa: PLC0415
    from rich.progress_bar import ProgressBar  # noqa: PLC0415
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
    if (user := answer.claimed_by) is not None:
        yield indented(claim(user))
    yield indented(headline(status), "dim")
    for line in describe(status):
        yield indented(printable(line), colour)
    for note in status.notes:
        yield indented(f"note: {printable(note)}")
    if (resync := status.resync) is not None:
        yield indented(resync_line(resync))
        bar = ProgressBar(total=resync.total_bytes or 1, completed=resync.done_bytes, width=40)
        yield Padding(bar, (0, 0, 0, 2))
    for line in scrub_lines(status):
        yield indented(line)
        if (scrub := status.scrub) is not None and line == scrub_line(scrub):
            bar = ProgressBar(total=scrub.total_bytes or 1, completed=scrub.done_bytes, width=40)
            yield Padding(bar, (0, 0, 0, 2))
    if width < NARROW:
        for replica in status.replicas:
            place, state, *_ = replica_row(replica)
            bad = not replica.current or replica.trouble
            word = Text.assemble(place, ": ", (state, colour if bad else ""), overflow="fold")
            yield Padding(word, (0, 0, 0, 2))
            yield Padding(Text(counts_line(replica)), (0, 0, 0, 4))
    else:
        yield Padding(_replica_table(status.replicas, colour, wide=width >= WIDE), (0, 0, 0, 1))
    for errors in filter(None, map(errors_line, status.replicas)):
        yield indented(f"errors of {errors}", "red")


def _replica_table(replicas: Sequence[ReplicaStatus], colour: str, *, wide: bool) -> "Table":
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=None, padding=(0, 1), header_style="dim")
    for name, side, always in COLUMNS:
        if wide or always:
            table.add_column(
                name,
                justify="left" if side == "left" else "right",
                no_wrap=name != "replica",  # where it is too narrow, paths fold, not numbers
                overflow="fold",
            )
    for replica in replicas:
        row = {
            name: Text(cell)
            for cell, (name, _, always) in zip(replica_row(replica), COLUMNS, strict=True)
            if wide or always
        }
        if not replica.current or replica.trouble:
            row["state"].stylize(colour)
        if replica.errors.total:
            row["errors"].stylize("red")
        table.add_row(*row.values())
    return table
