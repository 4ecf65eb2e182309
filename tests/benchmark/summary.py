"""From single runs to medians and ratios."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmark.alternation import Run
from benchmark.rows import Row

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Figures:
    """The medians of one contender in one row."""

    iops: float
    bytes_per_s: float
    p99_us: float
    cpu_s_per_gib: float
    cpu_us_per_operation: float
    resident_bytes: float


@dataclass(frozen=True, slots=True)
class Ratio:
    """How much faster one contender is than another: above 1 it is."""

    of_medians: float
    lowest: float
    """Of the rounds, each by itself."""
    highest: float


def of(runs: Iterable[Run], **wanted: object) -> list[Run]:
    """The runs whose fields are as *wanted*, in their order."""
    return [
        run for run in runs if all(getattr(run, name) == value for name, value in wanted.items())
    ]


def figures(row: Row, runs: Sequence[Run]) -> Figures:
    """The medians of *runs*, all of *row*."""
    cpu = statistics.median(run.cpu_s_per_gib for run in runs)
    return Figures(
        iops=statistics.median(run.iops for run in runs),
        bytes_per_s=statistics.median(run.bytes_per_s for run in runs),
        p99_us=statistics.median(run.p99_us for run in runs),
        cpu_s_per_gib=cpu,
        cpu_us_per_operation=cpu * 1e6 * row.block_size / (1 << 30),
        resident_bytes=statistics.median(run.resident_bytes for run in runs),
    )


def speed(row: Row, of: Figures) -> str:
    """In the unit that is usual for *row*."""
    return f"{of.iops:.0f} IOPS" if row.in_operations else f"{of.bytes_per_s / MIB:.0f} MiB/s"


def ratio(runs: Sequence[Run], base: Sequence[Run]) -> Ratio:
    """The speed of *runs* beside *base*, of the same rounds."""
    each = [run.iops / other.iops for run, other in zip(runs, base, strict=True)]
    medians = [statistics.median(run.iops for run in side) for side in (runs, base)]
    return Ratio(medians[0] / medians[1], min(each), max(each))


def goal(row: Row, *, voting: bool) -> float:
    """The ratio to the peer to reach; large blocks are where a vote can be much cheaper."""
    return 4.0 if voting and not row.in_operations else 1.2
