"""What a set remembers of its scrubs: written, torn, moved, and behind what others read."""

from dataclasses import replace

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from support.sidecars import decode, encode

from quorumfs.decisions.dirtymap import CHUNK_MIN, DirtyMap
from quorumfs.decisions.record import UNKNOWN_IDENTITY, Record, Role, RoleState, Sidecar
from quorumfs.decisions.scrub import (
    HALF,
    NO_SCRUB,
    UNDECIDED_MAX,
    Counts,
    ScrubRecord,
    decode_scrub,
    encode_scrub,
)
from quorumfs.decisions.sidecar import PAGE, file_size

SET = b"S" * 16
SIZE = 100 * CHUNK_MIN
PLACE = 5 * PAGE
ONE = ScrubRecord(
    version=7,
    number=3,
    running=True,
    paused=True,
    repairing=True,
    position=4 * CHUNK_MIN,
    counts=Counts(5, 4, 3, 2, 1),
    seconds=60,
    ended=1_795_824_000,
    took=3600,
    stopped=True,
    found=Counts(10, 9, 8, 7, 6),
    undecided=((0, 4096), (8192, 16384)),
)

numbers = st.integers(0, 2**63)
counts = st.builds(Counts, *[numbers] * 5)
places = st.integers(0, SIZE - 1).flatmap(
    lambda start: st.tuples(st.just(start), st.integers(start + 1, SIZE))
)
records = st.builds(
    ScrubRecord,
    numbers,
    numbers,
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, SIZE),
    counts,
    numbers,
    numbers,
    numbers,
    st.booleans(),
    counts,
    st.lists(places, max_size=UNDECIDED_MAX).map(tuple),
)


def page_of(*records: ScrubRecord) -> bytes:
    """The page after these were written to it, one after the other."""
    page = bytearray(PAGE)
    for record in records:
        offset, content = encode_scrub(record, SET, PLACE)
        assert len(content) == HALF
        page[offset - PLACE : offset - PLACE + HALF] = content
    return bytes(page)


def sidecar(**changes: object) -> Sidecar:
    roles = (Role(b"A" * 16, RoleState.CURRENT, 1, "/a.img"),)
    record = Record(SET, SIZE, CHUNK_MIN, 1, 1, roles)
    one = Sidecar(b"A" * 16, record, DirtyMap(SIZE, CHUNK_MIN), UNKNOWN_IDENTITY)
    return replace(one, **changes)  # type: ignore[arg-type]


@given(records)
def test_what_is_written_is_read(record: ScrubRecord) -> None:
    assert decode_scrub(page_of(record), SET, PLACE, SIZE) == record


def test_the_format_never_changes() -> None:
    """Sidecars out there have it."""
    offset, content = encode_scrub(ONE, SET, PLACE)
    assert offset == PLACE + HALF
    assert xxhash.xxh3_64_hexdigest(content) == "2b92e1cc153bec7d"


def test_the_later_version_counts_and_the_one_before_is_left_when_it_is_torn() -> None:
    later = replace(ONE, version=8, position=5 * CHUNK_MIN)
    page = page_of(ONE, later)
    assert decode_scrub(page, SET, PLACE, SIZE) == later
    for at in (0, 8, 100, 170):
        torn = page[:at] + b"\xff" + page[at + 1 :]
        assert decode_scrub(torn, SET, PLACE, SIZE) == ONE


@pytest.mark.parametrize(
    "page",
    [b"", bytes(PAGE), b"\xff" * PAGE, page_of(ONE)[: HALF + 300]],
    ids=["missing", "zeros", "ones", "cut off"],
)
def test_what_cannot_be_read_counts_as_no_scrub(page: bytes) -> None:
    assert decode_scrub(page, SET, PLACE, SIZE) == NO_SCRUB


def test_that_of_another_set_or_place_or_a_larger_disk_counts_as_no_scrub() -> None:
    page = page_of(ONE)
    assert decode_scrub(page, b"T" * 16, PLACE, SIZE) == NO_SCRUB
    assert decode_scrub(page, SET, PLACE + PAGE, SIZE) == NO_SCRUB
    assert decode_scrub(page, SET, PLACE, 3 * CHUNK_MIN) == NO_SCRUB
    assert decode_scrub(page, SET, PLACE, SIZE) == ONE


def test_it_stands_behind_the_map_where_older_programs_do_not_look() -> None:
    plain, content = encode(sidecar()), encode(sidecar(scrub=ONE))
    end = file_size(sidecar().map)
    assert content[:end] == plain
    assert len(content) == end + PAGE
    assert decode(plain).scrub == NO_SCRUB
    assert decode(content).scrub == ONE
    assert not decode(content).damage
