"""Whether a large disk costs more than a small one: both sparse at first.

The large one is used as far as the small one is, and all over: what is remembered per extent
(quorumfs's marks, a file system's own map) costs more where requests never return to an extent.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmark import summary, table
from benchmark.alternation import Entrant, Run, alternate, place
from benchmark.contenders import Space, both
from benchmark.matrix import FAMILIES
from benchmark.rows import Row

GIB = 1 << 30


def spaces(small_gib: int, large_gib: int) -> list[Space]:
    """The disks of everybody; the first is what others are compared with."""
    small, large = small_gib * GIB, large_gib * GIB
    return [
        Space(small, filled=False),
        Space(large, filled=False, used_first=small),
        Space(large, filled=False),
    ]


def measure(
    directory: Path, rows: Sequence[Row], of: Sequence[Space], rounds: int, seconds: float
) -> Iterator[Run]:
    """Each row on all disks in turn."""
    for family in FAMILIES:
        entrants = [Entrant(each, family, space) for each in both() for space in of]
        yield from alternate(directory, entrants, rows, rounds, seconds)


def report(
    directory: Path, rows: Sequence[Row], of: Sequence[Space], runs: Sequence[Run]
) -> list[str]:
    """A table of medians."""
    lines = []
    for family in FAMILIES:
        for row in rows:
            for contender in both():
                sides = [
                    summary.of(
                        runs,
                        place=place(directory),
                        family=family.name,
                        row=row.name,
                        contender=contender.name,
                        disk_bytes=space.size,
                        used_bytes=space.used,
                    )
                    for space in of
                ]
                for space, side in zip(of, sides, strict=True):
                    figures = summary.figures(row, side)
                    lines.append(
                        [
                            row.name,
                            family.name,
                            contender.name,
                            f"{space.size // GIB}, {space.used // GIB}",
                            summary.speed(row, figures),
                            f"{summary.ratio(side, sides[0]).of_medians:.2f}",
                            f"{figures.cpu_us_per_operation:.0f}",
                            f"{figures.resident_bytes / (1 << 20):.0f}",
                        ]
                    )
    header = ["row", "set", "", "GiB, used", "speed", "ratio", "CPU µs/operation", "RSS MiB"]
    return ["", place(directory), "", *table.lines(header, lines)]
