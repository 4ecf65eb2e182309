"""Every row, on every kind of set and directory, for each contender in turn."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmark import machine, summary, table
from benchmark.alternation import Entrant, Run, alternate, check_room, place
from benchmark.chart import Chart, Panel
from benchmark.contenders import Contender, Family, Space
from benchmark.rows import Row

FAMILIES = (Family(2, "fifo", 1), Family(3, "quorum", 2))


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run where; the first contender is the one that others are compared with."""

    rows: Sequence[Row]
    contenders: Sequence[Contender]
    directories: Sequence[Path]
    size: int
    rounds: int
    seconds: float

    def __post_init__(self) -> None:
        """Raises `ValueError` if a directory has too little room."""
        for directory in self.directories:
            for family in FAMILIES:
                check_room(directory, self.entrants(family))

    def contenders_in(self, family: Family) -> list[Contender]:
        """Who takes part: the floors in the first family only, for they know no families."""
        return [each for each in self.contenders if family == FAMILIES[0] or not each.is_floor]

    def entrants(self, family: Family) -> list[Entrant]:
        """The same with their disks."""
        space = Space(self.size)
        return [Entrant(contender, family, space) for contender in self.contenders_in(family)]


def measure(plan: Plan) -> Iterator[Run]:
    """All runs of *plan*."""
    for directory in plan.directories:
        for family in FAMILIES:
            yield from alternate(
                directory, plan.entrants(family), plan.rows, plan.rounds, plan.seconds
            )


def report(plan: Plan, runs: Sequence[Run]) -> list[str]:
    """Tables of medians, one for each family and directory, and one of memory."""
    lines = []
    for directory in plan.directories:
        for family in FAMILIES:
            title = f"{family.name}, {place(directory)}"
            lines += ["", title, "", *_table(plan, runs, family, place(directory))]
    title = "Memory of the daemon, MiB: the most right after a run, and its peak"
    return [*lines, "", title, "", *_memory(plan, runs)]


def _table(plan: Plan, runs: Sequence[Run], family: Family, where: str) -> list[str]:
    names = [contender.name for contender in plan.contenders_in(family)]
    base, *others = names
    rivals = [each.name for each in plan.contenders_in(family)[1:] if not each.is_floor]
    has_goal = base == "peer" and bool(rivals)
    header = ["row", *names]
    for rival in rivals:
        header += [f"{rival}/{base}", "of rounds"]
    header += [f"goal of {rivals[0]}"] if has_goal else []
    header += [f"p99 µs: {base}", *others, f"CPU s/GiB: {base}", *others]
    rows = []
    for row in plan.rows:
        of = {
            name: summary.of(runs, row=row.name, contender=name, family=family.name, place=where)
            for name in names
        }
        figures = {name: summary.figures(row, of[name]) for name in names}
        ratios = [summary.ratio(of[rival], of[base]) for rival in rivals]
        cells = [row.name, *(summary.speed(row, figures[name]) for name in names)]
        for ratio in ratios:
            cells += [f"{ratio.of_medians:.2f}", f"{ratio.lowest:.2f}..{ratio.highest:.2f}"]
        if has_goal:
            goal = summary.goal(row, voting=family.voting)
            cells.append(f"{goal:g} {'met' if ratios[0].of_medians >= goal else 'MISSED'}")
        cells += [f"{figures[name].p99_us:.0f}" for name in names]
        cells += [f"{figures[name].cpu_s_per_gib:.2f}" for name in names]
        rows.append(cells)
    return table.lines(header, rows)


def _memory(plan: Plan, runs: Sequence[Run]) -> list[str]:
    names = [each.name for each in plan.contenders if not each.is_floor]
    rows = []
    for family in FAMILIES:
        cells = [family.name]
        for name in names:
            of = summary.of(runs, family=family.name, contender=name)
            cells.append(f"{max(run.resident_bytes for run in of) >> 20}")
            cells.append(f"{max(run.peak_bytes for run in of) >> 20}")
        rows.append(cells)
    return table.lines(["", *(cell for name in names for cell in (name, "peak"))], rows)


def chart(plan: Plan, runs: Sequence[Run]) -> Chart:
    """The ratios of the second contender to the first: a panel for each directory."""
    base, rival = (contender.name for contender in plan.contenders[:2])
    panels = []
    for directory in plan.directories:
        groups = {}
        for row in plan.rows:
            bars = {}
            for family in FAMILIES:
                of = summary.of(runs, row=row.name, family=family.name, place=place(directory))
                ratio = summary.ratio(
                    summary.of(of, contender=rival), summary.of(of, contender=base)
                )
                bars[family.name] = ratio.of_medians
            groups[row.name] = bars
        panels.append(Panel(f"Replicas on {machine.file_system(directory)}", groups))
    return Chart(
        "Speed of quorumfs beside QEMU's quorum driver",
        "Ratio of operations per second, medians of alternating runs; longer is faster. "
        "Lines: as fast (1.0), a fifth faster (1.2)",
        panels,
        (1.0, 1.2),
    )
