"""The dirty map: where replicas may differ, one byte per chunk. Pure: no I/O, no clock.

The size of a chunk is a power of two, chosen so that the map of any disk stays small. The byte of a
chunk is a set of facts, so that the maps of several replicas are joined by one bitwise *or*:

* `INTENT`: a write may be under way, or may have been when the set was last used. The current
  replicas may differ here.
* `UNVERIFIED`: the chunk was not compared since the images were adopted as they were.
* ``out_of_sync(slot)``: the replica with that slot is known to lack something written here.

0 is a chunk that all replicas hold alike. A bit set wrongly costs a comparison or a copy; a bit
cleared wrongly costs data.
"""

from collections.abc import Iterator
from functools import cache

INTENT = 0x01
UNVERIFIED = 0x80
REPLICAS_MAX = 6
"""Slots whose bits fit between `INTENT` and `UNVERIFIED`."""

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
    return 2 << slot


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

    __slots__ = ("chunk_size", "extent", "size", "states")

    def __init__(self, size: int, chunk_size: int, states: bytearray | None = None) -> None:
        self.size = size
        self.chunk_size = chunk_size
        self.extent = max(EXTENT, chunk_size)
        """Bytes marked as intended at a time: a whole number of chunks."""
        self.states = bytearray(-(-size // chunk_size)) if states is None else states
        """A byte per chunk."""
        assert len(self.states) == -(-size // chunk_size)

    def __len__(self) -> int:
        """The number of chunks."""
        return len(self.states)

    def copy(self) -> "DirtyMap":
        """An independent map with the same facts."""
        return DirtyMap(self.size, self.chunk_size, bytearray(self.states))

    def resized(self, size: int, bits: int = 0) -> "DirtyMap":
        """A copy for a disk of *size* bytes; added chunks have *bits*."""
        count = -(-size // self.chunk_size)
        states = self.states[:count].ljust(count, bytes([bits]))
        return DirtyMap(size, self.chunk_size, states)

    def grow(self, size: int, bits: int) -> None:
        """Be the map of a disk of *size* bytes, at least the present one; added chunks have *bits*.

        `states` becomes another object: a view of the old one may keep that from getting longer.
        """
        assert size >= self.size
        self.states = self.resized(size, bits).states
        self.size = size

    def read_as(self, behind: int) -> "DirtyMap":
        """A copy in which only replicas *behind* (bits) lack unreadable chunks (`UNKNOWN`).

        Else an unreadable page would hide a real loss of a current replica.
        """
        table = bytes(INTENT | behind if state == UNKNOWN else state for state in range(256))
        return DirtyMap(self.size, self.chunk_size, self.states.translate(table))

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
        self._translate(_adding(bits), chunks)

    def remove(self, bits: int, chunks: range) -> None:
        """Clear *bits* for *chunks*."""
        self._translate(_removing(bits), chunks)

    def add_where(self, condition: int, bits: int) -> None:
        """Set *bits* wherever any bit of *condition* is set."""
        table = bytes(state | bits if state & condition else state for state in range(256))
        self.states[:] = self.states.translate(table)

    def join(self, other: "DirtyMap") -> None:
        """Add every fact of *other*, a map of the same shape."""
        assert len(other) == len(self)
        joined = int.from_bytes(self.states, "little") | int.from_bytes(other.states, "little")
        self.states[:] = joined.to_bytes(len(self), "little")

    def count(self, bits: int) -> int:
        """How many chunks have any of *bits*."""
        return len(self) - self.states.translate(_removing(0xFF & ~bits)).count(0)

    def lacking_bytes(self, slot: int) -> int:
        """An upper bound for the bytes that the replica with *slot* lacks."""
        chunks = self.count(out_of_sync(slot))
        if chunks and self.states[-1] & out_of_sync(slot):  # the last chunk may be a short one
            return (chunks - 1) * self.chunk_size + self.size - self.bounds(len(self) - 1)[0]
        return chunks * self.chunk_size

    def any(self, bits: int, chunks: range) -> bool:
        """Whether any of *chunks* has any of *bits*."""
        if len(chunks) == 1:  # nearly always
            return bool(self.states[chunks.start] & bits)
        return self._next(bits, chunks.start, chunks.stop) < chunks.stop

    def all(self, bits: int, chunks: range) -> bool:
        """Whether each of *chunks* has any of *bits*."""
        return self._next(bits, chunks.start, chunks.stop, having=False) == chunks.stop

    def has(self, bits: int, chunks: range) -> bool:
        """Whether each of *chunks* has all of *bits*."""
        missing = _missing(bits)
        for first in range(chunks.start, chunks.stop, _STEP):
            part = self.states[first : min(first + _STEP, chunks.stop)]
            if part.translate(missing).find(1) >= 0:
                return False
        return True

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

    def _next(self, bits: int, start: int, stop: int, *, having: bool = True) -> int:
        """The first chunk from *start* on that has any of *bits*, or has none; else *stop*."""
        for first in range(start, stop, _STEP):
            part = self.states[first : min(first + _STEP, stop)]
            if (found := part.translate(_having(bits)).find(having)) >= 0:
                return first + found
        return stop

    def _translate(self, table: bytes, chunks: range) -> None:
        part = slice(chunks.start, chunks.stop)
        self.states[part] = self.states[part].translate(table)


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
