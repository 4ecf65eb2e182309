"""`quorumfs.replica.ticks`: whoever looks again looks later than now; and the watchdog by it."""

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from support.simulated import make_bench
from trio.testing import MockClock

from quorumfs.decisions.patterns import Fifo
from quorumfs.disk.watchdog import TICK_S
from quorumfs.replica.replica import Replica
from quorumfs.replica.ticks import next_tick, until_tick


@given(st.sampled_from([0.1, 0.3, 0.5, 1.0, 1 / 3, 5.0]), st.integers(0, 10_000))
def test_the_next_tick_is_later_than_now(every_s: float, ticks: int) -> None:
    clock = MockClock()

    async def main() -> None:
        clock.jump(ticks * every_s)
        now = trio.current_time()
        assert now < next_tick(every_s) <= now + 2 * every_s
        clock.autojump_threshold = 0.0
        await until_tick(every_s)
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
