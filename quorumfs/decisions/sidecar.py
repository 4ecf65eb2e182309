"""The sidecar: the format of ``<replica>.quorumfs``, beside the replica's image.

Format, versions 2 to 4
=======================

Pages of 4096 bytes; all numbers little endian::

    page 0, 1     two slots, each a record with a checksum
    page 2        the claim of the mount that has the set in use: `quorumfs.decisions.claim`
    page 3        ranges of bytes that no replica can be read at, with a checksum; zeros: none
    page 4, 5 …   the dirty map: 4080 chunks and a checksum each
    then          the scrubs: `quorumfs.decisions.scrub`; a file may end before
    version 4     further roles and further planes of the map: see below

A **slot** holds the *record*, which all members share, and the facts of this replica alone::

    offset  type    content
    0       8s      "QUORUMFS"
    8       u32     format version: 2, 3 or 4
    12      u8      phase: 1 prepared, 2 committed
    13      u8      1 if the set was closed in order
    14      u8      vote threshold
    15      u8      number of roles, 1 to 6; in version 4 to 32
    16      u64     sequence number of the record
    24      16s     set id
    40      16s     replica id of this sidecar's own replica
    56      u64     size of the disk, bytes
    64      u64     chunk size, bytes
    72      u64     generation
    80      32 u64  ancestors, latest first; 0 ends the list
    336     2 u64   the image as it was left: inode, size (bytes); 0 unknown
    352     2 i64   its mtime, ctime (ns); 0 unknown
    368     6 of 512 bytes: replica id 16s; state u8 (1 current, 2 stale, 3 resyncing, 4 offline,
                    5 removed); path length u16; generation u64; sequence u64; mount u64, of a
                    removed replica the time (seconds since 1970); path
    3440    19 of 13 bytes: mount u64; sequence u32; changed u8; latest first; 0 ends the list
    3687    u8      of a device: how many regions of 1 MiB its fingerprint, the mtime, covers
    3688    16 u64  their numbers
    3816    …       zeros
    4056    u64     in version 4: features, 0
    4064    16s     in version 4: the xxh3-128 of the further roles
    4080    16s     xxh3-128 of bytes 0 to 4079

A **map page** ends in the xxh3-128 of its 4080 chunks, followed by the set id and the page's
number, so that a page that landed at the wrong place is noticed. An unreadable page means
`quorumfs.decisions.dirtymap.UNKNOWN` for each of its chunks.

The **unreadable** ranges are in both halves of their page, the latest version and the version
before, so that one is left if the other is torn: a u64 with the number of the version, a u32 with
their count, a u64 start and a u64 end of each, and the xxh3-128 of that, followed by the set id.

The **scrubs** are in both halves of their page, as the unreadable ranges are: two versions, of
which the one with the higher number counts. Integers, in this order, with the meaning that
`quorumfs.decisions.scrub.ScrubRecord` gives them: version u64; number u64; u8 (1 running, 2 paused,
4 repairing); position u64; five counts u64; seconds, ended, took u64; stopped u8; five counts u64;
a u32 count and as many ranges of u64 start, u64 end. Then the xxh3-128 of that, followed by the set
id and the offset of the page (u64). Without a good half there was no scrub. Nothing else depends on
that page, and a program that knows nothing of it takes the map for the end of the file. The page
does not lie beside the claim: a late write of a host that has lost the set must not reach the claim
of the next one.

Version 1 had no mounts, neither in the list nor in the roles. It is read, and written as version 2,
because a program that knows only version 1 would not record its own mounts.

Version 2 had no offline and no removed replicas. A record without any is written as version 2, so
that only a set that makes use of them is closed to programs that know no version 3.

Version 4: more than 6 replicas
===============================

A record of more than 6 roles is written as version 4, and any other one as before. Everything of
versions 2 and 3 stays where it is; what is added lies behind the largest map that there can be, in
a part of the file that earlier versions ignore, and that is a hole as long as it is not used::

    page 4 + 1030, 4 + 1034           the further roles of slot 0, and of slot 1
    page 4 + 1040 k, from k = 1 on    plane k of the map

The **further roles**, 26 places of 512 bytes as in the slot, are a part of that slot: their
checksum is in its page. A slot whose further roles are torn is torn.

Plane 0 of the map has a byte of each chunk, with the bits of the replicas in slots 0 to 5; each
further **plane** has a byte more, with those of the next 8 (`quorumfs.decisions.dirtymap`). There
are as many as the record has roles for. A page of plane k is one as any other; its number, which
its checksum covers, is 1040 k higher than that of the same chunks in plane 0. If any page of a
chunk cannot be read, nothing is known of that chunk.

So a set becomes one of more than 6 replicas by an ordinary commit: the pages of the new planes, in
which the new replica lacks every chunk, are durable on all members before any slot names it. At
each step a slot is good with what its own version calls for. A sidecar that the commit has not
reached is of version 2 or 3, and says the same as one with planes of zeros. Programs that know no
version 4 refuse every sidecar that the commit has reached, and no set is used without one of these:
all members had the record as prepared before any had it as committed.

There is room for what is planned. **Features** are what a program must know to use the set, a bit
each: one with a bit that is not known is refused as a later version is, before anything of it is
believed, the number of roles included: a small set may have them, too. A *witness*, a sidecar
without an image, is a role in a state of its own, and a feature: it holds the record, and no bit of
the map counts for it. *Sums* of the blocks of an image lie in a file beside it, and are a feature;
what belongs to them in a slot goes into the zeros before the features, and what belongs to a chunk
into a page 4 + 1038 or a plane behind those of the replicas.

Committing a record
===================

A record becomes valid in two phases. First every member gets the record as *prepared*, in the slot
that the last commit prepared. When that is durable on all members, they get the record as
*committed*, in the other slot. So each member always has one good slot, and both slots agree when
nothing is going on. A record that is only *prepared* tells that nothing was acknowledged under it,
and which members may hold it.

The disk grows by a commit, too: then the two slots of a sidecar differ in size for a while. The
pages of the larger map, and the longer image, are durable before any slot names the larger size.
So each slot is good with the map pages that its own size calls for; bytes behind them are ignored.
"""

import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import xxhash

from quorumfs.decisions.dirtymap import (
    CHUNK_MIN,
    CHUNKS_MAX,
    EXTENT,
    NARROW,
    REPLICAS_MAX,
    UNKNOWN,
    DirtyMap,
    chunk_size_for,
    plane_bits,
)
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
)
from quorumfs.decisions.scrub import NO_SCRUB, decode_scrub, encode_scrub

MAGIC = b"QUORUMFS"
VERSIONS = (1, 2, 3, 4)
"""Versions that can be read."""
WIDE = 4
"""The version of a record with more than `NARROW` roles."""
PAGE = 4096
_SEAL_SIZE = 16
"""Bytes of a checksum."""
CHUNKS_PER_PAGE = PAGE - _SEAL_SIZE
SLOT_OFFSETS = (0, PAGE)
CLAIM_OFFSET = 2 * PAGE
UNREADABLE_OFFSET = 3 * PAGE
MAP_OFFSET = 4 * PAGE
PLANE_PAGES = 1040
"""From a page of one plane to that of the same chunks in the next one; the largest map has 1029."""
UNREADABLE_MAX = 126
"""Ranges that fit in half a page."""
PATH_MAX = 469
"""Bytes; a longer path is left out, because paths are hints, and replica ids count."""
SIZE_MAX = (1 << 63) - 1
"""Bytes: no file can be larger."""
SEQUENCE_MAX = 1 << 63
"""No set gets so far, and a set that claims this number has as many numbers left."""

_LIST_SIZE = PAGE // 2
_LIST_HEAD = struct.Struct("<QI")
_HEAD = struct.Struct("<8sIBBBBQ16s16sQQQ32Q2Q2q")
_ROLE = struct.Struct(f"<16sBHQQQ{PATH_MAX}s")
_ROLE_OF_VERSION_1 = struct.Struct("<16sBHQQ477s")
_ROLE_SIZE = 512
_STATES_OF_VERSION_2 = (RoleState.CURRENT, RoleState.STALE, RoleState.RESYNCING)
_MOUNT = struct.Struct("<QIB")
_MOUNTS_OFFSET = _HEAD.size + NARROW * _ROLE_SIZE
_REGIONS = struct.Struct(f"<B{REGIONS}Q")
_REGIONS_OFFSET = _MOUNTS_OFFSET + MOUNTS_MAX * _MOUNT.size
_FEATURES = struct.Struct("<Q")
_SEALED = PAGE - _SEAL_SIZE
_ROLES_SEALED = _SEALED - _SEAL_SIZE
_FEATURES_OFFSET = _ROLES_SEALED - _FEATURES.size
_ROLES_OFFSETS = tuple(MAP_OFFSET + (1030 + 4 * slot) * PAGE for slot in range(len(SLOT_OFFSETS)))
_SEQUENCE_MAX = (1 << 32) - 1
"""The largest sequence of a mount's first record; commits every second reach it in a century."""


class FormatError(Exception):
    """The bytes are no usable sidecar."""


class UnknownVersionError(FormatError):
    """A later quorumfs wrote the sidecar, which must not be touched."""


Read = Callable[[int, int], bytes]
"""The content of a file at an offset, of a length (bytes); less where the file ends before."""


def file_size(disk_map: DirtyMap) -> int:
    """Bytes that the sidecar for a map of this shape has at least: up to the end of the map."""
    return MAP_OFFSET + (page_numbers(disk_map)[-1] + 1) * PAGE


def scrub_offset(disk_map: DirtyMap) -> int:
    """Where the page of the scrubs is in the sidecar for a map of this shape (bytes)."""
    return MAP_OFFSET + pages(disk_map) * PAGE


def pages(disk_map: DirtyMap) -> int:
    """The number of pages that hold one plane of the map."""
    return -(-len(disk_map) // CHUNKS_PER_PAGE)


def page_numbers(disk_map: DirtyMap, first: int = 0) -> list[int]:
    """The numbers of the pages that hold the map, in order; of each plane from page *first* on."""
    return [
        plane * PLANE_PAGES + page
        for plane in range(len(disk_map.planes))
        for page in range(first, pages(disk_map))
    ]


def page_of(chunk: int, plane: int = 0) -> int:
    """The number of the page that holds *chunk* in a *plane*."""
    return plane * PLANE_PAGES + chunk // CHUNKS_PER_PAGE


def chunks_of(page: int) -> tuple[int, slice]:
    """The plane that *page*, a number, is of, and the chunks that it has room for."""
    plane, place = divmod(page, PLANE_PAGES)
    return plane, slice(place * CHUNKS_PER_PAGE, (place + 1) * CHUNKS_PER_PAGE)


def slot_places(record: Record, slot: int) -> list[tuple[int, int]]:
    """Where file slot number *slot* of a sidecar with *record* lies: offsets and lengths, bytes."""
    further = max(0, len(record.roles) - NARROW) * _ROLE_SIZE
    return [(SLOT_OFFSETS[slot], PAGE), *([(_ROLES_OFFSETS[slot], further)] if further else [])]


def encode_further_roles(record: Record, slot: int) -> tuple[int, bytes] | None:
    """What belongs to file slot number *slot* besides its page: an offset (bytes), and the bytes.

    None if the record has no more roles than the page of a slot holds.
    """
    if len(record.roles) <= NARROW:
        return None
    return _ROLES_OFFSETS[slot], _encode_roles(record.roles[NARROW:])


def encode_slot(record: Record, replica_id: bytes, identity: Identity, phase: Phase) -> bytes:
    """The page of one slot of the sidecar of *replica_id*: 4096 bytes.

    A record of many roles needs `encode_further_roles`, too.
    """
    assert 1 <= len(record.roles) <= REPLICAS_MAX
    ancestors = list(record.ancestors[:ANCESTORS_MAX])
    ancestors += [0] * (ANCESTORS_MAX - len(ancestors))
    head = _HEAD.pack(
        MAGIC,
        _version_of(record),
        phase,
        record.clean,
        record.threshold,
        len(record.roles),
        record.sequence,
        record.set_id,
        replica_id,
        record.size,
        record.chunk_size,
        record.generation,
        *ancestors,
        identity.inode,
        identity.size,
        identity.mtime_ns,
        identity.ctime_ns,
    )
    body = bytearray(head + _encode_roles(record.roles[:NARROW]))
    body += bytes(_MOUNTS_OFFSET - len(body))
    for mount in record.mounts[:MOUNTS_MAX]:
        body += _MOUNT.pack(mount.identity, min(mount.first, _SEQUENCE_MAX), mount.changed)
    body += bytes(_REGIONS_OFFSET - len(body))
    regions = identity.regions[:REGIONS]
    body += _REGIONS.pack(len(regions), *regions, *[0] * (REGIONS - len(regions)))
    if len(record.roles) > NARROW:
        body += bytes(_ROLES_SEALED - len(body))  # no features
        body += xxhash.xxh3_128_digest(_encode_roles(record.roles[NARROW:]))
    body += bytes(_SEALED - len(body))
    return bytes(body) + xxhash.xxh3_128_digest(body)


def _version_of(record: Record) -> int:
    """The earliest version that has room for *record*."""
    if len(record.roles) > NARROW:
        return WIDE
    return 2 if all(role.state in _STATES_OF_VERSION_2 for role in record.roles) else 3


def _encode_roles(roles: Iterable[Role]) -> bytes:
    encoded = bytearray()
    for role in roles:
        path = os.fsencode(role.path)
        if len(path) > PATH_MAX:
            path = b""
        encoded += _ROLE.pack(
            role.replica_id, role.state, len(path), role.generation, role.sequence, role.mount, path
        )
    return bytes(encoded)


def encode_pages(disk_map: DirtyMap, set_id: bytes, first: int, last: int) -> bytes:
    """The map pages *first* to *last*, inclusive, of one plane."""
    encoded = bytearray()
    for page in range(first, last + 1):
        plane, chunks = chunks_of(page)
        body = bytes(disk_map.planes[plane][chunks]).ljust(CHUNKS_PER_PAGE, b"\0")
        encoded += body + _page_checksum(body, set_id, page)
    return bytes(encoded)


def encode_map(
    disk_map: DirtyMap, set_id: bytes, numbers: Iterable[int]
) -> list[tuple[int, bytes]]:
    """The map pages *numbers*: offsets in the file (bytes), and the bytes there."""
    return [
        (MAP_OFFSET + first * PAGE, encode_pages(disk_map, set_id, first, last))
        for first, last in page_runs(numbers)
    ]


def encode(sidecar: Sidecar) -> Iterator[tuple[int, bytes]]:
    """A whole new file, committed in both slots: offsets (bytes), and what is there but zeros."""
    record, set_id = sidecar.record, sidecar.record.set_id
    slot = encode_slot(record, sidecar.replica_id, sidecar.identity, Phase.COMMITTED)
    for number, offset in enumerate(SLOT_OFFSETS):
        yield offset, slot
        if (roles := encode_further_roles(record, number)) is not None:
            yield roles
    yield from encode_map(sidecar.map, set_id, page_numbers(sidecar.map))
    if sidecar.unreadable:
        yield encode_unreadable(sidecar.unreadable, set_id, sidecar.unreadable_number)
    if sidecar.scrub != NO_SCRUB:
        place = scrub_offset(sidecar.map)
        yield place, bytes(PAGE)
        yield encode_scrub(sidecar.scrub, set_id, place)


def encode_unreadable(
    ranges: Iterable[tuple[int, int]], set_id: bytes, number: int
) -> tuple[int, bytes]:
    """Version *number* of the list of unreadable ranges: the offset in the file, and the bytes.

    At most `UNREADABLE_MAX` ranges. The version before is not overwritten.
    """
    bounds = [bound for each in ranges for bound in each]
    assert len(bounds) <= 2 * UNREADABLE_MAX
    body = _LIST_HEAD.pack(number, len(bounds) // 2) + struct.pack(f"<{len(bounds)}Q", *bounds)
    half = (body + xxhash.xxh3_128_digest(body + set_id)).ljust(_LIST_SIZE, b"\0")
    return UNREADABLE_OFFSET + number % 2 * _LIST_SIZE, half


def _decode_unreadable(
    content: bytes, record: Record, damage: list[str]
) -> tuple[int, tuple[tuple[int, int], ...]]:
    """The number and the ranges of the latest version of the list of unreadable ranges."""
    lists: list[tuple[int, tuple[tuple[int, int], ...]]] = [(0, ())]
    for offset in (UNREADABLE_OFFSET, UNREADABLE_OFFSET + _LIST_SIZE):
        half = content[offset : offset + _LIST_SIZE]
        if not any(half):
            continue
        number, count = _LIST_HEAD.unpack_from(half)
        end = _LIST_HEAD.size + 16 * min(count, UNREADABLE_MAX)
        bounds = struct.unpack_from(f"<{(end - _LIST_HEAD.size) // 8}Q", half, _LIST_HEAD.size)
        ranges = tuple(zip(bounds[::2], bounds[1::2], strict=True))
        if half[end : end + 16] != xxhash.xxh3_128_digest(half[:end] + record.set_id):
            damage.append("the list of what cannot be read: its checksum does not fit")
        elif any(not start < stop <= record.size for start, stop in ranges):
            damage.append("the list of what cannot be read: it says what cannot be")
        else:
            lists.append((number, ranges))
    return max(lists)


def decode(read: Read) -> Sidecar:
    """Decode a sidecar file, whatever damage it has, and whatever program wrote it.

    What *read* finds behind the last page is ignored. Raises `FormatError` if neither slot can be
    read or the slots contradict each other, `UnknownVersionError` if a slot is of an unknown
    version; and what *read* raises.
    """
    head = read(0, MAP_OFFSET)
    committed, prepared, damage = _decode_slots(head, read)
    disk_map, unreadable = _decode_map(read, committed.record)
    if unreadable:
        damage.append(f"{unreadable} of {len(page_numbers(disk_map))} map pages")
    number, ranges = _decode_unreadable(head, committed.record, damage)
    place, set_id = scrub_offset(disk_map), committed.record.set_id
    scrub = decode_scrub(read(place, PAGE), set_id, place, disk_map.size)
    return Sidecar(
        committed.replica_id,
        committed.record,
        disk_map,
        committed.identity,
        prepared,
        1 - committed.number,
        tuple(damage),
        ranges,
        number,
        scrub,
    )


def _decode_slots(content: bytes, read: Read) -> tuple["_Slot", Record | None, list[str]]:
    """The slot committed last, the record prepared after it, and the damage."""
    slots: list[_Slot] = []
    damage: list[str] = []
    for number in range(len(SLOT_OFFSETS)):
        try:
            slots.append(_decode_slot(content, number, read))
        except UnknownVersionError:
            raise
        except FormatError as error:
            damage.append(f"slot {number}: {error}")
    if not slots:
        for offset in SLOT_OFFSETS:
            magic, version = struct.unpack_from("<8sI", content.ljust(MAP_OFFSET), offset)
            if magic == MAGIC and version not in VERSIONS:
                raise UnknownVersionError(_unknown(version))
        raise FormatError("; ".join(damage))
    latest = max(slots, key=lambda slot: (slot.record.sequence, slot.phase))
    committed, prepared = latest, None
    if latest.phase is Phase.PREPARED:
        others = [slot for slot in slots if slot is not latest]
        # Alone, its commit had begun when the other slot was torn: all had prepared it by then.
        # That is also how another one that says prepared, and is older, came to be valid.
        if others:
            committed, prepared = others[0], latest.record
    if len({(s.replica_id, s.record.disk) for s in slots}) > 1:  # sizes differ while a disk grows
        raise FormatError("its two slots are of different replicas")
    return committed, prepared, damage


@dataclass(frozen=True, slots=True)
class _Slot:
    number: int
    record: Record
    replica_id: bytes
    identity: Identity
    phase: Phase


def _decode_slot(content: bytes, number: int, read: Read) -> _Slot:
    offset = SLOT_OFFSETS[number]
    body = content[offset : offset + PAGE]
    if len(body) < PAGE:
        raise FormatError("it is cut off")
    if body[_SEALED:] != xxhash.xxh3_128_digest(body[:_SEALED]):
        raise FormatError("its checksum does not fit")
    magic, version, phase, clean, threshold, role_count, *rest = _HEAD.unpack_from(body)
    if magic != MAGIC:
        raise FormatError("it does not begin like a sidecar")
    if version not in VERSIONS:
        raise UnknownVersionError(_unknown(version))
    if version >= WIDE and (features := _FEATURES.unpack_from(body, _FEATURES_OFFSET)[0]):
        raise UnknownVersionError(
            f"format version {version} with features {features:x}, none known"
        )
    sequence, set_id, replica_id, size, chunk_size, generation = rest[:6]
    ancestors: Sequence[int] = rest[6 : 6 + ANCESTORS_MAX]
    least, most = (1, NARROW) if version < WIDE else (NARROW + 1, REPLICAS_MAX)
    if not least <= role_count <= most:
        raise FormatError(f"it cannot be true: {role_count} replicas")
    table = body[_HEAD.size : _MOUNTS_OFFSET]
    if version >= WIDE:
        table += _read_further_roles(body, number, role_count, read)
    try:
        roles = [_decode_role(table, index, version) for index in range(role_count)]
        phase = Phase(phase)
    except ValueError as error:
        raise FormatError(f"it cannot be true: {error}") from None
    record = Record(
        set_id,
        size,
        chunk_size,
        threshold,
        generation,
        tuple(roles),
        tuple(ancestor for ancestor in ancestors if ancestor),
        sequence,
        bool(clean),
        () if version == 1 else tuple(_decode_mounts(body)),
    )
    if record.place_of(replica_id) is None:
        raise FormatError("it cannot be true: its own replica is not in the set")
    if clean > 1:
        raise FormatError(f"it cannot be true: closed in order {clean}")
    if lie := _impossible(record):
        raise FormatError(f"it cannot be true: {lie}")
    count, *regions = _REGIONS.unpack_from(body, _REGIONS_OFFSET)
    if count > REGIONS:
        raise FormatError(f"it cannot be true: {count} regions of a fingerprint")
    image = Identity(*rest[6 + ANCESTORS_MAX :])
    identity = replace(image, regions=tuple(regions[:count]))
    return _Slot(number, record, replica_id, identity, phase)


def _read_further_roles(body: bytes, number: int, role_count: int, read: Read) -> bytes:
    """The roles of slot *number*, whose page is *body*, that lie elsewhere.

    Raises `FormatError`.
    """
    table = read(_ROLES_OFFSETS[number], (role_count - NARROW) * _ROLE_SIZE)
    if xxhash.xxh3_128_digest(table) != body[_ROLES_SEALED:_SEALED]:
        raise FormatError("the checksum of its further roles does not fit")
    return table


def _impossible(record: Record) -> str | None:
    """The part of *record* that no quorumfs can have written; None if there is none.

    A checksum proves nothing against a sidecar written by hand. Any record allowed here must be
    safe to use: to allocate a map for, to count on from, to show.
    """
    size, chunk_size = record.size, record.chunk_size
    replica_ids = {role.replica_id for role in record.roles}
    sequence = max(record.sequence, *(role.sequence for role in record.roles))
    if not 1 <= size <= SIZE_MAX:
        return f"a disk of {size} bytes"
    largest = max(EXTENT, chunk_size_for(size))
    if chunk_size & (chunk_size - 1) or not CHUNK_MIN <= chunk_size <= largest:
        return f"chunks of {chunk_size} bytes"
    if record.chunks > CHUNKS_MAX:
        return f"a disk of {size} bytes in chunks of {chunk_size}"
    if not 1 <= record.threshold <= len(record.slots):
        return f"a vote threshold of {record.threshold} with {len(record.slots)} replicas"
    if len(replica_ids) < len(record.roles):
        return "one replica has two places"
    if not record.generation or record.generation in record.ancestors:
        return f"generation {record.generation:016x}"
    if sequence > SEQUENCE_MAX:
        return f"sequence number {sequence}"
    if any("\0" in role.path for role in record.roles):
        return "a path with a zero byte"
    return None


def _decode_role(table: bytes, index: int, version: int) -> Role:
    """Raises `ValueError` for an impossible role."""
    offset = index * _ROLE_SIZE
    layout = _ROLE_OF_VERSION_1 if version == 1 else _ROLE
    replica_id, state, length, generation, sequence, *rest = layout.unpack_from(table, offset)
    *mount, path = rest
    if length > len(path):
        raise ValueError(f"a path of {length} bytes")
    if version < 3 and state > RoleState.RESYNCING:
        raise ValueError(f"a replica in state {state} in format version {version}")
    return Role(
        replica_id, RoleState(state), generation, os.fsdecode(path[:length]), sequence, *mount
    )


def _decode_mounts(body: bytes) -> Iterator[PastMount]:
    for number in range(MOUNTS_MAX):
        identity, first, changed = _MOUNT.unpack_from(body, _MOUNTS_OFFSET + number * _MOUNT.size)
        if not identity:
            return
        yield PastMount(identity, first, bool(changed))


def _unknown(version: int) -> str:
    return f"format version {version}, known here: {', '.join(map(str, VERSIONS))}"


def _decode_map(read: Read, record: Record) -> tuple[DirtyMap, int]:
    """The map, and how many map pages could not be read."""
    disk_map = record.new_map()
    count = pages(disk_map)
    torn: list[int] = []
    for number, plane in enumerate(disk_map.planes):
        first = number * PLANE_PAGES
        content = read(MAP_OFFSET + first * PAGE, count * PAGE)
        for page in range(first, first + count):
            offset = (page - first) * PAGE
            body = content[offset : offset + CHUNKS_PER_PAGE]
            checksum = content[offset + CHUNKS_PER_PAGE : offset + PAGE]
            if checksum == _page_checksum(body, record.set_id, page):
                _, chunks = chunks_of(page)
                plane[chunks] = body[: len(plane[chunks])]
            else:
                torn.append(page)
    for page in torn:  # only a state that is unknown in all planes is read as such
        _, chunks = chunks_of(page)
        for number, plane in enumerate(disk_map.planes):
            plane[chunks] = bytes([plane_bits(UNKNOWN, number)]) * len(plane[chunks])
    return disk_map, len(torn)


def _page_checksum(body: bytes, set_id: bytes, page: int) -> bytes:
    return xxhash.xxh3_128_digest(b"".join([body, set_id, page.to_bytes(8, "little")]))


def page_runs(page_numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Runs of adjacent page numbers: ``(first, last)``, inclusive."""
    runs: list[tuple[int, int]] = []
    for page in sorted(page_numbers):
        if runs and runs[-1][1] == page - 1:
            runs[-1] = (runs[-1][0], page)
        else:
            runs.append((page, page))
    return runs
