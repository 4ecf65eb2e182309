"""How much a repair does at a time."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quorumfs.control.status import added_up
from quorumfs.decisions.model import RepairKind
from quorumfs.repair.pacing import MEMORY_S, Portion, Speed
from quorumfs.repair.work import Progress

LEAST, MOST, LONGER_S = 64, 16 * 1024, 0.1


def found(latency_s: float, rate: float, portions: int = 60) -> Portion:
    """A portion after so many on a replica of this latency, and of *rate* bytes a second."""
    portion = Portion(LEAST, MOST, LONGER_S)
    work(portion, latency_s, rate, portions)
    return portion


def work(portion: Portion, latency_s: float, rate: float, portions: int) -> float:
    """Have so many portions done; returns how long the last one took (seconds)."""
    now, seconds = max(0.0, portion._since), 0.0
    for _ in range(portions):
        amount, seconds = portion.amount, latency_s + portion.amount / rate
        portion.took(amount, now, now + seconds)
        now += seconds
    return seconds


@pytest.mark.parametrize("latency_s", [0.0, 0.2, 2.0])
def test_what_is_fast_gets_all_at_once(latency_s: float) -> None:
    """However long even the least portion takes: smaller ones would not save that."""
    assert found(latency_s, rate=1e9).amount == MOST


@pytest.mark.parametrize("latency_s", [0.0, 0.2, 2.0])
@pytest.mark.parametrize("rate", [2e3, 2e4, 1e5])
def test_what_is_slow_takes_little_longer_than_the_least(latency_s: float, rate: float) -> None:
    portion = found(latency_s, rate)
    least_s = latency_s + LEAST / rate
    took = [work(portion, latency_s, rate, 1) for _ in range(16)]
    assert min(took) <= least_s + LONGER_S
    assert sum(took) / len(took) <= least_s + 1.5 * LONGER_S


def test_what_becomes_slow_gets_little_at_once() -> None:
    """Not step by step, each of which would take long."""
    portion = found(0.0, rate=1e9)
    work(portion, 0.0, rate=4e3, portions=1)
    assert work(portion, 0.0, rate=4e3, portions=1) <= LONGER_S + LEAST / 4e3


def test_what_began_before_a_change_is_no_reason_for_another() -> None:
    portion = found(0.0, rate=1e9)
    for _ in range(4):  # in parallel
        portion.took(MOST, 1e3, 1e3 + 0.15)
    assert portion.amount == MOST // 2


def test_less_than_was_wanted_is_no_reason_for_more() -> None:
    portion = Portion(LEAST, MOST, LONGER_S)
    portion.took(LEAST - 1, 1.0, 1.0)
    assert portion.amount == LEAST


STEPS = st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 1 << 40)), max_size=50)


@given(st.integers(0, 1 << 44), STEPS, st.floats(0, 1e6))
def test_progress_is_at_most_all_and_never_goes_back(
    total: int, steps: list[tuple[float, int]], later_s: float
) -> None:
    """And the time that is left is a number, or not known, also where more is copied than was
    lacking at first."""
    now, before = 100.0, 0
    progress = Progress(RepairKind.RESYNC, None, total, now)
    for spent, length in steps:
        now += spent
        progress.advance(now, length)
        for when in (now - 1, now, now + later_s):
            done, of, _, eta_s = added_up(
                progress.done_bytes, progress.total_bytes, progress.speed.rate(when)
            )
            assert before <= done == progress.done_bytes <= of == total
            assert eta_s is None or 0 <= eta_s <= total
        before = progress.done_bytes


def test_the_speed_is_that_of_lately_and_does_not_jump() -> None:
    speed = Speed(0.0)
    rates = []
    for second in range(1, 201):
        speed.worked(second, 100 if second <= 100 else 10)
        rates.append(speed.rate(second))
    assert rates[99] == pytest.approx(100, rel=0.1)
    assert rates[-1] == pytest.approx(10, rel=0.1)
    jumps = [abs(late - early) for early, late in itertools.pairwise(rates[1:])]
    assert max(jumps) <= 2 * 100 / MEMORY_S
    assert speed.rate(200 + 20 * MEMORY_S) < 0.1, "nothing is done any more"
