"""The sidecar is read back as it was written, or it says so; and its format does not drift."""

import errno
import os
import shutil
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import xxhash
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.claims import claim
from support.sidecars import decode, encode

from quorumfs.decisions.assembly import assemble
from quorumfs.decisions.claim import Claim
from quorumfs.decisions.dirtymap import INTENT, UNKNOWN, UNVERIFIED, DirtyMap, out_of_sync
from quorumfs.decisions.model import Found
from quorumfs.decisions.record import (
    ANCESTORS_MAX,
    MOUNTS_MAX,
    REGIONS,
    Identity,
    PastMount,
    Phase,
    Record,
    Role,
    RoleState,
    Sidecar,
    identity_of,
    path_for,
)
from quorumfs.decisions.refusal import AssemblyRefusedError
from quorumfs.decisions.resolution import resolve
from quorumfs.decisions.sidecar import (
    CHUNKS_PER_PAGE,
    CLAIM_OFFSET,
    MAP_OFFSET,
    PAGE,
    PATH_MAX,
    SEQUENCE_MAX,
    SIZE_MAX,
    SLOT_OFFSETS,
    UNREADABLE_MAX,
    FormatError,
    UnknownVersionError,
    encode_pages,
    encode_slot,
    encode_unreadable,
    file_size,
    page_of,
    page_runs,
    pages,
)
from quorumfs.replica import sidecarfile
from quorumfs.replica.sidecarfile import (
    SidecarLockedError,
    create_sidecar,
    file_of,
    holder,
    is_copied,
    open_sidecar,
    read_claim,
    read_sidecar,
    replace_sidecar,
    sign,
    turn_of,
)

GOLDEN = Path(__file__).parents[1] / "data" / "sidecar-v2.quorumfs"
GOLDEN_3 = Path(__file__).parents[1] / "data" / "sidecar-v3.quorumfs"
OLDER = Path(__file__).parents[1] / "data" / "sidecar-v1.quorumfs"
CHUNK = 64 << 10
SECTOR = 512
UNREADABLE = UNKNOWN & 0xFF

u64 = st.integers(1, (1 << 64) - 1)
sequences = st.integers(0, SEQUENCE_MAX)
ns = st.integers(-(1 << 63), (1 << 63) - 1)
ids = st.binary(min_size=16, max_size=16)
paths = st.binary(max_size=PATH_MAX).map(lambda raw: os.fsdecode(raw.replace(b"\0", b"")))
roles = st.builds(Role, ids, st.sampled_from(RoleState), u64, paths, sequences, u64)
mounts = st.builds(PastMount, u64, st.integers(0, (1 << 32) - 1), st.booleans())


@st.composite
def make_record(draw: st.DrawFn) -> Record:
    generation, *ancestors = draw(
        st.lists(u64, min_size=1, max_size=1 + ANCESTORS_MAX, unique=True)
    )
    members = st.lists(roles, min_size=1, max_size=6, unique_by=lambda role: role.replica_id)
    drawn = tuple(draw(members))
    left = sum(role.state is not RoleState.REMOVED for role in drawn)
    assume(left)
    return Record(
        set_id=draw(ids),
        size=draw(st.integers(1, 9000 * CHUNK)),
        chunk_size=CHUNK,
        threshold=draw(st.integers(1, left)),
        generation=generation,
        roles=drawn,
        ancestors=tuple(ancestors),
        sequence=draw(sequences),
        clean=draw(st.booleans()),
        mounts=tuple(draw(st.lists(mounts, max_size=MOUNTS_MAX))),
    )


records = make_record()
regions = st.lists(u64, max_size=REGIONS).map(tuple)


@st.composite
def sidecars(draw: st.DrawFn) -> Sidecar:
    record = draw(records)
    disk_map = DirtyMap(record.size, record.chunk_size)
    for chunk in draw(st.sets(st.integers(0, len(disk_map) - 1), max_size=5)):
        disk_map.add(draw(st.integers(1, 255)), range(chunk, chunk + 1))
    identity = draw(st.builds(Identity, u64, u64, ns, ns, regions))
    own = draw(st.sampled_from(record.roles)).replica_id
    return Sidecar(own, record, disk_map, identity, spare_slot=1)


def same(one: Sidecar, other: Sidecar) -> bool:
    return replace(one, map=other.map) == other and one.map.planes == other.map.planes


def never_too_clean(found: DirtyMap, truth: DirtyMap) -> bool:
    """Whether every fact of *truth* is in what was *found*, or that nothing is known."""
    return all(
        a == UNREADABLE or a & b == b for a, b in zip(found.planes[0], truth.planes[0], strict=True)
    )


def slot_page(sidecar: Sidecar, record: Record, phase: Phase) -> bytes:
    return encode_slot(record, sidecar.replica_id, sidecar.identity, phase)


def put(content: bytes, offset: int, piece: bytes) -> bytes:
    return content[:offset] + piece + content[offset + len(piece) :]


def example() -> Sidecar:
    """A sidecar with something in every field, and two map pages."""
    path = os.fsdecode("/srv/ä/b.img".encode() + b"\xff")
    record = Record(
        set_id=bytes(range(16)),
        size=5000 * CHUNK - 7,
        chunk_size=CHUNK,
        threshold=2,
        generation=0x1122334455667788,
        roles=(
            Role(b"A" * 16, RoleState.CURRENT, 0x1122334455667788, "/srv/a.img", 41, 99),
            Role(b"B" * 16, RoleState.STALE, 7, path, 12, 98),
            Role(b"C" * 16, RoleState.RESYNCING, 8, "", 0),
        ),
        ancestors=(8, 7, (1 << 64) - 1),
        sequence=41,
        clean=False,
        mounts=(PastMount(99, 30, changed=True), PastMount((1 << 64) - 1, 2, changed=False)),
    )
    disk_map = DirtyMap(record.size, record.chunk_size)
    disk_map.add(INTENT | out_of_sync(1), range(3, 5))
    disk_map.add(UNVERIFIED, range(4079, 4082))
    disk_map.add(out_of_sync(2), range(4999, 5000))
    return Sidecar(b"A" * 16, record, disk_map, Identity(1 << 40, 5000 * CHUNK, -1, 2), None, 1)


def example_of_version_3() -> Sidecar:
    """As `example`, with a replica offline, and one removed on 2026-11-28."""
    one = example()
    record = one.record.with_role(1, state=RoleState.OFFLINE)
    record = record.with_role(2, state=RoleState.REMOVED, mount=1_795_824_000)
    return replace(one, record=record)


def golden_content() -> bytes:
    """What is in the golden file: `example` with a record prepared in its spare slot."""
    one = example()
    later = replace(one.record, generation=9, ancestors=one.record.history, sequence=42)
    return put(encode(one), SLOT_OFFSETS[1], slot_page(one, later, Phase.PREPARED))


# Round trips, and the format


@given(sidecars())
def test_what_is_written_is_read(sidecar: Sidecar) -> None:
    content = encode(sidecar)
    assert len(content) == file_size(sidecar.map)
    assert same(decode(content), sidecar)


def test_what_version_1_wrote_is_read() -> None:
    """It names no mounts; what is written to it then is of the version of today."""
    one = example()
    roles = tuple(replace(role, mount=0) for role in one.record.roles)
    expected = replace(one, record=replace(one.record, roles=roles, mounts=()))
    read = decode(OLDER.read_bytes())
    assert read.prepared is not None
    assert (read.prepared.generation, read.prepared.sequence) == (9, 42)
    assert same(replace(read, prepared=None), expected)
    assert same(decode(encode(read)), replace(read, prepared=None))
    assert encode(read)[8:12] == (2).to_bytes(4, "little")


def test_format_version_2_never_changes() -> None:
    """Sidecars out there are of this format: another one needs another version number."""
    golden = GOLDEN.read_bytes()
    assert golden_content() == golden
    read, expected = decode(golden), example()
    assert read.prepared is not None
    assert (read.prepared.generation, read.prepared.sequence) == (9, 42)
    assert same(replace(read, prepared=None), expected)


def test_format_version_3_never_changes() -> None:
    """It differs from version 2 where a replica is offline or removed, and is written there."""
    golden, expected = GOLDEN_3.read_bytes(), example_of_version_3()
    assert encode(expected) == golden
    assert same(decode(golden), expected)
    assert golden[8:12] == (3).to_bytes(4, "little")
    assert expected.record.slots == [0, 1]
    assert expected.record.slot_of(b"C" * 16) is None


@pytest.mark.parametrize("state", [RoleState.OFFLINE, RoleState.REMOVED])
def test_version_2_has_no_replica_that_is(state: RoleState) -> None:
    """No program ever wrote that: another one would take such a replica for any other."""
    place = 368 + 512 + 16  # of the state in slot 1
    with pytest.raises(FormatError, match=f"a replica in state {state} in format version 2"):
        decode(lying((place, bytes([state]))))


def test_what_cannot_be_read_is_remembered_up_to_what_fits_in_its_page() -> None:
    role = Role(b"r" * 16, RoleState.CURRENT, 1, "/a")
    record = Record(b"s" * 16, CHUNK * 1024, CHUNK, 1, 1, (role,))
    disk_map = DirtyMap(record.size, CHUNK)
    ranges = tuple((n * 2 * PAGE, n * 2 * PAGE + PAGE) for n in range(UNREADABLE_MAX))
    sidecar = Sidecar(b"r" * 16, record, disk_map, unreadable=ranges, unreadable_number=3)
    content = encode(sidecar)
    assert decode(content).unreadable == ranges
    assert decode(content).unreadable_number == 3


@pytest.mark.parametrize("sectors", [1, 2])
def test_a_torn_list_of_what_cannot_be_read_leaves_the_one_before(sectors: int) -> None:
    role = Role(b"r" * 16, RoleState.CURRENT, 1, "/a")
    record = Record(b"s" * 16, CHUNK * 1024, CHUNK, 1, 1, (role,))
    ranges = tuple((n * 2 * PAGE, n * 2 * PAGE + PAGE) for n in range(100))
    before = Sidecar(b"r" * 16, record, DirtyMap(record.size, CHUNK), unreadable=ranges[:80])
    content = bytearray(encode(before))
    for number in (1, 2):
        offset, listed = encode_unreadable(ranges[: 90 + number], record.set_id, number)
        intact = bytes(content)
        content[offset : offset + len(listed)] = listed
        assert decode(bytes(content)).unreadable == ranges[: 90 + number]
        torn = bytearray(intact)
        torn[offset : offset + sectors * SECTOR] = listed[: sectors * SECTOR]
        assert decode(bytes(torn)).unreadable == decode(intact).unreadable
        assert "its checksum does not fit" in decode(bytes(torn)).damage[0]


def test_a_path_that_is_too_long_is_left_out() -> None:
    """It is a hint: no reason to fail."""
    one = example()
    long = one.record.with_role(1, path="/" + "x" * PATH_MAX)
    read = decode(encode(replace(one, record=long)))
    assert [role.path for role in read.record.roles] == ["/srv/a.img", "", ""]
    longest = one.record.with_role(1, path="x" * PATH_MAX)
    assert decode(encode(replace(one, record=longest))).record == longest


def test_what_a_later_version_wrote_is_refused() -> None:
    """Scenario 44: it must not be touched, whatever its checksum is like."""
    content = encode(example())
    for slots in ((0,), (1,), (0, 1)):
        later = content
        for slot in slots:
            body = bytearray(content[:PAGE])
            body[8:12] = (5).to_bytes(4, "little")
            body[-16:] = xxhash.xxh3_128_digest(body[:-16])
            later = put(later, SLOT_OFFSETS[slot], bytes(body))
        with pytest.raises(UnknownVersionError, match="format version 5, known here: 1, 2, 3, 4"):
            decode(later)
    other_checksum = content
    for offset in SLOT_OFFSETS:
        other_checksum = put(other_checksum, offset + 8, (6).to_bytes(4, "little"))
    with pytest.raises(UnknownVersionError, match="format version 6"):
        decode(other_checksum)


# Written by somebody else


def sealed(page: bytes) -> bytes:
    """A slot or map page with a checksum that fits."""
    return page[:-16] + xxhash.xxh3_128_digest(page[:-16])


def lying(*changes: tuple[int, bytes], slots: Sequence[int] = (0, 1)) -> bytes:
    """The sidecar of `example` with bytes changed in some of its slots, and checksums that fit."""
    content = encode(example())
    for slot in slots:
        page = content[SLOT_OFFSETS[slot] : SLOT_OFFSETS[slot] + PAGE]
        for offset, piece in changes:
            page = put(page, offset, piece)
        content = put(content, SLOT_OFFSETS[slot], sealed(page))
    return content


def number(value: int) -> bytes:
    return value.to_bytes(8, "little")


ROLE = 368
IMPOSSIBLE = {
    "no magic": [(0, b"\0")],
    "too many regions": [(3687, b"\x11")],
    "no phase": [(12, b"\0")],
    "unknown phase": [(12, b"\3")],
    "neither clean nor not": [(13, b"\2")],
    "threshold 0": [(14, b"\0")],
    "threshold above the replicas": [(14, b"\4")],
    "no replica": [(15, b"\0")],
    "too many replicas": [(15, b"\7")],
    "sequence without a successor": [(16, b"\xff" * 8)],
    "own replica elsewhere": [(40, b"x")],
    "no size": [(56, number(0))],
    "larger than a file": [(56, number(1 << 63)), (64, number(1 << 41))],
    "no chunk size": [(64, number(0))],
    "a byte a chunk": [(56, number(1 << 32)), (64, number(1))],
    "more chunks than a map": [(56, number(1 << 62)), (64, number(CHUNK))],
    "no power of two": [(64, number(3 * CHUNK))],
    "chunks that no set has": [(64, number(8 << 20))],
    "no generation": [(72, number(0))],
    "its own ancestor": [(80, number(example().record.generation))],
    "unknown state": [(ROLE + 16, b"\x09")],
    "path too long": [(ROLE + 17, b"\xff\xff")],
    "zero byte in a path": [(ROLE + 43, b"/srv\0a.img")],
    "sequence of a role": [(ROLE + 27, b"\xff" * 8)],
    "twice the same replica": [(ROLE + 512, b"A" * 16)],
}


@pytest.mark.parametrize("changes", IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_a_slot_that_cannot_be_is_no_slot(changes: list[tuple[int, bytes]]) -> None:
    """Even with a good checksum, which proves nothing."""
    with pytest.raises(FormatError):
        decode(lying(*changes))
    assert decode(lying(*changes, slots=[1])).damage


@pytest.mark.parametrize("phase", [Phase.PREPARED, Phase.COMMITTED])
def test_a_disk_grows_from_one_slot_to_the_other(phase: Phase) -> None:
    """Each slot is good with the pages that its size calls for, and others are ignored."""
    before = example()
    record = before.record
    larger = replace(record, size=record.size + CHUNKS_PER_PAGE * CHUNK, sequence=99)
    grown = before.map.resized(larger.size, out_of_sync(1))
    last = pages(before.map) - 1
    added = encode_pages(grown, record.set_id, last, pages(grown) - 1)
    content = put(encode(before), MAP_OFFSET + last * PAGE, added)
    assert decode(content).map.planes[0] == before.map.planes[0]
    content = put(content, SLOT_OFFSETS[1], slot_page(before, larger, phase))
    found = decode(content)
    assert not found.damage
    if phase is Phase.PREPARED:
        assert (found.record, found.prepared) == (record, larger)
        assert found.map.planes[0] == before.map.planes[0]
    else:
        assert (found.record, found.prepared) == (larger, None)
        assert found.map.planes[0] == grown.planes[0]
    torn = put(content, SLOT_OFFSETS[0], bytes(PAGE))  # the other one was being written to
    assert decode(torn).map.planes[0] == grown.planes[0]


def test_slots_of_two_replicas_are_no_sidecar() -> None:
    for changes in ([(24, b"x")], [(40, b"B" * 16)], [(64, number(2 * CHUNK))]):
        with pytest.raises(FormatError, match="different replicas"):
            decode(lying(*changes, slots=[1]))


bits = st.sampled_from([0, 1, 2, 3, 7, 0x7F, 0x80, 0xFF]) | st.integers(0, 255)
sizes = st.sampled_from([0, 1, 512, CHUNK, 1 << 32, 1 << 62, SIZE_MAX, SIZE_MAX + 1, (1 << 64) - 1])
lies = st.one_of(
    st.tuples(st.integers(12, 15), bits.map(lambda value: bytes([value]))),
    st.tuples(
        st.sampled_from([16, 56, 64, 72, 80, 88, *range(336, 368, 8), ROLE + 19, ROLE + 27]),
        (sizes | u64).map(number),
    ),
    st.tuples(st.sampled_from([24, 40, ROLE, ROLE + 512]), st.sampled_from([b"A", b"B"]).map(
        lambda letter: letter * 16
    )),
    st.tuples(st.integers(ROLE, PAGE - 17), st.binary(min_size=1, max_size=40)),
)  # fmt: skip
IMAGE_SIZE = 5000 * CHUNK


@given(
    st.lists(lies, min_size=1, max_size=4),
    st.sampled_from([(0,), (1,), (0, 1)]),
    bits,
    st.booleans(),
)
@settings(deadline=None)
def test_whatever_is_written_is_understood_or_refused_in_little_memory(
    changes: list[tuple[int, bytes]], slots: Sequence[int], state: int, degraded: bool
) -> None:
    """Scenario 11, by somebody who knows the checksum: nothing else is raised, then and later."""
    content = lying(*[(at, piece[: PAGE - 16 - at]) for at, piece in changes], slots=slots)
    tracemalloc.start()
    try:
        read = decode(content)
        read.map.planes[0][:] = bytes([state]) * len(read.map)
        image = Identity(1, min(IMAGE_SIZE, read.record.size), 1, 1)
        good = replace(example(), replica_id=b"B" * 16)
        found = [
            Found("/a.img", image, read),
            Found("/b.img", Identity(2, IMAGE_SIZE), good),
            Found("/c.img", Identity(3, IMAGE_SIZE)),
        ]
        for some in (found[:1], found[:2]):
            with suppress(AssemblyRefusedError):
                plan = assemble(some, degraded=degraded)
                later = replace(plan.record, sequence=plan.sequence_seen + 1).minted(plan.prepared)
                later = later.with_state(range(len(later.roles)), RoleState.STALE)
                encode_slot(later, read.replica_id, read.identity, Phase.PREPARED)
        for kept in ("/a.img", "/b.img"):
            with suppress(AssemblyRefusedError):
                for sidecar in resolve(found, kept).sidecars.values():
                    encode(sidecar)
    except FormatError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 64 << 20


# Torn, flipped, cut


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_crash_in_any_write_leaves_the_old_record_or_the_new(data: st.DataObject) -> None:
    """Scenario 9. Commits and map writes, one page at a time, each torn at any sectors.

    A crash is followed by a mount that goes on from what it finds: once a record was found to be
    committed, it stays so.
    """
    sidecar = example()
    content = encode(sidecar)
    record, disk_map, spare, before = sidecar.record, sidecar.map.copy(), 1, None
    for sequence in range(100, 100 + data.draw(st.integers(1, 6))):
        new = replace(record, sequence=sequence, clean=not record.clean)
        marked = disk_map.copy()
        chunks = data.draw(st.sampled_from([range(10), range(4075, 4090), range(4999, 5000)]))
        marked.add(data.draw(st.sampled_from([INTENT, out_of_sync(1), out_of_sync(2)])), chunks)
        first, last = page_of(chunks.start), page_of(chunks[-1])
        map_pages = encode_pages(marked, record.set_id, first, last)
        writes = [
            (SLOT_OFFSETS[spare], slot_page(sidecar, new, Phase.PREPARED)),
            (SLOT_OFFSETS[1 - spare], slot_page(sidecar, new, Phase.COMMITTED)),
            (MAP_OFFSET + first * PAGE, map_pages),
        ]
        crash_in = data.draw(st.integers(0, len(writes)))
        for number, (offset, piece) in enumerate(writes):
            if number == crash_in:
                old = content[offset : offset + len(piece)]
                for torn in torn_writes(old, piece, data):
                    read = decode(put(content, offset, torn))
                    assert read.record in ([record], [record, new], [new])[number]
                    assert read.prepared in (None, before, new)
                    assert never_too_clean(read.map, disk_map)
                    if torn == piece:
                        assert read.record == (record if number == 0 else new)
                        assert never_too_clean(read.map, marked if number == 2 else disk_map)
                content = put(content, offset, [old, torn, piece][data.draw(st.integers(0, 2))])
                break
            content = put(content, offset, piece)
        read = decode(content)
        record, disk_map, spare, before = read.record, read.map, read.spare_slot, read.prepared


def torn_writes(old: bytes, new: bytes, data: st.DataObject) -> Iterator[bytes]:
    """The first sectors new and the rest old, for every number of them; and any mixture."""
    for end in range(0, len(new) + 1, SECTOR):
        yield new[:end] + old[end:]
    count = len(new) // SECTOR
    for chosen in data.draw(st.lists(st.sets(st.integers(0, count - 1)), max_size=5)):
        yield b"".join(
            (new if sector in chosen else old)[sector * SECTOR : (sector + 1) * SECTOR]
            for sector in range(count)
        )


def test_each_step_of_a_commit_is_what_it_is_said_to_be() -> None:
    one = example()
    new = replace(one.record, sequence=42)
    prepared = put(encode(one), SLOT_OFFSETS[1], slot_page(one, new, Phase.PREPARED))
    read = decode(prepared)
    assert (read.record, read.prepared, read.spare_slot) == (one.record, new, 1)

    committed = put(prepared, SLOT_OFFSETS[0], slot_page(one, new, Phase.COMMITTED))
    read = decode(committed)
    assert (read.record, read.prepared, read.spare_slot) == (new, None, 1)

    torn = put(prepared, 0, b"torn")
    read = decode(torn)
    assert (read.record, read.prepared, read.spare_slot) == (new, None, 0)
    assert read.damage == ("slot 0: its checksum does not fit",)


def test_after_a_torn_commit_the_next_record_is_not_valid_before_its_time() -> None:
    """The only good slot says *prepared* then, and so does the one written next."""
    one = example()
    second, third = replace(one.record, sequence=42), replace(one.record, sequence=43)
    content = put(encode(one), SLOT_OFFSETS[1], slot_page(one, second, Phase.PREPARED))
    content = put(content, 0, b"torn")
    content = put(
        content, SLOT_OFFSETS[decode(content).spare_slot], slot_page(one, third, Phase.PREPARED)
    )
    read = decode(content)
    assert (read.record, read.prepared, read.spare_slot) == (second, third, 0)


def assert_right_or_refused(content: bytes) -> None:
    """Whatever happened to the golden file: no wrong record, no chunk cleaner than it was."""
    truth = decode(golden_content())
    try:
        read = decode(content)
    except FormatError:
        return
    assert read.record in (truth.record, truth.prepared)
    assert read.prepared in (None, truth.prepared)
    assert (read.replica_id, read.identity) == (truth.replica_id, truth.identity)
    assert never_too_clean(read.map, truth.map)
    for page in range(pages(read.map)):
        offset = MAP_OFFSET + page * PAGE
        if content[offset : offset + PAGE] != golden_content()[offset : offset + PAGE]:
            start = page * CHUNKS_PER_PAGE
            assert set(read.map.planes[0][start : start + CHUNKS_PER_PAGE]) == {UNREADABLE}
            assert read.damage


BYTES = len(golden_content())
spans = st.tuples(st.integers(0, BYTES), st.integers(1, BYTES))


@given(st.lists(st.integers(0, BYTES * 8 - 1), min_size=1, max_size=3))
def test_flipped_bits_are_noticed(flips: list[int]) -> None:
    content = bytearray(golden_content())
    for flip in flips:
        content[flip // 8] ^= 1 << flip % 8
    assert_right_or_refused(bytes(content))


@given(spans, st.sampled_from([b"\0", b"\xff", b"QUORUMFS"]))
def test_overwritten_parts_are_noticed(span: tuple[int, int], pattern: bytes) -> None:
    """Scenario 11."""
    start, length = span[0], min(span[1], BYTES - span[0])
    filler = (pattern * BYTES)[:length]
    assert_right_or_refused(put(golden_content(), start, filler))


@given(st.integers(0, BYTES))
def test_a_file_that_was_cut_off_knows_no_clean_chunk_behind(end: int) -> None:
    """Scenario 11."""
    assert_right_or_refused(golden_content()[:end])


def test_a_longer_file_is_as_good() -> None:
    assert same(decode(golden_content() + bytes(PAGE)), decode(golden_content()))


def test_without_a_good_slot_there_is_no_record() -> None:
    for content in (b"", bytes(BYTES), golden_content()[: PAGE - 1]):
        with pytest.raises(FormatError, match=r"slot 0: .*; slot 1: "):
            decode(content)


def test_a_map_page_at_the_wrong_place_is_unreadable() -> None:
    """A misdirected write, or a page of another set."""
    one = example()
    content = encode(one)
    first, second = content[MAP_OFFSET : MAP_OFFSET + PAGE], content[MAP_OFFSET + PAGE :]
    read = decode(content[:MAP_OFFSET] + second + first)
    assert set(read.map.planes[0]) == {UNREADABLE}
    assert read.damage == ("2 of 2 map pages",)
    strange = encode_pages(one.map, b"x" * 16, 0, 0)
    assert decode(put(content, MAP_OFFSET, strange)).map.planes[0][0] == UNREADABLE


# Records


@given(records, st.lists(u64, max_size=3))
def test_a_minted_generation_descends_from_all_that_are_known(
    record: Record, prepared: list[int]
) -> None:
    minted = record.minted(prepared)
    assert minted.generation not in record.history
    expected = [g for g in prepared if g not in record.history] + [*record.history]
    assert list(minted.ancestors) == expected[:ANCESTORS_MAX]
    assert replace(minted, generation=record.generation, ancestors=record.ancestors) == record


@given(records, st.data())
def test_a_role_remembers_with_which_record_it_changed(record: Record, data: st.DataObject) -> None:
    slots = data.draw(st.sets(st.integers(0, len(record.roles) - 1)))
    changed = record.with_state(slots, RoleState.STALE)
    for slot, (old, new) in enumerate(zip(record.roles, changed.roles, strict=True)):
        if slot in slots:
            assert (new.state, new.generation, new.sequence) == (
                RoleState.STALE,
                record.generation,
                record.sequence,
            )
        else:
            assert new == old
        removed = old.state is RoleState.REMOVED
        assert record.slot_of(old.replica_id) == (None if removed else slot)
        assert record.place_of(old.replica_id) == slot
    assert record.slot_of(b"nobody") is None


@given(st.sets(st.integers(0, 30)))
def test_page_runs_are_the_pages_in_as_few_pieces_as_possible(numbers: set[int]) -> None:
    runs = page_runs(numbers)
    assert [page for first, last in runs for page in range(first, last + 1)] == sorted(numbers)
    assert all(last + 1 < first for (_, last), (first, _) in pairwise(runs))


# Files


@pytest.fixture
def image(make_images: Callable[..., list[Path]]) -> str:
    return str(make_images(1)[0])


def test_a_sidecar_is_created_read_and_replaced(image: str) -> None:
    one = example()
    create_sidecar(image, one)
    replace_sidecar(image, replace(one, record=replace(one.record, sequence=99)))
    fd = open_sidecar(path_for(image), read_only=False)
    assert fd is not None
    try:
        assert read_sidecar(fd).record.sequence == 99
    finally:
        os.close(fd)
    assert sorted(os.listdir(os.path.dirname(image))) == ["a.img", "a.img.quorumfs"]


def test_a_sidecar_is_no_more_readable_than_its_image(image: str) -> None:
    os.chmod(image, 0o640)
    create_sidecar(image, example())
    assert os.stat(path_for(image)).st_mode & 0o777 & ~0o640 == 0


def test_a_failed_creation_leaves_what_was_there(
    image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_sidecar(image, example())
    before = Path(path_for(image)).read_bytes()

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, f"no sync of {fd}")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no sync"):
        replace_sidecar(image, replace(example(), identity=Identity()))
    assert Path(path_for(image)).read_bytes() == before
    assert sorted(os.listdir(os.path.dirname(image))) == ["a.img", "a.img.quorumfs"]


@pytest.mark.parametrize("write", [create_sidecar, replace_sidecar])
def test_what_a_crash_left_half_made_is_no_obstacle_and_goes(
    image: str, write: Callable[[str, Sidecar], None]
) -> None:
    for left in ("tmp", "0123abcd.tmp", "of-somebody.tmp"):
        Path(f"{path_for(image)}.{left}").write_bytes(b"half")
    write(image, example())
    assert decode(Path(path_for(image)).read_bytes()).record == example().record
    assert sorted(os.listdir(os.path.dirname(image))) == [
        "a.img",
        "a.img.quorumfs",
        "a.img.quorumfs.of-somebody.tmp",
    ]


@pytest.mark.parametrize("number", [0, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_of_two_who_create_a_sidecar_one_has_it(
    image: str, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Two hosts without shared locks adopt the same images; also without hard links."""

    def link(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    if number:
        monkeypatch.setattr(os, "link", link)
    create_sidecar(image, example(), claim(host="nas1"))
    before = Path(path_for(image)).read_bytes()
    with pytest.raises(FileExistsError):
        create_sidecar(image, example(), claim(host="nas2"))
    assert Path(path_for(image)).read_bytes() == before
    assert sorted(os.listdir(os.path.dirname(image))) == ["a.img", "a.img.quorumfs"]


def test_a_sidecar_has_its_claim_when_others_first_see_it(
    image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Claim | None] = []
    put = os.link

    def link(source: str, path: str) -> None:
        fd = os.open(source, os.O_RDONLY)
        seen.append(read_claim(fd))
        os.close(fd)
        put(source, path)

    monkeypatch.setattr(os, "link", link)
    create_sidecar(image, example(), claim())
    fd = os.open(path_for(image), os.O_RDONLY)
    assert seen == [read_claim(fd)] == [claim(file=file_of(fd), turn=turn_of(fd))]
    os.close(fd)


def test_an_image_may_have_no_sidecar(image: str) -> None:
    assert open_sidecar(path_for(image), read_only=True) is None


def test_a_sidecar_in_use_is_locked_and_names_who_holds_it(image: str) -> None:
    """Scenario 90."""
    create_sidecar(image, example())
    fd = open_sidecar(path_for(image), read_only=False)
    assert fd is not None
    try:
        assert holder(fd) == ""
        sign(fd, claim(pid=7, host="host"))
        for read_only in (False, True):
            with pytest.raises(SidecarLockedError, match="pid 7 on host"):
                open_sidecar(path_for(image), read_only=read_only)
        assert same(read_sidecar(fd), example())
        signed = claim(pid=7, host="host", file=file_of(fd), turn=turn_of(fd))
        assert read_claim(fd) == signed
        sign(fd, claim().release())
        assert holder(fd) == ""
        os.pwrite(fd, b"pid 8 on host".ljust(PAGE, b"\0"), CLAIM_OFFSET)  # as earlier versions did
        assert (holder(fd), read_claim(fd)) == ("pid 8 on host", None)
    finally:
        os.close(fd)


def test_readers_share_and_keep_writers_out(image: str) -> None:
    create_sidecar(image, example())
    fds = [open_sidecar(path_for(image), read_only=True) for _ in range(2)]
    try:
        with pytest.raises(SidecarLockedError, match="another quorumfs"):
            open_sidecar(path_for(image), read_only=False)
    finally:
        for fd in fds:
            assert fd is not None
            os.close(fd)
    fd = open_sidecar(path_for(image), read_only=False)
    assert fd is not None
    os.close(fd)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_where_there_are_no_locks_there_is_none_taken(
    image: str, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*_: object, exclusive: bool) -> bool:
        raise OSError(number, f"exclusive: {exclusive}")

    create_sidecar(image, example())
    monkeypatch.setattr(sidecarfile, "try_lock", fail)
    if number == errno.EIO:
        with pytest.raises(OSError, match="exclusive"):
            open_sidecar(path_for(image), read_only=True)
        return
    fd = open_sidecar(path_for(image), read_only=True)
    assert fd is not None
    os.close(fd)


@pytest.mark.parametrize("head", [b"", encode(example())], ids=["zeros", "sidecar"])
def test_a_sparse_file_of_any_size_is_read_as_far_as_it_says_something(
    image: str, head: bytes
) -> None:
    with open(path_for(image), "wb") as file:
        file.write(head)
        file.truncate(1 << 40)
    fd = open_sidecar(path_for(image), read_only=False)
    assert fd is not None
    try:
        if head:
            assert same(read_sidecar(fd), example())
        else:
            with pytest.raises(FormatError):
                read_sidecar(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
@pytest.mark.parametrize("read_only", [False, True])
def test_what_is_no_file_is_not_opened(
    image: str, make: Callable[[str], None], read_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To open a device may do something, and a FIFO may be waited for."""

    def fail(path: str, _: int) -> int:
        raise AssertionError(f"{path} was opened")

    make(path_for(image))
    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(OSError, match="not a regular file"):
        open_sidecar(path_for(image), read_only=read_only)


def test_the_identity_of_an_image_is_what_stat_says(image: str) -> None:
    os.utime(image, ns=(-5, -5))  # before 1970
    status = os.stat(image)
    identity = identity_of(status)
    assert (identity.inode, identity.size) == (status.st_ino, status.st_size)
    read = decode(encode(replace(example(), identity=identity)))
    assert read.identity == identity
    assert read.identity.mtime_ns == -5


def test_a_sidecar_that_was_copied_is_another_file(
    image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that has the same inode number, which was free again."""
    create_sidecar(image, example(), claim())
    place = path_for(image)
    with open(place, "rb") as file:
        own = read_claim(file.fileno())
        assert own is not None
        assert not is_copied(file.fileno(), own)
        assert not is_copied(file.fileno(), replace(own, file=(0, 0)))
        assert not is_copied(file.fileno(), replace(own, turn=0))  # of an earlier version
        if own.turn:  # tmpfs does not tell
            assert is_copied(file.fileno(), replace(own, turn=own.turn + 1))
        shutil.copy2(place, f"{place}.copy")
        with monkeypatch.context() as patched:  # a client of NFS, after a mount of the server
            patched.setattr("quorumfs.replica.sidecarfile.turn_of", lambda _: 0)
            assert not is_copied(file.fileno(), replace(own, turn=7))
    with open(f"{place}.copy", "rb") as copy:
        assert is_copied(copy.fileno(), read_claim(copy.fileno()))
