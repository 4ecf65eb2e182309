"""What a guest feels of a replica being replaced: its latency without that, and meanwhile."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmark import table
from benchmark.alternation import Entrant, Run, disks, place, run_once
from benchmark.contenders import Quorumfs, Space
from benchmark.matrix import FAMILIES
from benchmark.rows import DIRECT, KIB, Row

RATE = 4000
"""Reads a second, and as many writes: a busy guest, not one that takes all there is."""

GUEST = Row(
    f"4k randrw {2 * RATE}/s",
    4 * KIB,
    (*DIRECT, "--rw=randrw", "--iodepth=4", f"--rate_iops={RATE},{RATE}"),
)


@dataclass(frozen=True, slots=True)
class Felt:
    """What the guest felt in one round."""

    contender: str
    limit: str
    """Bytes a second for the resync, as ``resync-rate`` takes it."""
    without: Run
    meanwhile: Run


def measure(
    directory: Path,
    contenders: Sequence[Quorumfs],
    limits: Sequence[str],
    size: int,
    rounds: int,
    seconds: float,
) -> Iterator[Felt]:
    """Everybody in turn, with a new set each time.

    Raises `RuntimeError` if the new replica is current before the guest is done.
    """
    for number in range(1, rounds + 1):
        for limit in limits:
            for contender in contenders[:: 1 if number % 2 else -1]:
                yield _measure(directory, contender, limit, size, number, seconds)


def _measure(
    directory: Path, contender: Quorumfs, limit: str, size: int, number: int, seconds: float
) -> Felt:
    entrant, where = Entrant(contender, FAMILIES[0], Space(size)), place(directory)
    with disks(directory, [entrant]) as (disk,):
        without = run_once(disk, entrant, GUEST, seconds, where, number)
        mountpoint, old = disk.path.parent, disk.images[-1]
        contender.order("set", mountpoint, f"resync-rate={limit}")
        replace = contender.begin("replace", mountpoint, old, old.with_name("new.img"))
        try:
            meanwhile = run_once(disk, entrant, GUEST, seconds, where, number)
            if replace.poll() is not None:
                raise RuntimeError("the replacement ended before the guest: take a larger disk")
        finally:
            replace.kill()
            replace.wait()
    return Felt(contender.name, limit, without, meanwhile)


def report(felt: Sequence[Felt]) -> list[str]:
    """A table of medians."""
    rows = []
    for name, limit in dict.fromkeys((each.contender, each.limit) for each in felt):
        mine = [each for each in felt if (each.contender, each.limit) == (name, limit)]
        without = median(each.without.p99_us for each in mine)
        meanwhile = median(each.meanwhile.p99_us for each in mine)
        iops = median(each.meanwhile.iops / each.without.iops for each in mine)
        times = f"{meanwhile / without:.1f}"
        rows.append([limit, name, f"{without:.0f}", f"{meanwhile:.0f}", times, f"{iops:.2f}"])
    header = ["resync-rate", "", "p99 µs: without", "meanwhile", "times", "IOPS, of without"]
    return table.lines(header, rows)
