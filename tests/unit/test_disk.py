"""The disk on simulated files: order of requests, verdicts, deadlines. Time is trio's."""

import errno
import math
import random
from contextlib import nullcontext
from itertools import pairwise

import pytest
import trio
from support.simulated import (
    Bench,
    Chooser,
    Fault,
    at_random,
    fails,
    make_bench,
    takes,
)
from trio.testing import MockClock

from quorumfs.decisions.model import Standing
from quorumfs.decisions.patterns import Blkverify, Fifo, Quorum, ReadPattern
from quorumfs.disk.readorder import HEDGE_UNKNOWN_S
from quorumfs.disk.watchdog import TICK_S
from quorumfs.repair.rewrite import Rewriting
from quorumfs.replica.storage import Kind, Operation

BLOCK = 4096
X, Y = b"x" * BLOCK, b"y" * BLOCK


def states(bench: Bench) -> list[Standing]:
    """What each replica is to the set at this moment."""
    return [replica.state for replica in bench.disk.replicas]


async def raises(number: int, call: object) -> None:
    """Await *call*, which must fail with errno *number*."""
    with pytest.raises(OSError) as info:  # noqa: PT011
        await call  # type: ignore[misc]
    assert info.value.errno == number


async def test_overlapping_writes_are_applied_in_the_same_order_everywhere(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """R6: whatever each replica's delays, all end up equal."""
    bench = make_bench(nursery, 3, pattern=Quorum(2), threshold=2)
    dice = random.Random(6)
    for file in bench.files:
        file.choose = lambda _: Fault(dice.uniform(0, 1))
    async with trio.open_nursery() as writers:
        for _ in range(100):
            offset = dice.randrange(0, 3 * BLOCK)
            writers.start_soon(bench.disk.write, offset, dice.randbytes(BLOCK))
    assert bench.files[0].content == bench.files[1].content == bench.files[2].content


async def test_a_vote_read_never_sees_half_a_write(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """R6: a read that comes during a slow write waits for it, instead of failing its vote."""
    bench = make_bench(nursery, 2, pattern=Quorum(2), threshold=2)
    bench.files[1].choose = takes(5, Kind.WRITE)
    nursery.start_soon(bench.disk.write, 0, X)
    await trio.testing.wait_all_tasks_blocked()
    assert await bench.disk.read(0, BLOCK) == X
    assert trio.current_time() >= 5


async def test_reads_do_not_wait_for_each_other_or_for_writes_elsewhere(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    bench = make_bench(nursery, 1, pattern=Fifo())
    bench.files[0].choose = takes(1, Kind.READ, Kind.WRITE)
    async with trio.open_nursery() as requests:
        requests.start_soon(bench.disk.write, BLOCK, X)
        requests.start_soon(bench.disk.read, 0, BLOCK)
        requests.start_soon(bench.disk.read, 0, BLOCK)
    assert trio.current_time() < 1 + TICK_S


async def test_a_stream_of_readers_does_not_starve_a_writer(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    bench = make_bench(nursery, 1, pattern=Fifo())
    bench.files[0].choose = takes(1, Kind.READ)

    async def keep_reading(start_s: float) -> None:
        await trio.sleep(start_s)
        while True:
            await bench.disk.read(0, BLOCK)

    for start_s in (0, 0.5):
        nursery.start_soon(keep_reading, start_s)
    await trio.sleep(3)
    with trio.fail_after(2):
        await bench.disk.write(0, X)
    nursery.cancel_scope.cancel()


async def test_all_replicas_are_asked_at_once(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """Writes, flushes and vote reads take as long as the slowest replica, not as their sum."""
    bench = make_bench(nursery, 3, pattern=Quorum(2), threshold=2)
    for file in bench.files:
        file.choose = takes(0.3, Kind.READ, Kind.WRITE, Kind.SYNC)
    await bench.disk.write(0, X)
    await bench.disk.flush()
    await bench.disk.read(0, BLOCK)
    assert math.isclose(trio.current_time(), 0.9)


@pytest.mark.parametrize("kind", [Kind.WRITE, Kind.SYNC])
@pytest.mark.parametrize(
    ("errnos", "threshold", "expected"),
    [
        ([0, 0, 5], 2, 0),
        ([0, 5, 5], 1, 0),
        ([0, 5, 5], 2, errno.EIO),
        ([0, 28, 5], 2, errno.ENOSPC),
        ([0, 5, 28], 2, errno.EIO),
        ([28, 5, 28], 1, errno.ENOSPC),
        ([28, 28, 28], 1, errno.ENOSPC),
    ],
)
async def test_verdicts(
    nursery: trio.Nursery,
    autojump_clock: MockClock,
    kind: Kind,
    errnos: list[int],
    threshold: int,
    expected: int,
) -> None:
    """Success from the threshold on; else the commonest errno, of equals the first-listed's."""
    bench = make_bench(nursery, 3, pattern=Quorum(2), threshold=threshold)
    for file, number in zip(bench.files, errnos, strict=True):
        file.choose = fails(number, kind) if number else file.choose
    call = bench.disk.write(0, X) if kind is Kind.WRITE else bench.disk.flush()
    if expected:
        await raises(expected, call)
    else:
        await call


@pytest.mark.parametrize("pattern", [Fifo(), Quorum(1)])
async def test_an_acknowledged_write_is_never_unread(
    nursery: trio.Nursery, autojump_clock: MockClock, pattern: ReadPattern
) -> None:
    """P1: the first replica missed it; the read comes from the one that has it."""
    bench = make_bench(nursery, 2, pattern=pattern)
    bench.files[0].choose = fails(errno.EIO, Kind.WRITE)
    await bench.disk.write(100, b"new")
    bench.files[0].choose = takes(0)
    assert await bench.disk.read(99, 5) == b"\0new\0"
    assert states(bench)[0] is Standing.STALE

    await bench.disk.write(100, b"NEW")
    assert states(bench)[0] is Standing.CURRENT
    bench.files[1].choose = fails(errno.EIO, Kind.READ)
    assert await bench.disk.read(99, 5) == b"\0NEW\0"


async def test_a_failed_write_blames_nobody(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """R2: below the threshold the guest hears of it, and nobody missed what is acknowledged."""
    bench = make_bench(nursery, 3, pattern=Quorum(2), threshold=2)
    for file in bench.files[1:]:
        file.choose = fails(errno.ENOSPC, Kind.WRITE)
    await raises(errno.ENOSPC, bench.disk.write(0, X))
    assert set(states(bench)) == {Standing.CURRENT}


async def test_a_flush_counts_a_replica_only_for_what_it_holds(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """P2: the write is on one replica alone; when that one cannot flush it, nobody has."""
    bench = make_bench(nursery, 2, pattern=Fifo())
    bench.files[1].choose = fails(errno.EIO, Kind.WRITE)
    await bench.disk.write(0, X)
    await bench.disk.flush()
    bench.files[0].choose = fails(errno.EIO, Kind.SYNC)
    await raises(errno.EIO, bench.disk.flush())


async def test_what_a_flush_lost_is_not_read_and_not_forgotten(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """R4: the kernel tells of a lost page once; the next flush succeeds without it."""
    bench = make_bench(nursery, 3, pattern=Quorum(2), threshold=2)
    for file in bench.files[:2]:
        file.choose = fails(errno.EIO, Kind.SYNC)
    await bench.disk.write(0, X)
    await raises(errno.EIO, bench.disk.flush())
    for file in bench.files[:2]:
        file.choose = takes(0)
    await raises(errno.EIO, bench.disk.flush())
    await bench.disk.write(0, X)
    await bench.disk.flush()


async def test_flushes_of_a_replica_take_turns_and_share(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """R4: of two in flight either might be told of a lost page. Those that wait become one."""
    bench = make_bench(nursery, 2, pattern=Fifo())
    for file in bench.files:
        file.choose = takes(1, Kind.SYNC)
    async with trio.open_nursery() as flushes:
        flushes.start_soon(bench.disk.flush)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(9):
            flushes.start_soon(bench.disk.flush)
    assert [file.count(Kind.SYNC) for file in bench.files] == [2, 2]
    assert trio.current_time() < 3


async def test_a_flush_that_waited_fails_with_the_one_it_shares(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    bench = make_bench(nursery, 1, pattern=Fifo())
    bench.files[0].choose = lambda _: Fault(1, errno.EIO)
    async with trio.open_nursery() as flushes:
        for _ in range(3):
            flushes.start_soon(raises, errno.EIO, bench.disk.flush())


async def test_a_flush_counts_nothing_that_came_after_the_replica_s_own(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """P2: while the slowest replica syncs, a guest gives another what it had missed."""
    bench = make_bench(nursery, 3, pattern=Quorum(2), threshold=2)
    a, b, c = bench.files
    c.choose = fails(errno.EIO, Kind.WRITE)
    await bench.disk.write(0, X)
    c.choose = takes(0)
    a.choose = takes(2, Kind.SYNC)
    b.choose = lambda operation: Fault(2, errno.EIO) if operation.kind is Kind.SYNC else Fault()

    async with trio.open_nursery() as requests:
        requests.start_soon(raises, errno.EIO, bench.disk.flush())
        await trio.sleep(1)
        await bench.disk.write(0, X)  # now c has it too, but its sync is over


async def test_a_stopped_process_blames_no_replica(
    nursery: trio.Nursery, mock_clock: MockClock
) -> None:
    """Nobody here could hear the answers while the process was stopped."""
    bench = make_bench(nursery, 2, pattern=Fifo(), timeout_s=2)
    bench.files[0].choose = takes(3.2, Kind.READ)
    await trio.testing.wait_all_tasks_blocked()
    nursery.start_soon(bench.disk.read, 0, BLOCK)
    await trio.testing.wait_all_tasks_blocked()
    mock_clock.jump(3)
    await trio.testing.wait_all_tasks_blocked()
    assert set(states(bench)) == {Standing.CURRENT}
    mock_clock.jump(0.3)
    await trio.testing.wait_all_tasks_blocked()
    assert set(states(bench)) == {Standing.CURRENT}


async def test_a_read_ends_even_if_every_block_takes_long_to_find(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """Bad blocks in turn on either replica, each noticed after 7 seconds."""
    bench = make_bench(nursery, 2, pattern=Fifo(), timeout_s=8)
    for index, file in enumerate(bench.files):

        def choose(operation: Operation, index: int = index) -> Fault:
            block = operation.offset // BLOCK
            bad = operation.length > BLOCK or block % 2 == index
            return Fault(7, errno.EIO) if operation.kind is Kind.READ and bad else Fault()

        file.choose = choose
    await raises(errno.EIO, bench.disk.read(0, 16 * BLOCK))
    assert trio.current_time() < 60


async def test_a_read_of_many_gaps_is_one_request(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    bench = make_bench(nursery, 2, pattern=Fifo())
    bench.files[0].choose = fails(errno.EIO, Kind.WRITE)
    for block in range(0, 16, 2):
        await bench.disk.write(block * BLOCK, X)
    await bench.disk.read(0, 16 * BLOCK)
    assert bench.files[1].count(Kind.READ) == 1


async def test_a_repair_that_fails_costs_no_reader_its_data(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    class Failing(Rewriting):
        async def rewrite(self, offset: int, length: int) -> bytes:
            raise OSError(errno.EIO, "the replicas failed meanwhile")

    bench = make_bench(nursery, 2, pattern=Fifo(), repairer=Failing)
    bench.files[0].choose = fails(errno.EIO, Kind.READ)
    assert await bench.disk.read(0, BLOCK) == bytes(BLOCK)


async def test_ranges_that_different_replicas_missed_are_read_piece_by_piece(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    bench = make_bench(nursery, 2, pattern=Fifo())
    for failing, offset in ((0, 0), (1, 10)):
        bench.files[failing].choose = fails(errno.EIO, Kind.WRITE)
        await bench.disk.write(offset, b"x" * 10)
        bench.files[failing].choose = takes(0)
    assert await bench.disk.read(0, 20) == b"x" * 20
    await bench.disk.flush()


async def test_a_hung_replica_costs_one_timeout_once(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """P5, and R7: it is asked nothing until its old request has returned, however late."""
    bench = make_bench(nursery, 2, pattern=Fifo(), timeout_s=8)
    bench.files[0].choose = takes(3600, Kind.WRITE)
    await bench.disk.write(0, X)
    assert 8 <= trio.current_time() <= 8 + TICK_S
    asked = len(bench.files[0].log)
    for _ in range(10):
        await bench.disk.write(0, Y)
        assert await bench.disk.read(0, BLOCK) == Y
        await bench.disk.flush()
    assert trio.current_time() <= 8 + TICK_S
    assert len(bench.files[0].log) == asked
    assert states(bench)[0] is Standing.MISSING

    bench.files[0].choose = takes(0)
    await trio.sleep(3600)
    assert bench.files[0].content[:BLOCK] == X  # the zombie came after the newer writes
    assert states(bench)[0] is Standing.STALE
    assert await bench.disk.read(0, BLOCK) == Y


async def test_what_was_asked_after_a_standstill_did_not_begin_in_the_future(
    nursery: trio.Nursery, mock_clock: MockClock
) -> None:
    """The watchdog sees a standstill late, and pardons what began since. What began before it is
    given the time of the standstill in addition."""
    bench = make_bench(nursery, 2, pattern=Fifo())
    replica = bench.disk.replicas[0]
    bench.files[0].choose = takes(3600, Kind.WRITE, Kind.READ)
    nursery.start_soon(bench.disk.write, 0, X)
    await trio.testing.wait_all_tasks_blocked()
    began = trio.current_time()
    replica.pardon(5, began)
    assert replica.waiting == (Kind.WRITE, began)
    replica.pardon(5, began + 6)
    assert replica.waiting == (Kind.WRITE, began + 5)
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("pattern", "expected_s"), [(Fifo(), HEDGE_UNKNOWN_S), (Quorum(1), 8), (Quorum(2), 16)]
)
async def test_a_replica_that_nobody_stands_in_for_gets_twice_the_time(
    nursery: trio.Nursery, autojump_clock: MockClock, pattern: ReadPattern, expected_s: float
) -> None:
    bench = make_bench(nursery, 2, pattern=pattern, threshold=getattr(pattern, "threshold", 1))
    bench.files[0].choose = takes(3600, Kind.READ)
    with pytest.raises(OSError) if pattern == Quorum(2) else nullcontext():  # noqa: PT011
        await bench.disk.read(0, BLOCK)
    assert expected_s <= trio.current_time() <= expected_s + TICK_S


async def test_every_request_ends_when_no_replica_answers(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    bench = make_bench(nursery, 2, pattern=Quorum(1))
    for file in bench.files:
        file.choose = takes(math.inf, Kind.READ, Kind.WRITE, Kind.SYNC)
    async with trio.open_nursery() as requests:
        requests.start_soon(raises, errno.ETIMEDOUT, bench.disk.read(0, BLOCK))
        requests.start_soon(raises, errno.ETIMEDOUT, bench.disk.write(BLOCK, X))
        requests.start_soon(raises, errno.ETIMEDOUT, bench.disk.flush())
    assert trio.current_time() <= 64 + TICK_S
    nursery.cancel_scope.cancel()


async def test_a_slow_flush_is_no_hang(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    """A flush waits for all that was written before, so it may take much longer than a write."""
    bench = make_bench(nursery, 2, pattern=Fifo(), timeout_s=8)
    bench.files[0].choose = takes(30, Kind.SYNC)
    await bench.disk.flush()
    assert set(states(bench)) == {Standing.CURRENT}


@pytest.mark.parametrize("pattern", [Fifo(), Quorum(2)])
async def test_unreadable_places_that_differ_leave_the_request_readable(
    nursery: trio.Nursery, autojump_clock: MockClock, pattern: ReadPattern
) -> None:
    """Every replica has one bad sector; no two have the same one (R11)."""
    bench = make_bench(nursery, 3, pattern=pattern, threshold=2)
    content = random.Random(1).randbytes(8 * BLOCK)
    await bench.disk.write(0, content)
    for bad, file in zip((1, 3, 6), bench.files, strict=True):
        file.choose = _bad_sector(bad * BLOCK + 700)
    assert await bench.disk.read(10, 8 * BLOCK - 10) == content[10:]


async def test_a_dead_disk_fails_soon(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    """The search for readable blocks ends at the first one that nobody can read."""
    bench = make_bench(nursery, 2, pattern=Fifo(), size=1 << 20)
    for file in bench.files:
        file.choose = fails(errno.EIO, Kind.READ)
    await raises(errno.EIO, bench.disk.read(0, 1 << 20))
    assert bench.files[0].count(Kind.READ) <= 10


async def test_a_truncated_replica_is_never_zeros(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """R10: once found short, nothing in it can be told from a hole, even when it is long again."""
    bench = make_bench(nursery, 2, pattern=Fifo())
    await bench.disk.write(0, X)
    bench.files[0].truncated = True
    assert await bench.disk.read(0, BLOCK) == X
    bench.files[0].truncated = False
    bench.files[0].content[:] = bytes(len(bench.files[0].content))
    assert await bench.disk.read(0, BLOCK) == X


async def test_a_tie_is_answered_by_the_first_listed_and_rewrites_nothing(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """P4."""
    bench = make_bench(nursery, 4, pattern=Quorum(2), threshold=2, repairer=Rewriting)
    for file, data in zip(bench.files, (X, Y, Y, X), strict=True):
        file.content[:BLOCK] = data
    assert await bench.disk.read(0, BLOCK) == X
    assert not any(file.count(Kind.WRITE) for file in bench.files)


@pytest.mark.parametrize("pattern", [Fifo(), Quorum(2)])
async def test_rewrite_repairs_what_could_not_be_read(
    nursery: trio.Nursery, autojump_clock: MockClock, pattern: ReadPattern
) -> None:
    """A bad sector, which the disk remaps when it is written."""
    bench = make_bench(nursery, 3, pattern=pattern, threshold=2, repairer=Rewriting)
    bad, *good = bench.files
    for file in good:
        file.content[:BLOCK] = X
    unreadable = fails(errno.EIO, Kind.READ)
    bad.choose = lambda operation: Fault() if bad.count(Kind.WRITE) else unreadable(operation)
    assert await bench.disk.read(0, BLOCK) == X
    assert bench.files[0].content[:BLOCK] == X
    assert [event.name for event in bench.told] == ["QUORUM_REPORT_BAD", "MISMATCH_REPAIRED"]


async def test_rewrite_gives_back_a_missed_write(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    bench = make_bench(nursery, 2, pattern=Fifo(), repairer=Rewriting)
    bench.files[0].choose = fails(errno.EIO, Kind.WRITE)
    await bench.disk.write(0, X)
    bench.files[0].choose = takes(0)
    assert await bench.disk.read(0, BLOCK) == X
    assert bench.files[0].content[:BLOCK] == X
    assert states(bench)[0] is Standing.CURRENT


async def test_a_repair_never_writes_back_what_a_guest_has_replaced(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """R6: a write comes between the read that found the damage and the repair."""
    bench = make_bench(nursery, 3, pattern=Quorum(2), threshold=2, repairer=Rewriting)
    for file in bench.files:
        file.choose = lambda operation: Fault(1.5 if operation.kind is Kind.WRITE else 1)
    bench.files[2].content[:BLOCK] = b"rot" + bytes(BLOCK - 3)

    async with trio.open_nursery() as requests:
        requests.start_soon(bench.disk.read, 0, BLOCK)
        await trio.testing.wait_all_tasks_blocked()
        requests.start_soon(bench.disk.write, 0, X)
    assert [bytes(file.content[:BLOCK]) for file in bench.files] == [X, X, X]


async def test_blkverify_fails_at_any_difference(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    bench = make_bench(nursery, 2, pattern=Blkverify(2), threshold=2)
    bench.files[1].content[5000] = 1
    assert await bench.disk.read(0, BLOCK) == bytes(BLOCK)
    await raises(errno.EIO, bench.disk.read(BLOCK, BLOCK))
    assert [event.members["offset"] for event in bench.told[:1]] == [5000]


async def test_the_end_of_the_disk(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    """Reads and writes across the end are short; behind it there is nothing and no space."""
    bench = make_bench(nursery, 1, pattern=Fifo(), size=1000)
    assert await bench.disk.write(990, b"x" * 20) == 10
    assert await bench.disk.read(980, 100) == bytes(10) + b"x" * 10
    assert await bench.disk.read(1000, 1) == b""
    assert await bench.disk.read(5000, 1) == b""
    await raises(errno.ENOSPC, bench.disk.write(1000, b"x"))
    assert len(bench.files[0].content) == 1000


@pytest.mark.parametrize("seed", range(15))
@pytest.mark.parametrize(
    ("count", "threshold", "pattern"), [(2, 1, Fifo()), (3, 2, Quorum(2)), (3, 1, Fifo())]
)
@pytest.mark.parametrize("repairer", [None, Rewriting])
async def test_no_read_is_ever_older_than_what_was_acknowledged(
    autojump_clock: MockClock,
    seed: int,
    count: int,
    threshold: int,
    pattern: ReadPattern,
    repairer: type[Rewriting] | None,
) -> None:
    """P1 under slow, failing and hanging replicas, with clients on overlapping neighbour blocks.

    Each client owns a few bytes across a block bound and knows what it may see there: the last
    value acknowledged, or one of those whose write failed after it.
    """
    async with trio.open_nursery() as nursery:
        bench = make_bench(
            nursery,
            count,
            pattern=pattern,
            threshold=threshold,
            repairer=repairer,
            timeout_s=1,
        )
        for index, file in enumerate(bench.files):
            file.choose = at_random(1000 * seed + index, timeout_s=1)
        async with trio.open_nursery() as clients:
            for number in range(6):
                clients.start_soon(_client, bench, number, random.Random(f"{seed} {number}"))
        nursery.cancel_scope.cancel()


async def _client(bench: Bench, number: int, dice: random.Random) -> None:
    width = BLOCK + 2 * number
    offset = number * width
    possible = {bytes(width)}
    for _ in range(60):
        if dice.random() < 0.5:
            value = dice.randbytes(16) * (width // 16) + bytes(width % 16)
            try:
                await bench.disk.write(offset, value)
            except OSError:
                possible.add(value)
            else:
                possible = {value}
        else:
            try:
                seen = bytes(await bench.disk.read(offset, width))
            except OSError:
                continue
            assert seen in possible or (len(possible) > 1 and _mixed(seen, possible, offset))
        await trio.sleep(dice.uniform(0, 0.02))


def _mixed(seen: bytes, possible: set[bytes], offset: int) -> bool:
    """After a failed write each block may be old or new by itself."""
    bounds = sorted({0, len(seen), *range(-offset % BLOCK, len(seen), BLOCK)})
    return all(
        any(seen[start:end] == value[start:end] for value in possible)
        for start, end in pairwise(bounds)
    )


def _bad_sector(place: int) -> Chooser:
    def choose(operation: Operation) -> Fault:
        hit = operation.kind is Kind.READ and (
            operation.offset <= place < operation.offset + operation.length
        )
        return Fault(error=errno.EIO if hit else 0)

    return choose


# Zeros and holes


@pytest.mark.parametrize("kind", [Kind.DISCARD, Kind.ZERO])
async def test_zeros_are_ordered_like_writes(
    kind: Kind, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """R6: whatever each replica's delays, writes and zeros of one range end in the same order
    everywhere, the later one wins, and a read between them sees one or the other."""
    bench = make_bench(nursery, 3, pattern=Quorum(2), threshold=2)
    dice = random.Random(7)
    for file in bench.files:
        file.choose = lambda _: Fault(dice.uniform(0, 1))

    async def make_zeros() -> None:
        await bench.disk.make_zeros(0, BLOCK, discard=kind is Kind.DISCARD)

    for _ in range(20):
        async with trio.open_nursery() as requests:
            requests.start_soon(bench.disk.write, 0, X)
            await trio.testing.wait_all_tasks_blocked()
            requests.start_soon(make_zeros)
            await trio.testing.wait_all_tasks_blocked()
            assert await bench.disk.read(0, BLOCK) == bytes(BLOCK)
            requests.start_soon(bench.disk.write, 0, Y)
        assert all(file.content[:BLOCK] == Y for file in bench.files)
    assert all(file.count(kind) == 20 for file in bench.files)


@pytest.mark.parametrize("kind", [Kind.DISCARD, Kind.ZERO])
async def test_a_missed_request_for_zeros_is_a_missed_write(
    kind: Kind, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """P1, R4: not read where it was missed; a flush of that replica does not count for it."""
    bench = make_bench(nursery, 2, pattern=Fifo(), threshold=1)
    await bench.disk.write(0, X * 2)
    bench.files[0].choose = fails(errno.EIO, kind)
    await bench.disk.make_zeros(0, BLOCK, discard=kind is Kind.DISCARD)
    assert states(bench) == [Standing.STALE, Standing.CURRENT]
    assert await bench.disk.read(0, 2 * BLOCK) == bytes(BLOCK) + X
    bench.files[1].choose = fails(errno.EIO, Kind.SYNC)
    await raises(errno.EIO, bench.disk.flush())


async def test_zeros_are_what_detect_zeroes_makes_of_them(nursery: trio.Nursery) -> None:
    """A write of zeros over whole sectors becomes *zero_kind*, any other stays a write."""
    bench = make_bench(nursery, 1, pattern=Fifo(), zero_kind=Kind.DISCARD)
    (file,) = bench.files
    await bench.disk.write(0, X * 2)
    for offset, data in [(BLOCK, X), (1, bytes(BLOCK)), (0, bytes(100)), (0, bytes(BLOCK - 1))]:
        await bench.disk.write(offset, data)
    assert file.count(Kind.DISCARD) == 0
    await bench.disk.write(BLOCK, bytes(BLOCK))
    assert file.count(Kind.DISCARD) == 1
    assert file.content[: 2 * BLOCK] == bytes(2 * BLOCK)


async def test_holes_are_what_all_replicas_have(nursery: trio.Nursery) -> None:
    """Random layouts: each byte that SEEK_DATA and SEEK_HOLE pass over is what they say."""
    dice = random.Random(8)
    for _ in range(50):
        bench = make_bench(nursery, 3, pattern=Quorum(2), threshold=2)
        chance = dice.random()
        for file in bench.files:
            file.data_blocks = {n for n in range(16) if dice.random() < chance}
        union = set().union(*(file.data_blocks or () for file in bench.files))
        for place in range(16):
            data = await bench.disk.next_data(place * BLOCK + 9)
            hole = await bench.disk.next_hole(place * BLOCK + 9)
            after = range(place, 17)
            first_data = next((n for n in after if n in union), 16)
            first_hole = next(n for n in after if n not in union)
            assert data == min(max(first_data * BLOCK, place * BLOCK + 9), 16 * BLOCK)
            assert hole == min(max(first_hole * BLOCK, place * BLOCK + 9), 16 * BLOCK)


async def test_a_replica_without_holes_or_with_an_error_has_data(nursery: trio.Nursery) -> None:
    bench = make_bench(nursery, 2, pattern=Fifo(), threshold=1)
    bench.files[0].data_blocks = set()
    assert await bench.disk.next_data(5) == 5
    assert await bench.disk.next_hole(5) == bench.disk.size
    bench.files[1].data_blocks = set()
    assert await bench.disk.next_data(5) == bench.disk.size
    bench.files[1].choose = fails(errno.EIO, Kind.SEEK_DATA, Kind.SEEK_HOLE)
    assert await bench.disk.next_data(5) == 5
    assert await bench.disk.next_hole(5) == bench.disk.size


async def test_the_hole_of_a_replica_that_missed_the_write_is_none(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """P1: the one that has the data hangs. A read fails; then so must a copy that asks for holes
    first, instead of taking the other's old hole for zeros."""
    bench = make_bench(nursery, 2, pattern=Fifo(), threshold=1)
    for file in bench.files:
        file.data_blocks = set()
    bench.files[0].choose = fails(errno.EIO, Kind.WRITE)
    await bench.disk.write(0, X)
    bench.files[1].choose = takes(math.inf, *Kind)
    await raises(errno.ETIMEDOUT, bench.disk.read(0, BLOCK))
    assert states(bench) == [Standing.STALE, Standing.MISSING]
    assert await bench.disk.next_data(0) == 0


async def test_a_seek_with_all_replicas_hung_says_so(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """It fails as a read does, or calls everything data: no internal error."""
    bench = make_bench(nursery, 2, pattern=Fifo(), threshold=1)
    for file in bench.files:
        file.choose = takes(math.inf, *Kind)
    for seek in (bench.disk.next_data, bench.disk.next_hole):
        try:
            found = await seek(BLOCK)
        except OSError as error:
            assert error.errno == errno.ETIMEDOUT  # noqa: PT017
        else:
            assert found == (BLOCK if seek == bench.disk.next_data else bench.disk.size)
