"""How much a repair does at a time."""

import pytest

from quorumfs.repair.pacing import Portion

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
