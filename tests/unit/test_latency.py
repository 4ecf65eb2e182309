"""Percentiles of what a store did lately: right to a fifth, and soon forgotten; and a histogram."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quorumfs.decisions.latency import BOUNDS_NS, HALF_LIFE_S, Durations, Latency

SECONDS = st.floats(1e-8, 900)


@given(st.lists(SECONDS, min_size=1, max_size=300), st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]))
def test_a_percentile_is_right_to_a_fifth(took: list[float], fraction: float) -> None:
    latency = Latency()
    for seconds in took:
        latency.note(seconds, 0.0)
    exact = sorted(took)[math.ceil(fraction * len(took) - 1e-9) - 1]
    assert exact * 0.999 <= latency.percentile(fraction) <= exact * 1.26


@given(st.lists(SECONDS, min_size=1))
def test_what_is_shown_is_in_order(took: list[float]) -> None:
    latency = Latency()
    for seconds in took:
        latency.note(seconds, 0.0)
    shown = latency.percentiles()
    assert shown is not None
    assert shown.p50 <= shown.p99 <= shown.longest == max(took)


def test_what_was_a_while_ago_counts_less_and_less() -> None:
    latency = Latency()
    for _ in range(1000):
        latency.note(1.0, 0.0)
    for _ in range(200):
        latency.note(0.001, 3 * HALF_LIFE_S)
    assert latency.percentile(0.5) == pytest.approx(0.001, rel=0.26)
    assert latency.percentile(0.9) == pytest.approx(1.0, rel=0.26)
    latency.note(0.001, 40 * HALF_LIFE_S)
    assert latency.percentile(0.99) == pytest.approx(0.001, rel=0.26)
    shown = latency.percentiles()
    assert shown is not None
    assert shown.longest == 0.001


def test_without_requests_nothing_is_shown() -> None:
    latency = Latency()
    assert latency.percentiles() is None
    assert latency.percentile(0.99) == 0


@given(st.lists(st.one_of(SECONDS, st.sampled_from([bound / 1e9 for bound in BOUNDS_NS]))))
def test_a_histogram_counts_each_request_within_its_bounds(took: list[float]) -> None:
    durations = Durations()
    for seconds in took:
        durations.note(seconds)
    nanoseconds = [int(seconds * 1e9) for seconds in took]
    for place, bound in enumerate(BOUNDS_NS):
        assert sum(durations.counts[: place + 1]) == sum(one <= bound for one in nanoseconds)
    assert sum(durations.counts) == len(took)
    assert durations.total_ns == sum(nanoseconds)
