"""A sidecar of more than six replicas: of version 4, and what leads there from versions 2 and 3."""

import lzma
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sidecars import decode, encode

from quorumfs.decisions import sidecar as form
from quorumfs.decisions.assembly import assemble
from quorumfs.decisions.dirtymap import (
    CHUNKS_MAX,
    INTENT,
    NARROW,
    REPLICAS_MAX,
    UNKNOWN,
    UNVERIFIED,
    DirtyMap,
    out_of_sync,
    plane_bits,
    planes_for,
)
from quorumfs.decisions.model import Found
from quorumfs.decisions.record import (
    Identity,
    PastMount,
    Phase,
    Record,
    Role,
    RoleState,
    Sidecar,
    path_for,
)
from quorumfs.decisions.refusal import AssemblyRefusedError
from quorumfs.decisions.resolution import resolve
from quorumfs.decisions.scrub import NO_SCRUB, ScrubRecord
from quorumfs.decisions.sidecar import (
    CHUNKS_PER_PAGE,
    MAP_OFFSET,
    PAGE,
    PATH_MAX,
    PLANE_PAGES,
    SLOT_OFFSETS,
    FormatError,
    UnknownVersionError,
    encode_further_roles,
    encode_map,
    encode_slot,
    file_size,
    page_numbers,
    pages,
    scrub_offset,
)
from quorumfs.replica.sidecarfile import create_sidecar, open_sidecar, read_sidecar

GOLDEN = Path(__file__).parents[1] / "data" / "sidecar-v4.quorumfs.xz"
"""Compressed: nearly all of it is a hole."""
CHUNK = 64 << 10
SECTOR = 512
FEATURES = 4056
"""Where they are in a slot."""

widths = st.sampled_from([1, 5, 6, 7, 8, 14, 15, 22, 23, 30, 31, 32])


class File:
    """A sparse file, for sidecars whose planes are megabytes apart."""

    def __init__(self, sidecar: Sidecar) -> None:
        self._sectors: dict[int, bytes] = {}
        self.size = 0
        for offset, piece in form.encode(sidecar):
            self.write(offset, piece)

    def write(self, offset: int, piece: bytes) -> None:
        """Write whole sectors."""
        for start in range(0, len(piece), SECTOR):
            self._sectors[offset + start] = piece[start : start + SECTOR]
        self.size = max(self.size, offset + len(piece))

    def read(self, offset: int, length: int) -> bytes:
        stop = min(offset + length, self.size)
        first = offset // SECTOR * SECTOR
        sectors = (self._sectors.get(at, bytes(SECTOR)) for at in range(first, stop, SECTOR))
        return b"".join(sectors)[offset - first : stop - first] if stop > offset else b""

    def decode(self) -> Sidecar:
        return form.decode(self.read)

    def put(self, number: int, record: Record, own: Sidecar, phase: Phase) -> None:
        """Write the file slot *number*."""
        for offset, piece in slot_writes(number, record, own, phase):
            self.write(offset, piece)


def slot_writes(number: int, record: Record, own: Sidecar, phase: Phase) -> list[tuple[int, bytes]]:
    """What a commit of *record* writes to a file slot, in order."""
    page = SLOT_OFFSETS[number], encode_slot(record, own.replica_id, own.identity, phase)
    roles = encode_further_roles(record, number)
    return [page] if roles is None else [roles, page]


def make_record(slots: int, size: int = 5000 * CHUNK - 7) -> Record:
    roles = (
        Role(
            bytes([1 + slot]) * 16,
            RoleState(1 + slot % 5) if slot else RoleState.CURRENT,
            1000 + slot,
            f"/srv/{slot}.img" if slot % 7 else "x" * PATH_MAX,
            slot,
            slot + 50,
        )
        for slot in range(slots)
    )
    mounts = (PastMount(99, 30, changed=True), PastMount((1 << 64) - 1, 2, changed=False))
    return Record(
        bytes(range(16)), size, CHUNK, 1, 1 << 60, tuple(roles), (8, 7), 41, False, mounts
    )


def example(slots: int = REPLICAS_MAX) -> Sidecar:
    """A sidecar with something in every field and plane, and two map pages a plane."""
    record = make_record(slots)
    disk_map = record.new_map()
    disk_map.add(INTENT, range(3, 5))
    disk_map.add(UNVERIFIED, range(4079, 4082))
    for slot in range(slots):
        disk_map.add(out_of_sync(slot), range(slot, 2 * slot + 1))
        disk_map.add(out_of_sync(slot), range(4999 - slot, 5000))
    return Sidecar(
        record.roles[-1].replica_id,
        record,
        disk_map,
        Identity(1 << 40, 5000 * CHUNK, -1, 2),
        None,
        1,
        (),
        ((0, 4096), (1 << 20, 1 << 21)),
        3,
        ScrubRecord(2, 1, running=True, position=CHUNK),
    )


def same(one: Sidecar, other: Sidecar) -> bool:
    return replace(one, map=other.map) == other and one.map.planes == other.map.planes


def states(disk_map: DirtyMap) -> list[int]:
    return [disk_map.state(chunk) for chunk in range(len(disk_map))]


def unknown(disk_map: DirtyMap) -> int:
    """The state of a chunk of which nothing is known."""
    return UNKNOWN & (1 << 8 * len(disk_map.planes)) - 1


def never_too_clean(found: DirtyMap, truth: DirtyMap) -> bool:
    nothing = unknown(found)
    known = zip(states(found), states(truth), strict=True)
    return all(one == nothing or one & other == other for one, other in known)


# The format


def test_format_version_4_never_changes() -> None:
    """Sidecars out there are of this format: another one needs another version number."""
    golden = lzma.decompress(GOLDEN.read_bytes())
    assert encode(example()) == golden
    assert same(decode(golden), example())
    assert golden[8:12] == (4).to_bytes(4, "little")
    assert golden[FEATURES : FEATURES + 8] == bytes(8)


@given(widths, st.integers(1, 2 * CHUNKS_PER_PAGE + 1), st.data())
@settings(deadline=None)
def test_what_is_written_is_read_whatever_the_number_of_replicas(
    slots: int, chunks: int, data: st.DataObject
) -> None:
    record = make_record(slots, chunks * CHUNK)
    disk_map = record.new_map()
    lacking = st.integers(0, slots - 1).map(out_of_sync)
    for chunk in data.draw(st.sets(st.integers(0, chunks - 1), max_size=8)):
        bits = data.draw(st.sampled_from([INTENT, UNVERIFIED]) | lacking)
        disk_map.add(bits, range(chunk, chunk + 1))
    own = data.draw(st.sampled_from(record.roles)).replica_id
    sidecar = Sidecar(own, record, disk_map, Identity(1, 2, 3, 4), spare_slot=1)
    file = File(sidecar)
    assert same(file.decode(), sidecar)
    assert file.size == file_size(disk_map)
    states = {role.state for role in record.roles}
    late = states & {RoleState.OFFLINE, RoleState.REMOVED}
    version = 4 if slots > NARROW else 3 if late else 2
    assert file.read(8, 4) == version.to_bytes(4, "little")


def test_a_set_of_six_or_fewer_is_written_where_and_as_it_always_was() -> None:
    """`test_sidecar` has its golden files; here, that there is nothing behind."""
    for slots in range(1, NARROW + 1):
        one = example(slots)
        one = replace(one, scrub=NO_SCRUB)
        assert file_size(one.map) == MAP_OFFSET + 2 * PAGE
        assert len(encode(one)) == file_size(one.map)
        assert file_size(one.map) == scrub_offset(one.map)


def test_the_largest_map_and_the_scrubs_end_before_what_is_added() -> None:
    largest = DirtyMap(CHUNKS_MAX * CHUNK, CHUNK, slots=REPLICAS_MAX)
    assert pages(largest) == 1029
    further = [encode_further_roles(make_record(REPLICAS_MAX), number) for number in (0, 1)]
    places = [(scrub_offset(largest), PAGE)]
    places += [(offset, len(piece)) for offset, piece in filter(None, further)]
    places += [(MAP_OFFSET + PLANE_PAGES * PAGE, 0)]
    for (start, length), (following, _) in pairwise(places):
        assert start + length <= following
    assert page_numbers(largest)[-1] == 4 * PLANE_PAGES + 1028


def test_a_file_is_a_hole_wherever_it_says_nothing(tmp_path: Path) -> None:
    image = tmp_path / "a.img"
    image.write_bytes(b"x")
    create_sidecar(str(image), example())
    file = Path(path_for(str(image)))
    assert file.stat().st_size == file_size(example().map)
    assert file.stat().st_blocks * 512 < 200_000
    fd = open_sidecar(path_for(str(image)), read_only=True)
    assert fd is not None
    with open(fd, "rb") as opened:
        assert same(read_sidecar(opened.fileno()), example())


# Later and earlier programs


def test_an_earlier_program_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what it always did; this is the sentence."""
    file = File(example(NARROW))
    later = make_record(NARROW + 1)
    for number in (1, 0):  # first prepared, then committed
        file.put(number, later, example(NARROW), Phase(1 + (number == 0)))
        with monkeypatch.context() as earlier:
            earlier.setattr(form, "VERSIONS", (1, 2, 3))
            with pytest.raises(UnknownVersionError, match="format version 4, known here: 1, 2, 3"):
                file.decode()


@pytest.mark.parametrize("number", [0, 1])
def test_a_feature_that_is_not_known_is_refused_like_a_later_version(number: int) -> None:
    content = bytearray(File(example()).read(0, 2 * PAGE))
    start = SLOT_OFFSETS[number]
    content[start + FEATURES] = 2
    content[start + 15] = 3  # a small set may have it, too
    body = bytes(content[start : start + PAGE - 16])
    file = File(example())
    file.write(start, body + xxhash.xxh3_128_digest(body))
    with pytest.raises(UnknownVersionError, match="format version 4 with features 2, none known"):
        file.decode()


@pytest.mark.parametrize("count", [0, 6, 33, 255])
def test_a_number_of_roles_that_version_4_does_not_have_is_refused(count: int) -> None:
    file = File(example())
    for start in SLOT_OFFSETS:
        body = bytearray(file.read(start, PAGE - 16))
        body[15] = count
        file.write(start, bytes(body) + xxhash.xxh3_128_digest(body))
    with pytest.raises(FormatError, match=f"it cannot be true: {count} replicas"):
        file.decode()


# Torn


def test_a_slot_without_its_further_roles_is_torn() -> None:
    one = example()
    for number in (0, 1):
        file = File(one)
        roles = encode_further_roles(one.record, number)
        assert roles is not None
        file.write(roles[0] + len(roles[1]) - SECTOR, bytes(SECTOR))
        read = file.decode()
        assert read.damage == (f"slot {number}: the checksum of its further roles does not fit",)
        assert same(replace(read, damage=(), spare_slot=1), one)


def test_the_further_roles_of_one_slot_are_none_of_the_other() -> None:
    one, other = example(), make_record(REPLICAS_MAX).with_role(20, path="/other.img")
    file = File(one)
    for number in (0, 1):
        roles = encode_further_roles(other, number)
        assert roles is not None
        file.write(*roles)
    with pytest.raises(FormatError, match="slot 0: the checksum of its further roles does not fit"):
        file.decode()


@pytest.mark.parametrize("plane", range(planes_for(REPLICAS_MAX)))
def test_if_one_page_of_a_chunk_cannot_be_read_nothing_is_known_of_it(plane: int) -> None:
    """Then the next mount believes none of those who are current, rather than all."""
    one = example()
    file = File(one)
    file.write(MAP_OFFSET + (plane * PLANE_PAGES + 1) * PAGE, bytes(PAGE))
    read = file.decode()
    assert read.damage == ("1 of 10 map pages",)
    assert states(read.map)[:CHUNKS_PER_PAGE] == states(one.map)[:CHUNKS_PER_PAGE]
    assert set(states(read.map)[CHUNKS_PER_PAGE:]) == {UNKNOWN}
    behind = out_of_sync(31) | out_of_sync(2)
    assert set(states(read.map.read_as(behind))[CHUNKS_PER_PAGE:]) == {INTENT | behind}


def test_a_page_of_another_plane_is_unreadable() -> None:
    one = example()
    file = File(one)
    place = MAP_OFFSET + PLANE_PAGES * PAGE
    file.write(place, file.read(MAP_OFFSET + 2 * PLANE_PAGES * PAGE, PAGE))
    assert set(states(file.decode().map)[:CHUNKS_PER_PAGE]) == {UNKNOWN}


# Written by somebody else


@given(
    st.lists(
        st.tuples(
            st.integers(12, FEATURES - 1) | st.sampled_from([12, 14, 15, 56, 64, 72, 368 + 16]),
            st.binary(min_size=1, max_size=16),
        ),
        max_size=3,
    ),
    st.lists(
        st.tuples(
            st.integers(0, 25 * 512) | st.sampled_from([16, 17, 512 + 16, 25 * 512 + 16]),
            st.binary(min_size=1, max_size=16),
        ),
        max_size=3,
    ),
    st.sampled_from([(0,), (1,), (0, 1)]),
)
@settings(deadline=None)
def test_whatever_is_written_is_understood_or_refused(
    changes: list[tuple[int, bytes]], to_roles: list[tuple[int, bytes]], slots: tuple[int, ...]
) -> None:
    """By somebody who knows the checksums: nothing else is raised, then and by a mount."""
    one = example()
    file = File(one)
    for number in slots:
        further = encode_further_roles(one.record, number)
        assert further is not None
        roles = bytearray(further[1])
        for at, piece in to_roles:
            roles[at : at + len(piece)] = piece
        page = bytearray(file.read(SLOT_OFFSETS[number], FEATURES))
        for at, piece in changes:
            page[at : at + len(piece)] = piece
        page = page[:FEATURES] + bytes(8) + xxhash.xxh3_128_digest(roles)
        file.write(further[0], bytes(roles))
        file.write(SLOT_OFFSETS[number], bytes(page) + xxhash.xxh3_128_digest(page))
    try:
        read = file.decode()
    except FormatError:
        return
    assert NARROW < len(read.record.roles) <= REPLICAS_MAX
    image = Identity(1, min(1 << 40, read.record.size), 1, 1)
    with suppress(AssemblyRefusedError):
        plan = assemble([Found("/a.img", image, read)], degraded=True)
        assert len(plan.map.planes) == planes_for(len(plan.record.roles))
        later = plan.record.minted().with_state(range(len(plan.record.roles)), RoleState.STALE)
        encode_slot(later, read.replica_id, read.identity, Phase.PREPARED)
    with suppress(AssemblyRefusedError):
        found = [Found("/a.img", image, read), Found("/b.img", image)]
        for sidecar in resolve(found, "/a.img").sidecars.values():
            list(form.encode(sidecar))


# A set becomes one of more than six


def larger(one: Sidecar) -> tuple[Record, DirtyMap]:
    """The record and the map of the set of *one* with one more replica."""
    slot = len(one.record.roles)
    role = Role(bytes([1 + slot]) * 16, RoleState.STALE, one.record.generation, "/new.img")
    record = replace(one.record.with_new_role(slot, role), sequence=one.record.sequence + 1)
    disk_map = one.map.copy()
    disk_map.widen(slot + 1)
    disk_map.add(out_of_sync(slot), range(len(disk_map)))
    return record, disk_map


def upgrade(one: Sidecar) -> list[list[tuple[int, bytes]]]:
    """What it takes, write by write: what is in one list is synced together."""
    record, disk_map = larger(one)
    numbers = page_numbers(disk_map)
    return [
        *([piece] for piece in encode_map(disk_map, record.set_id, numbers)),
        slot_writes(one.spare_slot, record, one, Phase.PREPARED),
        slot_writes(1 - one.spare_slot, record, one, Phase.COMMITTED),
    ]


@given(st.sampled_from([5, 6, 7, 13, 14, 21, 30]), st.data())
@settings(max_examples=60, deadline=None)
def test_a_crash_in_any_step_leaves_the_smaller_set_or_the_larger(
    slots: int, data: st.DataObject
) -> None:
    """Each write torn at any sectors; what was not synced reached the medium in any order."""
    one = replace(example(slots), unreadable=(), unreadable_number=0)
    record, disk_map = larger(one)
    file, steps = File(one), upgrade(one)
    crash_in = data.draw(st.integers(0, len(steps) - 1))
    for number, pieces in enumerate(steps):
        if number < crash_in:
            for piece in pieces:
                file.write(*piece)
            continue
        tear(file, pieces, data)
        break
    read = file.decode()
    committed = number == len(steps) - 1
    assert read.record in ([one.record, record] if committed else [one.record])
    if read.record == record:
        assert states(read.map) == states(disk_map)
    else:
        assert never_too_clean(read.map, one.map)
        assert len(read.map.planes) == len(one.map.planes)
    assert read.prepared in (None, record)
    # And once more, from whatever there is.
    for pieces in upgrade(read):
        for piece in pieces:
            file.write(*piece)
    again = file.decode()
    assert not again.damage
    assert (again.record, states(again.map)) == (larger(read)[0], states(larger(read)[1]))


def tear(file: File, pieces: Iterable[tuple[int, bytes]], data: st.DataObject) -> None:
    """Write some sectors of *pieces*."""
    for offset, piece in pieces:
        places = range(0, len(piece), SECTOR)
        kept = data.draw(st.sampled_from(["none", "all", "some"]))
        if kept == "some":
            wanted = data.draw(st.sets(st.sampled_from(places)))
        else:
            wanted = set(places) if kept == "all" else set()
        for start in sorted(wanted):
            file.write(offset + start, piece[start : start + SECTOR])


def test_what_was_left_of_a_larger_set_that_never_was_is_ignored() -> None:
    """The pages of the new plane are there, and any garbage; the record names no such replica."""
    one = example(NARROW)
    file = File(one)
    for pieces in upgrade(one)[:-2]:
        for piece in pieces:
            file.write(*piece)
    file.write(MAP_OFFSET + 1030 * PAGE, b"\xff" * SECTOR)
    read = file.decode()
    assert not read.damage
    assert read.record == one.record
    assert states(read.map) == states(one.map)


def test_a_sidecar_that_the_map_did_not_reach_says_nothing_of_the_chunks() -> None:
    """A target that was away: its own map does not count, and is not taken for a clean one."""
    one = example(NARROW)
    record, _ = larger(one)
    file = File(one)
    for number in (0, 1):
        file.put(number, record, one, Phase.COMMITTED)
    assert set(states(file.decode().map)) == {plane_bits(UNKNOWN, 0) | plane_bits(UNKNOWN, 1) << 8}
