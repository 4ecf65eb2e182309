"""The oracle: what a guest may see of its disk.

Theory
======

Every 512-byte sector that a guest writes says which sector of which block it is, and which
request of which writer it came from (its *version*), so whatever is found says where it is from.
A version *ends* when its request is answered, or cut off. The oracle keeps for each sector the
versions that may be there. What excludes one:

* A write was acknowledged that was issued after the version had ended. (Two writes under way
  together may come in either order.)
* A read saw another one, and this one had ended when the read began, or when what the read saw
  was issued: it is not there, and cannot come back (P7).

A write that failed, or that a crash cut off, may have happened, in any of its sectors, until
something excludes it. Two versions never mix in one sector.

A flush that succeeds makes durable what was known when it began. When the daemon is killed all
that is known stays so. When power is cut only what is durable does, and what the rest had excluded
may be there again.
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from itertools import groupby

import xxhash

from support.simulation.media import BLOCK, SECTOR, Content

_HEAD = struct.Struct("<8sQQII")  # magic, block, sequence, sector in the block, writer
_MAGIC = b"ORACLE\r\n"
_ZERO_SECTOR = bytes(SECTOR)
_PER_BLOCK = BLOCK // SECTOR
_CANDIDATES_MAX = 16
"""Versions kept for a sector before those that are excluded for ever are forgotten."""


class Wrong(Enum):
    """How what was seen breaks a promise."""

    STALE = "older than an acknowledged write (P1)"
    LOST = "older than a write that was flushed before power was cut (P2)"
    TURNED_BACK = "other than what was read before, with no write since (P7)"
    NEVER_WRITTEN = "never written there"
    MISPLACED = "of another place"
    GARBAGE = "of no single write"
    SHORT = "not as long as it should be"
    DIFFERENT = "not the same on all replicas (P3)"
    CLOSED = "closed while something that was asked of it may still happen (R7)"
    UNTOLD = "lost on all replicas, and told by no flush (R13)"


class BrokenError(AssertionError):
    """Something did not go as promised that is no business of the oracle's."""


class ViolationError(AssertionError):
    """A promise was broken."""

    def __init__(self, wrong: Wrong, text: str) -> None:
        super().__init__(f"{text}: {wrong.value}")
        self.wrong = wrong


@dataclass(eq=False, slots=True)
class Version:
    """What one request wrote to all its sectors."""

    sequence: int
    """0: what was there before the first write."""
    writer: int
    zeros: bool
    sectors: range
    issued: int
    """In the oracle's own time, like all moments."""
    ended: int | None = None
    """When it was acknowledged, or failed; None: it is under way."""
    acknowledged: bool = False

    def ended_by(self, moment: int) -> bool:
        """Whether it was no longer under way then."""
        return self.ended is not None and self.ended <= moment

    def __str__(self) -> str:
        if not self.sequence:
            return "the initial content"
        end = "under way" if self.ended is None else "acknowledged"
        if self.ended is not None and not self.acknowledged:
            end = "not acknowledged"
        kind = "zeros" if self.zeros else "write"
        return f"{kind} {self.sequence} of writer {self.writer} ({end})"


@dataclass(eq=False, slots=True)
class _Candidate:
    """A version in one sector, and since when it is known not to be there; None: it may be."""

    version: Version
    by_write: int | None = None
    by_read: int | None = None
    durably: bool = False
    """The write that excludes it was itself durable when it was acknowledged."""

    @property
    def excluded(self) -> bool:
        return self.by_write is not None or self.by_read is not None


class _Sector:
    """What may be in one sector."""

    __slots__ = ("candidates", "possible")

    def __init__(self, first: Version) -> None:
        self.candidates = [_Candidate(first)]
        """In the order of issuing."""
        self.possible: tuple[Version, ...] = (first,)
        """Those that nothing excludes."""

    def limit(self) -> None:
        """Work out anew what is possible."""
        self.possible = tuple(one.version for one in self.candidates if not one.excluded)

    def overwritten(self, version: Version, now: int, *, durably: bool) -> None:
        """*version* was acknowledged."""
        for one in self.candidates:
            if one.version is not version and one.version.ended_by(version.issued):
                if one.by_write is None:
                    one.by_write = now
                one.durably = one.durably or durably
        self.limit()

    def seen(self, versions: tuple[Version, ...], before: int, now: int) -> None:
        """A read saw one of *versions*: what else had ended *before* is not there."""
        for one in self.candidates:
            ended = one.version.ended_by(before)
            if ended and one.by_read is None and one.version not in versions:
                one.by_read = now
        self.limit()


@dataclass(eq=False, slots=True)
class Writing:
    """A write of a guest: put `data` at `offset`, then tell the oracle how it ended."""

    offset: int
    length: int
    data: bytes
    version: Version


@dataclass(eq=False, slots=True)
class Reading:
    """A read of a guest: read it, then tell the oracle what was seen."""

    offset: int
    length: int
    began: int
    possible: list[tuple[Version, ...]]
    overtaken: bool = False
    """Something was lost while it was under way: what it sees may be from before."""


@dataclass(eq=False, slots=True)
class Flushing:
    """A flush of a guest."""

    began: int


class Oracle:
    """Knows what a disk of *size* bytes may hold; offsets and lengths are whole sectors."""

    def __init__(
        self, size: int, initial: bytes | None = None, *, reads_become_durable: bool = True
    ) -> None:
        """*initial*: what is there at first; None: zeros.

        *reads_become_durable*: whether a flush keeps what was read before it, and not only what
        was written, from turning back after a power cut.
        """
        assert not size % SECTOR
        self.size = size
        self.acknowledged = 0
        """Writes so far: a test that has none proves nothing."""
        self.checked = 0
        """Sectors of which a read was checked so far."""
        self._initial = initial
        self._reads_become_durable = reads_become_durable
        self._time = 0
        self._flushed = 0
        """What was known by then is durable."""
        self._untold_loss: int | None = None
        """When something acknowledged was lost on all replicas, until a flush has failed for it."""
        self._parted: set[int] = set()
        """The sectors that replicas have lost unlike each other, until a flush has failed: who asks
        one replica sees what that one holds, which nobody can know to be wrong."""
        self._inherited_loss = False
        """A loss that an earlier life told nobody of: a sync of this one may hear of it."""
        self._power_cut = 0
        """When the last one was."""
        self._unreadable: set[int] = set()
        """Sectors that no replica can be read at, as was told; until they are written."""
        sectors = range(size // SECTOR)
        first = Version(0, 0, initial is None, sectors, 0, 0, acknowledged=True)
        self._versions = [first]
        """By their sequence number."""
        self._under_way: dict[Version, None] = {}
        self._readings: dict[Reading, None] = {}
        self._sectors = [_Sector(first) for _ in sectors]

    # Writes

    def begin_write(self, offset: int, length: int, writer: int) -> Writing:
        """A guest is about to write; it must write exactly `Writing.data`."""
        version = self._issue(offset, length, writer, zeros=False)
        data = b"".join([self._content(version, index) for index in version.sectors])
        return Writing(offset, length, data, version)

    def begin_zeros(self, offset: int, length: int, writer: int) -> Writing:
        """A guest is about to discard, or to write zeros."""
        version = self._issue(offset, length, writer, zeros=True)
        return Writing(offset, length, bytes(length), version)

    def wrote(self, writing: Writing, *, durably: bool = False) -> None:
        """The write was acknowledged; *durably*: it was a write with O_DSYNC."""
        version = writing.version
        self._end(version)
        version.acknowledged = True
        self.acknowledged += 1
        self._unreadable.difference_update(version.sectors)
        for index in version.sectors:
            self._sectors[index].overwritten(version, self._time, durably=durably)

    def write_failed(self, writing: Writing) -> None:
        """The write was answered with an error: it may have happened or not."""
        self._end(writing.version)

    def _issue(self, offset: int, length: int, writer: int, *, zeros: bool) -> Version:
        assert 0 <= offset < offset + length <= self.size
        sectors = _sectors(offset, length)
        version = Version(len(self._versions), writer, zeros, sectors, self._tick())
        self._versions.append(version)
        self._under_way[version] = None
        for index in sectors:
            sector = self._sectors[index]
            if len(sector.candidates) > _CANDIDATES_MAX:
                self._forget_excluded(sector)
            sector.candidates.append(_Candidate(version))
            sector.possible += (version,)
        return version

    def _end(self, version: Version) -> None:
        assert version.ended is None, "it has ended already"
        version.ended = self._tick()
        del self._under_way[version]

    def grow(self, size: int) -> None:
        """The disk has *size* bytes from now on, at least as many as before: zeros there."""
        assert size >= self.size
        assert not size % SECTOR
        sectors = range(self.size // SECTOR, size // SECTOR)
        if sectors:
            now = self._tick()
            zeros = Version(len(self._versions), 0, True, sectors, now, now, acknowledged=True)
            self._versions.append(zeros)
            self._sectors += [_Sector(zeros) for _ in sectors]
            self.size = size

    def resize(self, size: int) -> None:
        """As `grow`; or growing it was cut off, and nobody has written behind *size*."""
        if size < self.size:
            del self._sectors[size // SECTOR :]
            self.size = size
        self.grow(size)

    @property
    def writing(self) -> bool:
        """Whether a write is under way: it may be lost in part, and acknowledged all the same."""
        return bool(self._under_way)

    # Reads

    def begin_read(self, offset: int, length: int) -> Reading:
        """A guest is about to read."""
        possible = [self._sectors[index].possible for index in _sectors(offset, length)]
        reading = Reading(offset, length, self._tick(), possible)
        self._readings[reading] = None
        return reading

    def read_failed(self, reading: Reading) -> None:
        """The read was answered with an error."""
        del self._readings[reading]

    def read(self, reading: Reading, data: bytes) -> None:
        """The read gave *data*; raises `ViolationError` if it must not."""
        del self._readings[reading]
        if len(data) != reading.length:
            raise ViolationError(
                Wrong.SHORT, f"read {len(data)} of {reading.length} bytes at {reading.offset}"
            )
        now = self._tick()
        for position, index in enumerate(_sectors(reading.offset, reading.length)):
            sector = self._sectors[index]
            content = data[position * SECTOR : (position + 1) * SECTOR]
            allowed = reading.possible[position]
            if sector.candidates[-1].version.issued > reading.began:
                versions = (one.version for one in sector.candidates)
                allowed += tuple(v for v in versions if v.issued > reading.began)
            seen = tuple(v for v in allowed if self._content(v, index) == content)
            if not seen:
                raise self._violation(sector, index, content)
            self.checked += 1
            if len(allowed) == 1 or reading.overtaken or index in self._parted:
                continue  # what else there was is excluded already, or may be there again
            before = max(reading.began, min(version.issued for version in seen))
            sector.seen(seen, before, now)
            if not sector.possible:
                raise ViolationError(
                    Wrong.TURNED_BACK,
                    f"{_place(index)} gave {_names(seen)}, a read meanwhile gave another version",
                )

    # Flushes and crashes

    def begin_flush(self) -> Flushing:
        """A guest is about to flush."""
        return Flushing(self._tick())

    def flushed(self, flushing: Flushing) -> None:
        """The flush was acknowledged; raises `ViolationError` if it had to tell of a loss."""
        self._flushed = max(self._flushed, flushing.began)
        if self._untold_loss is not None and flushing.began > self._untold_loss:
            raise ViolationError(Wrong.UNTOLD, "a flush succeeded over a write that all had lost")

    def flush_failed(self) -> None:
        """A flush failed: whatever was lost before is told by it."""
        self._untold_loss = None
        self._parted.clear()
        self._inherited_loss = False

    @property
    def owes_an_error(self) -> bool:
        """Whether a flush may fail for what happened before."""
        return self._inherited_loss or self._untold_loss is not None

    def lost(self, images: Sequence[Content]) -> None:
        """All replicas have lost what they had not synced, *images* is what they are left with.

        No set of copies survives that, but one flush has to fail for it.
        """
        excluded = self.allow(images)
        for index in range(len(self._sectors)):
            place = index * SECTOR, (index + 1) * SECTOR
            if len({image.read(*place) for image in images}) > 1:
                self._parted.add(index)
        if excluded:
            self._untold_loss = self._tick()

    def killed(self) -> None:
        """The daemon was killed: what was under way has ended, one way or the other."""
        for version in list(self._under_way):
            self._end(version)
        self._readings.clear()
        self._inherited_loss |= self._untold_loss is not None
        self._untold_loss = None  # whoever was to be told is gone, too
        self._parted.clear()

    def power_cut(self) -> None:
        """Power was cut: only what was flushed is sure."""
        self.killed()
        self._power_cut = self._tick()
        for sector in self._sectors:
            for one in sector.candidates:
                if not self._write_is_durable(one):
                    one.by_write = None
                if not self._read_is_durable(one):
                    one.by_read = None
            sector.limit()

    def forget_reads(self) -> None:
        """From now on what was read before may turn back.

        For what no set of copies can promise: a mount without the only replica that was read.
        """
        for sector in self._sectors:
            for one in sector.candidates:
                one.by_read = None
            sector.limit()

    def allow(self, images: Iterable[Content]) -> bool:
        """What *images* hold may be seen again, whatever excluded it; whether anything had.

        For a loss that somebody consented to: nothing but these images is left to go on with.
        """
        excluded = False
        for image in images:
            for index, sector in enumerate(self._sectors):
                content = image.read(index * SECTOR, (index + 1) * SECTOR)
                if any(self._content(v, index) == content for v in sector.possible):
                    continue
                found = [c for c in sector.candidates if self._content(c.version, index) == content]
                if not found and (version := self._version_of(content, index)) is not None:
                    found = [_Candidate(version)]
                    sector.candidates.insert(0, found[0])
                for one in found:
                    one.by_write = one.by_read = None
                    one.durably = False
                sector.limit()
                excluded = True
                for reading in self._readings:
                    reading.overtaken = True
                    at = index - reading.offset // SECTOR
                    if 0 <= at < len(reading.possible):
                        reading.possible[at] += tuple(one.version for one in found)
        return excluded

    def unreadable(self, offset: int, length: int) -> None:
        """It was told that no replica can be read at these bytes, until they are written."""
        self._unreadable.update(_sectors(offset, length))

    def is_readable(self, offset: int, length: int) -> bool:
        """Whether a read of this range has no reason to fail."""
        return self._unreadable.isdisjoint(_sectors(offset, length))

    def _version_of(self, content: bytes, index: int) -> Version | None:
        """Any version that wrote this there."""
        for version in self._versions:
            if index in version.sectors and self._content(version, index) == content:
                return version
        return None

    def _write_is_durable(self, one: _Candidate) -> bool:
        return one.durably or (one.by_write is not None and one.by_write <= self._flushed)

    def _read_is_durable(self, one: _Candidate) -> bool:
        return (
            self._reads_become_durable and one.by_read is not None and one.by_read <= self._flushed
        )

    def _forget_excluded(self, sector: _Sector) -> None:
        """Forget what will never be possible again, unless a read under way may have seen it."""
        oldest = min((reading.began for reading in self._readings), default=self._time)
        sector.candidates = [
            one
            for one in sector.candidates
            if not self._write_is_durable(one) or not one.version.ended_by(oldest)
        ]

    # In the end

    def check_images(self, images: Sequence[Content], names: Sequence[str] = ()) -> None:
        """All *images* hold the same bytes, and these are what a guest may see.

        But for what is unreadable, of which nobody knows what it is.
        """
        names = names or [f"replica {number}" for number in range(len(images))]
        for image, name in zip(images, names, strict=True):
            if image.size < self.size:
                raise ViolationError(Wrong.SHORT, f"{name} has {image.size} bytes")
        for other, name in zip(images[1:], names[1:], strict=True):
            for number in images[0].differing_blocks(other):
                for index in _sectors(number * BLOCK, min(BLOCK, self.size - number * BLOCK)):
                    start = index * SECTOR
                    one, two = (image.read(start, start + SECTOR) for image in (images[0], other))
                    if one != two and index not in self._unreadable:
                        raise ViolationError(
                            Wrong.DIFFERENT,
                            f"{_place(index)} is {self.describe(one)} on {names[0]}, "
                            f"{self.describe(two)} on {name}",
                        )
        readable = [index not in self._unreadable for index in range(self.size // SECTOR)]
        for is_so, run in groupby(range(len(readable)), readable.__getitem__):
            if is_so:
                first, *rest = run
                start, end = first * SECTOR, (first + len(rest) + 1) * SECTOR
                self.read(self.begin_read(start, end - start), images[0].read(start, end))

    def check_copy(self, image: Content, name: str) -> None:
        """*image* is the disk at this moment: raises `ViolationError` unless each sector holds what
        a guest may see of it now."""
        for index, sector in enumerate(self._sectors):
            content = image.read(index * SECTOR, (index + 1) * SECTOR)
            seen = any(self._content(version, index) == content for version in sector.possible)
            if not seen and index not in self._unreadable:
                violation = self._violation(sector, index, content)
                raise ViolationError(violation.wrong, f"{name} as a copy: {violation}")

    def describe(self, content: bytes) -> str:
        """What a sector's content is, for a reader."""
        if content == _ZERO_SECTOR:
            return "zeros"
        if (found := _parse(content)) is None:
            return f"garbage beginning with {content[:16].hex()}"
        block, sequence, part, writer = found
        if sequence < len(self._versions):
            return f"sector {part} of block {block}, {self._versions[sequence]}"
        return f"sector {part} of block {block}, unknown write {sequence} of writer {writer}"

    # Inside

    def _tick(self) -> int:
        self._time += 1
        return self._time

    def _content(self, version: Version, index: int) -> bytes:
        if version.zeros:
            return _ZERO_SECTOR
        if not version.sequence:
            assert self._initial is not None
            return self._initial[index * SECTOR : (index + 1) * SECTOR]
        return _payload(index // _PER_BLOCK, version.sequence, index % _PER_BLOCK, version.writer)

    def _violation(self, sector: _Sector, index: int, content: bytes) -> ViolationError:
        what = f"{_place(index)} gave {self.describe(content)}, possible: {_names(sector.possible)}"
        for one in reversed(sector.candidates):
            if one.excluded and self._content(one.version, index) == content:
                if one.by_write is None:
                    return ViolationError(Wrong.TURNED_BACK, what)
                lost = one.by_write < self._power_cut
                return ViolationError(Wrong.LOST if lost else Wrong.STALE, what)
        # Else it was forgotten, being excluded for ever, or it never was there.
        found = _parse(content)
        known = any(v.zeros and index in v.sectors for v in self._versions)
        if found is not None:
            block, sequence, part, _ = found
            if (block, part) != (index // _PER_BLOCK, index % _PER_BLOCK):
                return ViolationError(Wrong.MISPLACED, what)
            versions = self._versions[sequence : sequence + 1]
            known = any(index in version.sectors for version in versions)
        elif content != _ZERO_SECTOR:
            known = content == self._content(self._versions[0], index)
            if not known:
                return ViolationError(Wrong.GARBAGE, what)
        return ViolationError(Wrong.STALE if known else Wrong.NEVER_WRITTEN, what)


def _sectors(offset: int, length: int) -> range:
    assert not (offset | length) % SECTOR
    return range(offset // SECTOR, (offset + length) // SECTOR)


@lru_cache(maxsize=1 << 15)
def _payload(block: int, sequence: int, part: int, writer: int) -> bytes:
    """What a sector of a write holds: every byte follows from where and what it is."""
    head = _HEAD.pack(_MAGIC, block, sequence, part, writer)
    mark = xxhash.xxh3_128_digest(head)
    return head + mark * ((SECTOR - len(head)) // len(mark))


def _parse(content: bytes) -> tuple[int, int, int, int] | None:
    """Block, sequence, sector in the block and writer; None if it is of no single write."""
    magic, block, sequence, part, writer = _HEAD.unpack_from(content)
    if magic != _MAGIC or content != _payload(block, sequence, part, writer):
        return None
    return block, sequence, part, writer


def _place(index: int) -> str:
    return f"sector {index % _PER_BLOCK} of block {index // _PER_BLOCK}"


def _names(versions: Iterable[Version]) -> str:
    return ", ".join(map(str, versions)) or "nothing"
