"""What many mounts cost a host while nobody uses them."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmark import processes, table
from benchmark.alternation import Entrant, disks, place
from benchmark.contenders import Contender, Quorumfs, Space
from benchmark.matrix import FAMILIES
from benchmark.rows import MIB

CALM_S = 15.0
"""After this long without a request, a daemon rests."""

SIZE = 64 * MIB
"""Bytes of each disk."""


@dataclass(frozen=True, slots=True)
class Idle:
    """Of all daemons of one contender."""

    place: str
    contender: str
    mounts: int
    cores: float
    """How much of a processor all of them take together: 1 is one core."""
    pss_bytes: float
    """Of one daemon, on average: what is its own, and its share of what is shared."""
    status_s: float | None
    """How long ``quorumfs status`` of all takes; None: of a contender that has none."""


def measure(
    directory: Path, contenders: Sequence[Contender], mounts: int, seconds: float
) -> Iterator[Idle]:
    """One contender after the other, each for *seconds*."""
    for contender in contenders:
        entrants = [Entrant(contender, FAMILIES[0], Space(SIZE))] * mounts
        with disks(directory, entrants) as ready:
            pids = [disk.pid for disk in ready if disk.pid is not None]
            time.sleep(CALM_S)
            before, began = _cpu_s(pids), time.monotonic()
            time.sleep(seconds)
            cores = (_cpu_s(pids) - before) / (time.monotonic() - began)
            pss = sum(processes.pss_bytes(pid) for pid in pids) / len(pids)
            status_s = _status_s(contender) if isinstance(contender, Quorumfs) else None
        yield Idle(place(directory), contender.name, mounts, cores, pss, status_s)


def _cpu_s(pids: Sequence[int]) -> float:
    return sum(processes.cpu_s(pid) for pid in pids)


def _status_s(quorumfs: Quorumfs) -> float:
    """The median of some times (seconds)."""
    times = []
    for _ in range(5):
        began = time.monotonic()
        quorumfs.order("status")
        times.append(time.monotonic() - began)
    return median(times)


def report(measured: Sequence[Idle]) -> list[str]:
    """A table."""
    header = ["idle", "mounts", "% of a core, all", "MiB each", "s of status"]
    rows = [
        [
            each.contender,
            str(each.mounts),
            f"{100 * each.cores:.2f}",
            f"{each.pss_bytes / MIB:.1f}",
            "" if each.status_s is None else f"{each.status_s:.2f}",
        ]
        for each in measured
    ]
    return table.lines(header, rows)
