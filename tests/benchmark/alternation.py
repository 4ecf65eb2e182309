"""Rows run in turn on each disk, so that the runs to compare are seconds apart."""

import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmark import fio, interrupts, machine, processes
from benchmark.contenders import Contender, Disk, Family, Space
from benchmark.rows import Row

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Entrant:
    """Who takes part, with which disk."""

    contender: Contender
    family: Family
    space: Space

    def needed_bytes(self) -> int:
        """The room that its files take at first."""
        images = self.contender.image_count(self.family)
        return images * self.space.size if self.space.filled else 0


@dataclass(frozen=True, slots=True)
class Run:
    """One row on one disk once."""

    place: str
    """Which directory, and its file system."""
    family: str
    contender: str
    disk_bytes: int
    used_bytes: int
    """What the row ran on: the first bytes of the disk."""
    row: str
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


def place(directory: Path) -> str:
    """How a directory is named in results."""
    return f"{directory} ({machine.file_system(directory)})"


def check_room(directory: Path, entrants: Sequence[Entrant]) -> None:
    """Raises `ValueError` if the disks of *entrants* do not fit into *directory* together."""
    needed = sum(entrant.needed_bytes() for entrant in entrants)
    if shutil.disk_usage(directory).free < needed:
        raise ValueError(f"{directory} has no room for {needed >> 20} MiB")


@contextmanager
def disks(directory: Path, entrants: Sequence[Entrant]) -> Iterator[list[Disk]]:
    """The disks of all *entrants* at once, in *directory*, where nothing is left of them."""
    unnamed = tempfile.TemporaryDirectory(prefix="quorumfs-benchmark-", dir=directory)
    with unnamed as parent, ExitStack() as stack:
        try:
            ready = []
            for number, entrant in enumerate(entrants):
                place = Path(parent) / f"{entrant.contender.name}{number}"
                place.mkdir()
                disk = entrant.contender.disk(entrant.family, place, entrant.space)
                with interrupts.deferred():
                    ready.append(stack.enter_context(disk))
            for each in ready:
                each.settle()
            yield ready
        finally:
            with interrupts.deferred():
                stack.close()


def run_once(
    disk: Disk, entrant: Entrant, row: Row, seconds: float, place: str, number: int
) -> Run:
    """Run *row* on *disk*, with nothing left to write from earlier runs."""
    disk.settle()
    if disk.pid is not None:
        processes.forget_peak(disk.pid)
    before = processes.usage(disk.pid)
    outcome = fio.run(disk.path, row, entrant.space.used, seconds)
    after = processes.usage(disk.pid)
    return Run(
        place=place,
        family=entrant.family.name,
        contender=entrant.contender.name,
        disk_bytes=entrant.space.size,
        used_bytes=entrant.space.used,
        row=row.name,
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
    directory: Path, entrants: Sequence[Entrant], rows: Sequence[Row], rounds: int, seconds: float
) -> Iterator[Run]:
    """In each round, each row on the disk of each entrant, one right after the other.

    The order turns round each time: whoever comes second might find a machine that has warmed up.
    stderr is told how far it is.
    """
    where = place(directory)
    with disks(directory, entrants) as ready:
        for number in range(1, rounds + 1):
            for row_number, row in enumerate(rows):
                print(f"{where}, round {number}: {row.name}", end="", file=sys.stderr, flush=True)
                pairs = list(zip(ready, entrants, strict=True))
                for disk, entrant in pairs[:: 1 if (number + row_number) % 2 else -1]:
                    run = run_once(disk, entrant, row, seconds, where, number)
                    said = f", {run.contender} ({run.family}) {run.iops:.0f}"
                    print(said, end="", file=sys.stderr, flush=True)
                    yield run
                print(file=sys.stderr)
