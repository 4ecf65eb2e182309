"""The dirty map behaves as a plain set of facts per chunk would, at the speed of C."""

from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quorumfs.decisions.dirtymap import (
    ALL_OUT_OF_SYNC,
    CHUNK_MIN,
    CHUNKS_MAX,
    EXTENT,
    INTENT,
    NARROW,
    REPLICAS_MAX,
    UNKNOWN,
    UNVERIFIED,
    DirtyMap,
    chunk_size_for,
    out_of_sync,
    plane_bits,
    planes_for,
)

CHUNKS = 12
CHUNK = CHUNK_MIN
WIDTHS = [NARROW, NARROW + 1, 14, 15, REPLICAS_MAX]
"""Slots of sets whose maps have one plane, and more: about where there is one more."""


def facts_of(slots: int) -> tuple[int, ...]:
    return INTENT, UNVERIFIED, *map(out_of_sync, range(slots))


ranges = st.tuples(st.integers(0, CHUNKS), st.integers(0, CHUNKS)).map(
    lambda pair: range(min(pair), max(pair))
)
Facts = set[int]
Change = tuple[str, Facts, range]
Model = list[Facts]


class Case(NamedTuple):
    """A history of a map, another one of a map of the same shape, and facts to ask for."""

    slots: int
    history: list[Change]
    other: list[Change]
    bits: Facts


def cases() -> st.SearchStrategy[Case]:
    def of(slots: int) -> st.SearchStrategy[Case]:
        facts = st.sets(st.sampled_from(facts_of(slots)), min_size=1)
        kinds = st.sampled_from(["add", "remove", "where", "keep"])
        changes = st.lists(st.tuples(kinds, facts, ranges))
        return st.builds(Case, st.just(slots), changes, changes, facts)

    return st.sampled_from(WIDTHS).flatmap(of)


def applied(slots: int, history: list[Change]) -> tuple[DirtyMap, Model]:
    """The same changes to a map and to its model, a set of facts for each chunk."""
    disk_map = DirtyMap(CHUNKS * CHUNK, CHUNK, slots=slots)
    model = [set[int]() for _ in range(CHUNKS)]
    for change, bits, chunks in history:
        if change == "where":
            disk_map.add_where(INTENT | UNVERIFIED, sum(bits))
        elif change == "keep":
            disk_map.keep_as(sum(bits), max(bits))
        else:
            getattr(disk_map, change)(sum(bits), chunks)
        for chunk, known in enumerate(model):
            if change == "where":
                known.update(bits if known & {INTENT, UNVERIFIED} else ())
            elif change == "keep":
                model[chunk] = {max(bits)} if known & bits else set()
            elif chunk in chunks:
                (known.update if change == "add" else known.difference_update)(bits)
    return disk_map, model


def states(disk_map: DirtyMap) -> list[int]:
    return [disk_map.state(chunk) for chunk in range(len(disk_map))]


@given(cases())
def test_a_map_is_a_set_of_facts_for_each_chunk(case: Case) -> None:
    disk_map, model = applied(case.slots, case.history)
    assert states(disk_map) == [sum(known) for known in model]
    assert len(disk_map) == CHUNKS
    assert len(disk_map.planes) == planes_for(case.slots)


@given(cases(), ranges)
def test_counts_and_questions_are_about_any_of_the_bits(case: Case, chunks: range) -> None:
    disk_map, model = applied(case.slots, case.history)
    having = {chunk for chunk, known in enumerate(model) if known & case.bits}
    bits = sum(case.bits)
    assert disk_map.count(bits) == len(having)
    assert disk_map.any(bits, chunks) == bool(having & set(chunks))
    assert disk_map.all(bits, chunks) == (set(chunks) <= having)
    assert disk_map.has(bits, chunks) == all(model[chunk] >= case.bits for chunk in chunks)
    assert disk_map.any_has(bits) == any(known >= case.bits for known in model)
    assert disk_map.is_all(bits) == all(known == case.bits for known in model)


@given(cases(), st.integers(0, CHUNKS), st.integers(1, CHUNKS + 1))
def test_runs_are_exactly_the_chunks_in_order_and_no_longer_than_asked(
    case: Case, start: int, longest: int
) -> None:
    disk_map, model = applied(case.slots, case.history)
    runs = list(disk_map.runs(sum(case.bits), start, longest))
    having = [chunk for chunk, known in enumerate(model) if known & case.bits and chunk >= start]
    assert [chunk for run in runs for chunk in run] == having
    assert all(0 < len(run) <= longest for run in runs)
    for run, following in pairwise(runs):
        assert run.stop < following.start or len(run) == longest  # not cut without need


@given(cases(), st.integers(0, CHUNKS), st.integers(0, CHUNKS))
def test_runs_within_some_chunks_are_those_of_these_alone(
    case: Case, start: int, stop: int
) -> None:
    disk_map, model = applied(case.slots, case.history)
    runs = list(disk_map.runs_in(sum(case.bits), range(start, stop)))
    expected = [chunk for chunk in range(start, stop) if model[chunk] & case.bits]
    assert [chunk for run in runs for chunk in run] == expected
    assert all(run.stop < following.start for run, following in pairwise(runs))


@given(cases())
def test_a_join_knows_what_either_knew_and_changes_only_itself(case: Case) -> None:
    (joined, model), (second, second_model) = (
        applied(case.slots, history) for history in (case.history, case.other)
    )
    copy = second.copy()
    joined.join(second)
    joined.add(sum(case.bits), range(CHUNKS))
    assert states(joined) == [
        sum(a | b | case.bits) for a, b in zip(model, second_model, strict=True)
    ]
    assert copy.planes == second.planes
    copy.add(sum(case.bits), range(CHUNKS))
    assert states(second) == [sum(known) for known in second_model]


@given(cases(), st.sampled_from(WIDTHS))
def test_a_map_gets_room_and_says_nothing_of_whom_it_is_for(case: Case, slots: int) -> None:
    disk_map, model = applied(case.slots, case.history)
    disk_map.widen(slots)
    assert states(disk_map) == [sum(known) for known in model]
    assert len(disk_map.planes) == planes_for(max(slots, case.slots))
    disk_map.add(out_of_sync(slots - 1), range(1))
    assert disk_map.state(0) == sum(model[0] | {out_of_sync(slots - 1)})


@given(cases(), cases())
def test_of_a_map_with_more_room_what_there_is_room_for_is_joined(one: Case, other: Case) -> None:
    (joined, model), (second, second_model) = (
        applied(case.slots, case.history) for case in (one, other)
    )
    room = {fact for fact in facts_of(REPLICAS_MAX) if fact < 1 << 8 * len(joined.planes)}
    joined.join(second)
    assert states(joined) == [sum(a | b & room) for a, b in zip(model, second_model, strict=True)]


@given(cases(), st.sets(st.integers(0, CHUNKS - 1)), st.sets(st.integers(0, REPLICAS_MAX - 1)))
def test_what_is_unknown_everywhere_is_read_as_lacked_by_those_who_are_behind(
    case: Case, torn: set[int], behind: set[int]
) -> None:
    """Chunk by chunk, and whether or not there was room for those who are behind."""
    disk_map, model = applied(case.slots, case.history)
    for chunk in torn:
        for number, plane in enumerate(disk_map.planes):
            plane[chunk] = plane_bits(UNKNOWN, number)
    unknown = sum(UNKNOWN & 0xFF << 8 * number for number in range(len(disk_map.planes)))
    read = disk_map.read_as(sum(map(out_of_sync, behind)))
    for chunk, known in enumerate(model):
        lost = chunk in torn or sum(known) == unknown
        expected = {INTENT, *map(out_of_sync, behind)} if lost else known
        assert read.state(chunk) == sum(expected)


@pytest.mark.parametrize(
    ("slots", "planes"),
    [(1, 1), (6, 1), (7, 2), (14, 2), (15, 3), (22, 3), (30, 4), (31, 5), (32, 5)],
)
def test_a_map_takes_no_more_bytes_than_its_replicas_need(slots: int, planes: int) -> None:
    assert planes_for(slots) == planes
    assert out_of_sync(slots - 1) < 1 << 8 * planes
    assert slots in (1, 6) or out_of_sync(slots - 1) >= 1 << 8 * (planes - 1)


@given(cases(), st.integers(0, 30))
def test_what_is_added_to_a_map_has_the_bits_it_is_to_have(case: Case, more: int) -> None:
    disk_map, model = applied(case.slots, case.history)
    resized = disk_map.resized((CHUNKS + more) * CHUNK, sum(case.bits))
    disk_map.grow((CHUNKS + more) * CHUNK, sum(case.bits))
    assert states(disk_map) == [*map(sum, model), *[sum(case.bits)] * more]
    assert resized.planes == disk_map.planes
    assert disk_map.resized(CHUNK).planes == tuple(plane[:1] for plane in disk_map.planes)


def test_there_is_no_fact_without_room_for_it() -> None:
    disk_map = DirtyMap(CHUNK, CHUNK)
    with pytest.raises(AssertionError, match="no room"):
        disk_map.add(out_of_sync(NARROW), range(1))
    assert not disk_map.any(out_of_sync(NARROW), range(1))
    assert not disk_map.has(out_of_sync(NARROW), range(1))


def test_runs_see_what_changes_ahead_of_them() -> None:
    """Or a resync would miss what is marked while it runs."""
    disk_map = DirtyMap(CHUNKS * CHUNK, CHUNK)
    disk_map.add(INTENT, range(1, 3))
    runs = disk_map.runs(INTENT, longest=CHUNKS)
    assert next(runs) == range(1, 3)
    disk_map.add(INTENT, range(5, 6))
    assert list(runs) == [range(5, 6)]


@given(st.integers(1, 1 << 44))
def test_the_map_of_any_disk_is_small(size: int) -> None:
    """At most 4 MiB up to 16 TiB, and no coarser than it must be."""
    chunk = chunk_size_for(size)
    assert chunk >= CHUNK_MIN
    assert chunk.bit_count() == 1
    assert size <= chunk * CHUNKS_MAX
    assert chunk == CHUNK_MIN or size > chunk // 2 * CHUNKS_MAX


def test_chunks_of_well_known_disks() -> None:
    assert chunk_size_for(1) == chunk_size_for(256 << 30) == 64 << 10
    assert chunk_size_for((256 << 30) + 1) == 128 << 10
    assert chunk_size_for(16 << 40) == 4 << 20


def test_a_map_of_16_tib_answers_at_once() -> None:
    disk_map = DirtyMap(16 << 40, 4 << 20)
    disk_map.add(INTENT, range(len(disk_map) - 1, len(disk_map)))
    assert list(map(len, disk_map.planes)) == [4 << 20]
    assert list(disk_map.runs(INTENT)) == [range(len(disk_map) - 1, len(disk_map))]
    assert disk_map.count(INTENT) == 1


@given(st.integers(1, 40 * CHUNK), st.data())
def test_a_range_touches_the_chunks_and_extents_its_bytes_are_in(
    size: int, data: st.DataObject
) -> None:
    disk_map = DirtyMap(size, CHUNK)
    offset = data.draw(st.integers(0, size - 1))
    length = data.draw(st.integers(1, size - offset))
    last = offset + length - 1
    assert disk_map.chunks(offset, length) == range(offset // CHUNK, last // CHUNK + 1)
    assert disk_map.extents(offset, length) == range(offset // EXTENT, last // EXTENT + 1)
    marked = disk_map.extent_chunks(disk_map.extents(offset, length))
    assert set(disk_map.chunks(offset, length)) <= set(marked) <= set(range(len(disk_map)))


@given(st.integers(1, 5 * CHUNK))
def test_bounds_cover_the_disk_and_the_last_chunk_may_be_short(size: int) -> None:
    disk_map = DirtyMap(size, CHUNK)
    bounds = [disk_map.bounds(chunk) for chunk in range(len(disk_map))]
    assert [start for start, _ in bounds] == [0, *(end for _, end in bounds[:-1])]
    assert bounds[-1][1] == size
    assert all(0 < end - start <= CHUNK for start, end in bounds)


@given(st.integers(1, 5 * CHUNK), st.data())
def test_lacking_bytes_are_those_of_the_chunks_that_lack(size: int, data: st.DataObject) -> None:
    disk_map = DirtyMap(size, CHUNK)
    lacking = data.draw(st.sets(st.integers(0, len(disk_map) - 1)))
    for chunk in lacking:
        disk_map.add(out_of_sync(2) | INTENT, range(chunk, chunk + 1))
    expected = sum(end - start for start, end in map(disk_map.bounds, lacking))
    assert disk_map.lacking_bytes(2) == expected
    assert disk_map.lacking_bytes(1) == 0


def test_a_large_chunk_is_its_own_extent() -> None:
    disk_map = DirtyMap(1 << 30, 64 << 20)
    assert disk_map.extent_chunks(disk_map.extents(0, 1)) == range(1)


def test_each_fact_has_its_own_bit() -> None:
    """And the bits of the replicas do not reach into the others."""
    facts = facts_of(REPLICAS_MAX)
    assert len(set(facts)) == 34
    assert sum(facts) == (1 << 34) - 1
    assert sum(facts_of(NARROW)) == 0xFF
    assert all(fact.bit_count() == 1 for fact in facts)
    assert UNKNOWN == INTENT | ALL_OUT_OF_SYNC
    assert not ALL_OUT_OF_SYNC & (INTENT | UNVERIFIED)
