"""How speed falls with the number of replicas, beside the peer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmark import machine, summary, table
from benchmark.alternation import Entrant, Run, alternate, check_room, place
from benchmark.chart import Chart, Panel
from benchmark.contenders import Family, Space, both
from benchmark.rows import Row

COUNTS = (1, 2, 3, 5)
PATTERNS = (
    [Family(count, "fifo", 1) for count in COUNTS],
    [Family(count, "quorum", count // 2 + 1) for count in COUNTS],
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run."""

    rows: Sequence[Row]
    directories: Sequence[Path]
    size: int
    rounds: int
    seconds: float

    def __post_init__(self) -> None:
        """Raises `ValueError` if a directory has too little room."""
        for directory in self.directories:
            for families in PATTERNS:
                check_room(directory, self.entrants(families))

    def entrants(self, families: Sequence[Family]) -> list[Entrant]:
        """Everybody with every number of replicas, at once: else nothing is to be compared."""
        space = Space(self.size)
        return [Entrant(each, family, space) for family in families for each in both()]


def measure(plan: Plan) -> Iterator[Run]:
    """All runs of *plan*."""
    for directory in plan.directories:
        for families in PATTERNS:
            entrants = plan.entrants(families)
            yield from alternate(directory, entrants, plan.rows, plan.rounds, plan.seconds)


def report(plan: Plan, runs: Sequence[Run]) -> list[str]:
    """A table of medians for each directory."""
    lines = []
    for directory in plan.directories:
        rows = []
        for family in (family for families in PATTERNS for family in families):
            for row in plan.rows:
                theirs, ours = _sides(runs, directory, row, family)
                figures = [summary.figures(row, side) for side in (theirs, ours)]
                speeds = [summary.speed(row, each) for each in figures]
                ratio = summary.ratio(ours, theirs).of_medians
                rows.append([family.name, row.name, *speeds, f"{ratio:.2f}"])
        header = ["set", "row", "peer", "ours", "ours/peer"]
        lines += ["", place(directory), "", *table.lines(header, rows)]
    return lines


def chart(plan: Plan, runs: Sequence[Run]) -> Chart:
    """Speeds in units of the peer's with one replica; a panel for each directory and pattern."""
    panels = []
    for directory in plan.directories:
        for families in PATTERNS:
            groups = {}
            for row in plan.rows:
                unit, _ = _sides(runs, directory, row, families[0])
                for family in families:
                    theirs, ours = (
                        summary.ratio(side, unit).of_medians
                        for side in _sides(runs, directory, row, family)
                    )
                    groups[f"{row.name} over {family.replicas}"] = {
                        "QEMU": theirs,
                        "quorumfs": ours,
                    }
            pattern = "vote" if families[0].voting else "fifo"
            panels.append(Panel(f"{pattern}, on {machine.file_system(directory)}", groups))
    return Chart(
        "Speed with 1, 2, 3 and 5 replicas",
        "Operations per second; 1.0 is QEMU's quorum driver with one replica; longer is faster",
        panels,
        (1.0,),
    )


def _sides(runs: Sequence[Run], directory: Path, row: Row, family: Family) -> list[list[Run]]:
    of = summary.of(runs, place=place(directory), row=row.name, family=family.name)
    return [summary.of(of, contender=contender.name) for contender in both()]
