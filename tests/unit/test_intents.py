"""Marks of what is written to: a mark that goes too early costs data, one too many only time."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quorumfs.decisions.dirtymap import EXTENT, INTENT, DirtyMap
from quorumfs.metadata.ledger import intents as module
from quorumfs.metadata.ledger.intents import AHEAD_MAX, SPAN_MAX, Intents

COUNT = 300


def a_map(count: int) -> DirtyMap:
    """That of a disk of *count* extents of a chunk each."""
    return DirtyMap(count * EXTENT, EXTENT)


def anywhere(span: range) -> bool:
    """What may be marked that nobody asked for."""
    return True


def mark(known: DirtyMap, intents: Intents, extents: range) -> bool:
    """As before a write; whether it had to wait for a mark."""
    span = intents.want(extents, anywhere, ahead=True)
    if span is not None:
        known.add(INTENT, span)
    assert known.all(INTENT, extents)
    return span is not None


def marked(known: DirtyMap) -> list[int]:
    return [extent for run in known.runs(INTENT, longest=len(known)) for extent in run]


def test_extents_that_come_later_are_marked_like_others() -> None:
    known = a_map(2)
    intents = Intents(known)
    mark(known, intents, range(1, 2))
    known.grow(4 * EXTENT, 0)
    intents.grow()
    assert list(intents.in_use()) == [range(1, 2)]
    mark(known, intents, range(3, 4))
    assert marked(known) == [1, 3]
    assert list(intents.in_use()) == [range(1, 2), range(3, 4)]


@pytest.fixture(autouse=True)
def few_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MISSES_MAX", 4)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, COUNT - 1), st.integers(1, 5)),
        st.tuples(st.just("want"), st.integers(0, COUNT - 1), st.integers(1, 5)),
        st.tuples(st.just("clear"), st.just(0), st.just(0)),
    ),
    max_size=200,
)


@given(steps)
def test_no_mark_goes_that_somebody_relies_on(history: list[tuple[str, int, int]]) -> None:
    """Neither of what was written to since the last look, nor of what is about to be."""
    known = a_map(COUNT)
    intents = Intents(known)
    written: set[int] = set()
    for step, start, length in history:
        extents = range(start, min(start + length, COUNT))
        if step == "write":
            mark(known, intents, extents)
            intents.touch(extents)
            written.update(extents)
        elif step == "want":
            if mark(known, intents, extents):
                written.update(extents)
        else:
            idle = list(intents.idle())
            assert all(one.stop <= other.start for one, other in pairwise(idle))
            gone = {extent for span in idle for extent in span}
            assert not gone & written
            assert set(marked(known)) - gone <= {
                neighbour for e in written for neighbour in intents._span_of(e)
            }
            intents.look_anew()
            assert not list(intents.in_use())
            written.clear()
            for span in idle:
                known.remove(INTENT, span)


def test_a_small_working_set_is_marked_and_nothing_else() -> None:
    known = a_map(1000)
    intents = Intents(known)
    for extent in (5, 500, 999):
        assert mark(known, intents, range(extent, extent + 1))
        assert not mark(known, intents, range(extent, extent + 1))
    assert marked(known) == [5, 500, 999]


def test_writes_all_over_a_large_disk_soon_find_it_marked() -> None:
    """Not one wait for each extent: their number grows with the logarithm of the disk's size."""
    count = 1 << 20
    known = a_map(count)
    intents = Intents(known)
    step = 514_229  # coprime to the count: every extent once, in a scattered order
    waits = sum(
        mark(known, intents, range(e, e + 1)) for e in (n * step % count for n in range(count))
    )
    assert waits <= count // SPAN_MAX + 4 * SPAN_MAX.bit_length()


def test_who_writes_from_one_end_to_the_other_rarely_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And never is more marked ahead than was written to, in one piece, before."""
    monkeypatch.setattr(module, "MISSES_MAX", 256)  # spans shall stay short
    count = 40 * AHEAD_MAX
    known = a_map(count)
    intents = Intents(known)
    waits = 0
    for extent in range(count):
        waits += mark(known, intents, range(extent, extent + 1))
        intents.touched[extent] = 1
        ahead = known.count(INTENT) - (extent + 1)
        assert ahead <= min(extent, AHEAD_MAX)
    assert waits <= count // AHEAD_MAX + AHEAD_MAX.bit_length()


def test_who_repairs_has_nothing_marked_ahead() -> None:
    """Else what is settled after each crash would be twice what was settled before it."""
    known = a_map(1000)
    intents = Intents(known)
    intents.touched[:10] = b"\1" * 10
    assert intents.want(range(10, 11), anywhere, ahead=False) == range(10, 11)


def test_what_must_not_be_marked_ahead_is_not() -> None:
    """What was never compared, P4: a mark says there that a write may have torn it."""
    known = a_map(1000)
    intents = Intents(known)
    intents.touched[:10] = b"\1" * 10
    assert intents.want(range(10, 11), lambda span: span.stop <= 15, ahead=True) == range(10, 11)


def test_who_writes_anew_far_away_begins_with_one_extent() -> None:
    known = a_map(1000)
    intents = Intents(known)
    for extent in (10, 11, 12, 13, 500):
        mark(known, intents, range(extent, extent + 1))
        intents.touched[extent] = 1
    assert marked(known) == [
        *range(10, 17),
        500,
    ]


def test_spans_get_short_again_in_calm_times() -> None:
    """So that a crash does not cost what a storm long ago did."""
    known = a_map(100_000)
    intents = Intents(known)
    for extent in range(0, 100_000, 100):
        mark(known, intents, range(extent, extent + 1))
    for _ in range(SPAN_MAX.bit_length()):
        for span in list(intents.idle()):
            known.remove(INTENT, span)
        intents.look_anew()
    assert not marked(known)
    mark(known, intents, range(7, 8))
    assert known.count(INTENT) == 1


def test_who_wants_what_another_wants_already_waits_with_it() -> None:
    known = a_map(100)
    intents = Intents(known)
    assert mark(known, intents, range(3, 5))
    assert intents.want(range(4, 5), anywhere, ahead=True) is None


def test_nothing_is_marked_around_what_must_not_be() -> None:
    """However many requests had to wait."""
    known = a_map(COUNT)
    intents = Intents(known)
    for extent in range(20):
        assert intents.want(
            range(extent, extent + 1), lambda span: len(span) == 1, ahead=True
        ) == range(extent, extent + 1)
