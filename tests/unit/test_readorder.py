"""Which replicas a read asks, in simulated storage: hedges, ``latency``, ``write-mostly``."""

import errno
from collections.abc import Sequence

import pytest
import trio
from support.simulated import Bench, Fault, fails, make_bench, takes
from trio.testing import MockClock

from quorumfs.decisions.latency import HALF_LIFE_S
from quorumfs.decisions.model import Standing
from quorumfs.decisions.patterns import Fastest, Fifo, Quorum
from quorumfs.disk.reading import sole_source
from quorumfs.disk.readorder import (
    BUDGET,
    BUDGET_MAX,
    FORGOTTEN_S,
    HEDGE_UNKNOWN_S,
    KNOWN,
    PASSED_OVER_S,
)
from quorumfs.disk.watchdog import COMPARED_EVERY_S, COMPARED_FROM, TICK_S
from quorumfs.replica.health import Sort
from quorumfs.replica.storage import Kind, Operation
from quorumfs.replica.ticks import IDLE_S

BLOCK = 4096
USUAL_S = 0.002


def usually(bench: Bench, seconds: Sequence[float] = (USUAL_S, USUAL_S)) -> None:
    """Have the replicas take so long for everything."""
    for file, each in zip(bench.files, seconds, strict=False):
        file.choose = takes(each, *Kind)


def reads(bench: Bench) -> list[int]:
    """How many reads each replica was asked for."""
    return [file.count(Kind.READ) for file in bench.files]


async def timed(bench: Bench, count: int = 1) -> float:
    """Read so often; how long (seconds) the last read took."""
    began = trio.current_time()
    for _ in range(count):
        began = trio.current_time()
        await bench.disk.read(0, BLOCK)
    return trio.current_time() - began


async def test_a_read_that_takes_unusually_long_asks_the_next(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    bench = make_bench(nursery, 3, pattern=Fifo())
    usually(bench, (USUAL_S,) * 3)
    await timed(bench, 2 * KNOWN)
    assert reads(bench) == [2 * KNOWN, 0, 0]
    bench.files[0].choose = takes(5.0, Kind.READ)
    assert 2 * USUAL_S <= await timed(bench) <= 3 * USUAL_S
    assert reads(bench) == [2 * KNOWN + 1, 1, 0]


async def test_while_nothing_is_known_a_read_waits_a_tenth_of_a_second(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    bench = make_bench(nursery, 2, pattern=Fifo())
    usually(bench, (5.0, USUAL_S))
    assert await timed(bench) == pytest.approx(HEDGE_UNKNOWN_S + USUAL_S)


async def test_the_first_good_answer_wins(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    """The second replica cannot read, so the late answer of the first is the one."""
    bench = make_bench(nursery, 2, pattern=Fifo())
    bench.files[0].choose = takes(1.0, Kind.READ)
    bench.files[1].choose = fails(errno.EIO, Kind.READ)
    assert await timed(bench) == pytest.approx(1.0)
    assert reads(bench) == [1, 1]


async def test_a_store_that_crawls_costs_one_wait_and_is_passed_over_for_longer_and_longer(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    bench = make_bench(nursery, 2, pattern=Fifo())
    usually(bench)
    await timed(bench, 2 * KNOWN)
    bench.files[0].choose = takes(5.0, Kind.READ)
    before, began = reads(bench)[0], trio.current_time()
    slow = 0
    while trio.current_time() - began < 600:
        slow += await timed(bench) > 1.5 * USUAL_S
        await trio.sleep(0.1)
    tried = reads(bench)[0] - before
    assert slow == tried
    assert 600 / (PASSED_OVER_S[1] + 6) <= tried <= 20
    assert bench.disk.replicas[0].state is Standing.CURRENT
    bench.files[0].choose = takes(USUAL_S, Kind.READ)
    await trio.sleep(PASSED_OVER_S[1])
    before = reads(bench)[0]
    await timed(bench, 100)
    assert reads(bench)[0] == before + 100


async def test_a_slow_replica_with_a_hung_one_has_twice_the_time(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """The second one is the last that can answer: it is not given up as if others could."""
    bench = make_bench(nursery, 2, pattern=Fifo(), timeout_s=8)
    bench.files[0].choose = takes(3600, Kind.READ)
    bench.files[1].choose = takes(9, Kind.READ)
    assert await timed(bench) == pytest.approx(9 + HEDGE_UNKNOWN_S)
    assert bench.disk.replicas[1].state is Standing.CURRENT
    nursery.cancel_scope.cancel()


async def test_where_replicas_are_known_to_differ_reads_keep_to_the_order(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """Else a read would turn back (P7): also while the first is passed over elsewhere."""
    bench = make_bench(nursery, 2, pattern=Fifo())
    usually(bench)
    await timed(bench, 2 * KNOWN)
    bench.files[1].content[:BLOCK] = b"y" * BLOCK
    bench.disk.mirror.read_order.undecided.add(0, BLOCK)
    bench.files[0].choose = takes(3.0, Kind.READ)
    assert await timed(bench) == pytest.approx(3.0)
    await bench.disk.read(BLOCK, BLOCK)
    before = reads(bench)
    assert await bench.disk.read(0, BLOCK) == bytes(BLOCK)
    assert reads(bench) == [before[0] + 1, before[1]]
    mirror, (first, second) = bench.disk.mirror, bench.disk.replicas
    assert sole_source(mirror, 0, BLOCK) is first  # what a resync copies is what reads show
    assert sole_source(mirror, BLOCK, BLOCK) is second


async def test_hedges_that_come_to_nothing_have_a_budget(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """A healthy replica whose reads vary: hedges add a fiftieth of the reads, beside a start."""
    bench = make_bench(nursery, 2, pattern=Fifo())
    usually(bench)
    await timed(bench, 2 * KNOWN)

    def varies(_: Operation) -> Fault:
        return Fault(USUAL_S if len(bench.files[0].log) % 2 else 2 * USUAL_S)

    bench.files[0].choose = varies
    bench.files[1].choose = takes(4 * USUAL_S, Kind.READ)
    await timed(bench, 2000)
    asked = reads(bench)
    assert 0 < asked[1] <= BUDGET_MAX + BUDGET * sum(asked)


async def test_a_hung_replica_is_noticed_though_no_read_waits_for_it(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    bench = make_bench(nursery, 2, pattern=Fifo(), timeout_s=8)
    bench.files[0].choose = takes(3600, Kind.READ)
    assert await timed(bench) <= 2 * HEDGE_UNKNOWN_S
    await trio.sleep(8 + 2 * TICK_S)
    assert bench.disk.replicas[0].state is Standing.MISSING
    nursery.cancel_scope.cancel()


async def test_latency_reads_the_fastest_and_sees_when_another_is(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    bench = make_bench(nursery, 3, pattern=Fastest())
    usually(bench, (0.020, USUAL_S, 0.020))
    await timed(bench, 2 * KNOWN)
    before = reads(bench)
    await timed(bench, KNOWN)
    assert reads(bench) == [before[0], before[1] + KNOWN, before[2]]
    usually(bench, (0.020, 0.200, 0.020))
    await timed(bench, 10 * KNOWN)
    assert await timed(bench) <= 0.021


async def test_a_replica_that_was_slow_is_judged_anew_after_a_while(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    bench = make_bench(nursery, 2, pattern=Fastest())
    usually(bench, (0.050, 0.010))
    await timed(bench, 2 * KNOWN)
    usually(bench, (USUAL_S, 0.010))
    await trio.sleep(FORGOTTEN_S)
    await timed(bench, 10)
    before = reads(bench)
    await timed(bench, 10)
    assert reads(bench) == [before[0] + 10, before[1]]


async def test_equals_are_read_in_the_order_given(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    bench = make_bench(nursery, 2, pattern=Fastest())
    usually(bench, (0.0031, 0.0028))
    await timed(bench, 3 * KNOWN)
    assert reads(bench) == [3 * KNOWN - 1, 1]  # to see how fast it is


def mostly_written(bench: Bench, *indexes: int) -> None:
    marked = frozenset(bench.disk.replicas[index] for index in indexes)
    bench.disk.mirror.read_order.write_mostly = frozenset(one.path for one in marked)


@pytest.mark.parametrize("pattern", [Fifo(), Fastest(), Quorum(2)])
async def test_write_mostly_replicas_are_read_only_where_no_other_answers(
    nursery: trio.Nursery, autojump_clock: MockClock, pattern: Fifo | Quorum
) -> None:
    bench = make_bench(nursery, 3, pattern=pattern)
    mostly_written(bench, 0)
    await bench.disk.write(0, b"x" * BLOCK)
    usually(bench, (5.0, USUAL_S, USUAL_S))
    assert await timed(bench, 50) <= 2 * USUAL_S
    assert reads(bench)[0] == 0
    for file in bench.files[1:]:
        file.choose = fails(errno.EIO, Kind.READ)
    if isinstance(pattern, Quorum):
        bench.files[1].choose = takes(USUAL_S, Kind.READ)
    bench.files[0].choose = takes(USUAL_S, Kind.READ)
    assert await bench.disk.read(0, BLOCK) == b"x" * BLOCK
    assert reads(bench)[0] == 1


@pytest.mark.parametrize("threshold", [1, 2])
async def test_a_write_mostly_replica_decides_where_others_differ(
    nursery: trio.Nursery, autojump_clock: MockClock, threshold: int
) -> None:
    bench = make_bench(nursery, 3, pattern=Quorum(threshold))
    mostly_written(bench, 2)
    await bench.disk.write(0, b"x" * BLOCK)
    bench.files[0].content[:BLOCK] = b"y" * BLOCK
    assert await bench.disk.read(0, BLOCK) == b"x" * BLOCK
    assert reads(bench) == [1, 1, 1]


async def test_a_vote_that_needs_them_asks_them_at_once(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    bench = make_bench(nursery, 3, pattern=Quorum(2))
    mostly_written(bench, 1, 2)
    usually(bench, (USUAL_S,) * 3)
    assert await timed(bench) == pytest.approx(USUAL_S)
    assert reads(bench) == [1, 1, 1]


def told_slow(bench: Bench) -> list[tuple[str, str]]:
    events = (event for event in bench.told if event.name == "REPLICA_SLOW")
    return [(event.members["replica"], event.members["operation"]) for event in events]


async def test_a_replica_that_is_much_slower_than_others_is_told_once(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    bench = make_bench(nursery, 3, pattern=Quorum(2))
    usually(bench, (USUAL_S, USUAL_S, 50 * USUAL_S))

    async def use() -> None:
        for _ in range(COMPARED_FROM):
            await bench.disk.write(0, bytes(BLOCK))
        await trio.sleep(COMPARED_EVERY_S + IDLE_S)

    await use()
    await use()
    assert told_slow(bench) == [("r2", "write")]
    await timed(bench, 50 * COMPARED_FROM)  # most votes are decided without it
    await trio.sleep(COMPARED_EVERY_S + IDLE_S)
    assert told_slow(bench) == [("r2", "write"), ("r2", "read")]
    usually(bench, (USUAL_S,) * 3)
    await trio.sleep(5 * HALF_LIFE_S)
    await use()
    assert bench.disk.mirror.read_order.slow[Sort.WRITE] == {}


async def test_a_far_replica_that_is_not_read_is_not_slow_at_reading(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    bench = make_bench(nursery, 3, pattern=Quorum(2))
    usually(bench, (USUAL_S, USUAL_S, 50 * USUAL_S))
    await timed(bench, COMPARED_FROM)
    mostly_written(bench, 2)
    await trio.sleep(COMPARED_EVERY_S + IDLE_S)
    assert told_slow(bench) == []


async def test_a_hung_replica_with_a_reserve_costs_one_timeout(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    bench = make_bench(nursery, 3, pattern=Quorum(2), timeout_s=8)
    mostly_written(bench, 2)
    bench.files[0].choose = takes(3600, Kind.READ)
    assert 8 <= await timed(bench) <= 8 + 2 * TICK_S
    assert reads(bench) == [1, 1, 1]
    nursery.cancel_scope.cancel()
