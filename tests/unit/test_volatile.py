"""``metadata=none``: what a failed flush may have lost is not taken for held, or for durable."""

import errno
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing
from support.simulated import (
    BLOCK,
    Bench,
    Fault,
    SimulatedStorage,
    fails,
    make_bench,
    takes,
)

from quorumfs.decisions.patterns import Fifo, Quorum, ReadPattern
from quorumfs.replica.storage import Done, Kind, Operation

NEW = b"x" * BLOCK


@dataclass
class CachedFile(SimulatedStorage):
    """A file with a page cache, which a write reaches before its thread gets to say so."""

    medium: bytes = b""
    loses: bool = False
    """The next flush fails, and what it should have written is soon gone from the cache too."""
    told: trio.Event = field(default_factory=trio.Event)
    """No write is answered before this is set."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.medium = bytes(self.size)
        self.told.set()

    async def _perform(self, operation: Operation, done: Done, fault: Fault) -> None:
        if operation.kind is Kind.WRITE:
            await super()._perform(operation, lambda *_: None, fault)
            await self.told.wait()
            done(operation, 0, None)
            return
        if operation.kind is Kind.SYNC and self.loses:
            self.loses = False  # the kernel tells it once
            self.content[:] = self.medium
            fault = Fault(error=errno.EIO)
        elif operation.kind is Kind.SYNC:
            self.medium = bytes(self.content)
        await super()._perform(operation, done, fault)


def cached_bench(
    nursery: trio.Nursery, count: int, *, pattern: ReadPattern, threshold: int
) -> tuple[Bench, list[CachedFile]]:
    bench = make_bench(nursery, count, pattern=pattern, threshold=threshold, storage=CachedFile)
    return bench, [file for file in bench.files if isinstance(file, CachedFile)]


async def lose_a_write_in_flight(bench: Bench, file: CachedFile) -> OSError | None:
    """A flush of *file* fails when a write is in its cache, and is about to be told of as done.

    Returns the outcome of the flush; the guest hears of success of the write.
    """
    outcome = None
    file.told = trio.Event()
    async with trio.open_nursery() as writer:
        writer.start_soon(bench.disk.write, 0, NEW)
        await trio.testing.wait_all_tasks_blocked()
        file.loses = True
        try:
            await bench.disk.flush()
        except OSError as error:
            outcome = error
        file.told.set()
    return outcome


async def test_a_write_lost_in_flight_is_read_from_others(nursery: trio.Nursery) -> None:
    """P1: as soon as the flush has found others to have what this replica lost."""
    bench, (first, _) = cached_bench(nursery, 2, pattern=Fifo(), threshold=1)
    assert await lose_a_write_in_flight(bench, first) is None
    assert await bench.disk.read(0, BLOCK) == NEW
    await bench.disk.flush()
    assert await bench.disk.read(0, BLOCK) == NEW


async def test_a_write_lost_in_flight_is_read_from_others_though_the_flush_failed(
    nursery: trio.Nursery,
) -> None:
    """P1: nothing more is needed than a replica that took the write, and lost nothing."""
    bench, (first, second) = cached_bench(nursery, 2, pattern=Fifo(), threshold=1)
    second.choose = fails(errno.EIO, Kind.DISCARD)
    await bench.disk.make_zeros(8 * BLOCK, BLOCK, discard=True)  # the second one lacks that
    assert await lose_a_write_in_flight(bench, first) is not None
    assert await bench.disk.read(0, BLOCK) == NEW


async def test_a_write_lost_in_flight_is_not_durable(nursery: trio.Nursery) -> None:
    """P2: the kernel tells the loss once; the next flush succeeds there all the same."""
    bench, files = cached_bench(nursery, 2, pattern=Quorum(2), threshold=2)
    assert await lose_a_write_in_flight(bench, files[0]) is not None
    with pytest.raises(OSError, match="error"):
        await bench.disk.flush()
    await bench.disk.write(0, NEW)
    await bench.disk.flush()  # it was in flight at no flush that failed
    assert [file.medium[:BLOCK] for file in files] == [NEW, NEW]


async def test_a_write_lost_in_flight_is_read_where_nobody_else_has_it(
    nursery: trio.Nursery,
) -> None:
    """As what was lost before: to refuse it would make a loss of what may well be there."""
    bench, files = cached_bench(nursery, 2, pattern=Fifo(), threshold=1)
    files[1].choose = fails(errno.EIO, Kind.SYNC)
    await lose_a_write_in_flight(bench, files[0])
    await bench.disk.read(0, BLOCK)
    with pytest.raises(OSError, match="error"):
        await bench.disk.flush()


async def test_writes_before_and_after_a_lost_one_count(nursery: trio.Nursery) -> None:
    bench, files = cached_bench(nursery, 2, pattern=Quorum(2), threshold=2)
    await bench.disk.write(BLOCK, NEW)
    await bench.disk.flush()
    await lose_a_write_in_flight(bench, files[0])
    await bench.disk.write(2 * BLOCK, NEW)
    assert await bench.disk.read(BLOCK, 2 * BLOCK) == 2 * NEW
    await bench.disk.write(0, NEW)
    await bench.disk.flush()
    assert [file.medium[: 3 * BLOCK] for file in files] == [3 * NEW, 3 * NEW]


async def test_a_flush_that_fails_may_lose_what_was_written_since_it_began(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    bench = make_bench(nursery, 2, pattern=Quorum(2), threshold=2)
    first = bench.files[0]

    async def flush() -> None:
        with pytest.raises(OSError, match="error"):
            await bench.disk.flush()

    def choose(operation: Operation) -> Fault:
        return Fault(5.0, errno.EIO) if operation.kind is Kind.SYNC else Fault(1.0)

    first.choose = choose
    async with trio.open_nursery() as flushing:
        flushing.start_soon(flush)
        await trio.sleep(2.0)
        await bench.disk.write(0, NEW)
    first.choose = takes(0.0)
    await flush()


async def test_a_flush_given_up_may_lose_a_write_in_flight(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """It fails long after it was given up, when the write has already told of success."""
    bench = make_bench(nursery, 2, pattern=Quorum(2), threshold=2, timeout_s=8.0)
    first = bench.files[0]

    def choose(operation: Operation) -> Fault:
        return Fault(100.0, errno.EIO) if operation.kind is Kind.SYNC else Fault(5.0)

    async def flush() -> None:
        with pytest.raises(OSError, match="timed out"):
            await bench.disk.flush()

    first.choose = choose
    async with trio.open_nursery() as flushing:
        flushing.start_soon(flush)
        await trio.sleep(62.0)  # it is given up after 64 s: nobody else suffices
        await bench.disk.write(0, NEW)
    await trio.sleep(60.0)
    assert not bench.disk.replicas[0].hung
    first.choose = takes(0.0)
    with pytest.raises(OSError, match="error"):
        await bench.disk.flush()


@pytest.mark.parametrize("late_s", [0.0, 5.0])
async def test_a_flush_fails_amid_a_write(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock, late_s: float
) -> None:
    """The one replica took it, then lost it, and then the write ended."""
    bench = make_bench(nursery, 2, pattern=Fifo(), threshold=2)
    first, second = bench.files
    second.choose = takes(late_s, Kind.WRITE)
    nursery.start_soon(bench.disk.write, 0, NEW)
    await trio.sleep(1.0)
    first.choose = fails(errno.EIO, Kind.SYNC)
    with pytest.raises(OSError, match="error"):
        await bench.disk.flush()
    first.choose = takes(0.0)
    await trio.sleep(10.0)
    with pytest.raises(OSError, match="error"):  # only the second one can have it on its medium
        await bench.disk.flush()


async def test_what_was_lost_amid_a_write_is_not_held_again(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """It took the write, lost it, was found out, and then the write ended."""
    bench = make_bench(nursery, 2, pattern=Fifo(), threshold=1)
    first, second = bench.files
    second.choose = takes(5.0, Kind.WRITE)
    nursery.start_soon(bench.disk.write, 0, NEW)
    await trio.sleep(1.0)
    first.choose = fails(errno.EIO, Kind.SYNC)
    await bench.disk.flush()
    first.content[:BLOCK] = bytes(BLOCK)  # memory is short
    first.choose = takes(0.0)
    await trio.sleep(10.0)
    assert await bench.disk.read(0, BLOCK) == NEW
