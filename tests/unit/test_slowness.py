"""Who is slow is said with respect to the fastest other replica, and does not come and go."""

from hypothesis import given
from hypothesis import strategies as st

from quorumfs.decisions.slowness import SLOW_S, TIMES, TIMES_STILL, slow_ones

MEDIANS = st.dictionaries(st.integers(0, 5), st.floats(1e-6, 100), max_size=6)


@given(MEDIANS, st.sets(st.integers(0, 5)))
def test_the_fastest_is_never_slow_and_no_one_alone(
    medians: dict[int, float], before: set[int]
) -> None:
    slow = slow_ones(medians, before)
    assert slow.keys() <= medians.keys()
    if medians:
        assert min(medians, key=lambda one: medians[one]) not in slow
    assert all(one.median_s >= SLOW_S and one.times >= TIMES_STILL for one in slow.values())


@given(MEDIANS)
def test_what_is_slow_stays_slow_while_nothing_changes(medians: dict[int, float]) -> None:
    slow = slow_ones(medians, ())
    assert all(one.times >= TIMES for one in slow.values())
    assert slow_ones(medians, slow) == slow
