"""The dirty map: where replicas may differ, by chunk. Pure: no I/O, no clock.

The size of a chunk is a power of two, chosen so that the map of any disk stays small. The state of
a chunk is a set of facts, so that the maps of several replicas are joined by one bitwise *or*:

* `INTENT`: a write may be under way, or may have been when the set was last used. The current
  replicas may differ here.
* `UNVERIFIED`: the chunk was not compared since the images were adopted as they were.
* ``out_of_sync(slot)``: the replica with that slot is known to lack something written here.

0 is a chunk that all replicas hold alike. A bit set wrongly costs a comparison or a copy; a bit
cleared wrongly costs data.

A map lies in *planes*, each a byte per chunk, and a state is read across them: the first plane has
bits 0 to 7 of each chunk, the second one bits 8 to 15, and so on. The first plane is all of a set
of up to `NARROW` replicas; each further plane has room for 8 more. So a map takes as few bytes as
its replicas need, what is asked about one replica looks at one plane, and a set that gets more
replicas gets a plane, while what there was stays where it is.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache

INTENT = 0x01
UNVERIFIED = 0x80
NARROW = 6
"""Slots whose bits fit between `INTENT` and `UNVERIFIED`: in the first plane."""
REPLICAS_MAX = 32
"""Replicas of a set with sidecars, at most."""
PLANE_BITS = 8

CHUNK_MIN = 64 << 10
CHUNKS_MAX = 4 << 20
"""Chunks of a disk, at most; a larger disk gets larger chunks."""

EXTENT = 4 << 20
"""Bytes that are marked as intended at a time, so that a hot area costs one sync."""

_STEP = 16 << 10
"""Chunks searched in one go; most searches end in the first."""


def out_of_sync(slot: int) -> int:
    """The bit that says that the replica with *slot* lacks something."""
    assert 0 <= slot < REPLICAS_MAX
    return 2 << slot if slot < NARROW else 4 << slot  # `UNVERIFIED` is between


def planes_for(slots: int) -> int:
    """The number of planes in a map of *slots* replicas."""
    return max(1, -(-(2 + slots) // PLANE_BITS))


def plane_bits(bits: int, plane: int) -> int:
    """What *bits* are in the byte of a *plane*, from 0."""
    return bits >> PLANE_BITS * plane & 0xFF


ALL_OUT_OF_SYNC = sum(out_of_sync(slot) for slot in range(REPLICAS_MAX))
UNKNOWN = INTENT | ALL_OUT_OF_SYNC
"""The bits of an unreadable part of a map: all replicas may differ, or lack something."""


def chunk_size_for(size: int) -> int:
    """The chunk size for a disk of *size* bytes: 64 KiB up to 256 GiB, 4 MiB at 16 TiB."""
    chunk = CHUNK_MIN
    while size > chunk * CHUNKS_MAX:
        chunk *= 2
    return chunk


class DirtyMap:
    """The map of a disk of *size* bytes in chunks of *chunk_size* bytes."""

    __slots__ = ("chunk_size", "extent", "planes", "size")

    def __init__(
        self,
        size: int,
        chunk_size: int,
        planes: Iterable[bytearray] | None = None,
        *,
        slots: int = NARROW,
    ) -> None:
        """*planes*, which become the map's own; default: a clean map with room for *slots*."""
        self.size = size
        self.chunk_size = chunk_size
        self.extent = max(EXTENT, chunk_size)
        """Bytes marked as intended at a time: a whole number of chunks."""
        count = -(-size // chunk_size)
        if planes is None:
            planes = (bytearray(count) for _ in range(planes_for(slots)))
        self.planes: Sequence[bytearray] = tuple(planes)
        """Each a byte per chunk."""
        assert all(len(plane) == count for plane in self.planes)

    def __len__(self) -> int:
        """The number of chunks."""
        return len(self.planes[0])

    def state(self, chunk: int) -> int:
        """All facts of *chunk*."""
        return int.from_bytes([plane[chunk] for plane in self.planes], "little")

    def copy(self) -> "DirtyMap":
        """An independent map with the same facts."""
        return DirtyMap(self.size, self.chunk_size, map(bytearray, self.planes))

    def resized(self, size: int, bits: int = 0) -> "DirtyMap":
        """A copy for a disk of *size* bytes; added chunks have *bits*."""
        count = -(-size // self.chunk_size)
        return DirtyMap(
            size,
            self.chunk_size,
            (
                plane[:count].ljust(count, bytes([plane_bits(bits, number)]))
                for number, plane in enumerate(self.planes)
            ),
        )

    def grow(self, size: int, bits: int) -> None:
        """Be the map of a disk of *size* bytes, at least the present one; added chunks have *bits*.

        `planes` become other objects: a view of an old one may keep that from getting longer.
        """
        assert size >= self.size
        self.planes = self.resized(size, bits).planes
        self.size = size

    def widen(self, slots: int) -> None:
        """Have room for *slots* replicas; those that had none before lack nothing."""
        self._widen(planes_for(slots))

    def _widen(self, planes: int) -> None:
        added = (bytearray(len(self)) for _ in range(planes - len(self.planes)))
        self.planes = (*self.planes, *added)

    def read_as(self, behind: int, *, mark: int = INTENT) -> "DirtyMap":
        """A copy in which only replicas *behind* (bits) lack unreadable chunks (`UNKNOWN`).

        Else an unreadable page would hide a real loss of a current replica. *mark*: a further fact
        of those chunks.
        """
        read = DirtyMap(self.size, self.chunk_size, map(bytearray, self.planes))
        read._widen(_planes_needed(behind))
        for part in self._parts(0, len(self)):
            unread = self._exactly(UNKNOWN, part)
            if 1 not in unread:
                continue
            for number, plane in enumerate(read.planes):
                kept = _both(plane[part], unread.translate(_flags(0, 0xFF)))
                given = unread.translate(_flags(plane_bits(mark | behind, number), 0))
                plane[part] = _either([kept, given])
        return read

    def chunks(self, offset: int, length: int) -> range:
        """The chunks that ``[offset, offset + length)`` (bytes) touches."""
        return range(offset // self.chunk_size, -(-(offset + length) // self.chunk_size))

    def extents(self, offset: int, length: int) -> range:
        """The extents that ``[offset, offset + length)`` (bytes) touches."""
        return range(offset // self.extent, -(-(offset + length) // self.extent))

    def extent_chunks(self, extents: range) -> range:
        """The chunks of some adjacent *extents*."""
        per_extent = self.extent // self.chunk_size
        return range(extents.start * per_extent, min(extents.stop * per_extent, len(self)))

    def bounds(self, chunk: int) -> tuple[int, int]:
        """Where *chunk* begins and ends on the disk (bytes)."""
        start = chunk * self.chunk_size
        return start, min(start + self.chunk_size, self.size)

    def bounds_of(self, chunks: range) -> tuple[int, int]:
        """Where *chunks*, at least one, begin and end on the disk (bytes)."""
        return self.bounds(chunks[0])[0], self.bounds(chunks[-1])[1]

    def add(self, bits: int, chunks: range) -> None:
        """Set *bits* for *chunks*."""
        assert _planes_needed(bits) <= len(self.planes), "there is no room for them"
        part = slice(chunks.start, chunks.stop)
        for plane, some in self._planes_of(bits):
            plane[part] = plane[part].translate(_adding(some))

    def remove(self, bits: int, chunks: range) -> None:
        """Clear *bits* for *chunks*."""
        part = slice(chunks.start, chunks.stop)
        for plane, some in self._planes_of(bits):
            plane[part] = plane[part].translate(_removing(some))

    def add_where(self, condition: int, bits: int) -> None:
        """Set *bits* wherever any bit of *condition* is set."""
        assert _planes_needed(bits) <= len(self.planes), "there is no room for them"
        for part in self._parts(0, len(self)):
            where = self._having(condition, part)
            if 1 in where:
                for plane, some in self._planes_of(bits):
                    plane[part] = _either([plane[part], where.translate(_flags(some, 0))])

    def keep_as(self, condition: int, bit: int) -> None:
        """Replace all facts: by *bit* wherever any bit of *condition* is set, else by none.

        *bit* may be one for which there was no room.
        """
        kept = DirtyMap(self.size, self.chunk_size, (bytearray(len(self)) for _ in self.planes))
        kept._widen(_planes_needed(bit))
        for part in self._parts(0, len(self)):
            where = self._having(condition, part)
            for plane, some in kept._planes_of(bit):
                plane[part] = where.translate(_flags(some, 0))
        self.planes = kept.planes

    def join(self, other: "DirtyMap") -> None:
        """Add every fact of *other*, a map of the same disk, about a replica that has room here."""
        assert len(other) == len(self)
        for plane, theirs in zip(self.planes, other.planes, strict=False):
            plane[:] = _either([plane, theirs])

    def count(self, bits: int) -> int:
        """How many chunks have any of *bits*."""
        return sum(self._having(bits, part).count(1) for part in self._parts(0, len(self)))

    def is_all(self, bits: int) -> bool:
        """Whether each chunk has *bits*, and nothing else."""
        return all(
            plane.count(plane_bits(bits, number)) == len(self)
            for number, plane in enumerate(self.planes)
        )

    def lacking_bytes(self, slot: int) -> int:
        """An upper bound for the bytes that the replica with *slot* lacks."""
        chunks = self.count(out_of_sync(slot))
        last = range(len(self) - 1, len(self))
        if chunks and self.any(out_of_sync(slot), last):  # the last chunk may be a short one
            return (chunks - 1) * self.chunk_size + self.size - self.bounds(last[0])[0]
        return chunks * self.chunk_size

    def any(self, bits: int, chunks: range) -> bool:
        """Whether any of *chunks* has any of *bits*."""
        if len(chunks) == 1 and bits <= 0xFF:  # nearly always
            return bool(self.planes[0][chunks.start] & bits)
        return self._next(bits, chunks.start, chunks.stop) < chunks.stop

    def all(self, bits: int, chunks: range) -> bool:
        """Whether each of *chunks* has any of *bits*."""
        if len(chunks) == 1:
            return self.any(bits, chunks)
        return self._next(bits, chunks.start, chunks.stop, having=False) == chunks.stop

    def has(self, bits: int, chunks: range) -> bool:
        """Whether each of *chunks* has all of *bits*."""
        if len(chunks) == 1 and bits <= 0xFF:
            return self.planes[0][chunks.start] & bits == bits
        if _planes_needed(bits) > len(self.planes):
            return False
        for part in self._parts(chunks.start, chunks.stop):
            for plane, some in self._planes_of(bits):
                if plane[part].translate(_missing(some)).find(1) >= 0:
                    return False
        return True

    def any_has(self, bits: int) -> bool:
        """Whether any chunk has all of *bits*."""
        if _planes_needed(bits) > len(self.planes):
            return False
        for part in self._parts(0, len(self)):
            lacking = [
                plane[part].translate(_missing(some)) for plane, some in self._planes_of(bits)
            ]
            if not lacking or _either(lacking).find(0) >= 0:
                return True
        return False

    def runs(self, bits: int, start: int = 0, longest: int = 1) -> Iterator[range]:
        """Adjacent chunks from *start* on that have any of *bits*, at most *longest* at a time.

        The map may change meanwhile: what is ahead is looked at when it is reached.
        """
        while (first := self._next(bits, start, len(self))) < len(self):
            start = self._next(bits, first, min(first + longest, len(self)), having=False)
            yield range(first, start)

    def runs_in(self, bits: int, chunks: range) -> Iterator[range]:
        """As `runs`, but of *chunks* alone: the rest of the map is not looked at."""
        start = chunks.start
        while (first := self._next(bits, start, chunks.stop)) < chunks.stop:
            start = self._next(bits, first, chunks.stop, having=False)
            yield range(first, start)

    def runs_without(self, bits: int, chunks: range) -> Iterator[range]:
        """Adjacent chunks of *chunks*, as far as the map goes, that have none of *bits*."""
        start, stop = chunks.start, min(chunks.stop, len(self))
        while (first := self._next(bits, start, stop, having=False)) < stop:
            start = self._next(bits, first, stop)
            yield range(first, start)

    def _next(self, bits: int, start: int, stop: int, *, having: bool = True) -> int:
        """The first chunk from *start* on that has any of *bits*, or has none; else *stop*."""
        for first in range(start, stop, _STEP):
            part = slice(first, min(first + _STEP, stop))
            if (found := self._having(bits, part).find(having)) >= 0:
                return first + found
        return stop

    def _having(self, bits: int, part: slice) -> bytes | bytearray:
        """1 for each chunk of *part* that has any of *bits*, else 0."""
        each = [plane[part].translate(_having(some)) for plane, some in self._planes_of(bits)]
        return _either(each) if each else bytes(part.stop - part.start)

    def _exactly(self, bits: int, part: slice) -> bytes | bytearray:
        """1 for each chunk of *part* that has *bits*, as far as there is room, and nothing else."""
        found: bytes | bytearray = self.planes[0][part].translate(_equal(bits & 0xFF))
        for number, plane in enumerate(self.planes[1:], 1):
            found = _both(found, plane[part].translate(_equal(plane_bits(bits, number))))
        return found

    def _planes_of(self, bits: int) -> Iterator[tuple[bytearray, int]]:
        """The planes with any of *bits*, and which these are there."""
        for plane in self.planes:
            if some := bits & 0xFF:
                yield plane, some
            if not (bits := bits >> PLANE_BITS):
                return

    @staticmethod
    def _parts(start: int, stop: int) -> Iterator[slice]:
        for first in range(start, stop, _STEP):
            yield slice(first, min(first + _STEP, stop))


def _planes_needed(bits: int) -> int:
    """The number of planes of a map that has room for *bits*."""
    return -(-bits.bit_length() // PLANE_BITS)


def _either(each: Sequence[bytes | bytearray]) -> bytes | bytearray:
    """The bitwise *or* of *each*, at least one, of equal length."""
    if len(each) == 1:
        return each[0]
    joined = 0
    for one in each:
        joined |= int.from_bytes(one, "little")
    return joined.to_bytes(len(each[0]), "little")


def _both(one: bytes | bytearray, other: bytes | bytearray) -> bytes:
    """The bitwise *and* of two of equal length."""
    joined = int.from_bytes(one, "little") & int.from_bytes(other, "little")
    return joined.to_bytes(len(one), "little")


@cache
def _flags(one: int, zero: int) -> bytes:
    """*one* for 1, and *zero* for 0."""
    return bytes([zero, one]) + bytes(254)


@cache
def _equal(bits: int) -> bytes:
    """1 for a byte of exactly *bits*, else 0."""
    return bytes(state == bits for state in range(256))


@cache
def _adding(bits: int) -> bytes:
    return bytes(state | bits for state in range(256))


@cache
def _removing(bits: int) -> bytes:
    return bytes(state & ~bits for state in range(256))


@cache
def _having(bits: int) -> bytes:
    """1 for a byte with any of *bits*, else 0."""
    return bytes(bool(state & bits) for state in range(256))


@cache
def _missing(bits: int) -> bytes:
    """1 for a byte without any one of *bits*, else 0."""
    return bytes(state & bits != bits for state in range(256))
