"""When each chunk was last changed, and which changes each replica has synced since. Pure: no I/O.

As in DRBD, time is counted in *epochs*: each sync ends the present epoch. A change belongs to the
epoch in which the change ended; a change under way belongs to the present epoch. So a sync covers
every change that ended before the sync began. A failed sync of a replica may have lost the changes
given to the replica after the last covered epoch, and nothing else. The set is exact: rounding up
would declare chunks lost that the replica holds, perhaps alone.
"""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

from quorumfs.replica.replica import Replica

CHUNKS_MAX = 65_536
"""A larger set of chunks becomes a table with a byte per chunk of the disk (at most a few MiB)."""


class ChunkSet:
    """A set of chunks, cheap to add to."""

    __slots__ = ("_chunks", "_table")

    def __init__(self) -> None:
        self._chunks: set[int] = set()
        self._table = bytearray()
        """1 for each chunk in the set; empty until there were more than `CHUNKS_MAX`."""

    def __bool__(self) -> bool:
        return bool(self._chunks or self._table)

    def add(self, chunks: range) -> None:
        """Add *chunks*."""
        if self._table:
            if len(self._table) < chunks.stop:
                self._table.extend(bytes(chunks.stop - len(self._table)))
            self._table[chunks.start : chunks.stop] = b"\1" * len(chunks)
        elif len(self._chunks) + len(chunks) <= CHUNKS_MAX:
            self._chunks.update(chunks)
        else:
            self._table = bytearray(max(self._chunks, default=0) + 1)
            for chunk in self._chunks:
                self._table[chunk] = 1
            self._chunks.clear()
            self.add(chunks)

    def update(self, chunks: Collection[int]) -> None:
        """Add *chunks*, in any order: thousands of them take less than a millisecond."""
        if self._table and chunks:
            self._table.extend(bytes(max(0, max(chunks) + 1 - len(self._table))))
            for chunk in chunks:
                self._table[chunk] = 1
        elif len(self._chunks) + len(chunks) <= CHUNKS_MAX:
            self._chunks.update(chunks)
        else:
            for chunk in chunks:
                self.add(range(chunk, chunk + 1))

    def overlaps(self, chunks: range) -> bool:
        """Whether any of *chunks* is in the set."""
        if self._table:
            return self._table.find(1, chunks.start, chunks.stop) >= 0
        return not self._chunks.isdisjoint(chunks)

    def runs(self) -> Iterator[range]:
        """The chunks of the set in order, adjacent chunks joined."""
        chunks = sorted(self._chunks)
        first = 0  # of the adjacent chunks
        for position, chunk in enumerate(chunks, 1):
            if position == len(chunks) or chunks[position] != chunk + 1:
                yield range(chunks[first], chunk + 1)
                first = position
        start = self._table.find(1)
        while start >= 0:
            stop = self._table.find(0, start)
            stop = len(self._table) if stop < 0 else stop
            yield range(start, stop)
            start = self._table.find(1, stop)


class _Given:
    """Chunks given to single replicas in an epoch, beside the chunks given to all."""

    __slots__ = ("by_replica",)

    def __init__(self) -> None:
        self.by_replica: dict[Replica, ChunkSet] = {}

    def __bool__(self) -> bool:
        return bool(self.by_replica)

    def to(self, replica: Replica) -> ChunkSet:
        return self.by_replica.get(replica) or _NOTHING

    def add(self, replica: Replica, chunks: range) -> None:
        self.by_replica.setdefault(replica, ChunkSet()).add(chunks)

    def join(self, other: "_Given") -> None:
        for replica, chunks in other.by_replica.items():
            for run in chunks.runs():
                self.add(replica, run)


_NOTHING = ChunkSet()


class Epochs:
    """The changes of a disk, by epoch, while any replica has not synced them."""

    __slots__ = ("_covered", "_ended", "_given", "_giving", "_syncing", "latest", "now")

    def __init__(self) -> None:
        self.now = 1
        """The number of the present epoch, which only grows."""
        self.latest = ChunkSet()
        """Chunks changed in the present epoch on all replicas, or under change. A change is added
        at its start and again at its end."""
        self._given = _Given()
        """The same for repairs, which change some replicas."""
        self._giving: dict[object, tuple[Collection[Replica], range]] = {}
        """The repairs under way."""
        self._ended: list[tuple[int, ChunkSet, _Given]] = []
        """Earlier epochs not covered on all replicas, oldest first. Epochs that no sync tells apart
        are joined."""
        self._covered: dict[Replica, int] = {}
        """By replica, the last epoch whose changes are synced or recorded as lost."""
        self._syncing: dict[Replica, int] = {}
        """By replica, the epoch that the latest sync is to cover."""

    def follow(self, replicas: Collection[Replica]) -> None:
        """Follow the syncs of exactly *replicas*. A new replica waits for no earlier change."""
        added = [replica for replica in replicas if replica not in self._covered]
        epoch = self._end(()) if added else 0
        self._covered = {replica: self._covered.get(replica, epoch) for replica in replicas}
        self._syncing = {replica: self._syncing.get(replica, epoch) for replica in replicas}
        self._tidy()

    @contextmanager
    def giving(self, replicas: Collection[Replica], chunks: range) -> Iterator[None]:
        """Note *chunks* as given to *replicas* alone, while the context lasts."""
        key = object()
        self._giving[key] = replicas, chunks
        self._note_given(replicas, chunks)
        try:
            yield
        finally:
            del self._giving[key]
            self._note_given(replicas, chunks)

    def _note_given(self, replicas: Iterable[Replica], chunks: range) -> None:
        for replica in replicas:
            self._given.add(replica, chunks)

    def begin_sync(self, replicas: Iterable[Replica], changing: Iterable[range]) -> int:
        """Note the start of syncs of *replicas* amid changes of *changing*; returns the epoch."""
        epoch = self._end(changing)
        for replica in replicas:
            self._syncing[replica] = epoch
        if len(self._ended) > 1:
            self._tidy()
        return epoch

    def cover(self, replicas: Iterable[Replica], epoch: int) -> None:
        """Note *epoch* and earlier epochs as synced, or recorded as lost, on *replicas*."""
        for replica in replicas:
            self._covered[replica] = max(self._covered[replica], epoch)
        self._tidy()

    def covered(self, replica: Replica) -> int:
        """The last epoch whose changes are synced, or recorded as lost, on *replica*."""
        return self._covered[replica]

    def unsynced(self, replica: Replica) -> Iterator[range]:
        """The chunks that a failed sync of *replica* may lose; a chunk may come more than once.

        Empty for a replica not followed, whose lacking chunks are known.
        """
        if replica in self._covered:
            for chunks in self._after(replica):
                yield from chunks.runs()

    def waits(self, replica: Replica, chunks: range) -> bool:
        """Whether any of *chunks* was changed after the last covered epoch of *replica*."""
        return any(later.overlaps(chunks) for later in self._after(replica))

    def _after(self, replica: Replica) -> Iterator[ChunkSet]:
        """The changes that *replica* got after its last covered epoch."""
        for number, chunks, given in self._ended:
            if number > self._covered[replica]:
                yield chunks
                yield given.to(replica)
        yield self.latest
        yield self._given.to(replica)

    def _end(self, changing: Iterable[range]) -> int:
        """End the present epoch amid changes of *changing*; returns its number."""
        epoch, self.now = self.now, self.now + 1
        if self.latest or self._given:
            self._ended.append((epoch, self.latest, self._given))
            self.latest, self._given = ChunkSet(), _Given()
            for replicas, chunks in self._giving.values():
                self._note_given(replicas, chunks)
        for chunks in changing:
            self.latest.add(chunks)
        return epoch

    def _tidy(self) -> None:
        """Drop the epochs covered on all replicas, and join epochs that no sync tells apart."""
        ended = self._ended
        oldest = min(self._covered.values(), default=self.now)
        if not ended or ended[-1][0] <= oldest:
            ended.clear()  # the usual case: all replicas synced together
            return
        bounds = {*self._covered.values(), *self._syncing.values()}
        self._ended = []
        for epoch, chunks, given in ended:
            if epoch <= oldest:
                continue
            if self._ended:
                before, joined, joined_given = self._ended[-1]
                if not any(before <= bound < epoch for bound in bounds):
                    for run in chunks.runs():
                        joined.add(run)
                    joined_given.join(given)
                    self._ended[-1] = epoch, joined, joined_given
                    continue
            self._ended.append((epoch, chunks, given))
