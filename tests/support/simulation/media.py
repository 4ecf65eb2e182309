"""A file as a kernel keeps it: a page cache, a medium behind it, and the writes in between.

What was written is seen by every reader at once and survives the daemon. It survives a power cut
only if an fsync that *began* after it succeeded; else each write on its own survives, is lost, or
is torn between 512-byte sectors. That covers reordering: whatever the order in which some writes
reach a medium, each sector ends up with the content of one of them, or its old one.
"""

import errno
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import count, pairwise

from quorumfs.decisions.record import Identity
from quorumfs.replica.storage import CHANGES, Kind

SECTOR = 512
"""Bytes that a medium writes all or not at all."""

BLOCK = 4096
"""Bytes that a file system allocates at a time."""

_ZERO_BLOCK = bytes(BLOCK)
_PER_BLOCK = BLOCK // SECTOR

Piece = tuple[int, int]
"""Bytes ``[start, end)`` of a file."""


class Content:
    """Bytes with holes, in blocks. Reading, writing and copying cost what they touch."""

    __slots__ = ("_blocks", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self._blocks: dict[int, bytes] = {}

    def copy(self) -> "Content":
        """An independent copy."""
        twin = Content(self.size)
        twin._blocks = dict(self._blocks)
        return twin

    def read(self, start: int, end: int) -> bytes:
        """The bytes of ``[start, end)``; zeros where there is a hole."""
        numbers = range(start // BLOCK, -(-end // BLOCK))
        whole = b"".join([self._blocks.get(number, _ZERO_BLOCK) for number in numbers])
        skipped = start % BLOCK
        return whole[skipped : skipped + end - start]

    def write(self, start: int, data: bytes) -> None:
        """Put *data* at *start*; holes become data."""
        end = start + len(data)
        assert 0 <= start <= end <= self.size
        for number in range(start // BLOCK, -(-end // BLOCK)):
            at = number * BLOCK - start
            if at >= 0 and at + BLOCK <= len(data):
                self._blocks[number] = data[at : at + BLOCK]
                continue
            old = self._blocks.get(number, _ZERO_BLOCK)
            first, last = max(0, -at), min(BLOCK, len(data) - at)
            piece = data[max(0, at) : at + last]
            self._blocks[number] = old[:first] + piece + old[last:]

    def punch(self, start: int, end: int) -> None:
        """Make zeros; whole blocks become holes."""
        for number in range(start // BLOCK, -(-end // BLOCK)):
            low, high = max(start, number * BLOCK), min(end, (number + 1) * BLOCK)
            if high - low == BLOCK or (high == self.size and low % BLOCK == 0):
                self._blocks.pop(number, None)
            elif number in self._blocks:
                self.write(low, bytes(high - low))

    def allocate(self, start: int, end: int) -> None:
        """Turn holes into zeros that take space."""
        for number in range(start // BLOCK, -(-end // BLOCK)):
            self._blocks.setdefault(number, _ZERO_BLOCK)

    def resize(self, size: int) -> None:
        """Cut off what is behind *size*, or add a hole."""
        if size < self.size:
            for number in [n for n in self._blocks if n * BLOCK >= size]:
                del self._blocks[number]
            if size % BLOCK and size // BLOCK in self._blocks:
                kept = self._blocks[size // BLOCK][: size % BLOCK]
                self._blocks[size // BLOCK] = kept.ljust(BLOCK, b"\0")
        self.size = size

    def holes(self, start: int, end: int) -> int:
        """How many blocks of a range are holes."""
        numbers = range(start // BLOCK, -(-end // BLOCK))
        return sum(number not in self._blocks for number in numbers)

    def is_data(self, number: int) -> bool:
        """Whether the block *number* takes space."""
        return number in self._blocks

    def seek(self, offset: int, *, data: bool) -> int:
        """The next byte at or after *offset* that is data, or in a hole; the size if none."""
        while offset < self.size and (offset // BLOCK in self._blocks) is not data:
            offset = (offset // BLOCK + 1) * BLOCK
        return min(offset, self.size)

    @property
    def allocated(self) -> int:
        """Bytes that take space."""
        return len(self._blocks) * BLOCK

    def differing_blocks(self, other: "Content") -> list[int]:
        """Where the two do not hold the same bytes; a hole is the same as zeros."""
        mine, its = self._blocks, other._blocks
        return sorted(
            number
            for number in mine.keys() | its.keys()
            if mine.get(number, _ZERO_BLOCK) != its.get(number, _ZERO_BLOCK)
        )


def sector_pieces(dice: random.Random, start: int, end: int) -> list[Piece]:
    """Some of the sectors of ``[start, end)`` but, where there are two or more, not all.

    A beginning, an end, or any: a medium may write the sectors of one request in any order.
    """
    edges = [start, *range((start // SECTOR + 1) * SECTOR, end, SECTOR), end]
    pieces = [(low, high) for low, high in pairwise(edges) if low < high]
    if len(pieces) < 2:
        return pieces[: dice.randrange(2)]
    match dice.randrange(3):
        case 0:
            return pieces[: dice.randrange(1, len(pieces))]
        case 1:
            return pieces[dice.randrange(1, len(pieces)) :]
        case _:
            chosen = [piece for piece in pieces if dice.random() < 0.5]
            return chosen if len(chosen) < len(pieces) else pieces[1:]


@dataclass(frozen=True, slots=True)
class Unsynced:
    """A change in the page cache that no fsync has made durable."""

    number: int
    """Counts the changes of the file."""
    start: int
    data: bytes
    """What the cache held of all its sectors when it had been made."""
    punched: Piece | None = None
    """What became a hole with it."""
    size: int | None = None
    """What the size became with it, all zeros from the start on; None: it is no change of size."""

    @property
    def end(self) -> int:
        return self.start + len(self.data)


@dataclass(frozen=True, slots=True)
class Backup:
    """A file as it was copied."""

    content: Content
    inode: int
    changed_ns: int


class SimulatedFile:
    """One file of some size on a file system of its own."""

    def __init__(
        self, name: str, size: int, inodes: "count[int] | None" = None, content: bytes = b""
    ) -> None:
        """*content* is there from the beginning, durably; *inodes* gives inode numbers."""
        self.name = name
        self.space: int | None = None
        """Bytes that the file may take on its file system; None: any."""
        self.cache = Content(size)
        """What a reader sees."""
        if content:
            self.cache.write(0, content)
        self.durable = self.cache.copy()
        """What the medium holds."""
        self.unsynced: list[Unsynced] = []
        """What a power cut decides about, oldest first."""
        self._inodes = inodes or count(1)
        self._inode = next(self._inodes)
        self._numbers = count(1)
        self._ticks = count(1_700_000_000_000_000_000, 1_000_000)
        self._changed_ns = self._durable_changed_ns = next(self._ticks)
        self.lost_pages = False
        """Pages are gone that could not be written, and no sync has said so yet."""
        self._dropped: set[int] = set()
        """Sectors that the cache takes for clean and the medium does not hold."""

    @property
    def size(self) -> int:
        """Bytes."""
        return self.cache.size

    @property
    def identity(self) -> Identity:
        """What stat tells of the file."""
        return Identity(self._inode, self.size, self._changed_ns, self._changed_ns)

    @property
    def whole(self) -> bytes:
        """All that a reader sees."""
        return self.cache.read(0, self.size)

    @property
    def dropped(self) -> frozenset[int]:
        """The sectors that a reader sees and the medium does not hold, and no sync will save."""
        return frozenset(self._dropped)

    # What a program does

    def change(
        self,
        kind: Kind,
        start: int,
        end: int,
        data: bytes = b"",
        pieces: Iterable[Piece] | None = None,
    ) -> None:
        """Do one of `CHANGES`, or as much of it as *pieces* says, in the page cache.

        Raises ENOSPC if there is no space for all of it, having done what there was space for.
        """
        for low, high in [(start, end)] if pieces is None else pieces:
            fitting = self._fitting(kind, low, high)
            if fitting > low:
                self._change(kind, low, fitting, data[low - start : fitting - start])
            if fitting < high:
                raise OSError(errno.ENOSPC, "simulated: no space left")

    def allocate(self, start: int, end: int) -> None:
        """Reserve space; durable at once, for nothing can be told from it. Raises ENOSPC."""
        if self._fitting(Kind.ALLOCATE, start, end) < end:
            raise OSError(errno.ENOSPC, "simulated: no space left")
        for content in (self.cache, self.durable):
            content.allocate(start, end)

    def resize(self, start: int, end: int) -> None:
        """Make the file end at *end*, with zeros from *start* on."""
        if self.cache.seek(start, data=True) < self.size:
            self.cache.resize(start)
        self.cache.resize(end)
        self.unsynced.append(Unsynced(next(self._numbers), start, b"", size=end))
        self._changed_ns = next(self._ticks)

    def begin_sync(self) -> int:
        """Returns what `end_sync` and `fail_sync` need: later writes are none of its business."""
        return next(self._numbers)

    def end_sync(self, began: int) -> None:
        """What was written before the sync began is durable."""
        for one in self._take(began):
            self._land(one)

    def fail_sync(self, began: int, dice: random.Random | None = None) -> None:
        """The kernel failed to write and takes the pages for clean: a later sync succeeds.

        Every write before *began* is lost at the next power cut, and until then a reader sees it.
        With *dice* some of them reached the medium, whole or in part.
        """
        taken, kept = self._take(began), list[Unsynced]()
        for at, one in enumerate(taken):
            if one.punched is None and one.size is None:
                self._land(one, [] if dice is None else self._fate(one, dice, survival=0.5))
            elif any(later.start < one.end and one.start < later.end for later in taken[at:][1:]):
                self._land(one)  # before what was written there later: never over it
            else:
                # A hole, or a size, is no page: the journal keeps it for the next commit.
                kept.append(one)
        self.unsynced[:0] = kept

    def end_seal(self, began: int) -> None:
        """As `end_sync`, and the times with it."""
        self.end_sync(began)
        self._durable_changed_ns = self._changed_ns

    def _change(self, kind: Kind, start: int, end: int, data: bytes) -> None:
        assert kind in CHANGES
        punched = None
        if end > self.size:
            self.cache.resize(end)
        if kind is Kind.WRITE:
            self.cache.write(start, data)
        elif kind is Kind.DISCARD:
            self.cache.punch(start, end)
            punched = (start, end)
        else:
            self.cache.write(start, bytes(end - start))
        low = start // SECTOR * SECTOR
        high = min(-(-end // SECTOR) * SECTOR, self.size)
        self.unsynced.append(
            Unsynced(next(self._numbers), low, self.cache.read(low, high), punched)
        )
        self._changed_ns = next(self._ticks)

    def _fitting(self, kind: Kind, start: int, end: int) -> int:
        """Up to where there is space for a change."""
        if self.space is None or kind is Kind.DISCARD:
            return end
        room = (self.space - self.cache.allocated) // BLOCK
        if self.cache.holes(start, end) <= room:
            return end
        at = start
        while at < end:
            if not self.cache.is_data(at // BLOCK):
                if room <= 0:
                    return at
                room -= 1
            at = (at // BLOCK + 1) * BLOCK
        return end

    def _take(self, began: int) -> list[Unsynced]:
        taken = [one for one in self.unsynced if one.number < began]
        self.unsynced = [one for one in self.unsynced if one.number > began]
        return taken

    def _land(self, one: Unsynced, written: list[Piece] | None = None) -> None:
        """Put a change on the medium, or only those parts of it; the rest is dropped."""
        if one.size is not None:
            if written is None:
                self.durable.resize(min(one.start, self.durable.size))
                self.durable.resize(one.size)
            return
        if one.end > self.durable.size:
            self.durable.resize(one.end)
        if written is None:
            self.durable.write(one.start, one.data)
            if one.punched:
                self.durable.punch(*one.punched)
            written = [(one.start, one.end)]
        else:
            for low, high in written:
                self.durable.write(low, one.data[low - one.start : high - one.start])
        self._dropped |= set(range(one.start // SECTOR, -(-one.end // SECTOR)))
        for low, high in written:
            self._dropped -= set(range(low // SECTOR, -(-high // SECTOR)))

    def _fate(self, one: Unsynced, dice: random.Random, survival: float) -> list[Piece] | None:
        """What a medium holds of a change that it was not made to keep; None: all of it."""
        if dice.random() < 0.25:
            return sector_pieces(dice, one.start, one.end)
        return None if dice.random() < survival else []

    # What happens to it

    def power_cut(self, dice: random.Random) -> None:
        """The page cache is gone, and with it what the dice say of the un-synced writes."""
        survival = dice.choice([0.0, 0.2, 0.5, 0.8, 1.0])
        for one in self.unsynced:
            self._land(one, self._fate(one, dice, survival))
        if dice.random() < 0.5:  # fdatasync leaves the times to be written later
            self._durable_changed_ns = self._changed_ns
        self._forget_cache()

    def settle(self) -> None:
        """Everything is on the medium, as after an umount; pages dropped before stay lost."""
        self.end_sync(self.begin_sync())
        self._durable_changed_ns = self._changed_ns
        self._forget_cache()

    def evict(self, start: int = 0, end: int | None = None) -> None:
        """Memory is short: clean pages, or those of a range, are read again from the medium."""
        evicted = range(start // BLOCK, -(-(self.size if end is None else end) // BLOCK))
        dirty = {
            sector // _PER_BLOCK
            for one in self.unsynced
            for sector in range(one.start // SECTOR, -(-one.end // SECTOR))
        }
        lost = {sector // _PER_BLOCK for sector in self._dropped}
        for number in sorted(lost.intersection(evicted) - dirty):
            low, high = number * BLOCK, min((number + 1) * BLOCK, self.size)
            if self.durable.is_data(number):
                self.cache.write(low, self.durable.read(low, high))
            else:
                self.cache.punch(low, high)
            self._dropped -= set(range(number * _PER_BLOCK, (number + 1) * _PER_BLOCK))

    def lose_pages(self) -> None:
        """What is not synced cannot be written: it is gone, and the next sync says so."""
        self.fail_sync(self.begin_sync())
        self.evict()
        self.lost_pages = True

    def truncate(self, size: int) -> None:
        """Somebody else made the file shorter, or longer; durable at once."""
        for content in (self.cache, self.durable):
            content.resize(size)
        self.unsynced = [
            replace(
                one,
                data=one.data[: size - one.start],
                punched=one.punched and (min(one.punched[0], size), min(one.punched[1], size)),
                size=None if one.size is None else size,
            )
            for one in self.unsynced
            if one.start < size
        ]
        self._dropped = {sector for sector in self._dropped if sector * SECTOR < size}
        self._changed_ns = self._durable_changed_ns = next(self._ticks)

    def edit(self, start: int, data: bytes) -> None:
        """Somebody else writes to the file, and its times tell."""
        self._change(Kind.WRITE, start, start + len(data), data)

    def rot(self, start: int, data: bytes) -> None:
        """The medium holds something else now, and nothing tells."""
        for content in (self.cache, self.durable):
            content.write(start, data)

    def backup(self) -> Backup:
        """A copy made with a program that reads the file."""
        return Backup(self.cache.copy(), self._inode, self._changed_ns)

    def restore(self, backup: Backup, *, in_place: bool = False) -> None:
        """Replace the file by its copy: another inode, other times; durable at once.

        *in_place*: by a snapshot of the file system, from which nothing of this can be told.
        """
        self.cache, self.durable = backup.content.copy(), backup.content.copy()
        self.unsynced.clear()
        self._dropped.clear()
        self._inode = backup.inode if in_place else next(self._inodes)
        changed_ns = backup.changed_ns if in_place else next(self._ticks)
        self._changed_ns = self._durable_changed_ns = changed_ns

    def _forget_cache(self) -> None:
        self.cache = self.durable.copy()
        self.lost_pages = False
        self.unsynced.clear()
        self._dropped.clear()
        self._changed_ns = self._durable_changed_ns
