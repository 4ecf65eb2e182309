"""write-ack=threshold: how long a request waits for replicas that others can do without."""

from collections.abc import Awaitable, Callable

import pytest
import trio
from support.simulated import BLOCK, Bench, make_bench, takes
from trio.testing import MockClock

from quorumfs.decisions.model import Standing
from quorumfs.decisions.patterns import Quorum
from quorumfs.disk.disk import Disk
from quorumfs.replica.fanout import FanOut
from quorumfs.replica.inflight import SYNC_PATIENCE
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Kind, Operation

BEHIND_MAX_S = 0.1
DATA = b"n" * BLOCK


def bench_of(nursery: trio.Nursery, threshold: int, *delays_s: float) -> Bench:
    """A disk whose replicas take so long (seconds) for every change and flush."""
    bench = make_bench(nursery, len(delays_s), pattern=Quorum(threshold), threshold=threshold)
    for replica, file, delay_s in zip(bench.disk.replicas, bench.files, delays_s, strict=True):
        replica.behind_max_s = BEHIND_MAX_S
        file.choose = takes(delay_s, Kind.WRITE, Kind.DISCARD, Kind.ZERO, Kind.SYNC)
    return bench


async def taken_s(request: Awaitable[object]) -> float:
    """How long (seconds) *request* took."""
    began = trio.current_time()
    await request
    return trio.current_time() - began


def behind(bench: Bench) -> list[int]:
    """The replicas that were given up."""
    return [replica.index for replica in bench.disk.replicas if replica.hung]


def write(disk: Disk) -> Awaitable[object]:
    return disk.write(0, DATA)


def discard(disk: Disk) -> Awaitable[object]:
    return disk.make_zeros(0, BLOCK, discard=True)


def zero(disk: Disk) -> Awaitable[object]:
    return disk.make_zeros(0, BLOCK, discard=False)


def flush(disk: Disk) -> Awaitable[object]:
    return disk.flush()


Request = Callable[[Disk], Awaitable[object]]


@pytest.mark.parametrize(
    ("request_", "patience_s"),
    [
        (write, BEHIND_MAX_S),
        (discard, BEHIND_MAX_S),
        (zero, BEHIND_MAX_S),
        (flush, SYNC_PATIENCE * BEHIND_MAX_S),
    ],
)
@pytest.mark.parametrize("first_s", [0.0, 1.0])
async def test_the_slowest_is_waited_for_so_long_after_the_others(
    nursery: trio.Nursery,
    autojump_clock: MockClock,
    request_: Request,
    patience_s: float,
    first_s: float,
) -> None:
    bench = bench_of(nursery, 2, first_s, first_s, 7.0)
    assert await taken_s(request_(bench.disk)) == pytest.approx(first_s + patience_s)
    assert behind(bench) == [2]
    assert await taken_s(request_(bench.disk)) == pytest.approx(first_s)  # once


async def test_who_comes_in_time_stays(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    bench = bench_of(nursery, 2, 1.0, 1.0, 1.0 + 0.9 * BEHIND_MAX_S)
    assert await taken_s(write(bench.disk)) == pytest.approx(1.0 + 0.9 * BEHIND_MAX_S)
    assert not behind(bench)


async def test_the_threshold_is_waited_for(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    bench = bench_of(nursery, 2, 0.0, 5.0, 7.0)
    assert await taken_s(write(bench.disk)) == pytest.approx(5.0 + BEHIND_MAX_S)
    assert behind(bench) == [2]


async def test_nobody_is_left_behind_where_all_are_needed(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    bench = bench_of(nursery, 3, 0.0, 0.0, 5.0)
    assert await taken_s(write(bench.disk)) == pytest.approx(5.0)
    assert not behind(bench)


async def test_by_default_all_are_waited_for(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    bench = bench_of(nursery, 1, 0.0, 0.0, 5.0)
    for replica in bench.disk.replicas:
        replica.behind_max_s = None
    assert await taken_s(write(bench.disk)) == pytest.approx(5.0)
    assert not behind(bench)


async def test_reads_leave_nobody_behind(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    bench = bench_of(nursery, 2, 0.0, 0.0, 0.0)
    bench.files[2].choose = takes(5.0, Kind.READ)
    await bench.disk.mirror.ask(bench.disk.replicas, Kind.READ, 2, 0, BLOCK)
    assert not behind(bench)


async def ask(needed: int, *replicas: Replica) -> None:
    fan_out = FanOut(needed)
    for replica in replicas:
        fan_out.submit(replica, Operation(Kind.WRITE, 0, BLOCK, DATA))
    await fan_out.complete()


async def test_a_target_is_waited_for(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    """Else one that is busy being resynced would never become current."""
    bench = bench_of(nursery, 1, 0.0, 5.0)
    one, target = bench.disk.replicas
    target.standing = Standing.RESYNCING
    assert await taken_s(ask(1, one, target)) == pytest.approx(5.0)
    assert not behind(bench)


async def test_one_that_was_ejected_stands_in_for_nobody(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """Else one that is needed would be given up, and a flush fail that could have succeeded."""
    bench = bench_of(nursery, 2, 0.0, 1.0, 5.0)
    replicas = bench.disk.replicas
    nursery.start_soon(ask, 2, *replicas)
    await trio.sleep(0.5)
    replicas[1].standing = Standing.STALE
    await trio.sleep(3.0)
    assert not behind(bench)


async def test_what_has_no_substitute_is_waited_for(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """What needs no success, as a sync of a target alone, is given up by nobody's success."""
    bench = bench_of(nursery, 1, 5.0)
    assert await taken_s(ask(0, *bench.disk.replicas)) == pytest.approx(5.0)
    assert not behind(bench)


async def test_who_answered_while_this_process_was_stopped_is_not_behind(
    nursery: trio.Nursery, mock_clock: MockClock
) -> None:
    bench = bench_of(nursery, 2, 0.0, 0.0, 60.0 + BEHIND_MAX_S / 2)
    async with trio.open_nursery() as requests:
        requests.start_soon(bench.disk.write, 0, DATA)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(60.0)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.autojump_threshold = 0
    assert not behind(bench)


async def test_it_can_be_taken_back_while_it_is_waited_for(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    bench = bench_of(nursery, 2, 1.0, 1.0, 5.0)
    nursery.start_soon(bench.disk.write, 0, DATA)
    await trio.sleep(0.5)
    for replica in bench.disk.replicas:
        replica.behind_max_s = None
    assert await taken_s(bench.disk.write(0, DATA)) > 4.0
    assert not behind(bench)
