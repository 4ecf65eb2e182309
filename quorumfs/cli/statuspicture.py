"""A status on a terminal: in colours, with progress bars, as wide as the terminal is."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from quorumfs.cli.answers import Answer, View
from quorumfs.cli.output import printable
from quorumfs.cli.statustext import (
    COLUMNS,
    counts_line,
    errors_line,
    headline,
    replica_row,
    resync_line,
    scrub_line,
    scrub_lines,
    state_word,
    warning_of_stranger,
)
from quorumfs.control.advice import describe
from quorumfs.control.status import DiskState, ReplicaStatus

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.table import Table

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


def console_of_stdout() -> "Console":
    from rich.console import Console  # noqa: PLC0415 (a tenth of a second, needed only here)

    return Console(highlight=False)


def live_on(console: "Console") -> "Live":
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
        yield indented(warning_of_stranger(user))
    yield indented(headline(status), "dim")
    for line in describe(status):
        yield indented(printable(line), colour)
    for line in status.actions:
        yield indented(f"under way: {printable(line)}")
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
