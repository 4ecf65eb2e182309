"""The range set behaves as the plain set of its bytes would."""

from hypothesis import given
from hypothesis import strategies as st

from quorumfs.decisions.ranges import RangeSet, least_coverage, segments

SIZE = 24
spans = st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE)).map(
    lambda pair: (pair[0], min(SIZE, pair[0] + pair[1]))
)
changes = st.lists(st.tuples(st.booleans(), spans), max_size=12)


def applied(history: list[tuple[bool, tuple[int, int]]]) -> tuple[RangeSet, set[int]]:
    """The same adds (True) and removes (False) on a range set and on its model."""
    ranges, model = RangeSet(), set[int]()
    for add, (start, end) in history:
        if add:
            ranges.add(start, end)
            model.update(range(start, end))
        else:
            ranges.remove(start, end)
            model.difference_update(range(start, end))
    return ranges, model


@given(changes, spans)
def test_a_range_set_is_the_set_of_its_bytes(
    history: list[tuple[bool, tuple[int, int]]], probe: tuple[int, int]
) -> None:
    ranges, model = applied(history)
    assert {byte for start, end in ranges for byte in range(start, end)} == model
    assert bool(ranges) == bool(model)
    assert ranges.overlaps(*probe) == bool(model & set(range(*probe)))
    inside = [byte for byte in model if byte >= probe[0]]
    assert ranges.next_inside(probe[0], default=-1) == min(inside, default=-1)
    assert ranges.next_outside(probe[0]) == next(
        byte for byte in range(probe[0], SIZE + 1) if byte not in model
    )
    if model:
        ranges.limit(0)
        assert list(ranges) == [(min(model), max(model) + 1)]


@given(changes)
def test_ranges_are_sorted_disjoint_and_do_not_touch(
    history: list[tuple[bool, tuple[int, int]]],
) -> None:
    """Or the set would grow with every write next to another."""
    ranges, _ = applied(history)
    bounds = [bound for pair in ranges for bound in pair]
    assert bounds == sorted(set(bounds))
    assert len(ranges) == len(bounds) // 2


@given(st.lists(changes, min_size=1, max_size=4), spans)
def test_segments_name_exactly_the_sets_that_each_byte_is_in(
    histories: list[list[tuple[bool, tuple[int, int]]]], span: tuple[int, int]
) -> None:
    pairs = [applied(history) for history in histories]
    models = [model for _, model in pairs]
    cut = list(segments(*span, [ranges for ranges, _ in pairs]))

    assert [byte for start, end, _ in cut for byte in range(start, end)] == list(range(*span))
    for start, end, inside in cut:
        for byte in range(start, end):
            assert inside == [i for i, model in enumerate(models) if byte in model]


@given(st.lists(changes, max_size=4))
def test_least_coverage_counts_the_holders_of_the_worst_byte(
    histories: list[list[tuple[bool, tuple[int, int]]]],
) -> None:
    pairs = [applied(history) for history in histories]
    expected = min(sum(byte not in model for _, model in pairs) for byte in range(SIZE))
    assert least_coverage(SIZE, [ranges for ranges, _ in pairs]) == expected
