"""A simulated file under the real disk: faults on command, time from trio's clock.

With `trio.testing.MockClock` an hour of hanging takes no time, and everything that happens
follows from one seed.
"""

import errno
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from quorumfs.decisions.patterns import ReadPattern
from quorumfs.disk.disk import Disk
from quorumfs.disk.events import Event, EventLog
from quorumfs.disk.mirror import Mirror
from quorumfs.metadata.volatile import Volatile
from quorumfs.repair.rewrite import Rewriting
from quorumfs.replica.fastfile import FastFile
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Done, Kind, Operation, TruncatedError, Value

BLOCK = 4096


@dataclass
class Fault:
    """What happens to one operation: it takes a time, and then perhaps fails."""

    delay_s: float = 0.0
    error: int = 0


NO_FAULT = Fault()
Chooser = Callable[[Operation], Fault]


@dataclass
class SimulatedStorage:
    """A file in memory. Writes take effect at the end of their delay, in 512-byte sectors.

    *choose* decides what happens to each operation; `log` keeps what was asked, in order.
    `data_blocks` are the 4 KiB blocks that are not in a hole; None: it knows no holes.
    """

    nursery: trio.Nursery
    size: int
    choose: Chooser = lambda _: NO_FAULT
    content: bytearray = field(default_factory=bytearray)
    log: list[Operation] = field(default_factory=list)
    data_blocks: set[int] | None = None
    truncated: bool = False
    fast_file: FastFile | None = None
    in_flight: int = 0
    in_flight_max: int = 0

    def __post_init__(self) -> None:
        self.content = self.content or bytearray(self.size)

    def submit(self, operation: Operation, done: Done) -> None:
        self.log.append(operation)
        self.in_flight += 1
        self.in_flight_max = max(self.in_flight, self.in_flight_max)
        self.nursery.start_soon(self._perform, operation, done, self.choose(operation))

    def copying(self, _: object, offset: int, length: int) -> None:
        """It copies from nobody."""

    def resized(self, _: int) -> None:
        """The disk keeps its size."""

    def count(self, kind: Kind) -> int:
        """How many operations of *kind* were asked for."""
        return sum(operation.kind is kind for operation in self.log)

    async def _perform(self, operation: Operation, done: Done, fault: Fault) -> None:
        await trio.sleep(fault.delay_s)
        self.in_flight -= 1
        if fault.error:
            done(operation, 0, OSError(fault.error, "simulated"))
            return
        if self.truncated:
            done(operation, 0, TruncatedError(0))
            return
        value: Value = 0
        start, end = operation.offset, operation.offset + operation.length
        match operation.kind:
            case Kind.READ:
                value = bytes(self.content[start:end])
            case Kind.WRITE:
                self.content[start:end] = operation.data
                self._blocks_become_data(start, end)
            case Kind.ZERO | Kind.DISCARD:
                self.content[start:end] = bytes(end - start)
                if self.data_blocks is not None and operation.kind is Kind.DISCARD:
                    self.data_blocks -= set(range(-(-start // BLOCK), end // BLOCK))
            case Kind.SEEK_DATA | Kind.SEEK_HOLE:
                value = self._seek(start, data=operation.kind is Kind.SEEK_DATA)
            case Kind.REACH:
                value = end
        done(operation, value, None)

    def _blocks_become_data(self, start: int, end: int) -> None:
        if self.data_blocks is not None:
            self.data_blocks.update(range(start // BLOCK, -(-end // BLOCK)))

    def _seek(self, offset: int, *, data: bool) -> int:
        if self.data_blocks is None:
            return offset if data else self.size
        while offset < self.size and (offset // BLOCK in self.data_blocks) is not data:
            offset = (offset // BLOCK + 1) * BLOCK
        return min(offset, self.size)


def fails(error: int, *kinds: Kind) -> Chooser:
    """Every operation of one of *kinds* fails with *error* at once."""
    return lambda operation: Fault(error=error) if operation.kind in kinds else NO_FAULT


def takes(delay_s: float, *kinds: Kind) -> Chooser:
    """Every operation of one of *kinds* takes *delay_s* seconds and then succeeds."""
    return lambda operation: Fault(delay_s) if operation.kind in kinds else NO_FAULT


def at_random(seed: int, timeout_s: float) -> Chooser:
    """Mostly well, sometimes slow, sometimes failing, now and then hanging past *timeout_s*."""
    dice = random.Random(seed)

    def choose(operation: Operation) -> Fault:
        number = dice.random()
        if number < 0.005:
            return Fault(dice.uniform(1, 10) * timeout_s, dice.choice([0, 0, errno.EIO]))
        if number < 0.05:
            return Fault(dice.uniform(0, 0.1), dice.choice([errno.EIO, errno.ENOSPC]))
        return Fault(dice.uniform(0, 0.01))

    return choose


@dataclass
class Bench:
    """A disk on simulated files, and what it told."""

    disk: Disk
    files: list[SimulatedStorage]
    told: list[Event]


def make_bench(
    nursery: trio.Nursery,
    count: int,
    *,
    pattern: ReadPattern,
    threshold: int = 1,
    size: int = 1 << 16,
    timeout_s: float = 8.0,
    repairer: type[Rewriting] | None = None,
    zero_kind: Kind | None = None,
    storage: type[SimulatedStorage] = SimulatedStorage,
) -> Bench:
    """A running disk of *size* bytes on *count* simulated files, all zeros."""
    files = [storage(nursery, size) for _ in range(count)]
    told: list[Event] = []
    replicas = [Replica(i, f"r{i}", file, timeout_s) for i, file in enumerate(files)]
    mirror = Mirror(
        size,
        Volatile(replicas, size, threshold),
        pattern=pattern,
        search_s=timeout_s,
        events=EventLog("disk", told.append),
    )
    disk = Disk(mirror, None if repairer is None else repairer(mirror), zero_kind=zero_kind)
    nursery.start_soon(disk.run)
    return Bench(disk, files, told)
