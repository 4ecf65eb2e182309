"""Every row, on every kind of set and directory, for each contender in turn."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmark import machine, summary, table
from benchmark.alternation import Run, alternate
from benchmark.chart import Chart, Panel
from benchmark.contenders import Contender, Family, Space, disks
from benchmark.rows import Row

FAMILIES = (Family(2, "fifo", 1), Family(3, "quorum", 2))

PREFIX = "quorumfs-benchmark-"


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run where; the first contender is the one that others are compared with."""

    rows: Sequence[Row]
    families: Sequence[Family]
    contenders: Sequence[Contender]
    directories: Sequence[Path]
    size: int
    rounds: int
    seconds: float

    def __post_init__(self) -> None:
        """Raises `ValueError` if a directory has too little room."""
        for directory in self.directories:
            needed = self.size * max(
                sum(contender.image_count(family) for contender in self.of(family))
                for family in self.families
            )
            if shutil.disk_usage(directory).free < needed:
                raise ValueError(f"{directory} has no room for {needed >> 20} MiB")

    def of(self, family: Family) -> list[Contender]:
        """Who takes part: the floors in the first family only, for they know no families."""
        floors = family == self.families[0]
        return [each for each in self.contenders if floors or not each.is_floor]


def place(directory: Path) -> str:
    """How a directory is named in results."""
    return f"{directory} ({machine.file_system(directory)})"


def measure(plan: Plan) -> Iterator[Run]:
    """All runs of *plan*; nothing is left in its directories."""
    for directory in plan.directories:
        for family in plan.families:
            with (
                tempfile.TemporaryDirectory(prefix=PREFIX, dir=directory) as name,
                disks(plan.of(family), family, Path(name), Space(plan.size)) as ready,
            ):
                yield from alternate(
                    ready,
                    plan.rows,
                    plan.size,
                    plan.seconds,
                    plan.rounds,
                    place=place(directory),
                    family=family.name,
                )


def report(plan: Plan, runs: Sequence[Run]) -> list[str]:
    """Tables of medians, one for each family and directory."""
    lines = []
    for directory in plan.directories:
        for family in plan.families:
            lines += ["", f"{family.name}, {place(directory)}", ""]
            lines += _table(plan, runs, family, directory)
    lines += ["", "memory of the daemon, MiB: after a run (highest), and its peak", ""]
    lines += _memory(plan, runs)
    return lines


def _table(plan: Plan, runs: Sequence[Run], family: Family, directory: Path) -> list[str]:
    names = [contender.name for contender in plan.of(family)]
    base = names[0]
    rivals = [each.name for each in plan.of(family)[1:] if not each.is_floor]
    header = ["row", *names]
    for rival in rivals:
        header += [f"{rival}/{base}", "of rounds"]
    header += ["goal"] if base == "peer" and rivals else []
    header += [f"p99 µs {names[0]}", *names[1:], f"CPU s/GiB {names[0]}", *names[1:]]
    rows = []
    for row in plan.rows:
        of = {
            name: summary.of(runs, row.name, name, family.name, place(directory)) for name in names
        }
        figures = {name: summary.figures(of[name]) for name in names}
        cells = [row.name, *(speed(row, figures[name]) for name in names)]
        ratios = [summary.ratio(of[rival], of[base]) for rival in rivals]
        for ratio in ratios:
            cells += [f"{ratio.of_medians:.2f}", f"{ratio.lowest:.2f}..{ratio.highest:.2f}"]
        if base == "peer" and rivals:
            goal = summary.goal(row, voting=family.voting)
            cells.append(f"{goal:g} {'met' if ratios[0].of_medians >= goal else 'MISSED'}")
        cells += [f"{figures[name].p99_us:.0f}" for name in names]
        cells += [f"{figures[name].cpu_s_per_gib:.2f}" for name in names]
        rows.append(cells)
    return table.lines(header, rows)


def speed(row: Row, figures: summary.Figures) -> str:
    """In the unit that is usual for the row."""
    if row.in_operations:
        return f"{figures.iops:.0f} IOPS"
    return f"{figures.bytes_per_s / (1 << 20):.0f} MiB/s"


def _memory(plan: Plan, runs: Sequence[Run]) -> list[str]:
    families = [family.name for family in plan.families]
    names = [each.name for each in plan.contenders if not each.is_floor]
    rows = []
    for family in families:
        cells = [family]
        for name in names:
            of = [run for run in runs if (run.family, run.contender) == (family, name)]
            cells.append(f"{max(run.resident_bytes for run in of) >> 20}")
            cells.append(f"{max(run.peak_bytes for run in of) >> 20}")
        rows.append(cells)
    return table.lines(["", *(cell for name in names for cell in (name, "peak"))], rows)


def chart(plan: Plan, runs: Sequence[Run], base: str, rival: str) -> Chart:
    """The ratios of one contender to another: a panel for each directory."""
    panels = []
    for directory in plan.directories:
        groups = {}
        for row in plan.rows:
            bars = {}
            for family in plan.families:
                mine, theirs = (
                    summary.of(runs, row.name, name, family.name, place(directory))
                    for name in (rival, base)
                )
                bars[family.name] = summary.ratio(mine, theirs).of_medians
            groups[row.name] = bars
        panels.append(Panel(f"Replicas on {machine.file_system(directory)}", groups))
    return Chart(
        "Speed of quorumfs beside QEMU's quorum driver",
        "Ratio of operations per second, medians of alternating runs; "
        "the lines: as fast (1.0), and a fifth faster (1.2)",
        panels,
        (1.0, 1.2),
    )
