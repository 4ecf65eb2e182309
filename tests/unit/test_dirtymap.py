"""The dirty map behaves as a plain set of facts per chunk would, at the speed of C."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from quorumfs.decisions.dirtymap import (
    ALL_OUT_OF_SYNC,
    CHUNK_MIN,
    CHUNKS_MAX,
    EXTENT,
    INTENT,
    REPLICAS_MAX,
    UNKNOWN,
    UNVERIFIED,
    DirtyMap,
    chunk_size_for,
    out_of_sync,
)

CHUNKS = 12
CHUNK = CHUNK_MIN
FACTS = (INTENT, UNVERIFIED, *(out_of_sync(slot) for slot in range(REPLICAS_MAX)))

facts = st.sets(st.sampled_from(FACTS), min_size=1)
ranges = st.tuples(st.integers(0, CHUNKS), st.integers(0, CHUNKS)).map(
    lambda pair: range(min(pair), max(pair))
)
changes = st.lists(st.tuples(st.sampled_from(["add", "remove", "where"]), facts, ranges))
Model = list[set[int]]


def applied(history: list[tuple[str, set[int], range]]) -> tuple[DirtyMap, Model]:
    """The same changes to a map and to its model, a set of facts for each chunk."""
    disk_map, model = DirtyMap(CHUNKS * CHUNK, CHUNK), [set[int]() for _ in range(CHUNKS)]
    for change, bits, chunks in history:
        if change == "where":
            disk_map.add_where(INTENT | UNVERIFIED, sum(bits))
        else:
            getattr(disk_map, change)(sum(bits), chunks)
        for chunk, known in enumerate(model):
            if change == "where":
                known.update(bits if known & {INTENT, UNVERIFIED} else ())
            elif chunk in chunks:
                (known.update if change == "add" else known.difference_update)(bits)
    return disk_map, model


@given(changes)
def test_a_map_is_a_set_of_facts_for_each_chunk(history: list[tuple[str, set[int], range]]) -> None:
    disk_map, model = applied(history)
    assert list(disk_map.states) == [sum(known) for known in model]
    assert len(disk_map) == CHUNKS


@given(changes, facts, ranges)
def test_counts_and_questions_are_about_any_of_the_bits(
    history: list[tuple[str, set[int], range]], bits: set[int], chunks: range
) -> None:
    disk_map, model = applied(history)
    having = {chunk for chunk, known in enumerate(model) if known & bits}
    assert disk_map.count(sum(bits)) == len(having)
    assert disk_map.any(sum(bits), chunks) == bool(having & set(chunks))


@given(changes, facts, st.integers(0, CHUNKS), st.integers(1, CHUNKS + 1))
def test_runs_are_exactly_the_chunks_in_order_and_no_longer_than_asked(
    history: list[tuple[str, set[int], range]], bits: set[int], start: int, longest: int
) -> None:
    disk_map, model = applied(history)
    runs = list(disk_map.runs(sum(bits), start, longest))
    having = [chunk for chunk, known in enumerate(model) if known & bits and chunk >= start]
    assert [chunk for run in runs for chunk in run] == having
    assert all(0 < len(run) <= longest for run in runs)
    for run, following in pairwise(runs):
        assert run.stop < following.start or len(run) == longest  # not cut without need


@given(changes, facts, st.integers(0, CHUNKS), st.integers(0, CHUNKS))
def test_runs_within_some_chunks_are_those_of_these_alone(
    history: list[tuple[str, set[int], range]], bits: set[int], start: int, stop: int
) -> None:
    disk_map, model = applied(history)
    runs = list(disk_map.runs_in(sum(bits), range(start, stop)))
    expected = [chunk for chunk in range(start, stop) if model[chunk] & bits]
    assert [chunk for run in runs for chunk in run] == expected
    assert all(run.stop < following.start for run, following in pairwise(runs))


@given(changes, changes, facts)
def test_a_join_knows_what_either_knew_and_changes_only_itself(
    one: list[tuple[str, set[int], range]],
    other: list[tuple[str, set[int], range]],
    bits: set[int],
) -> None:
    (joined, model), (second, second_model) = applied(one), applied(other)
    copy = second.copy()
    joined.join(second)
    joined.add(sum(bits), range(CHUNKS))
    assert list(joined.states) == [
        sum(a | b | bits) for a, b in zip(model, second_model, strict=True)
    ]
    assert copy.states == second.states
    copy.add(sum(bits), range(CHUNKS))
    assert list(second.states) == [sum(known) for known in second_model]


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
    assert len(disk_map.states) == 4 << 20
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
    assert len(set(FACTS)) == 8
    assert sum(FACTS) == 0xFF
    assert all(fact.bit_count() == 1 for fact in FACTS)
    assert UNKNOWN == INTENT | ALL_OUT_OF_SYNC
    assert not ALL_OUT_OF_SYNC & (INTENT | UNVERIFIED)
