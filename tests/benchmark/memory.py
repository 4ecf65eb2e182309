"""The resident memory of a daemon: idle, busy, and idle again."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmark import processes, table
from benchmark.alternation import Entrant, disks, place, run_once
from benchmark.contenders import Contender, Family, Space, both
from benchmark.matrix import FAMILIES
from benchmark.rows import DIRECT, KIB, MIB, Row

ROWS = (
    Row("4k randrw qd32", 4 * KIB, (*DIRECT, "--rw=randrw", "--iodepth=32")),
    Row("1M randrw qd64", MIB, (*DIRECT, "--rw=randrw", "--iodepth=64")),
)
CALM_S = 5.0
"""After this long without a request, a daemon has given back what it means to give back."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Of one daemon, one after the other; all in bytes."""

    place: str
    family: str
    contender: str
    idle_bytes: int
    busy_peak_bytes: dict[str, int]
    """By row."""
    calm_bytes: int
    """`CALM_S` after the last row."""


def measure(directory: Path, size: int, seconds: float) -> Iterator[Memory]:
    """Everybody's, with both kinds of sets."""
    for family in FAMILIES:
        for contender in both():
            yield _measure(directory, contender, family, size, seconds)


def _measure(
    directory: Path, contender: Contender, family: Family, size: int, seconds: float
) -> Memory:
    entrant = Entrant(contender, family, Space(size))
    with disks(directory, [entrant]) as (disk,):
        time.sleep(CALM_S)
        idle = processes.usage(disk.pid).resident_bytes
        peaks = {}
        for row in ROWS:
            peaks[row.name] = run_once(disk, entrant, row, seconds, place(directory), 1).peak_bytes
        time.sleep(CALM_S)
        calm = processes.usage(disk.pid).resident_bytes
    return Memory(place(directory), family.name, contender.name, idle, peaks, calm)


def report(measured: Sequence[Memory]) -> list[str]:
    """A table in MiB."""
    header = ["MiB", "set", "idle", *(f"peak {row.name}" for row in ROWS), "idle again"]
    rows = []
    for each in measured:
        stages = [each.idle_bytes, *each.busy_peak_bytes.values(), each.calm_bytes]
        rows.append([each.contender, each.family, *(f"{stage / MIB:.0f}" for stage in stages)])
    return table.lines(header, rows)
