"""`quorumfs.replica.ticks`: whoever looks again looks later than now, and seldom at an idle disk;
and the watchdog by it."""

import math

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from support.simulated import Bench, make_bench, takes
from trio.testing import MockClock

from quorumfs.decisions.model import Standing
from quorumfs.decisions.patterns import Fifo
from quorumfs.disk.events import EventLog
from quorumfs.disk.watchdog import QUIET_S, TICK_S
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Kind
from quorumfs.replica.ticks import IDLE_S, Rhythm, next_tick


@given(st.sampled_from([0.1, 0.3, 0.5, 1.0, 1 / 3, 5.0]), st.integers(0, 10_000))
def test_the_next_tick_is_later_than_now(every_s: float, ticks: int) -> None:
    clock = MockClock()

    async def main() -> None:
        clock.jump(ticks * every_s)
        now = trio.current_time()
        assert now < next_tick(every_s) <= now + 2 * every_s
        clock.autojump_threshold = 0.0
        await Rhythm().until_tick(every_s)
        assert trio.current_time() > now

    trio.run(main, clock=clock)


def test_a_tick_that_takes_long_is_pardoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log that takes no line holds up the whole process: no replica is to blame."""
    clock, pardoned = MockClock(autojump_threshold=0.0), []
    monkeypatch.setattr(Replica, "pardon", lambda _, seconds, __: pardoned.append(seconds))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            bench = make_bench(nursery, 1, pattern=Fifo())
            ticks = iter(range(1000))

            def tick(_: float) -> None:
                if next(ticks) == 2:
                    clock.jump(5.0)

            monkeypatch.setattr(bench.disk.mirror.events, "tick", tick)
            await trio.sleep(20 * TICK_S)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=clock)
    assert pardoned == [pytest.approx(5.0 - TICK_S)]


def is_idle(bench: Bench) -> bool:
    return bench.disk.mirror.rhythm.idle


def looks_of(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The times (seconds) at which a watchdog looks, from now on."""
    looks: list[float] = []
    monkeypatch.setattr(EventLog, "tick", lambda _, now: looks.append(now))
    return looks


def test_an_idle_disk_is_looked_at_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = looks_of(monkeypatch)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            bench = make_bench(nursery, 2, pattern=Fifo())
            await trio.sleep(101.0)
            assert is_idle(bench)
            assert len([look for look in looks if look > QUIET_S + IDLE_S]) <= 100.0 / IDLE_S
            await bench.disk.write(0, bytes(512))
            await trio.sleep_until(next_tick(IDLE_S) + 0.1)
            assert not is_idle(bench)
            looks.clear()
            await trio.sleep(2 * TICK_S)
            assert len(looks) == 2
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0.0))


@pytest.mark.parametrize("timeout_s", [1.0, 3.0, 5.0, 16.0])
@pytest.mark.parametrize("pause_s", [0.0, 1.7, 4.9])
def test_a_timeout_is_noticed_in_time_though_the_disk_was_idle(
    timeout_s: float, pause_s: float
) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            bench = make_bench(nursery, 2, pattern=Fifo(), threshold=1, timeout_s=timeout_s)
            await trio.sleep(20 * IDLE_S + pause_s)
            assert is_idle(bench)
            bench.files[0].choose = takes(math.inf, Kind.WRITE)
            began = trio.current_time()
            await bench.disk.write(0, bytes(512))
            assert timeout_s <= trio.current_time() - began <= timeout_s + 2 * TICK_S
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0.0))


@pytest.mark.parametrize("state", [Standing.STALE, Standing.MISSING, Standing.RESYNCING])
def test_a_disk_is_not_idle_while_a_replica_is_not_current(state: Standing) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            bench = make_bench(nursery, 2, pattern=Fifo(), threshold=1)
            bench.disk.replicas[1].standing = state
            await trio.sleep(20.0)
            assert not is_idle(bench)
            bench.disk.replicas[1].standing = Standing.OFFLINE
            await trio.sleep(20.0)
            assert is_idle(bench), "it was taken out, and nobody waits for it"
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0.0))


def test_a_process_that_starved_over_a_whole_pause_blames_no_replica() -> None:
    clock = MockClock(autojump_threshold=0.0)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            bench = make_bench(nursery, 2, pattern=Fifo(), threshold=1, timeout_s=4.0)
            await trio.sleep(20 * IDLE_S + 0.01)  # just after a look
            assert is_idle(bench)
            bench.files[0].choose = takes(4.45, Kind.WRITE)
            nursery.start_soon(bench.disk.write, 0, bytes(512))
            await trio.lowlevel.checkpoint()
            clock.jump(4.4)
            await trio.sleep(1.0)
            assert bench.disk.replicas[0].counters.timeouts == 0
            nursery.cancel_scope.cancel()

    trio.run(main, clock=clock)


def test_who_sleeps_long_looks_soon_once_the_disk_is_used() -> None:
    async def main() -> None:
        rhythm = Rhythm()
        rhythm.idle = True
        looks: list[float] = []

        async def look() -> None:
            while True:
                await rhythm.until_tick(5.0, 60.0)
                looks.append(trio.current_time())

        began = trio.current_time() // 60.0 * 60.0 + 60.0
        await trio.sleep_until(began + 1.0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            await trio.sleep(10.0)
            assert not looks
            rhythm.idle = False
            await trio.sleep(10.0)
            assert looks == [began + 15.0, began + 20.0]
            rhythm.idle = True
            await trio.sleep(100.0)
            assert looks[2:] == [began + 25.0, began + 60.0, began + 120.0]
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0.0))
