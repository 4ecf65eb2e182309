"""Rows run in turn for each contender, so that a row's runs to compare are seconds apart."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmark import fio, processes
from benchmark.contenders import Disk
from benchmark.rows import Row

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Run:
    """One row on one disk once."""

    place: str
    """Which directory, and its file system."""
    family: str
    row: str
    contender: str
    round_number: int
    iops: float
    bytes_per_s: float
    p99_us: float
    sync_p99_us: float
    moved_bytes: int
    user_s: float
    """CPU time of the daemon."""
    system_s: float
    resident_bytes: int
    """Of the daemon, right after the run."""
    peak_bytes: int
    """The most during the run."""

    @property
    def cpu_s_per_gib(self) -> float:
        return (self.user_s + self.system_s) * GIB / self.moved_bytes if self.moved_bytes else 0.0


def run_once(
    disk: Disk, row: Row, size: int, seconds: float, *, place: str, family: str, number: int
) -> Run:
    """Run *row* on *disk*."""
    disk.settle()
    processes.forget_peak(disk.pid)
    before = processes.usage(disk.pid)
    outcome = fio.run(disk.path, row, size, seconds)
    after = processes.usage(disk.pid)
    return Run(
        place=place,
        family=family,
        row=row.name,
        contender=disk.contender,
        round_number=number,
        iops=outcome.iops,
        bytes_per_s=outcome.bytes_per_s,
        p99_us=outcome.p99_us,
        sync_p99_us=outcome.sync_p99_us,
        moved_bytes=outcome.moved_bytes,
        user_s=after.user_s - before.user_s,
        system_s=after.system_s - before.system_s,
        resident_bytes=after.resident_bytes,
        peak_bytes=after.peak_bytes,
    )


def alternate(
    disks: Sequence[Disk],
    rows: Sequence[Row],
    size: int,
    seconds: float,
    rounds: int,
    *,
    place: str,
    family: str,
) -> Iterator[Run]:
    """In each round, each row on each disk, one right after the other; tells stderr where it is."""
    for number in range(1, rounds + 1):
        for row in rows:
            print(f"{place}, {family}, round {number}: {row.name}", file=sys.stderr)
            for disk in disks:
                yield run_once(disk, row, size, seconds, place=place, family=family, number=number)
