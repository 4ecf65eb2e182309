"""From single runs to medians and ratios."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmark.alternation import Run
from benchmark.rows import Row


@dataclass(frozen=True, slots=True)
class Figures:
    """The medians of one contender in one row."""

    iops: float
    bytes_per_s: float
    p99_us: float
    cpu_s_per_gib: float
    resident_bytes: float
    peak_bytes: float


@dataclass(frozen=True, slots=True)
class Ratio:
    """How much faster one contender is than another: above 1 it is."""

    of_medians: float
    lowest: float
    """Of the rounds, each by itself."""
    highest: float


def of(runs: Sequence[Run], row: str, contender: str, family: str, place: str) -> list[Run]:
    """The runs of one contender in one row, by round."""
    wanted = (row, contender, family, place)
    return [run for run in runs if (run.row, run.contender, run.family, run.place) == wanted]


def figures(runs: Sequence[Run]) -> Figures:
    """The medians of *runs*."""
    return Figures(
        iops=statistics.median(run.iops for run in runs),
        bytes_per_s=statistics.median(run.bytes_per_s for run in runs),
        p99_us=statistics.median(run.p99_us for run in runs),
        cpu_s_per_gib=statistics.median(run.cpu_s_per_gib for run in runs),
        resident_bytes=statistics.median(run.resident_bytes for run in runs),
        peak_bytes=statistics.median(run.peak_bytes for run in runs),
    )


def ratio(runs: Sequence[Run], base: Sequence[Run]) -> Ratio:
    """The speed of *runs* beside *base*, of the same rounds."""
    each = [run.iops / other.iops for run, other in zip(runs, base, strict=True)]
    return Ratio(figures(runs).iops / figures(base).iops, min(each), max(each))


def goal(row: Row, *, voting: bool) -> float:
    """The ratio to the peer to reach; large blocks are where a vote can be much cheaper."""
    return 4.0 if voting and not row.in_operations else 1.2
